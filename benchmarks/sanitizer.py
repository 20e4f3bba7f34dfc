"""Runs every variant of every kernel under the tools of NVIDIA's compute-sanitizer.

    python benchmarks/sanitizer.py                      all four tools, over all cores and GPUs
    python benchmarks/sanitizer.py --tools racecheck --only "ragged on Hopper"

Every array is an allocation of its own, so that a byte past its end is nobody's. The variants are
run without a tool first: what that compiles the tools' processes load. What the tools do not see is
told in `docs/reliability.md`.
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


def variants(shard: str, only: list[str]) -> list[str]:
    return [sys.executable, str(FOLDER / "variants.py"), "--shard", shard, "--only", *only]


def compile_all(only: list[str]) -> None:
    """Run the variants over all cores; what fails here fails under the tools, which tell of it."""

    def one(i: int) -> None:
        environment = os.environ | gpus.environment(i, gpus.visible())
        command = variants(f"{i}/{gpus.WORKERS}", only)
        subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)

    with concurrent.futures.ThreadPoolExecutor(gpus.WORKERS) as pool:
        list(pool.map(one, range(gpus.WORKERS)))


def run(
    tool: str, shard: str, only: list[str], keep: Path | None, number: int = 0
) -> dict[str, Any]:
    """Run a shard of the variants under a tool, as the `number`-th process."""
    command = ["compute-sanitizer", "--tool", tool, *TOOLS[tool], *variants(shard, only)]
    environment = {"XLA_PYTHON_CLIENT_ALLOCATOR": "platform"}
    environment |= gpus.environment(number, gpus.visible())
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)
    output = done.stdout + done.stderr
    if keep:
        (keep / f"{tool}_{shard.replace('/', '_of_')}.log").write_text(output)
    lines = [line for line in done.stdout.splitlines() if line.startswith('{"counts"')]
    if not lines:
        return {"calls": 0, "errors": 0, "kernels": {}, "failed": output[-1500:]}
    errors, kernels = read(output)
    calls = json.loads(lines[-1])["counts"]["calls"]
    return {"calls": calls, "errors": errors, "kernels": kernels}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tools", nargs="+", default=[*TOOLS], choices=TOOLS)
    parser.add_argument("--shards", type=int, help="processes of each tool; of all one a core")
    parser.add_argument("--only", nargs="+", default=[""], metavar="WORD", help="of the names")
    parser.add_argument("--keep", type=Path, help="a folder for what the tools print")
    args = parser.parse_args()
    if shutil.which("compute-sanitizer") is None:
        print(json.dumps({"counts": {}, "found": [], "missing": MISSING}))
        return
    shards = args.shards or max(1, gpus.WORKERS // len(args.tools))
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    compile_all(args.only)
    counts: dict[str, int] = {}
    found: list[str] = []
    others: collections.Counter[str] = collections.Counter()
    with concurrent.futures.ThreadPoolExecutor(shards * len(args.tools)) as pool:
        runs = {
            (tool, i): pool.submit(run, tool, f"{i}/{shards}", args.only, args.keep, i)
            for tool in args.tools
            for i in range(shards)
        }
        for (tool, i), future in runs.items():
            result = future.result()
            counts[tool] = counts.get(tool, 0) + result["calls"]
            if "failed" in result:
                found.append(f"{tool}, process {i}: {result['failed']}")
            own = {k: n for k, n in result["kernels"].items() if is_own(k)}
            others.update({k: n for k, n in result["kernels"].items() if k not in own})
            if own or (result["errors"] and not result["kernels"]):
                found.append(f"{tool}: {result['errors']} errors, {own or 'of no named kernel'}")
    print(json.dumps({"counts": counts, "others": others, "found": found}))
    sys.exit(bool(found))


def is_own(kernel: str) -> bool:
    """Say whether a kernel is this package's. Those of Mosaic are named after it."""
    return kernel.startswith("ejk_") or any(name in kernel for name in own_kernels())


if __name__ == "__main__":
    main()
