"""Times this checkout beside another one, in turn, and prints by how much each workload changed.

    git worktree add ../before main~1
    python benchmarks/compare.py ../before
    python benchmarks/compare.py ../before --only W1a "mixed, page 16" --rounds 9
    python benchmarks/compare.py ../before --suite waves latent
    python benchmarks/compare.py ../before --tiny     small batches, interpreted on a CPU

Single kernels that are timed one after another drift by 5 to 10 % with heat and power. So each
checkout gets a process of its own, with the arrays of one workload in both, and the two are timed
in turn: before, after, before, after. Of small batches the wall time a layer is compared, too. What
counts is the median over the rounds of one time over the other. The scripts of this checkout time
both; `ejk` alone differs.
"""

import argparse
import functools
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import contenders
import programs
import ragged
import ragged_batches
import ragged_programs
import timing
import workloads

HERE = Path(__file__).parents[1]
OWN = "ejk"  # the contender that changes


Timer = Callable[[], float]  # microseconds of a call


def timers(tiny: bool) -> dict[str, dict[str, Callable[[], Timer]]]:
    """What is compared, by suite and name: each is checked, then returns what times it."""

    def own() -> contenders.Contender:
        [found] = [c for c in contenders.contenders(tiny) if c.name == OWN]
        return found

    def of_calls(workload):
        _, calls, run = programs.compile_calls(workload, own(), 2 if tiny else None)()
        return lambda: timing.device_time(calls, run)[0]

    def of_chain(workload):
        (_, calls, run), _ = programs.prepare(workload, own())
        return lambda: timing.device_time(calls, run)[0]

    def of_wall(workload):
        _, step = programs.prepare(workload, own())
        return lambda: timing.wall_time(step, repeats=50, rounds=3) / programs.LAYERS

    def of_ragged(batch):
        tools = ragged_programs.compile_tools(batch)
        program = ragged_programs.compile_program(batch, ragged_programs.own_choice(batch, tiny))
        ready = ragged_programs.prepare(program, tools, tools.draw())
        return lambda: timing.device_time(batch.calls, ready.run)[0]

    def each(way, chosen, suffix=""):
        return {w.name + suffix: functools.partial(way, w) for w in chosen}

    if tiny:
        return {
            "map": each(of_calls, workloads.TINY_MAP),
            "ragged": each(of_ragged, ragged_batches.each(ragged_batches.TINY)),
        }
    ways = dict.fromkeys(("map", "latent", "quantised"), of_calls)
    found = {
        suite: each(ways.get(suite, of_chain), chosen) for suite, chosen in workloads.SUITES.items()
    }
    found["small"] |= each(of_wall, workloads.SMALL, ", wall a layer")
    return found | {"ragged": each(of_ragged, ragged_batches.BATCHES)}


def flat(known: dict[str, dict[str, Callable[[], Timer]]]) -> dict[str, Callable[[], Timer]]:
    return {name: timer for suite in known.values() for name, timer in suite.items()}


def serve(tiny: bool) -> None:
    """Answer the lines of standard input: a name prepares a program, an empty line times it."""
    known, timer = flat(timers(tiny)), lambda: 0.0
    for line in sys.stdin:
        if name := line.rstrip("\n"):
            timer = lambda: 0.0  # noqa: E731  frees the arrays of the last one
            timer = known[name]()
            print(json.dumps("ready"), flush=True)
        else:
            print(json.dumps(timer()), flush=True)


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
    suites = (*workloads.SUITES, "ragged")
    parser.add_argument("--suite", nargs="+", choices=suites, help="instead of all but the map")
    parser.add_argument("--only", nargs="+", help="names, instead of suites")
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
    known = timers(args.tiny)
    if unknown := set(args.only or ()) - set(flat(known)):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(flat(known))}")
    suites = args.suite or [suite for suite in known if suite != "map"]
    names = args.only or list(flat({suite: known[suite] for suite in suites}))
    lines = results(args.before, names, args.rounds, args.tiny)
    ragged.append(args.output, lines, "compare.py", prefix="compare_")


if __name__ == "__main__":
    main()
