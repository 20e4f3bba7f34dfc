"""Times this checkout beside another one, in turn, and prints by how much each workload changed.

    git worktree add ../before main~1
    python benchmarks/compare.py ../before
    python benchmarks/compare.py ../before --only W1a "mixed, page 16" --rounds 9
    python benchmarks/compare.py ../before --tiny     small batches, interpreted on a CPU

Single kernels that are timed one after another drift by 5 to 10 % with heat and power. So each
checkout gets a process of its own, with the arrays of one workload in both, and the two are timed
in turn: before, after, before, after. What counts is the median over the rounds of one time over
the other. The scripts of this checkout time both; `ejk` alone differs.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import contenders
import decode
import ragged
import workloads

HERE = Path(__file__).parents[1]
OWN = "ejk"  # the contender that changes


def programs(tiny: bool) -> dict[str, Callable[[], tuple[int, Callable[[], Any]]]]:
    """What is compared, by name: each is checked, then returns its calls and the program."""
    found: dict[str, Callable[[], tuple[int, Callable[[], Any]]]] = {}

    def of_decode(workload):
        [own] = [c for c in contenders.contenders() if c.name == OWN]
        prepared = decode.prepare(workload, own)
        return prepared.calls, prepared.run

    def of_ragged(batch):
        _, run = ragged.prepare(batch, OWN, ragged.contenders(batch, tiny)[OWN])
        return ragged.CALLS, run

    if not tiny:
        for suite in (workloads.NAMED, workloads.SHAPES, workloads.OPTIONS):
            found |= {w.name: lambda w=w: of_decode(w) for w in suite}
    batches = ragged.TINY if tiny else ragged.BATCHES
    return found | {batch.name: lambda batch=batch: of_ragged(batch) for batch in batches}


def serve(tiny: bool) -> None:
    """Answer the lines of standard input: a name prepares a program, an empty line times it."""
    known, calls, run = programs(tiny), 0, lambda: None
    for line in sys.stdin:
        if name := line.rstrip("\n"):
            run = lambda: None  # noqa: E731  frees the arrays of the last one
            calls, run = known[name]()
            print(json.dumps("ready"), flush=True)
        else:
            us, _ = decode.device_time(calls, run, ragged.device_kernels)
            print(json.dumps(us), flush=True)


class Checkout:
    """A process that times the `ejk` of one checkout."""

    def __init__(self, root: Path, tiny: bool):
        command = [sys.executable, __file__, "--serve", *["--tiny"] * tiny]
        paths = [str(root), *filter(None, [os.environ.get("PYTHONPATH")])]
        env, pipe = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}, subprocess.PIPE
        self.process = subprocess.Popen(command, env=env, stdin=pipe, stdout=pipe, text=True)

    def ask(self, name: str = "") -> Any:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(name + "\n")
        self.process.stdin.flush()
        if not (answer := self.process.stdout.readline()):
            raise RuntimeError(f"the process of a checkout ended at {name or 'its timing'!r}")
        return json.loads(answer)


def results(before: Path, names: list[str], rounds: int, tiny: bool) -> Iterator[dict]:
    """Yield a line for each workload: both times, and the one over the other."""
    checkouts = [Checkout(root, tiny) for root in (before, HERE)]
    for name in names:
        for checkout in checkouts:
            checkout.ask(name)
        times = [[checkout.ask() for checkout in checkouts] for _ in range(rounds)]
        ratio = statistics.median(new / old for old, new in times)
        old, new = (statistics.median(own) for own in zip(*times))
        yield {
            "workload": name,
            "contender": "after / before",
            "before_us": round(old, 2),
            "after_us": round(new, 2),
            "ratio": round(ratio, 4),
        }


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("before", type=Path, nargs="?", help="the root of the other checkout")
    parser.add_argument("--only", nargs="+", help="names, instead of all")
    parser.add_argument("--rounds", type=int, default=5, help="times that each is timed")
    parser.add_argument("--tiny", action="store_true", help="small ones, interpreted on a CPU")
    parser.add_argument("--output", type=Path, help="instead of results/compare_<device>.jsonl")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # the processes share one device
    if args.serve:
        return serve(args.tiny)
    if args.before is None:
        parser.error("name the root of the checkout to compare with")
    if args.tiny and args.output is None:
        parser.error("--tiny needs --output: it measures nothing that is to be kept")
    known = programs(args.tiny)
    if unknown := set(args.only or ()) - set(known):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    lines = results(args.before, args.only or list(known), args.rounds, args.tiny)
    ragged.append(args.output, lines, "compare.py", prefix="compare_")


if __name__ == "__main__":
    main()
