"""Bugs put into what shares prefixes, and into what is not causal: the properties catch each."""

import dataclasses
import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from edges import config
from entries import RAGGED_PALLAS, RAGGED_TRITON, RaggedEntry
from test_prefix_groups import BOUNDS, GROUPS, LENS

import ejk
import ejk.backends.pallas.ragged_page_attention.call as pallas
import ejk.backends.ragged_prefixes as prefixes
import ejk.backends.xla.ragged_page_attention as xla
from ejk.backends.triton.ragged_page_attention.sizes import RaggedSizes
from ejk.testing.bounds import assert_close
from ejk.testing.ragged_page_attention import build_ragged

BACKENDS = {
    "xla": ejk.XlaRaggedPageAttention(),
    "triton": RAGGED_TRITON,
    "pallas": RAGGED_PALLAS,
}
# To lower for Pallas' interpreter takes seconds: by default it runs one of each, as what shares
# prefixes is no backend's own.
each_backend = pytest.mark.parametrize(
    "name", ["xla", "triton", pytest.param("pallas", marks=pytest.mark.one_in(100))]
)
numbers = itertools.count(1)  # bytes, few: a backend of its own for each bug, traced for it alone


def entry_of(name):
    backend = dataclasses.replace(BACKENDS[name], least_saved_bytes=next(numbers))
    return RaggedEntry(name, backend, examples=0)


def holds(name, window=40):
    features = frozenset({"sinks", "sliding_window", "alibi_slopes"})
    case = build_ragged(
        config(features=features), LENS, BOUNDS, window=window, prefix_groups=GROUPS
    )
    assert_close(case, *entry_of(name)(case, prefix_groups=GROUPS))


def holds_without_a_causal_mask(name):
    long = np.array([0, 9, 9, 9, 10, 11, 12, 12, 13, 13])  # of more new tokens than one block has
    case = build_ragged(config(), LENS, long, causal=False)
    assert_close(case, *entry_of(name)(case))


prefix_problem, prefix_operands = prefixes.prefix_problem, prefixes.prefix_operands
own_operands, shared_prefixes = prefixes.own_operands, prefixes.shared_prefixes


def another_prefix(problem, operands, *rest):
    changed = prefix_operands(problem, operands, *rest)
    return changed._replace(block_tables=jnp.roll(changed.block_tables, 1, axis=0))


def counted_twice(operands, rows, shares):
    return operands._replace(**prefixes.NO_GROUPS)


def sink_counted_twice(problem, operands, *rest):
    return prefix_operands(problem, operands, *rest)._replace(sinks=operands.sinks)


def window_not_shifted(problem, operands, rows, shares, place):
    changed = prefix_operands(problem, operands, rows, shares, place)
    return changed._replace(positions=changed.positions - 16)


def longer_prefix(*args):
    shares = shared_prefixes(*args)
    return shares._replace(pages=jnp.where(shares.pages > 0, shares.pages + 1, 0))


def rows_of_others(problem, operands, rows, shares, place):
    return prefix_operands(problem, operands, rows, shares, jnp.roll(place, 1))


BUGS = {
    "the prefix of another group": {"prefix_operands": another_prefix},
    "the prefix counted twice": {"own_operands": counted_twice},
    "the sink counted twice": {
        "prefix_operands": sink_counted_twice,
        "prefix_problem": lambda problem: dataclasses.replace(
            prefix_problem(problem), has_sinks=True
        ),
    },
    "the window not shifted": {"prefix_operands": window_not_shifted},
    "a page more than is shared": {"shared_prefixes": longer_prefix},
    "another row's queries": {"prefix_operands": rows_of_others},
}


@pytest.mark.fault("prefix_groups", "shared")
@pytest.mark.fast(20)
@each_backend
@pytest.mark.parametrize("bug", BUGS)
def test_bugs_of_shared_prefixes_are_caught(bug, name, monkeypatch):
    for target, replacement in BUGS[bug].items():
        monkeypatch.setattr(prefixes, target, replacement)
    with pytest.raises(AssertionError):
        holds(name)


def causal_places(problem, operands, *rest):
    return xla_queries_of(dataclasses.replace(problem, causal=True), operands, *rest)


def causal_constants(sizes, problem, *rest):
    return triton_constants(sizes, problem, *rest) | {"CAUSAL": True}


def causal_ranges(problem, *rest):
    return pallas_ranges(dataclasses.replace(problem, causal=True), *rest)


xla_queries_of, triton_constants = xla.Queries.of, RaggedSizes.constants
pallas_ranges = pallas.ranges
CAUSAL = {
    "xla": (xla.Queries, "of", causal_places),
    "triton": (RaggedSizes, "constants", causal_constants),
    "pallas": (pallas, "ranges", causal_ranges),
}


@pytest.mark.fast(20)
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.fault("ragged_page_attention", n)) for n in CAUSAL]
)
def test_a_causal_mask_that_nobody_asked_for_is_caught(name, monkeypatch):
    monkeypatch.setattr(*CAUSAL[name])
    with pytest.raises(AssertionError):
        holds_without_a_causal_mask(name)


@each_backend
def test_the_sound_backends_are_not_accused(name):
    holds(name)
    holds_without_a_causal_mask(name)


def test_the_groups_share_and_the_window_ends_in_what_they_share():
    """Or no bug would show."""
    case = build_ragged(
        config(features=frozenset({"sliding_window"})), LENS, BOUNDS, window=40,
        prefix_groups=GROUPS,
    )  # fmt: skip
    seen = [tokens[:, 0] for s, tokens in case.rows_seen.values() if GROUPS[0][s] == 0]
    assert any(0 < min(row) < 32 for row in seen) and np.array(GROUPS[1]).max() == 2
