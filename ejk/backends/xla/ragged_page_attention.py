"""`ejk.ragged_page_attention` as an XLA program: runs everything, anywhere.

New tokens are taken in items, each of one sequence, and a few items at a time see their contexts in
blocks of pages: an online softmax from the first block that any of the tokens sees to the last.
Temporary memory is what those few items and a block hold: it grows with neither the width of the
table nor the number of tokens.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from ejk._backend import Tunable
from ejk._indices import least
from ejk._rounding import rounded
from ejk.backends._fields import at_least
from ejk.backends.ragged_page_attention import (
    RaggedPageAttentionBackend,
    RaggedPageAttentionOperands,
    RaggedPageAttentionProblem,
    number_items,
    sane_bounds,
)
from ejk.backends.ragged_prefixes import attend_in_groups
from ejk.backends.xla._backend import XlaBackend
from ejk.backends.xla._softmax import Block, attend, bytes_of_block
from ejk.backends.xla.page_attention import XlaPageAttention

MAX_BLOCK_Q = 64  # not measured


@dataclasses.dataclass(frozen=True)
class XlaRaggedPageAttention(XlaBackend, RaggedPageAttentionBackend):
    """Run `ejk.ragged_page_attention` as an XLA program.

    Attributes:
        block_q: new tokens of a sequence that are taken at a time. None: at most 64.
        block_kv: tokens of the context that a step of the loop takes, in whole pages. None: at
            most 512, fewer where their keys exceed 2 MiB of float32 on a CPU, 32 MiB elsewhere.
        least_saved_bytes: as of `ejk.TritonRaggedPageAttention`.
    """

    block_q: int | None = None
    block_kv: int | None = None
    least_saved_bytes: int | None = None

    features = XlaPageAttention.features | {"positions", "tree_mask", "causal=False"}
    tunable: ClassVar[Tunable] = {"block_q": (16, 32, 64, 128), "block_kv": (128, 256, 512, 1024)}

    def __post_init__(self):
        at_least(self, block_q=1, block_kv=1, least_saved_bytes=0)

    def run(
        self,
        problem: RaggedPageAttentionProblem,
        operands: RaggedPageAttentionOperands,
        platform: str,
    ) -> tuple[jax.Array, ...]:
        def attend_alone(problem: Any, operands: Any) -> tuple[jax.Array, ...]:
            sizes = Sizes.of(problem, bytes_of_block(platform), self.block_q, self.block_kv)
            return _attend(problem, operands, sizes)[: len(problem.results)]

        return attend_in_groups(problem, operands, attend_alone, self.least_saved_bytes)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How the work is cut."""

    tokens: int  # new tokens of an item
    pages: int  # of a block of an item's context
    together: int  # items that are taken at a time

    @classmethod
    def of(
        cls,
        problem: RaggedPageAttentionProblem,
        block_bytes: int,
        block_q: int | None = None,
        block_kv: int | None = None,
    ) -> "Sizes":
        if block_q is None:
            # Twice the mean: a batch of many decodes and a few prefills is nearly all decodes.
            usual = -(-2 * problem.total_tokens // problem.num_seqs)
            block_q = least(MAX_BLOCK_Q, problem.q_len_bound, usual)
        token_bytes = 4 * problem.num_kv_heads * max(problem.head_dim, problem.value_head_dim)
        if block_kv is None:
            block_kv = min(512, block_bytes // token_bytes)
        pages = least(max(block_kv // problem.page_size, 1), problem.max_blocks)
        num_items = problem.total_tokens // block_q + least(problem.num_seqs, problem.total_tokens)
        row_bytes = max(token_bytes, 4 * problem.num_heads * block_q)
        together = block_bytes // (pages * problem.page_size * row_bytes)
        return cls(block_q, pages, least(max(together, 1), num_items))


class Queries(NamedTuple):
    """The new tokens of a few items: which they are, and what they see."""

    seq: jax.Array  # int32 [items]
    token: jax.Array  # int32 [items, tokens]
    place: jax.Array  # int32 [items, tokens]: which token of its sequence each is
    position: jax.Array  # int32 [items, tokens]: what window and slopes count from
    context: jax.Array  # int32 [items]: tokens of the sequence before its new ones
    inside: jax.Array  # bool [items, tokens]: it is a token, and of this sequence
    sees: jax.Array  # bool [items, tokens]: it sees a token at all, if its window shows one
    first: jax.Array  # int32 [items, tokens]: no token before it is visible
    last: jax.Array  # int32 [items, tokens]: nor this one or one after it
    window: Any  # int32 [items, tokens], or None
    newer: jax.Array  # int32 [items, tokens]: new tokens of the sequence after each

    @classmethod
    def of(
        cls,
        problem: RaggedPageAttentionProblem,
        operands: RaggedPageAttentionOperands,
        sizes: Sizes,
        bounds: jax.Array,
        which: jax.Array,
    ) -> "Queries":
        """Return the new tokens of the items that `which` numbers."""
        counts = item_counts(bounds, sizes)
        items = number_items(problem, operands.context_lens, bounds, counts, sizes.tokens, which)
        nth = jnp.arange(sizes.tokens, dtype=jnp.int32)[None]
        inside = nth < items.num_tokens[:, None]
        token = jnp.where(inside, items.row[:, None] + nth, problem.total_tokens)
        place = (items.context + items.begin)[:, None] + nth
        newer = items.length[:, None] - 1 - place
        if problem.is_part:  # counted, not placed: the tokens here that each sees come first
            place = _of_tokens(operands.row_lens, token) - 1
        position = place
        if problem.has_positions:
            position = jnp.maximum(_of_tokens(operands.positions, token), 0)
        first, window = jnp.zeros_like(place), None
        if problem.has_window:
            window = operands.sliding_window
            window = _of_tokens(window, token) if problem.own_windows else window
            window = jnp.broadcast_to(window, place.shape)
            first = jnp.maximum(position - (jnp.maximum(window, 0) - 1), 0)
            if problem.has_positions and problem.causal:  # those of new tokens may be anything
                first = jnp.minimum(first, jnp.maximum(items.context, 0)[:, None])
        last = place + 1
        if problem.tree_width or not problem.causal:
            last = jnp.broadcast_to(items.length[:, None], place.shape)
        sees = inside & (place >= 0) if problem.causal else inside
        return cls(
            items.seq, token, place, position, items.context, inside, sees, first, last, window,
            newer,
        )  # fmt: skip

    def span(self, problem: RaggedPageAttentionProblem, sizes: Sizes) -> tuple[Any, Any]:
        """Return the blocks of pages `[begin, end)` that some of them sees a token of."""
        num_keys = sizes.pages * problem.page_size
        sees = self.sees & (self.first < self.last)
        begin = jnp.min(jnp.where(sees, self.first, jnp.iinfo(jnp.int32).max)) // num_keys
        return begin, -(-jnp.max(jnp.where(sees, self.last, 0)) // num_keys)

    def rows(self, problem: RaggedPageAttentionProblem, x: jax.Array) -> jax.Array:
        """Return their rows of `x [total_tokens, num_heads, ...]` by KV head; zeros for none's."""
        return by_kv_head(problem, _of_tokens(x, self.token))


def _of_tokens(x: jax.Array, token: jax.Array) -> jax.Array:
    """Return what `x [total_tokens, ...]` has of tokens: zeros of one that is none."""
    return x.at[token].get(mode="fill", fill_value=0)


def item_counts(bounds: jax.Array, sizes: Sizes) -> jax.Array:
    """Return how many items each sequence has."""
    return -(-(bounds[1:] - bounds[:-1]) // sizes.tokens)


def load_block(
    problem: RaggedPageAttentionProblem,
    operands: RaggedPageAttentionOperands,
    sizes: Sizes,
    bounds: jax.Array,
    queries: Queries,
    number: jax.Array,
) -> Block:
    """Load one block of the context of each item."""
    pages = number * sizes.pages + jnp.arange(sizes.pages, dtype=jnp.int32)
    at = (queries.seq[:, None], pages[None])
    num_keys = sizes.pages * problem.page_size
    key = number * num_keys + jnp.arange(num_keys, dtype=jnp.int32)
    key_position = _key_positions(problem, operands, queries, bounds, key)
    visible = _visible(problem, operands, queries, key, key_position)
    ahead = key_position[:, None] - queries.position[..., None]
    if problem.own_distances:
        begins = operands.page_distances.at[at].get(mode="fill", fill_value=0)
        slots = jnp.arange(num_keys, dtype=jnp.int32) % problem.page_size
        from_last = jnp.repeat(begins, problem.page_size, axis=1) + slots[None]
        ahead = from_last[:, None] + queries.newer[..., None]
    entries = operands.block_tables.at[at].get(mode="fill", fill_value=-1)
    return Block.load(problem, operands, entries, ahead, visible)


def _visible(
    problem: RaggedPageAttentionProblem,
    operands: RaggedPageAttentionOperands,
    queries: Queries,
    key: jax.Array,
    key_position: jax.Array,
) -> jax.Array:
    """Say which of the tokens `key` each new token sees: `[items, tokens, keys]`."""
    visible = key[None, None] < queries.last[..., None]
    if problem.tree_width:
        column = key[None] - queries.context[:, None]  # [items, keys]
        rows = _of_tokens(operands.tree_mask, queries.token)
        is_column = (column >= 0) & (column < problem.tree_width)
        among_new = jnp.take_along_axis(rows, jnp.where(is_column, column, 0)[:, None], axis=2)
        visible = visible & ((column < 0)[:, None] | (among_new & is_column[:, None]))
    if problem.has_window:
        behind = queries.position[..., None] - key_position[:, None]
        # New tokens may lie ahead of each other: a window below 1 still shows nothing.
        window = queries.window[..., None]
        visible = visible & (behind < window) & (window > 0)
    return visible & queries.sees[..., None]


def _key_positions(
    problem: RaggedPageAttentionProblem,
    operands: RaggedPageAttentionOperands,
    queries: Queries,
    bounds: jax.Array,
    key: jax.Array,
) -> jax.Array:
    """Return the positions of keys, `[items, keys]`: new ones may have been given others."""
    if not (problem.has_positions and problem.causal):
        return jnp.broadcast_to(key[None], (queries.seq.shape[0], key.shape[0]))
    new = key[None] - queries.context[:, None]
    token = jnp.where(new >= 0, bounds[queries.seq][:, None] + new, problem.total_tokens)
    return jnp.where(new >= 0, jnp.maximum(_of_tokens(operands.positions, token), 0), key[None])


def by_kv_head(problem: RaggedPageAttentionProblem, x: jax.Array) -> jax.Array:
    """Turn `[items, tokens, num_heads, ...]` to `[items, num_kv_heads, tokens * group, ...]`."""
    x = x.reshape(*x.shape[:2], problem.num_kv_heads, problem.group, *x.shape[3:]).swapaxes(1, 2)
    return x.reshape(*x.shape[:2], -1, *x.shape[4:])


def by_token(problem: RaggedPageAttentionProblem, x: jax.Array) -> jax.Array:
    """Turn it back."""
    x = x.reshape(*x.shape[:2], -1, problem.group, *x.shape[3:]).swapaxes(1, 2)
    return x.reshape(*x.shape[:2], problem.num_heads, *x.shape[4:])


def sinks_of_rows(
    problem: RaggedPageAttentionProblem, operands: RaggedPageAttentionOperands, queries: Queries
) -> jax.Array | None:
    """Return each row's sink, `[items, num_kv_heads, tokens * group]`."""
    if not problem.has_sinks:
        return None
    of_tokens = jnp.broadcast_to(operands.sinks, (*queries.token.shape, problem.num_heads))
    return by_kv_head(problem, of_tokens)


def _attend(
    problem: RaggedPageAttentionProblem, operands: RaggedPageAttentionOperands, sizes: Sizes
) -> tuple[jax.Array, ...]:
    bounds = sane_bounds(problem, operands.cu_q_lens)

    def step(queries: Queries, results: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        query = queries.rows(problem, operands.query)
        sinks = sinks_of_rows(problem, operands, queries)
        load = functools.partial(load_block, problem, operands, sizes, bounds, queries)
        out, lse = attend(problem, operands, query, sinks, queries.span(problem, sizes), load)
        found = (rounded(by_token(problem, out), problem.out_dtype), by_token(problem, lse))
        return tuple(
            result.at[queries.token].set(x, mode="drop") for result, x in zip(results, found)
        )

    out_type, lse_type = dataclasses.replace(problem, return_lse=True).results
    nothing = jnp.full(lse_type.shape, -jnp.inf, lse_type.dtype)  # of what is no sequence's
    results: tuple[jax.Array, ...] = (jnp.zeros(out_type.shape, out_type.dtype), nothing)
    return loop_over_items(problem, operands, sizes, bounds, step, results)


def loop_over_items[Carry](
    problem: RaggedPageAttentionProblem,
    operands: RaggedPageAttentionOperands,
    sizes: Sizes,
    bounds: jax.Array,
    step: Callable[[Queries, Carry], Carry],
    carry: Carry,
) -> Carry:
    """Return what becomes of `carry` in a loop over all items, a few at a time."""

    def take(number: jax.Array, carry: Carry) -> Carry:
        which = number * sizes.together + jnp.arange(sizes.together, dtype=jnp.int32)
        return step(Queries.of(problem, operands, sizes, bounds, which), carry)

    num_items = item_counts(bounds, sizes).sum(dtype=jnp.int32)
    return lax.fori_loop(0, -(-num_items // sizes.together), take, carry)
