"""Holds a backend to what its operation promises."""

import warnings
import zlib
from collections.abc import Callable, Collection
from typing import Any

import hypothesis
from hypothesis import strategies as st

from ejk._nearest import did_you_mean
from ejk.testing import copy_kv_cache, page_attention, ragged_page_attention, write_kv_cache
from ejk.testing.configurations import MANY_CONFIGURATIONS, Few
from ejk.testing.properties import PROPERTIES, concerns
from ejk.testing.subject import Refusal, Subject

SLOW = (
    hypothesis.HealthCheck.too_slow,
    hypothesis.HealthCheck.data_too_large,
    hypothesis.HealthCheck.large_base_example,
)
"""A call is large, and its program takes a while to compile."""
STRATEGIES: dict[str, tuple[Callable[..., st.SearchStrategy[Any]], Collection[Any]]] = {
    "page_attention": (page_attention.cases, MANY_CONFIGURATIONS),
    "ragged_page_attention": (
        ragged_page_attention.ragged_cases,
        ragged_page_attention.with_own_options(MANY_CONFIGURATIONS),
    ),
    "write_kv_cache": (write_kv_cache.writes, write_kv_cache.CONFIGURATIONS),
    **{
        operation: (
            copy_kv_cache.copies, [c for c in copy_kv_cache.CONFIGURATIONS if c.unit == unit],
        )
        for operation, unit in copy_kv_cache.UNIT_OF.items()
    },
}  # fmt: skip


def calls(
    operation: str,
    *,
    configurations: Collection[Any] | None = None,
    suits: Callable[[Any], bool] | None = None,
    programs: int | None = None,
    seed: int = 0,
) -> st.SearchStrategy[Any]:
    """Make the Hypothesis strategy of calls of an operation: of its cases.

    A case is one call, poisoned wherever nothing must be read. `case.run(backend)` returns NumPy
    arrays, `case.check(results)` holds them to `case.expected()`, what the oracle says.

    Args:
        operation: "page_attention", "ragged_page_attention", "write_kv_cache", "copy_kv_slots" or
            "copy_kv_pages".
        configurations: what programs are compiled for, or None for a list of `ejk`'s own. Of
            attention each is an `ejk.testing.Configuration`.
        suits: says of a configuration whether it is drawn.
        programs: how many configurations are drawn, or None for all; one that is quantised comes on
            top. Each is a program to compile, or two.
        seed: which they are.

    Raises:
        ValueError: there is no such operation, no configuration suits, or `programs` is below 1.

    Examples:
        >>> import ejk.testing
        >>> ejk.testing.calls("write_kv_cache", suits=lambda c: c.cache_layout == "NHD")
        calls('write_kv_cache', suits=...)
    """
    _chosen(operation, configurations, suits, programs)
    given = {"configurations": configurations, "suits": suits, "programs": programs}
    given = {name: x for name, x in given.items() if x is not None}
    return _named(operation, **given, **({"seed": seed} if seed else {}))


def _drawn(
    draw: Any,
    operation: str,
    *,
    configurations: Any = None,
    suits: Any = None,
    programs: Any = None,
    seed: Any = 0,
) -> Any:
    """Draw one of `calls`."""
    chosen = _chosen(operation, configurations, suits)
    return draw(STRATEGIES[operation][0](chosen, Few(seed, programs)))


# Hypothesis prints a strategy as the call that made it: by this name, and without ejk's own lists.
_drawn.__name__ = "calls"
_named = st.composite(_drawn)


def _chosen(
    operation: str,
    configurations: Collection[Any] | None,
    suits: Callable[[Any], bool] | None,
    programs: int | None = None,
) -> list[Any]:
    """Return the configurations that are drawn from."""
    if operation not in STRATEGIES:
        hint = did_you_mean(operation, STRATEGIES)
        raise ValueError(f"{operation=} must be one of {', '.join(STRATEGIES)}{hint}")
    if programs is not None and programs < 1:
        raise ValueError(f"{programs=} must be at least 1, or None for all configurations")
    _, own = STRATEGIES[operation]
    among = own if configurations is None else configurations
    chosen = [c for c in among if suits is None or suits(c)]
    if not chosen:
        raise ValueError(
            f"suits= must let one of the configurations of {operation} be, and none of {len(among)}"
            " is: pass configurations= of your own"
        )
    return chosen


