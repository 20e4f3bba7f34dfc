"""`ejk.ragged_page_attention` as an XLA program: runs everything, anywhere.

New tokens are taken in blocks, each of one sequence, and a few blocks at a time see the context in
blocks of pages: an online softmax from the first block of pages that any of the tokens sees to the
last. Temporary memory is what those few blocks hold: it grows with neither the width of the table
nor the number of tokens.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from ejk import _dispatch
from ejk._indices import Size, least
from ejk._rounding import rounded
from ejk.backends._fields import at_least
from ejk.backends.ragged_page_attention import (
    RaggedPageAttentionBackend,
    RaggedPageAttentionOperands,
    RaggedPageAttentionProblem,
    number_items,
    sane_bounds,
)
from ejk.backends.xla.page_attention import (
    BLOCK_BYTES,
    BLOCK_BYTES_ELSEWHERE,
    XlaPageAttention,
    accumulate,
    capped_products,
    finish,
    load_pages,
    nothing_seen,
)

MAX_BLOCK_Q = 64  # not measured


@dataclasses.dataclass(frozen=True)
class XlaRaggedPageAttention(RaggedPageAttentionBackend):
    """Run `ejk.ragged_page_attention` as an XLA program.

    Attributes:
        block_q: new tokens of a sequence that are taken at a time. None: at most 64.
        block_kv: tokens of the context that a step of the loop takes, in whole pages. None: at
            most 512, fewer where their keys exceed 2 MiB of float32 on a CPU, 32 MiB elsewhere.
    """

    block_q: int | None = None
    block_kv: int | None = None

    def __post_init__(self):
        at_least(self, block_q=1, block_kv=1)

    name = "xla"
    is_opaque = False
    features = XlaPageAttention.features | {"positions", "tree_mask"}

    @property
    def platforms(self):
        return _dispatch.PLATFORMS

    def limits(self, problem, platform):
        return ()

    def run(self, problem, operands, platform):
        block_bytes = BLOCK_BYTES.get(platform, BLOCK_BYTES_ELSEWHERE)
        sizes = Sizes.of(problem, block_bytes, self.block_q, self.block_kv)
        out, lse = _attend(problem, operands, sizes)
        return (out, lse) if problem.return_lse else (out,)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How the work is cut."""

    tokens: int  # new tokens of a query block
    pages: int  # of a step
    num_blocks: Size  # as many query blocks as there may be
    together: int  # query blocks of a step

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
        num_blocks = problem.total_tokens // block_q + least(problem.num_seqs, problem.total_tokens)
        row_bytes = max(token_bytes, 4 * problem.num_heads * block_q)
        together = block_bytes // (pages * problem.page_size * row_bytes)
        return cls(block_q, pages, num_blocks, least(max(together, 1), num_blocks))


class QueryBlocks(NamedTuple):
    """A few query blocks: which tokens they are, and what those see."""

    seq: jax.Array  # int32 [blocks]
    token: jax.Array  # int32 [blocks, tokens]
    place: jax.Array  # int32 [blocks, tokens]: which token of its sequence each is
    position: jax.Array  # int32 [blocks, tokens]: what window and slopes count from
    context: jax.Array  # int32 [blocks]: tokens of the sequence before its new ones
    inside: jax.Array  # bool [blocks, tokens]: it is a token, and of this sequence
    first: jax.Array  # int32 [blocks, tokens]: no token before it is visible
    last: jax.Array  # int32 [blocks, tokens]: nor this one or one after it
    window: Any  # int32 [blocks, tokens], or None
    newer: jax.Array  # int32 [blocks, tokens]: new tokens of the sequence after each


def query_blocks(problem, operands, sizes, bounds, which) -> QueryBlocks:
    """Return the query blocks that `which` numbers: sequence by sequence."""
    counts = block_counts(bounds, sizes)
    items = number_items(problem, operands.context_lens, bounds, counts, sizes.tokens, which)
    nth = jnp.arange(sizes.tokens, dtype=jnp.int32)[None]
    inside = nth < items.num_tokens[:, None]
    token = jnp.where(inside, items.row[:, None] + nth, problem.total_tokens)
    place = (items.context + items.begin)[:, None] + nth
    newer = items.length[:, None] - 1 - place
    if problem.is_part:  # counted, not placed: the tokens here that each sees come first
        place = operands.row_lens.at[token].get(mode="fill", fill_value=0) - 1
    position = place
    if problem.has_positions:
        given = operands.positions.at[token].get(mode="fill", fill_value=0)
        position = jnp.maximum(given, 0)
    first, window = jnp.zeros_like(place), None
    if problem.has_window:
        window = operands.sliding_window
        if problem.own_windows:
            window = window.at[token].get(mode="fill", fill_value=0)
        window = jnp.broadcast_to(window, place.shape)
        first = jnp.maximum(position - (jnp.maximum(window, 0) - 1), 0)
        if problem.has_positions:  # those of new tokens may be anything
            first = jnp.minimum(first, jnp.maximum(items.context, 0)[:, None])
    last = jnp.broadcast_to(items.length[:, None], place.shape) if problem.tree_width else place + 1
    return QueryBlocks(
        items.seq, token, place, position, items.context, inside, first, last, window, newer
    )  # fmt: skip


