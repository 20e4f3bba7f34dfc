"""Runs every variant of every kernel under the tools of NVIDIA's compute-sanitizer.

    python benchmarks/sanitizer.py                      all four tools, over all cores and GPUs
    python benchmarks/sanitizer.py --tools racecheck --only "ragged on Hopper"

Every array is an allocation of its own, so that a byte past its end is nobody's. The variants are
run without a tool first: what that compiles the tools' processes load. What is done when goes to
standard error, what the tools print to `.pytest_cache/sanitizer/`. What they do not see is told in
`docs/reliability.md`.
"""

import argparse
import collections
import concurrent.futures
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import gpus

FOLDER = Path(__file__).parent
CACHE = FOLDER.parent / ".pytest_cache" / "reliability"
TOOLS = {
    "memcheck": ("--padding", "512", "--report-api-errors", "no"),
    "racecheck": ("--racecheck-report", "all"),
    "initcheck": (),
    "synccheck": (),
}
# Without the host's calls for each of what may be half a million errors, and with all of them.
ALWAYS = ("--print-limit", "0", "--show-backtrace", "no")
# Initcheck does not see what the tensor memory engine (TMA) writes: all that Mosaic's prefill does.
# Copies of it to the host, and what combines its parts, would be said to read what nobody wrote.
BLIND = {
    "initcheck": (
        "--check-api-memory-access", "no", "--kernel-name-exclude", "kns=ragged_combine_kernel"
    )
}  # fmt: skip
MISSING = (
    "compute-sanitizer is not on the PATH: it is part of NVIDIA's CUDA Toolkit, and alone the "
    "package cuda-sanitizer-13-0 of NVIDIA's repository for apt"
)
SUMMARY = re.compile(r"={9} (?:ERROR|RACECHECK) SUMMARY: (\d+) (?:error|hazard)")
WHERE = re.compile(r"={9}.*? at (?:\w+: )?(?:void )?([\w$.:<>]+?)(?:\(.*?\))?\+0x")


def own_kernels() -> set[str]:
    """Name the kernels of this package: any other is XLA's."""
    backends = FOLDER.parent / "ejk" / "backends"
    text = "".join(p.read_text() for p in backends.glob("[tm]*/**/*kernel.py"))
    return {*re.findall(r"^def (\w+_kernel)\(", text, re.MULTILINE)}


def read(output: str) -> tuple[int, dict[str, int]]:
    """Return how many errors a run of the tool tells of, and how many places name each kernel."""
    summaries = SUMMARY.findall(output)
    if not summaries:
        raise ValueError(f"the tool printed no summary: {output[-1500:]}")
    return sum(map(int, summaries)), dict(collections.Counter(WHERE.findall(output)))


def variants(shard: str, only: list[str], *options: str) -> list[str]:
    return [
        sys.executable, str(FOLDER / "variants.py"), "--shard", shard, "--only", *only, *options
    ]  # fmt: skip


def shards(tools: int) -> list[tuple[str, str]]:
    """Return a backend and a shard of its variants for each process of a tool.

    All tools have about a process a core. A variant of Mosaic's takes four times as long as one of
    Triton's, and there are a tenth as many.
    """
    processes = max(2, gpus.WORKERS // tools)
    of = {"triton": processes - max(1, processes // 3), "mosaic_gpu": max(1, processes // 3)}
    return [(backend, f"{i}/{n}") for backend, n in of.items() for i in range(n)]


def compile_all(only: list[str]) -> None:
    """Run the variants over all cores; what fails here fails under the tools, which tell of it."""

    def one(i: int) -> None:
        environment = os.environ | gpus.environment(i, gpus.visible())
        command = variants(f"{i}/{gpus.WORKERS}", only)
        subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)

    with concurrent.futures.ThreadPoolExecutor(gpus.WORKERS) as pool:
        list(pool.map(one, range(gpus.WORKERS)))


def run(
    tool: str, backend: str, shard: str, only: list[str], keep: Path, number: int = 0
) -> dict[str, Any]:
    """Run a shard of a backend's variants under a tool, as the `number`-th process."""
    options = TOOLS[tool] + (BLIND.get(tool, ()) if backend == "mosaic_gpu" else ())
    command = ["compute-sanitizer", "--tool", tool, *ALWAYS, *options]
    command += variants(shard, only, "--backend", backend)
    environment = {"XLA_PYTHON_CLIENT_ALLOCATOR": "platform"}
    environment |= gpus.environment(number, gpus.visible())
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)
    output = done.stdout + done.stderr
    (keep / f"{tool}_{backend}_{shard.replace('/', '_of_')}.log").write_text(output)
    lines = [line for line in done.stdout.splitlines() if line.startswith('{"counts"')]
    if not lines:
        return {"calls": 0, "errors": 0, "kernels": {}, "failed": output[-1500:]}
    errors, kernels = read(output)
    calls = json.loads(lines[-1])["counts"]["calls"]
    return {"calls": calls, "errors": errors, "kernels": kernels}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tools", nargs="+", default=[*TOOLS], choices=TOOLS)
    parser.add_argument("--only", nargs="+", default=[""], metavar="WORD", help="of the names")
    parser.add_argument(
        "--keep", type=Path, default=CACHE.with_name("sanitizer"),
        help="a folder for what the tools print",
    )  # fmt: skip
    args = parser.parse_args()
    if shutil.which("compute-sanitizer") is None:
        print(json.dumps({"counts": {}, "found": [], "missing": MISSING}))
        return
    args.keep.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    begin = time.perf_counter()

    def tell(what: str) -> None:
        print(f"{time.perf_counter() - begin:.0f} s: {what}", file=sys.stderr, flush=True)

    compile_all(args.only)
    tell("compiled")
    counts: dict[str, int] = {}
    found: list[str] = []
    others: collections.Counter[str] = collections.Counter()
    shares = [(tool, *share) for share in shards(len(args.tools)) for tool in args.tools]
    with concurrent.futures.ThreadPoolExecutor(len(shares)) as pool:
        runs = {
            share: pool.submit(run, *share, args.only, args.keep, i)
            for i, share in enumerate(shares)
        }
        for (tool, backend, shard), future in runs.items():
            result = future.result()
            tell(f"{tool}, {backend} {shard}: {result['calls']} calls")
            counts[tool] = counts.get(tool, 0) + result["calls"]
            if "failed" in result:
                found.append(f"{tool}, {backend} {shard}: {result['failed']}")
            own = {k: n for k, n in result["kernels"].items() if is_own(k)}
            others.update({k: n for k, n in result["kernels"].items() if k not in own})
            if own or result["errors"] > sum(result["kernels"].values()):
                named = own or "of no named kernel"
                found.append(f"{tool}, {backend} {shard}: {result['errors']} errors, {named}")
    print(json.dumps({"counts": counts, "others": others, "found": found}))
    sys.exit(bool(found))


def is_own(kernel: str) -> bool:
    """Say whether a kernel is this package's. Those of Mosaic are named after it."""
    return kernel.startswith("ejk_") or any(name in kernel for name in own_kernels())


if __name__ == "__main__":
    main()
