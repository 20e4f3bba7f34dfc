"""`ejk check`: random calls on this machine's backends against the float64 oracle."""

import json
import math
import os
import secrets
import sys
from typing import Annotated, Any

import typer

from ejk._backend_report import default_platform
from ejk._version import __version__
from ejk.cli._fuzzed import BackendNames, Interpret, backends, check_names, engine
from ejk.cli._in_flight import InFlight, crashed
from ejk.cli._options import AsJson, one_of
from ejk.cli._output import Table, show


def check(
    seconds: Annotated[float, typer.Option(help="How long to draw calls.")] = 30.0,
    operation: Annotated[
        list[str] | None,
        typer.Option(help="One of ejk's operations, as write_kv_cache; may be repeated."),
    ] = None,
    backend: BackendNames = None,
    interpret: Interpret = False,
    seed: Annotated[
        int | None, typer.Option(help="Of what is drawn; the same seed draws the same.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Draw calls and compositions of them, run them here and compare them with the oracle.

    Every backend that runs on this machine is tried, or those that are named. A call that fails is
    shrunk and printed as one line, which runs it again. The exit code is 1 where there is any, or
    where no call was compared at all. The line of the call that is being run is in a file, named at
    the start, which a crash leaves; the next run prints it.

    Example: ejk check --seconds 1 --operation copy_kv_slots --seed 3
    """
    if not 0 < seconds < math.inf:
        raise typer.BadParameter(f"{seconds} must be above 0, and finite", param_hint="'--seconds'")
    fuzzer, known = engine("fuzzer"), engine("case").OPERATIONS
    operations = [one_of("--operation", name, known) for name in operation or known]
    check_names(backend, operations)
    pairs = [(op, b) for op in operations for b in backends(op, backend, interpret).values()]
    if not pairs:
        rule = f"{', '.join(backend or ())} has none of {', '.join(operations)}"
        raise typer.BadParameter(rule, param_hint="'--backend'")
    platform = default_platform()
    for op, b in pairs:
        if platform not in b.platforms:
            mend = ": add --interpret" * (platform == "cpu" and hasattr(b, "interpret"))
            rule = f"{b.name} runs {op} on {' and '.join(b.platforms)}, not on {platform}{mend}"
            raise typer.BadParameter(rule, param_hint="'--backend'")
    seed = secrets.randbelow(2**32) if seed is None else seed
    for path, line in crashed():
        said = f"a process died in this call, which it left in {path}:\n  {line or 'none yet'}"
        print(said, file=sys.stderr, flush=True)
        os.remove(path)
    with InFlight() as begins:
        said = f"ejk {__version__} on {platform}, --seed {seed}; the call in flight: {begins.path}"
        print(said, file=sys.stderr if as_json else sys.stdout, flush=True)
        tallies = fuzzer.fuzz(
            pairs, seconds=seconds, seed=seed, progress=Progress(fuzzer), begins=begins
        )
    counts = fuzzer.summary(tallies)
    if as_json:
        found = {
            "ejk": __version__,
            "platform": platform,
            "seconds": seconds,
            "seed": seed,
        }
        rows = [tally.as_object() for tally in tallies]
        print(json.dumps({**found, **counts, "results": rows}, indent=2))
    else:
        print(report(tallies))
    raise typer.Exit(1 if counts["failures"] or not counts["examples"] else 0)


class Progress:
    """Prints where a run is: on a terminal in one line, elsewhere a line every 10 seconds."""

    def __init__(self, fuzzer: Any):
        self.summary, self.is_terminal = fuzzer.summary, sys.stderr.isatty()
        self.last = math.inf

    def __call__(self, tallies: Any, left: float) -> None:
        if self.is_terminal or self.last - left >= 10:
            self.last = left
            said = ", ".join(f"{count} {name}" for name, count in self.summary(tallies).items())
            start, end = ("\r", "\033[K") if self.is_terminal else ("", "\n")
            print(f"{start}{said}, {max(left, 0):.0f} s left", end=end, file=sys.stderr, flush=True)
        if self.last == math.inf:
            self.last = left


def report(tallies: Any) -> str:
    """Return the table, the reasons of refusals, and what failed with the lines to run again."""
    rows = [
        (
            tally.operation,
            tally.backend.name + ", interpreted" * tally.is_interpreted,
            str(tally.examples),
            str(len(tally.programs)),
            str(tally.refused.total()),
            str(len(tally.failures)),
        )
        for tally in tallies
    ]
    heads = ("operation", "backend", "examples", "programs", "refused", "failures")
    parts = [show(Table(heads, rows))]
    for tally in tallies:
        for failure in tally.failures:
            named = f"{tally.operation} on {tally.backend.name}, {failure.recipe.composition}"
            parts.append(f"{named}: {failure.said}\n  {failure.line}")
    bare = [f"{x.operation} on {x.backend.name}" for x in tallies if not x.examples]
    if bare:
        said = "; ".join(bare)
        parts.append(f"Nothing was compared of {said}: give it more --seconds, or see --json.")
    if len(bare) < len(tallies) and not any(tally.failures for tally in tallies):
        parts.append("All that was compared agrees with the oracle.")
    return "\n\n".join(parts)
