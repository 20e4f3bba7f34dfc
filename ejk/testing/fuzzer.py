"""Draws calls until the time is over, and shrinks those that fail: what `ejk check` runs.

Hypothesis draws and shrinks (MacIver, 2019); what it finds is a recipe, which needs neither its
database nor its version.
"""

import collections
import dataclasses
import math
import shlex
import time
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import hypothesis
import hypothesis.errors
import jax

import ejk
from ejk.testing import compositions, runs
from ejk.testing.agreement import SLOW
from ejk.testing.drawn_recipes import recipes
from ejk.testing.recipes import Recipe
from ejk.testing.verdicts import Verdict, backend_of, judge

LONGEST_TURN = 20.0  # seconds
DRAWS = 9  # of a turn, at most: of ten or more Hypothesis begins with small ones of few calls
FEW = 3  # calls that each program has, however long they take
SHRINKING = 20.0  # seconds that a failure is shrunk for

SETTINGS = hypothesis.settings(
    max_examples=DRAWS,
    database=None,
    deadline=None,
    derandomize=False,
    print_blob=False,
    report_multiple_bugs=False,
    phases=(hypothesis.Phase.generate, hypothesis.Phase.shrink),
    suppress_health_check=SLOW,
    verbosity=hypothesis.Verbosity.quiet,
)


def line_of(recipe: Recipe) -> str:
    """Return the command that runs a call again."""
    return f"python -m ejk repro {shlex.quote(str(recipe))}"


@dataclasses.dataclass(frozen=True)
class Failure:
    """A call that does not agree, as small as it was made."""

    recipe: Recipe
    verdict: Verdict

    @property
    def said(self) -> str:
        return self.verdict.said

    @property
    def line(self) -> str:
        """The command that runs it again."""
        return line_of(self.recipe)


@dataclasses.dataclass
class Tally:
    """What became of the calls of one operation on one backend.

    Attributes:
        examples: how many were run and compared.
        programs: what was compiled for them.
        refused: by reason, how many were refused by name.
        failures: those that failed; of them no more are drawn.
        names: the compositions that are still drawn.
        agreed: the calls that agreed or were refused: none is run again.
    """

    operation: str
    backend: ejk.Backend
    names: list[str]
    examples: int = 0
    programs: set[str] = dataclasses.field(default_factory=set[str])
    refused: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    failures: list[Failure] = dataclasses.field(default_factory=list)
    agreed: set[str] = dataclasses.field(default_factory=set[str])

    def add(self, recipe: Recipe, verdict: Verdict) -> None:
        if verdict.outcome == "refused":
            self.refused[verdict.said] += 1
        else:
            self.examples += 1
            self.programs.add(recipe.program)

    @property
    def is_interpreted(self) -> bool:
        return bool(getattr(self.backend, "interpret", False))

    def as_object(self) -> dict[str, Any]:
        return {
            "operation": self.operation,
            "backend": self.backend.name,
            "interpret": self.is_interpreted,
            "examples": self.examples,
            "programs": len(self.programs),
            "refused": dict(self.refused),
            "failures": [{"said": x.said, "repro": x.line} for x in self.failures],
        }


class _Disagreement(Exception):  # noqa: N818
    """Carries what fails through Hypothesis, which takes all of them for one."""

    def __init__(self, failure: Failure):
        self.failure = failure


def fuzz(
    pairs: Iterable[tuple[str, ejk.Backend]],
    *,
    seconds: float = 30.0,
    seed: int = 0,
    progress: Callable[[Sequence[Tally], float], None] = lambda tallies, left: None,
    begins: Callable[[str], None] = lambda line: None,
) -> list[Tally]:
    """Draw calls and compositions of each operation and backend until the time is over.

    Where a plain call fails no more of that backend's are drawn, nor of another composition that
    failed: what is found once would be found again and again. An error that a GPU does not recover
    from ends the run, and its call is left as it was drawn.

    Args:
        pairs: operations by name, each with a backend.
        seconds: to run for. What is then being compiled or shrunk is brought to its end.
        seed: of everything. The same seed draws the same, as far as the time goes.
        progress: called after every turn.
        begins: called before every call, with its line.
    """
    tallies = [
        Tally(operation, backend, compositions.names_of(operation, backend))
        for operation, backend in pairs
    ]
    end = time.monotonic() + seconds
    turn = min(max(seconds / max(len(tallies), 1), 1.0), LONGEST_TURN)
    number, first = 0, seed % max(len(tallies), 1)  # processes do not compile the same at once
    while any(tally.names for tally in tallies):
        for tally in tallies[first:] + tallies[:first]:
            now = time.monotonic()
            if now >= end:
                return tallies
            if tally.names:
                salt = f"{seed} {number} {tally.operation} {tally.backend.name}"
                hunt(tally, zlib.crc32(salt.encode()), min(now + turn, end), begins)
                progress(tallies, end - time.monotonic())
                if any(failure.verdict.loses_device for failure in tally.failures):
                    return tallies
        number += 1
        runs.forget_programs()
        jax.clear_caches()  # a process may map only so many programs
    return tallies


def hunt(
    tally: Tally, seed: int, end: float, begins: Callable[[str], None] = lambda line: None
) -> None:
    """Draw until `end`, of `time.monotonic`; shrink the first failure and add it to the tally.

    Calls of a program go on until they have taken as long as its first, which compiled it. One that
    is refused is refused for what its program is: no more of it are tried.
    """
    failed: dict[str, Failure] = {}
    known = {tally.backend.name: tally.backend}
    limit = end
    left: dict[str, float] = {}  # seconds that a program's further calls may take

    def judged(recipe: Recipe, text: str) -> None:
        nonlocal limit
        begins(line_of(recipe))
        begin = time.monotonic()
        verdict = judge(recipe, backend_of(recipe, known))
        took, program = time.monotonic() - begin, recipe.program
        left[program] = left[program] - took if program in left else took
        if verdict.outcome == "refused":
            left[program] = -math.inf
        if not failed:
            tally.add(recipe, verdict)
        if verdict.outcome != "fails":
            tally.agreed.add(text)
            return
        if not failed:
            limit = time.monotonic() + SHRINKING * (not verdict.loses_device)
        failed[text] = Failure(recipe, verdict)

    def run(drawn: Any) -> None:
        for number, recipe in enumerate(drawn):
            text, has_time = str(recipe), left.get(recipe.program, 1.0)
            goes_on = has_time > 0 or (number < FEW and has_time > -math.inf)
            new = text not in failed and text not in tally.agreed
            if new and goes_on and time.monotonic() < limit:
                judged(recipe, text)
            if text in failed:
                raise _Disagreement(failed[text])  # in one line: Hypothesis tells failures by it

    drawn = recipes(tally.operation, tally.backend, tuple(tally.names))
    try:
        hypothesis.seed(seed)(SETTINGS(hypothesis.given(drawn)(run)))()
    except _Disagreement as error:
        found = error.failure
    except hypothesis.errors.Flaky:  # it failed, and then no more
        found = next(reversed(failed.values()))
    else:
        return
    tally.failures.append(found)
    composition = found.recipe.composition
    tally.names = [] if composition == "plain" else [n for n in tally.names if n != composition]


def summary(tallies: Sequence[Tally]) -> Mapping[str, int]:
    """Count what was run, refused and failed over all."""
    return {
        "examples": sum(tally.examples for tally in tallies),
        "programs": sum(len(tally.programs) for tally in tallies),
        "refused": sum(tally.refused.total() for tally in tallies),
        "failures": sum(len(tally.failures) for tally in tallies),
    }
