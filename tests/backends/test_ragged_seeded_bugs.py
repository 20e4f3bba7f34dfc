"""Bugs put into the XLA backend of `ejk.ragged_page_attention`: the properties must catch each."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
import test_gradients
import test_ragged_gradients as gradients
from edges import LENS, config
from entries import RaggedEntry

import ejk
import ejk._ragged_page_attention as public
import ejk.backends.reverse_mode.ragged_page_attention as backward
import ejk.backends.xla._softmax as softmax
import ejk.backends.xla.ragged_page_attention as ragged
from ejk.testing.bounds import assert_close
from ejk.testing.configurations import FEATURES
from ejk.testing.ragged_page_attention import EXTRAS, build_ragged

BOUNDS = ([3, 9, 7, 8, 8, 20, 13, 12, 4, 4], [1, 5, 5, 9, 10, 11, 12, 12, 12, 12])


@dataclasses.dataclass(frozen=True)
class Mutant(ejk.XlaRaggedPageAttention):
    bug: str = ""


def holds(bug: str):
    """The first property, on calls that every run of the suite has the like of."""
    entry = RaggedEntry(bug, Mutant(block_q=4, block_kv=16, bug=bug), examples=0)
    everything = frozenset(FEATURES)
    lens = LENS.copy()
    lens[0] = 3  # less than it has new tokens
    # What shows the most comes first: a fault is compiled into as few programs as will do.
    for bounds in BOUNDS:
        for features in (everything, everything - {"sliding_window", "sinks"}, frozenset()):
            for extras in (EXTRAS, ()):
                case = build_ragged(
                    config(features=features, fused=features == everything), lens,
                    np.array(bounds, np.int32),
                    window=17, invalid=0.2, extras=frozenset(extras),
                )  # fmt: skip
                assert_close(case, *entry(case))
    wrapping = np.array(BOUNDS[1], np.int64)
    wrapping[[0, -1]] -= 2**32
    case = build_ragged(config(), LENS, wrapping)
    assert_close(case, *entry(case))


queries_of, visible, key_positions = ragged.Queries.of, ragged._visible, ragged._key_positions
sane_bounds, item_counts, gather = ragged.sane_bounds, ragged.item_counts, softmax._gather
by_token, accumulate = ragged.by_token, softmax.accumulate


def queries_changed(change):
    def changed(problem, operands, *rest):
        return change(problem, queries_of(problem, operands, *rest))

    return changed


def shifted_places(by):
    def change(problem, queries):
        return queries._replace(place=queries.place + by, last=queries.last + by)

    return queries_changed(change)


def windows_longer_by(by):
    def changed(problem, operands, queries, *rest):
        if problem.has_window:
            queries = queries._replace(window=queries.window + by)
        return visible(problem, operands, queries, *rest)

    return changed


def columns_shifted(problem, operands, *rest):
    if problem.tree_width:
        operands = operands._replace(tree_mask=jnp.roll(operands.tree_mask, 1, axis=1))
    return visible(problem, operands, *rest)


def causal_trees(problem, operands, queries, key, *rest):
    seen = visible(problem, operands, queries, key, *rest)
    return seen & (key[None, None] <= queries.place[..., None])


def trees_without_context(problem, operands, queries, key, *rest):
    seen = visible(problem, operands, queries, key, *rest)
    hidden = (key[None] < queries.context[:, None])[:, None] & (problem.tree_width > 0)
    return seen & ~hidden


def default_key_positions(problem, *rest):
    return key_positions(dataclasses.replace(problem, has_positions=False), *rest)


def given_positions_ignored(problem, *rest):
    return queries_of(dataclasses.replace(problem, has_positions=False), *rest)


def contexts_from_the_start(problem, queries):
    context = jnp.maximum(queries.context, 0)[:, None]
    return queries._replace(place=queries.place - context, last=queries.last - context)


def next_sequence(problem, queries):
    return queries._replace(seq=(queries.seq + 1) % problem.num_seqs)


def next_rows(problem, queries):
    token = jnp.where(queries.inside, (queries.token + 1) % problem.total_tokens, queries.token)
    return queries._replace(token=token)


def whole_items(problem, queries):
    token = queries.token[:, :1] + jnp.arange(queries.token.shape[1], dtype=jnp.int32)[None]
    return queries._replace(
        token=token, inside=queries.inside[:, :1] | jnp.zeros_like(queries.inside)
    )


def seen_before_the_first(problem, queries):
    return queries._replace(last=jnp.maximum(queries.last, 1), sees=queries.inside)


def unselected_gather(problem, pool, pages, half, visible):
    return gather(problem, pool, pages, half, jnp.ones_like(visible))


def fewer_items(bounds, sizes):
    ends = jnp.cumsum(item_counts(bounds, sizes))
    return jnp.diff(jnp.minimum(ends, ends[-1] - 1), prepend=0)


def heads_in_reverse(problem, x):
    return jnp.flip(by_token(problem, x), 2)


def earlier_blocks_forgotten(state, *rest):
    return accumulate((jnp.full_like(state[0], -jnp.inf), *state[1:]), *rest)


BUGS = {
    "causality is off by one": (ragged.Queries, "of", shifted_places(1)),
    "a token does not see itself": (ragged.Queries, "of", shifted_places(-1)),
    "the window is one too long": (ragged, "_visible", windows_longer_by(1)),
    "the window is one too short": (ragged, "_visible", windows_longer_by(-1)),
    "another sequence's pages": (ragged.Queries, "of", queries_changed(next_sequence)),
    "another row's queries": (ragged.Queries, "of", queries_changed(next_rows)),
    "rows of the next sequence, too": (ragged.Queries, "of", queries_changed(whole_items)),
    "new tokens come first": (ragged.Queries, "of", queries_changed(contexts_from_the_start)),
    "tokens before the first see it": (
        ragged.Queries, "of", queries_changed(seen_before_the_first),
    ),
    "columns of the mask are off by one": (ragged, "_visible", columns_shifted),
    "trees are causal, too": (ragged, "_visible", causal_trees),
    "trees hide the context": (ragged, "_visible", trees_without_context),
    "positions are ignored": (ragged.Queries, "of", given_positions_ignored),
    "keys keep their default positions": (ragged, "_key_positions", default_key_positions),
    "the last item is dropped": (ragged, "item_counts", fewer_items),
    "bounds may fall": (
        ragged, "sane_bounds", lambda problem, bounds: jnp.clip(bounds, 0, problem.total_tokens),
    ),
    "bounds are not clipped": (
        ragged, "sane_bounds", lambda problem, bounds: sane_bounds(
            dataclasses.replace(problem, total_tokens=2**31 - 1), bounds
        ),
    ),
    "64-bit integers are narrowed first": (
        public, "as_int32", lambda x, bound: jnp.asarray(np.asarray(x).astype(np.int32)),
    ),
    "unread slots are multiplied by zero": (softmax, "_gather", unselected_gather),
    "heads in reverse": (ragged, "by_token", heads_in_reverse),
    "earlier blocks are forgotten": (softmax, "accumulate", earlier_blocks_forgotten),
}  # fmt: skip


@pytest.mark.fault("ragged_page_attention", "xla")
@pytest.mark.fast(20)
@pytest.mark.parametrize("bug", BUGS)
def test_bugs_are_caught(bug, monkeypatch):
    target, name, replacement = BUGS[bug]
    monkeypatch.setattr(target, name, replacement)
    with pytest.raises(AssertionError):
        holds(bug)


def backward_changed(name, change):
    """The backward pass with what it calls by `name` changed; the forward pass is sound."""
    sound = getattr(backward, name)
    return name, lambda *args, **keywords: change(sound, *args, **keywords)


def without_the_last_token(loop, problem, operands, sizes, bounds, *rest):
    return loop(problem, operands, sizes, jnp.minimum(bounds, bounds[-1] - 1), *rest)


def without_the_lse(rows, query, g, h, lse, sinks):
    return rows(query, g, jnp.zeros_like(h), lse, sinks=sinks)


BACKWARD = {
    "the last token has no gradient": ("loop_over_items", without_the_last_token),
    "the LSE has no gradient": ("Rows", without_the_lse),
    "heads have each other's gradient": (
        "by_token", lambda sound, problem, x: jnp.flip(sound(problem, x), 2),
    ),
    "bounds may fall": (
        "sane_bounds", lambda sound, problem, bounds: jnp.clip(bounds, 0, problem.total_tokens),
    ),
}  # fmt: skip


def holds_backward(bug: str):
    entry = RaggedEntry(bug, Mutant(block_q=4, block_kv=16, bug=bug), examples=0)
    bounds = np.array([1, 5, 4, 7, 8, 10, 11, 12, 12, 12])
    case = build_ragged(config(features=frozenset({"sinks"})), LENS, bounds)
    test_gradients.check(gradients.clean_query(case), entry, gradients.attend)


@pytest.mark.fault("ragged_page_attention", "reverse_mode")
@pytest.mark.fast(9)
@pytest.mark.parametrize("bug", BACKWARD)
def test_bugs_of_the_gradient_are_caught(bug, monkeypatch):
    monkeypatch.setattr(backward, *backward_changed(*BACKWARD[bug]))
    with pytest.raises(AssertionError):
        holds_backward(f"sound forward pass: {bug}")


def test_the_sound_backend_is_not_accused():
    holds("none")
    holds_backward("none")
