"""What became of one call: it agrees with the oracle, is refused by name, or fails."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import numpy as np

import ejk
from ejk import _registry
from ejk._load_tuning import OPERATIONS as BACKENDS
from ejk.testing.bits import bits
from ejk.testing.case import ATTENTIONS, SCALES
from ejk.testing.compositions import COMPOSITIONS, implemented_as, names_of
from ejk.testing.memory import memory_checked
from ejk.testing.recipes import Recipe, RecipeError, build_case
from ejk.testing.runs import POOLS, POSITIONAL, Call
from ejk.testing.subject import reasons_of

MOST_CHARACTERS = 400
LOST = re.compile("CUDA_ERROR_(?!OUT_OF_MEMORY)")


class Verdict(NamedTuple):
    """How a call went, and what is to be said of it: the reason, or the difference."""

    outcome: Literal["agrees", "refused", "fails"]
    said: str = ""

    @property
    def loses_device(self) -> bool:
        """After such an error the process gets nothing from its GPU but the same error."""
        return self.outcome == "fails" and LOST.search(self.said) is not None


def backends_of(operation: str) -> dict[str, ejk.Backend]:
    """Return the backends of an operation by name, registered ones among them."""
    problem_type, own = BACKENDS[implemented_as(operation)]
    found = reversed(_registry.choose(None, problem_type, own).backends)
    return {backend.name: backend for backend in found}


def backend_of(recipe: Recipe, known: Mapping[str, ejk.Backend] | None = None) -> ejk.Backend:
    """Return the backend that a recipe names, with its fields.

    Raises:
        RecipeError: there is none.
    """
    known = backends_of(recipe.operation) if known is None else known
    if recipe.backend not in known:
        raise RecipeError(
            f"backend={recipe.backend!r} must be one of {', '.join(known)}: register another "
            "with ejk.register_backend, or name its class with --backend module:Class"
        )
    found: Any = known[recipe.backend]
    try:
        return dataclasses.replace(found, **recipe.fields) if recipe.fields else found
    except (TypeError, ValueError) as error:
        raise RecipeError(f"fields: {error}") from None


def judge(recipe: Recipe, backend: ejk.Backend) -> Verdict:
    """Build a recipe's call, run it and hold every result to the oracle's.

    Raises:
        RecipeError: it builds no call.
    """
    operation, given = recipe.operation, recipe.call
    known = names_of(operation, backend)
    if recipe.composition not in known:
        raise RecipeError(f"composition={recipe.composition!r} must be one of {', '.join(known)}")

    def twin() -> Any:
        return build_case(operation, given, 1)

    call = Call(operation, build_case(operation, given), backend, twin, given.get("seed", 0))
    return judge_call(call, recipe.composition)


def judge_call(call: Call, composition: str) -> Verdict:
    """Run a call by a composition and hold every result to the oracle's."""
    try:
        with memory_checked():
            for case, results in COMPOSITIONS[composition](call):
                try:
                    case.check(results)
                except AssertionError as error:
                    said = f"{_in_one_line(error)}; {difference(call.operation, case, results)}"
                    return Verdict("fails", said)
    except ejk.UnsupportedError as error:
        reasons = reasons_of(error, call.backend)
        if not reasons:
            return Verdict("fails", f"a refusal must name the backend: {_in_one_line(error)}")
        return Verdict("refused", reasons[0])
    except AssertionError as error:
        return Verdict("fails", _in_one_line(error))
    except Exception as error:
        return Verdict("fails", f"raises {type(error).__name__}: {_in_one_line(error)}")
    return Verdict("agrees")


def difference(operation: str, case: Any, results: tuple[Any, ...]) -> str:
    """Say of the entry that is furthest off what it is, and what the oracle says."""
    names: Any = ("out", "lse")
    if operation not in ATTENTIONS:
        pools = dict(zip(POSITIONAL[operation], case.operands()))
        pools |= dict(zip(SCALES, case.scales))
        names = [name for name in POOLS if pools[name] is not None]
    named = zip(names, results, case.expected())
    worst, said = -1.0, "no entry differs by its value"
    for name, found, expected in named:
        if np.shape(found) != np.shape(expected):
            return f"{name}.shape is {np.shape(found)}, the oracle says {np.shape(expected)}"
        if not np.size(found):
            continue
        with np.errstate(invalid="ignore", over="ignore"):  # of NaN that signal
            a, b = (np.asarray(x).astype(np.float64) for x in (found, expected))
            off = np.nan_to_num(np.abs(a - b), nan=np.inf)
        same = a == b if operation in ATTENTIONS else bits(found) == bits(expected)
        off = np.where(same | (np.isnan(a) & np.isnan(b)), 0, off)
        at = np.unravel_index(np.argmax(off), off.shape)
        if off[at] > worst:
            worst, where = float(off[at]), ", ".join(map(str, at))
            said = f"{name}[{where}] is {a[at]:.6g}, the oracle says {b[at]:.6g}"
    return said


def _in_one_line(error: Exception) -> str:
    said = " ".join(str(error).split()).partition(" Max absolute difference")[0]
    return said if len(said) <= MOST_CHARACTERS else f"{said[:MOST_CHARACTERS]} ..."