def block_counts(bounds: jax.Array, sizes: Sizes) -> jax.Array:
    """Return how many query blocks each sequence has."""
    return -(-(bounds[1:] - bounds[:-1]) // sizes.tokens)


def _visible(problem, operands, blocks: QueryBlocks, key, key_position):
    """Say which of the tokens `key` each new token sees: `[blocks, tokens, keys]`."""
    sees = blocks.inside & (blocks.place >= 0)
    if problem.tree_width:
        column = key[None] - blocks.context[:, None]  # [blocks, keys]
        rows = operands.tree_mask.at[blocks.token].get(mode="fill", fill_value=False)
        is_column = (column >= 0) & (column < problem.tree_width)
        among_new = jnp.take_along_axis(rows, jnp.where(is_column, column, 0)[:, None], axis=2)
        visible = (column < 0)[:, None] | (among_new & is_column[:, None])
        visible = visible & (key[None] < (blocks.last[:, :1]))[:, None]
    else:
        visible = key[None, None] <= blocks.place[..., None]
    if problem.has_window:
        behind = blocks.position[..., None] - key_position[:, None]
        # New tokens may lie ahead of each other: a window below 1 still shows nothing.
        window = blocks.window[..., None]
        visible = visible & (behind < window) & (window > 0)
    return visible & sees[..., None]


def _key_positions(problem, operands, blocks: QueryBlocks, bounds, key):
    """Return the positions of keys: new ones may have been given others."""
    if not problem.has_positions:
        return jnp.broadcast_to(key[None], (blocks.seq.shape[0], key.shape[0]))
    new = key[None] - blocks.context[:, None]
    token = jnp.where(new >= 0, bounds[blocks.seq][:, None] + new, problem.total_tokens)
    given = operands.positions.at[token].get(mode="fill", fill_value=0)
    return jnp.where(new >= 0, jnp.maximum(given, 0), key[None])


def by_kv_head(problem, x):
    """Turn `[blocks, tokens, num_heads, ...]` to `[blocks, num_kv_heads, tokens * group, ...]`."""
    x = x.reshape(*x.shape[:2], problem.num_kv_heads, problem.group, *x.shape[3:]).swapaxes(1, 2)
    return x.reshape(*x.shape[:2], -1, *x.shape[4:])


def by_token(problem, x):
    """Turn it back."""
    x = x.reshape(*x.shape[:2], -1, problem.group, *x.shape[3:]).swapaxes(1, 2)
    return x.reshape(*x.shape[:2], problem.num_heads, *x.shape[4:])


def tokens_of(x, blocks: QueryBlocks):
    """Return the tokens of the blocks, `[blocks, tokens, ...]`; zeros for those of none."""
    return x.at[blocks.token].get(mode="fill", fill_value=0)


class Keys(NamedTuple):
    """One block of the context of a few query blocks."""

    pages: jax.Array  # int32 [blocks, pages], of which none is invalid
    ahead: jax.Array  # int32 [blocks, tokens, keys]: positions from each new token on
    visible: jax.Array  # bool [blocks, tokens, keys]
    keys: jax.Array  # [blocks, num_kv_heads, keys, head_dim], zero where nobody sees them
    values: jax.Array

    @classmethod
    def load(cls, problem, operands, sizes, bounds, blocks: QueryBlocks, block) -> "Keys":
        entry = block * sizes.pages + jnp.arange(sizes.pages, dtype=jnp.int32)
        at = (blocks.seq[:, None], entry[None])
        pages = operands.block_tables.at[at].get(mode="fill", fill_value=-1)
        valid = (pages >= 0) & (pages < problem.num_pages)
        num_keys = sizes.pages * problem.page_size
        key = block * num_keys + jnp.arange(num_keys, dtype=jnp.int32)
        key_position = _key_positions(problem, operands, blocks, bounds, key)
        visible = _visible(problem, operands, blocks, key, key_position)
        visible = visible & jnp.repeat(valid, problem.page_size, axis=1)[:, None]
        pages = jnp.where(valid, pages, 0)
        keys, values = load_pages(problem, operands, pages, visible.any(1))
        ahead = key_position[:, None] - blocks.position[..., None]
        if problem.own_distances:
            begins = operands.page_distances.at[at].get(mode="fill", fill_value=0)
            slots = jnp.arange(num_keys, dtype=jnp.int32) % problem.page_size
            from_last = jnp.repeat(begins, problem.page_size, axis=1) + slots[None]
            ahead = from_last[:, None] + blocks.newer[..., None]
        return cls(pages, ahead, visible, keys, values)

    def logits(self, problem, operands, query, keys):
        """Return the logits, `[blocks, num_kv_heads, tokens * group, keys]`, in float32."""
        scores = capped_products(problem, operands, query, keys)
        if not problem.has_alibi:
            return scores
        slopes = operands.alibi_slopes.reshape(1, problem.num_kv_heads, 1, problem.group, 1)
        ahead = slopes * self.ahead[:, None, :, None].astype(jnp.float32)
        return scores + ahead.reshape(scores.shape)

    def visible_rows(self, problem):
        """Say which tokens each row of the logits sees: `[blocks, 1, tokens * group, keys]`."""
        return jnp.repeat(self.visible, problem.group, axis=1)[:, None]


def span(problem, sizes, blocks: QueryBlocks) -> tuple[jax.Array, jax.Array]:
    """Return the blocks of pages `[begin, end)` that some of the new tokens sees a token of."""
    num_keys = sizes.pages * problem.page_size
    sees = blocks.inside & (blocks.place >= 0) & (blocks.first < blocks.last)
    begin = jnp.min(jnp.where(sees, blocks.first, jnp.iinfo(jnp.int32).max)) // num_keys
    return begin, -(-jnp.max(jnp.where(sees, blocks.last, 0)) // num_keys)


def sinks_of_rows(problem, operands, blocks: QueryBlocks) -> jax.Array | None:
    """Return each row's sink, `[blocks, num_kv_heads, tokens * group]`."""
    if not problem.has_sinks:
        return None
    of_tokens = jnp.broadcast_to(operands.sinks, (*blocks.token.shape, problem.num_heads))
    return by_kv_head(problem, of_tokens)


def _attend_blocks(problem, operands, sizes, bounds, blocks: QueryBlocks):
    """Return output and LSE of a few query blocks, `[blocks, tokens, num_heads, ...]`."""
    query = by_kv_head(problem, tokens_of(operands.query, blocks))

    def step(block, state):
        seen = Keys.load(problem, operands, sizes, bounds, blocks, block)
        scores = seen.logits(problem, operands, query, seen.keys)
        scores = jnp.where(seen.visible_rows(problem), scores, -jnp.inf)
        return accumulate(state, scores, seen.values)

    begin, end = span(problem, sizes, blocks)
    state = nothing_seen(query.shape[:3], problem.value_head_dim)
    state = lax.fori_loop(begin, end, step, state)
    out, lse = finish(state, sinks_of_rows(problem, operands, blocks))
    return rounded(by_token(problem, out), problem.out_dtype), by_token(problem, lse)


def _attend(
    problem: RaggedPageAttentionProblem, operands: RaggedPageAttentionOperands, sizes: Sizes
):
    bounds = sane_bounds(problem, operands.cu_q_lens)
    num_blocks = block_counts(bounds, sizes).sum(dtype=jnp.int32)

    def step(number, results):
        which = number * sizes.together + jnp.arange(sizes.together, dtype=jnp.int32)
        blocks = query_blocks(problem, operands, sizes, bounds, which)
        found = _attend_blocks(problem, operands, sizes, bounds, blocks)
        return tuple(
            result.at[blocks.token].set(x, mode="drop") for result, x in zip(results, found)
        )

    out_type, lse_type = dataclasses.replace(problem, return_lse=True).results
    # What is no sequence's stays as it is here.
    nothing = jnp.full(lse_type.shape, -jnp.inf, lse_type.dtype)
    results = (jnp.zeros(out_type.shape, out_type.dtype), nothing)
    return lax.fori_loop(0, -(-num_blocks // sizes.together), step, results)
