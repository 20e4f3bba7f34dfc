"""Runs what `docs/reliability.md` counts, and appends a line a part to `results/`.

    python benchmarks/reliability.py                      what a CPU can show, or a GPU
    python benchmarks/reliability.py --only soak replay   those parts
    python benchmarks/reliability.py --tiny --output x.jsonl    all of them, small

    kernels    the tests of the real kernels, on a GPU: `make gpu`
    fuzz       drawn calls and compositions of them on every backend that runs here, by `ejk check`
    hostile    calls whose integers may be anything, by `tests/hostile.py`
    bugs       every seeded bug, by `pytest -m fault`
    repeats    each operation in its variants again and again: the same bits
    soak       random steps of serving: results right, memory flat
    replay     one compiled step with XLA's command buffers and without: the same bits
    memory     the device's memory runs out: an error, and pools that keep their bits
    sanitizer  every variant of every kernel under the four tools of compute-sanitizer

Each runs in processes of its own, spread over all GPUs of the machine: what dies is found.
`docs/reliability.md` is written from the newest lines of each device by `reliability_report.py`.
"""

import argparse
import concurrent.futures
import datetime
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import gpus

FOLDER = Path(__file__).parent
ROOT, RESULTS = FOLDER.parent, FOLDER / "results"
PACKAGES = ("ejk", "jax", "triton", "jax-triton", "hypothesis")
CORES = os.cpu_count() or 2
Result = dict[str, Any]


class Job(NamedTuple):
    """A process, and what is read from what it prints to standard output."""

    command: list[str]
    read: Callable[[str], Result]
    limit_s: float = 1200


def last_line(printed: str) -> Result:
    return json.loads(printed.splitlines()[-1])


def script(name: str, *arguments: str) -> Job:
    return Job([sys.executable, str(FOLDER / f"{name}.py"), *arguments], last_line)


def fuzzed(printed: str) -> Result:
    """Read what `ejk check --json` prints, after what a compiler may have printed of a program."""
    found = json.loads(re.split(r"^(?={$)", printed, flags=re.MULTILINE)[-1])
    failures = [failure for row in found["results"] for failure in row["failures"]]
    counts = {name: found[name] for name in ("examples", "programs", "refused")}
    for row in found["results"]:
        name = f"on {row['backend']}{', interpreted' * row['interpret']}"
        counts[name] = counts.get(name, 0) + row["examples"]
    return {"counts": counts, "found": [f"{x['said']} {x['repro']}" for x in failures]}


def hostile(printed: str) -> Result:
    """Read what `tests/hostile.py` prints."""
    counts: dict[str, int] = {}
    for calls, backend in re.findall(r"^(\d+) calls of .* on (.*)$", printed, re.MULTILINE):
        counts[f"on {backend}"] = counts.get(f"on {backend}", 0) + int(calls)
    if not counts:
        raise ValueError("no calls were counted")
    return {"counts": {"calls": sum(counts.values())} | counts, "found": []}


def kernels(printed: str) -> Result:
    """Read the summary of the tests of the real kernels."""
    counts = {name: 0 for name in ("passed", "failed", "skipped")}
    for count, name in re.findall(r"(\d+) (passed|failed|skipped)", printed.splitlines()[-1]):
        counts[name] = int(count)
    for name, count in re.findall(r"(\w+) on .*: (\d+) examples passed", printed):
        counts[f"examples on {name}"] = counts.get(f"examples on {name}", 0) + int(count)
    return {"counts": counts, "found": re.findall(r"^(?:FAILED|ERROR) .*$", printed, re.MULTILINE)}


def bugs(printed: str) -> Result:
    """Read the summary of a run of tests that plant faults."""
    [(caught, planted)] = re.findall(r"^ *all .*?(\d+)/(\d+)$", printed, re.MULTILINE)
    found = re.findall(r"^NOT CAUGHT: .*$", printed, re.MULTILINE)
    return {"counts": {"caught": int(caught), "planted": int(planted)}, "found": found}


