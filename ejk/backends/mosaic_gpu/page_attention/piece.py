"""Which piece of which context is a program's."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax

from ejk.backends.mosaic_gpu._arithmetic import divide_up
from ejk.backends.mosaic_gpu._pages import in_pages
from ejk.backends.mosaic_gpu._tensor_cores import ROWS
from ejk.backends.mosaic_gpu.page_attention.memory import Inputs
from ejk.backends.mosaic_gpu.page_attention.sizes import BLOCK_KV, LatentSizes


class Piece(NamedTuple):
    """A program's share of the work."""

    seq: Any
    head: Any  # the first
    token: Any  # the first: a row of query and output
    table: Any  # which of the tables
    low: Any  # positions in [low, high) are visible
    high: Any
    common: Any  # those before it also to the first of several tokens
    part: Any  # the part that is written, or -1: the result itself
    first_block: Any
    blocks: Any  # at least one, of which nothing may be visible


def my_piece(inputs: Inputs, sizes: LatentSizes) -> tuple[Any, Piece]:
    """Return which piece of which context is this program's, and whether there is one."""
    problem, cut = sizes.problem, sizes.cut
    # Programs of one piece follow each other: what one reads the next finds in the cache.
    program, groups = lax.axis_index("program"), problem.num_heads // sizes.rows
    piece, head = lax.div(program, groups), lax.rem(program, groups) * ROWS
    split, is_mine, part = jnp.int32(0), jnp.bool(True), jnp.int32(-1)
    begin, reach = jnp.int32(0), jnp.int32(0)
    if cut.plan:
        seq, begin, reach, part = (inputs.work[1 + piece, i] for i in range(4))
        # Whatever the plan says, nothing outside is touched.
        is_mine = (piece < inputs.work[0, 0]) & (seq >= 0) & (seq < problem.num_seqs)
        is_mine &= part < sizes.num_parts
        # The first piece of a window begins at -1 - first: the window itself will say.
        begin = jnp.clip(begin, 0, problem.capacity)
    else:
        seq, split = lax.div(piece, cut.num_splits), lax.rem(piece, cut.num_splits)
    seq = jnp.clip(seq, 0, problem.num_seqs - 1)
    length = jnp.clip(inputs.context_lens[seq], 0, problem.capacity)
    first = jnp.int32(0)
    if inputs.sliding_window is not None:
        window = inputs.sliding_window[seq if problem.own_windows else 0]
        first = jnp.maximum(length - jnp.maximum(window, 0), 0)
    if not cut.plan:
        first_block, last_block = lax.div(first, BLOCK_KV), blocks_of(length)
        each = divide_up(last_block - first_block, cut.num_splits)
        block = jnp.minimum(first_block + split * each, last_block)
        begin, reach = block * BLOCK_KV, jnp.minimum(block + each, last_block) * BLOCK_KV
        part = piece if sizes.num_parts else part
    low, high = jnp.maximum(begin, first), jnp.minimum(reach, length)
    first_block = lax.div(low, BLOCK_KV)
    blocks = jnp.maximum(blocks_of(high) - first_block, 1)
    table = seq if inputs.tables is None else inputs.tables[seq]
    token, common = seq, high
    if inputs.spans is not None:
        end = inputs.spans[seq, 1]
        token = jnp.maximum(end - sizes.tokens, 0)
        common = length - (end - 1 - token)
    return is_mine, Piece(seq, head, token, table, low, high, common, part, first_block, blocks)


def blocks_of(tokens: Any) -> Any:
    return divide_up(tokens, BLOCK_KV)


def pages_of(j: Any, piece: Piece, inputs: Inputs, sizes: LatentSizes) -> tuple[Any, ...]:
    """Return the ids of a block's pages, or the last of the table where it ends."""
    first = lax.div((piece.first_block + j) * BLOCK_KV, sizes.problem.page_size)
    places = (jnp.minimum(first + i, sizes.problem.max_blocks - 1) for i in range(sizes.copies))
    return tuple(inputs.block_tables[piece.table, place] for place in places)


def is_partial(j: Any, exist: Any, piece: Piece, sizes: LatentSizes) -> Any:
    """Say whether some row does not see all of a block; `exist` has a bit for each of its pages."""
    first = (piece.first_block + j) * BLOCK_KV
    some = (first < piece.low) | (first + BLOCK_KV > jnp.minimum(piece.high, piece.common))
    return some | (exist != (1 << sizes.copies) - 1)


def visible(token: Any, j: Any, exist: Any, piece: Piece, sizes: LatentSizes) -> Any:
    """Say which tokens of a block are visible to some row, counted from its first."""
    position = token + (piece.first_block + j) * BLOCK_KV
    there = in_pages(token, exist, sizes.copied_rows)
    return (position >= piece.low) & (position < piece.high) & there


def is_before(row: Any, token: Any, j: Any, piece: Piece, sizes: LatentSizes) -> Any:
    """Say which tokens of a block are not after a row's own."""
    position = token + (piece.first_block + j) * BLOCK_KV
    return position < piece.common + lax.div(row, jnp.full_like(row, sizes.heads))


def is_own(token: Any, piece: Piece, inputs: Inputs) -> Any:
    """Say whether a token that is read is the sequence's: others' may come before and after."""
    if inputs.spans is None:
        return jnp.bool(True)
    begin, end = (inputs.spans[piece.seq, i] for i in range(2))
    return (token >= begin) & (token < end)
