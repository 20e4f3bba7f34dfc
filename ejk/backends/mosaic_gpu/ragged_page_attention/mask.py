"""Which tokens of a block each row sees, and which blocks need no mask."""

from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from ejk.backends.mosaic_gpu._arithmetic import divide_up
from ejk.backends.mosaic_gpu._pages import exists, in_pages, page_bits
from ejk.backends.mosaic_gpu._private import ROW, TILE
from ejk.backends.mosaic_gpu._tensor_cores import ROWS
from ejk.backends.mosaic_gpu.ragged_page_attention.memory import Inputs
from ejk.backends.mosaic_gpu.ragged_page_attention.sizes import PrefillSizes
from ejk.backends.mosaic_gpu.ragged_page_attention.tiles import Tile, window_of


def positions(tile: Tile, warpgroup: Any, sizes: PrefillSizes) -> Any:
    """Return the position of each row of a warpgroup, `[ROWS]`."""
    row = plgpu.broadcasted_iota(jnp.int32, (ROWS,), 0, layout=ROW)
    token = lax.div(row, jnp.full_like(row, sizes.group)) if sizes.group > 1 else row
    return token + (tile.position + warpgroup * sizes.own_tokens)


def _blind(tile: Tile, sizes: PrefillSizes) -> Any:
    """Return how many first tokens of a tile see nothing; at most 0: none."""
    if sizes.problem.causal:
        return -tile.position
    return jnp.where(tile.end > 0, 0, tile.count)


def some_see_nothing(tile: Tile, warpgroup: Any, sizes: PrefillSizes) -> Any:
    """Say whether some rows of a warpgroup have no token, or one that sees nothing."""
    if sizes.own_rows < ROWS:
        return True
    is_short = tile.count < (warpgroup + 1) * sizes.own_tokens
    return is_short | (_blind(tile, sizes) > 0)


def rows_that_see(tile: Tile, warpgroup: Any, shape: tuple[int, ...], sizes: PrefillSizes) -> Any:
    """Say which rows of a warpgroup, along axis 0, have a token that sees anything."""
    row = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=TILE)
    token = lax.div(row, jnp.full_like(row, sizes.group)) + warpgroup * sizes.own_tokens
    return (row < sizes.own_rows) & (token < tile.count) & (token >= _blind(tile, sizes))


def unmasked(
    tile: Tile, warpgroup: Any, scale: Any, inputs: Inputs, sizes: PrefillSizes
) -> tuple[Any, Any]:
    """Return the blocks `[start, stop)` of which every row of a warpgroup sees all tokens.

    The block before each of them has no values to clear, either: all warpgroups clear together, see
    `is_partial`.
    """
    first, blocks = tile.first_block(sizes), tile.blocks(sizes)
    nearest = tile.position + warpgroup * sizes.own_tokens
    reach = jnp.minimum(tile.end, tile.whole)
    if sizes.problem.causal:
        reach = jnp.minimum(nearest + 1, reach)
    stop = jnp.clip(lax.div(reach, sizes.block_kv) - first, 0, blocks)
    # A negative scale would make the largest product the smallest logit: see `softmax.weigh`.
    stop = jnp.where(scale >= 0, stop, 0)
    if inputs.sliding_window is None:
        return jnp.int32(0), stop
    farthest = jnp.maximum(nearest + (sizes.own_tokens - 1), 0)
    start = divide_up(jnp.maximum(farthest - (window_of(inputs) - 1), 0), sizes.block_kv) - first
    for begin, least in ((tile.begin, 1), (tile.seen_begin, 2)):
        start = jnp.where(begin > first * sizes.block_kv, jnp.maximum(start, least), start)
    return jnp.minimum(start, stop), stop


def existing(tile: Tile, j: Any, inputs: Inputs, sizes: PrefillSizes) -> Any:
    """Return a bit for each page of block `j` that there is."""
    problem = sizes.problem
    first = (tile.first_block(sizes) + j) * sizes.block_kv
    everything = jnp.int32((1 << sizes.copies) - 1)

    def look() -> Any:
        place = lax.div(first, problem.page_size)
        places = (jnp.minimum(place + i, problem.max_blocks - 1) for i in range(sizes.copies))
        pages = (inputs.block_tables[tile.seq, place] for place in places)
        return page_bits(exists(page, problem.num_pages) for page in pages)

    is_whole = jnp.minimum(first + sizes.block_kv, tile.seen_end) <= tile.whole
    return lax.cond(is_whole, lambda: everything, look)


def is_partial(tile: Tile, j: Any, exist: Any, sizes: PrefillSizes) -> Any:
    """Say whether some tokens of block `j` are visible to no row of the sequence.

    Tokens that only its other tiles see need not be cleared: they hold numbers, too.
    """
    first = (tile.first_block(sizes) + j) * sizes.block_kv
    some = (first < tile.seen_begin) | (first + sizes.block_kv > tile.seen_end)
    return some | (exist != (1 << sizes.copies) - 1)


def limits(
    tile: Tile, j: Any, position: Any, inputs: Inputs, sizes: PrefillSizes
) -> tuple[Any, Any]:
    """Return which tokens of block `j` the rows at `position` see, counted in it: `[ROWS]` each."""
    first = (tile.first_block(sizes) + j) * sizes.block_kv
    begins = plgpu.layout_cast(jnp.full_like(position, tile.begin), ROW)
    ends = plgpu.layout_cast(jnp.full_like(position, tile.end), ROW)
    if sizes.problem.causal:
        ends = jnp.minimum(position + 1, tile.end)
    if inputs.sliding_window is not None:
        nearest = position if sizes.problem.causal else jnp.maximum(position, 0)
        begins = jnp.maximum(nearest - (window_of(inputs) - 1), begins)
    return begins - first, ends - first


def visible_to_some(
    tile: Tile, j: Any, exist: Any, first: Any, shape: tuple[int, ...], sizes: PrefillSizes
) -> Any:
    """Say which tokens of block `j`, from its `first` on, are visible to a row, along axis 0."""
    token = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=TILE) + first
    key = token + (tile.first_block(sizes) + j) * sizes.block_kv
    there = in_pages(token, exist, sizes.copied_rows)
    return there & (key >= tile.seen_begin) & (key < tile.seen_end)