def fuzz_jobs(device: str, tiny: bool, seconds: float) -> list[Job]:
    """One process a core: on a CPU every other one interprets the kernels."""
    workers = 1 if tiny else gpus.WORKERS
    seconds = 3 if tiny else seconds
    start = datetime.date.today().toordinal()  # other calls every day
    check = [sys.executable, "-m", "ejk", "check", "--json", "--seconds", str(seconds)]
    if tiny:
        check += ["--operation", "copy_kv_slots", "--backend", "xla"]
    kinds = [
        ["--seed", str(100 * start + i), *["--interpret"] * (device == "cpu" and i % 2)]
        for i in range(workers)
    ]
    return [Job([*check, *kind], fuzzed) for kind in kinds]


def hostile_jobs(device: str, tiny: bool) -> list[Job]:
    """A process compiles one family of calls or a few, of which there are twelve."""
    calls = ["60", "8"] if tiny else ["1000", "10000"] if device == "gpu" else []  # XLA's, Triton's
    of = 1 if tiny else min(gpus.WORKERS, 12)
    command = [sys.executable, "tests/hostile.py", *calls]
    return [Job([*command, "--shard", f"{i}/{of}"], hostile) for i in range(of)]


def repeats_jobs(device: str, tiny: bool) -> list[Job]:
    """A thousand calls of each variant; on a CPU of every fourth in XLA, and ten interpreted."""
    if tiny:
        return [script("variants", "--repeats", "3", "--only", "write: fused")]
    if device == "cpu":
        return [
            script("variants", "--repeats", "1000", "--xla", "--shard", "0/4"),
            script("variants", "--repeats", "10", "--shard", "1/4"),
        ]
    shards = [f"{i}/{gpus.WORKERS}" for i in range(gpus.WORKERS)]  # each compiles its share
    return [script("variants", "--repeats", "1000", "--shard", shard) for shard in shards]


def jobs(device: str, tiny: bool, fuzz_seconds: float, soak_seconds: float) -> dict[str, list[Job]]:
    """Return the processes of each part that this device can run."""
    small = ["--tiny"] if tiny or device == "cpu" else []
    pytest = [sys.executable, "-m", "pytest", "-q", "-n", "1" if tiny else "auto", "-m", "fault"]
    steps = "3" if tiny else "200" if device == "gpu" else "50"  # a CPU has no command buffers
    chosen = ["tests/backends/test_copy_seeded_bugs.py", "-k", "xla"] if tiny else []
    suite = [sys.executable, "-m", "pytest", "-q", "--gpu", "-n", str(max(1, CORES - 1))]
    suite += ["--dist", "worksteal"]  # tests of a minute would be left to few processes
    found = {
        "kernels": [Job([*suite, *["-k", "negative"] * tiny], kernels)],
        "fuzz": fuzz_jobs(device, tiny, fuzz_seconds),
        "hostile": hostile_jobs(device, tiny),
        "bugs": [Job([*pytest, *chosen], bugs)],
        "repeats": repeats_jobs(device, tiny),
        "soak": [script("soak", "--seconds", str(1 if tiny else soak_seconds), *small)],
        "replay": [script("replay", "--steps", steps, *small)],
        "memory": [script("exhaustion")],
        "sanitizer": [script("sanitizer")],
    }
    if device == "cpu":
        del found["sanitizer"], found["kernels"]
    else:
        del found["bugs"]  # faults are planted in what a CPU interprets
    return found


def run(job: Job, number: int = 0) -> Result:
    """Run the `number`-th process of a part; what it dies of is found."""
    environment = gpus.environment(number, gpus.visible()) | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # they share the devices
    }
    try:
        done = subprocess.run(
            job.command, env=os.environ | environment, capture_output=True, text=True, cwd=ROOT,
            timeout=job.limit_s,
        )  # fmt: skip
        result, why = job.read(done.stdout), done.stderr
    except subprocess.TimeoutExpired:
        result, why = {"counts": {}, "found": []}, f"not done after {job.limit_s:.0f} s"
    except (ValueError, IndexError):
        result, why = {"counts": {}, "found": []}, done.stderr
    else:
        if not done.returncode or result["found"]:
            return result
    name = " ".join(job.command[1:])
    return result | {"found": [f"{name}: {why[-1500:]}"]}


