"""Times decode attention, checks it first, and appends a line a result to `results/`.

    python benchmarks/decode.py                            every workload, every contender
    python benchmarks/decode.py --workload W1a W6 --contender ejk
    python benchmarks/decode.py --suite shapes             shapes that nobody tunes for
    python benchmarks/decode.py --suite options            every option against the plain call
    python benchmarks/decode.py --suite order              what pages in random order cost
    python benchmarks/decode.py --suite waves              few more programs than multiprocessors
    python benchmarks/decode.py --suite small              batches whose time is that of launches
    python benchmarks/decode.py --suite latent             keys whose first entries are the values
    python benchmarks/decode.py --suite quantised          caches of 8 and 4 bits, beside bfloat16
    python benchmarks/decode.py --suite prefix             shared prefixes, beside the plain call
    python benchmarks/decode.py --suite shapes order waves latent map      side by side: see below
    python benchmarks/decode.py --suite map                batches, heads and contexts
    python benchmarks/decode.py --suite map --tiny --output x.jsonl   interpreted on a CPU; or
                                                           quantised

Device time is how long the device was busy with a program of eight chained calls, over eight, from
CUPTI through `jax.profiler`: the mean of five runs. Of short contexts there are 64 calls, each on
pages of its own, so that the cache does not hold them all. What a step makes once for all its
layers, the plan and each layer's block tables, is not in it; the plan is timed apart. The wall time
a layer is that of a program of 32 chained layers with all of that inside, its query donated, over
one pool that holds as many layers as fit, twenty or fifty programs queued without waiting.

The read ceiling is measured at some sizes, and interpolated between them.

Seven suites are timed by `ejk` alone, in processes that compile side by side and take turns on the
device: shapes, order, waves, latent, map, quantised, prefix. There each call is a program of its
own, and no wall time is measured. The map ends with every place that is short of what it should
reach; a call that failed makes the script fail. The caches of a quantised batch take turns, call by
call; each line has its time over that of the first: bfloat16, or the queries' float32. Scales count
as bytes that are read.
"""

import argparse
import datetime
import functools
import importlib.metadata
import json
import os
import statistics
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import ceiling
import contenders
import jax
import map_report
import prefix
import programs
import side_by_side
import timing
import workloads

SUITES = workloads.SUITES | {"prefix": prefix.PREFIX}
RESULTS = Path(__file__).parent / "results"


def measure(workload, contender) -> dict:
    """Check, then time one contender on one workload."""
    (error, calls, run), step = programs.prepare(workload, contender)
    device_us, plan_us = timing.device_time(calls, run)
    repeats = 20 if workload.kv_bytes > 2**28 else 50
    wall_us = timing.wall_time(step, repeats=repeats) / programs.LAYERS
    return {
        "device_us": round(device_us, 2),
        "wall_us_per_layer": round(wall_us, 2),
        "plan_us": round(statistics.median(plan_us), 2) if plan_us else None,
        "error": error,
    }


def versions() -> dict[str, str]:
    names = ("jax", "jaxlib", "jax-triton", "triton", "ejkernel", "nvidia-cudnn-cu13")
    found = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def jobs(chosen, found, yardsticks: ceiling.Yardsticks) -> Iterator[programs.Job]:
    """Yield each workload with each contender."""

    def result(workload, contender):
        if refusal := contender.can_run(workload):
            raise NotImplementedError(refusal)
        line = measure(workload, contender)
        return line | yardsticks.shares(workload, line["device_us"])

    for workload in chosen:
        for contender in found:
            yield workload, contender.name, functools.partial(result, workload, contender)


def results(given: Iterable[programs.Job]) -> Iterator[dict]:
    """Yield a line for each job: one that fails must not cost the others their turn."""
    for workload, contender, job in given:
        line = {"workload": workload.name, "contender": contender}
        try:
            line |= job()
        except Exception as error:
            reason = str(error).splitlines()[0] if str(error) else ""
            line["failed"] = f"{type(error).__name__}: {reason}"[:300]
        yield line


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--suite", nargs="+", choices=SUITES, default=["named"])
    parser.add_argument("--workload", nargs="+", help="names of the suites', instead of all")
    parser.add_argument("--contender", nargs="+", help="names")
    parser.add_argument("--processes", type=int, help="side by side; two fewer than CPU cores")
    parser.add_argument("--tiny", action="store_true", help="of the map, interpreted on a CPU")
    parser.add_argument("--output", type=Path, help="instead of results/<device>.jsonl")
    args = parser.parse_args()
    if args.tiny and (args.suite not in (["map"], ["quantised"]) or args.output is None):
        parser.error("--tiny needs --suite map, or quantised, and --output: nothing is to be kept")
    suites = workloads.TINY if args.tiny else SUITES
    known = {w.name for suite in args.suite for w in suites[suite]}
    if unknown := {*(args.workload or ())} - known:
        parser.error(f"--suite {' '.join(args.suite)} has no {', '.join(sorted(unknown))}")
    parallel, alone = (
        [
            workload
            for suite in args.suite
            for workload in suites[suite]
            if (suite in side_by_side.SUITES) == wanted
            and (args.workload is None or workload.name in args.workload)
        ]
        for wanted in (True, False)
    )
    if parallel and side_by_side.OWN not in (args.contender or [side_by_side.OWN]):
        parser.error(f"{', '.join(side_by_side.SUITES)} are timed by {side_by_side.OWN} alone")
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # processes may share the device

    device = jax.devices()[0].device_kind
    path = args.output or RESULTS / f"{device.replace(' ', '_')}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    facts = {
        "device": device,
        "date": datetime.date.today().isoformat(),
        "versions": versions(),
        "command": "python benchmarks/decode.py " + " ".join(sys.argv[1:]),
    }
    found = contenders.contenders()
    found = [c for c in found if args.contender is None or c.name in args.contender]
    lines = {}

    def record(given):
        for line in results(given):
            lines[line["workload"], line["contender"]] = line
            with path.open("a") as file:
                file.write(json.dumps(line | facts) + "\n")
            show(line)

    with side_by_side.started(parallel, args.tiny, args.processes) as (yardsticks, own):
        record(own)
    record(jobs(alone, found, yardsticks))
    if "map" in args.suite:
        judge(lines)


def judge(lines: dict[tuple[str, str], dict]) -> None:
    """Print the worst places of the map; exit if a call failed, or was wrong."""
    print(map_report.worst_table(lines))
    if failed := [name for (name, _), line in lines.items() if "failed" in line]:
        sys.exit(f"failed: {', '.join(failed)}")


def show(line):
    head = f"{line['workload']:<48} {line['contender']:<18}"
    if "failed" in line:
        print(f"{head} {line['failed'][:100]}", flush=True)
        return
    floor = f", {line['of_floor']:6.1%} of the larger floor" if "of_floor" in line else ""
    wall = (
        f", {line['wall_us_per_layer']:.1f} us wall a layer" if "wall_us_per_layer" in line else ""
    )
    plan = f", plan {line['plan_us']} us" if line.get("plan_us") else ""
    base = f", {line['of_base']:.3f} of {line['base_us']} us" if "of_base" in line else ""
    print(
        f"{head} {line['device_us']:9.1f} us  {line['of_ceiling']:6.1%} of the ceiling"
        f"{floor}{wall}{plan}{base}",
        flush=True,
    )


if __name__ == "__main__":
    main()