def assert_backend_agrees(
    backend: Any,
    operation: str,
    *,
    examples: int = 10,
    may_refuse: Collection[str] = (),
    configurations: Collection[Any] | None = None,
    suits: Callable[[Any], bool] | None = None,
    batch_invariant: bool = False,
    equal_bits: bool = True,
    programs: int | None = 3,
    seed: int = 0,
) -> None:
    """Draw calls, and hold a backend to every property that the operation promises.

    Args:
        backend: as it is passed to `backend=`, an object or a name.
        operation: as in `calls`.
        examples: calls that are drawn for each of `PROPERTIES[operation]`.
        may_refuse: regular expressions of the only reasons that the backend may give for refusing.
        configurations: as in `calls`.
        suits: as in `calls`: which configurations are drawn.
        batch_invariant: for `num_splits >= 1` the backend promises that a sequence's bits depend on
            that sequence alone.
        equal_bits: under `jit`, of pages in another order and without the LSE an output has the
            same bits; False: no more than the bound is asked for. Running twice gives the same bits
            in any case, and what must not be read changes none.
        programs: as in `calls`.
        seed: of the configurations and of all calls.

    Raises:
        AssertionError: a property does not hold; the smallest call found is in the message. Or the
            backend refused for another reason, or every call.
        ValueError: as `calls`.

    Warns:
        UserWarning: the backend agrees, but no configuration that suits has one of the features
            that it declares.
    """
    chosen = _chosen(operation, configurations, suits, programs)
    subject = Subject(backend, may_refuse, batch_invariant, equal_bits)
    for name in PROPERTIES[operation]:
        concerned = [c for c in chosen if concerns(name, c)]
        if not concerned:
            continue
        drawn = STRATEGIES[operation][0](concerned, Few(seed, programs))
        ran, refused = _hold(subject, operation, name, drawn, examples, seed)
        if not ran:
            raise AssertionError(
                f"{name} of {operation}: {backend} refused every call that was drawn, so nothing "
                f"is known: narrow suits=. It said: {'; '.join(sorted(refused))}"
            )
    known = _features(STRATEGIES[operation][1]) & {*getattr(backend, "features", ())}
    if untested := known - _features(chosen):
        warnings.warn(
            f"{backend} declares {', '.join(sorted(untested))}, which no configuration that was "
            "drawn from has: widen suits=, or pass configurations= with it",
            stacklevel=2,
        )


def _features(configurations: Collection[Any]) -> set[str]:
    """Return the features that some of these have; those of writes and copies have none."""
    return {name for c in configurations for name in getattr(c, "features", ())}


def _hold(
    subject: Subject,
    operation: str,
    name: str,
    drawn: st.SearchStrategy[Any],
    examples: int,
    seed: int,
) -> tuple[int, set[str]]:
    """Hold a backend to one property; return how many calls it ran, and why it refused others."""
    ran, refused = 0, set[str]()

    @hypothesis.seed(zlib.crc32(f"{seed} {name}".encode()))  # each property has its own calls
    @hypothesis.settings(
        max_examples=examples, deadline=None, database=None, report_multiple_bugs=False,
        phases=(hypothesis.Phase.generate, hypothesis.Phase.shrink),
        suppress_health_check=SLOW,
    )  # fmt: skip
    @hypothesis.given(drawn)
    def holds(case: Any) -> None:
        nonlocal ran
        try:
            PROPERTIES[operation][name](subject, case)
        except Refusal as refusal:
            refused.update(map(str, refusal.args))
            return
        except Exception as error:
            raise AssertionError(
                f"{name} of {operation} does not hold on {subject.backend}:\n"
                f"{type(error).__name__}: {error}\n{case!r}"
            ) from error
        ran += 1

    holds()
    return ran, refused