def merged(results: list[Result]) -> Result:
    """Add up the counts of the processes of a part, and put together what each has found."""
    whole: Result = {"counts": {}, "found": []}
    for result in results:
        for name, count in result["counts"].items():
            whole["counts"][name] = whole["counts"].get(name, 0) + count
        whole["found"] += result["found"]
        whole |= {name: x for name, x in result.items() if name not in whole}
    return whole


def device_of(name: str | None) -> tuple[str, str]:
    """Return `cpu` or `gpu`, and the device's name. A process of its own asks: it frees the GPU."""
    code = "import jax; d = jax.devices()[0]; print(d.platform); print(d.device_kind)"
    environment = {"JAX_PLATFORMS": {"gpu": "cuda", "cpu": "cpu"}[name]} if name else {}
    asked = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    kind, device = asked.stdout.splitlines()[-2:]
    return kind, device


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", metavar="PART")
    parser.add_argument("--platform", choices=("cpu", "gpu"), help="what JAX prefers if not given")
    parser.add_argument("--tiny", action="store_true", help="small: whether they run")
    parser.add_argument("--fuzz-seconds", type=float, default=180)
    parser.add_argument("--soak-seconds", type=float, default=60)
    parser.add_argument("--at-once", type=int, default=1, help="parts that share the device")
    parser.add_argument("--output", type=Path, help="instead of results/reliability_<device>.jsonl")
    args = parser.parse_args()
    if args.tiny and args.output is None:
        parser.error("--tiny needs --output: it shows nothing that is to be kept")
    kind, device = device_of(args.platform)
    if kind == "cpu":
        from paging import processor

        device = processor()
        os.environ["JAX_PLATFORMS"] = "cpu"
    processes = jobs(kind, args.tiny, args.fuzz_seconds, args.soak_seconds)
    if unknown := [part for part in args.only or () if part not in processes]:
        parser.error(f"--only {unknown[0]} must be one of {', '.join(processes)} on a {kind}")
    facts = {
        "device": device,
        "platform": kind,
        "gpus": len(gpus.visible()) if kind == "gpu" else 0,
        "cores": CORES,
        "date": datetime.date.today().isoformat(),
        "versions": {"python": platform.python_version()}
        | {name: found for name in PACKAGES if (found := version(name))},
        "command": " ".join(["python", "benchmarks/reliability.py", *sys.argv[1:]]),
    }
    # What one process has compiled no other compiles again.
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".pytest_cache" / "reliability"))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    path = args.output or RESULTS / f"reliability_{re.sub(r'[^0-9A-Za-z-]+', '_', device)}.jsonl"
    parts = args.only or [*processes]

    def whole(part: str) -> Result:
        begin = time.perf_counter()
        with concurrent.futures.ThreadPoolExecutor(len(processes[part])) as pool:
            first = parts.index(part)  # those that are one process share no GPU
            numbers = range(first, first + len(processes[part]))
            result = merged([*pool.map(run, processes[part], numbers)])
        return {"part": part} | result | {"seconds": round(time.perf_counter() - begin, 1)}

    with path.open("a") as file, concurrent.futures.ThreadPoolExecutor(args.at_once) as pool:
        lines = []
        for line in pool.map(whole, parts):
            file.write(json.dumps(line | facts) + "\n")
            file.flush()
            lines.append(line)
            print(said(line), flush=True)
    if any(line["found"] for line in lines):
        sys.exit(1)


def said(line: Result) -> str:
    """Say in a few words what a part has shown, and everything that it has found."""
    counts = ", ".join(f"{count:,} {name}" for name, count in line["counts"].items())
    head = f"{line['part']}: {line.get('missing') or counts}, {line['seconds']:.0f} s"
    return "\n  ".join([head, *line["found"]])


if __name__ == "__main__":
    main()
