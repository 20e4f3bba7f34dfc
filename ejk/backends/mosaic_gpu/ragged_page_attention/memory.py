"""What a program reads, writes and shares: by names, with its types."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from ejk.backends.layouts import LAYOUTS
from ejk.backends.mosaic_gpu._shared_memory import swizzled
from ejk.backends.mosaic_gpu._tensor_cores import ROWS, SWIZZLED_BYTES
from ejk.backends.mosaic_gpu.ragged_page_attention.sizes import PrefillSizes
from ejk.backends.ragged_page_attention import RaggedPageAttentionProblem

TILE_FIELDS = 16  # integers in shared memory: those of a `Tile`, and some more


class Inputs(NamedTuple):
    """Arrays in global memory."""

    query: Any  # [total_tokens, num_kv_heads, group, head_dim]
    key: Any  # [num_slabs, page_size, columns]: see `slabs`
    value: Any  # the same; None: `key` has the values, too
    block_tables: Any  # int32 [num_seqs, max_blocks]
    attn_scale: Any  # float32 [1], or [num_kv_heads] with the scales of keys
    value_scale: Any  # of quantised values, float32 [num_kv_heads], or None
    # Those of tokens, of keys and values side by side: see `ordered_scales`. Or None.
    token_scales: Any  # float32 [num_kv_heads, num_seqs * blocks, 2, block_kv]
    sliding_window: Any  # int32 [1], or None
    sinks: Any  # float32 [num_kv_heads, ROWS]: see `heads_by_row`; or None
    alibi_slopes: Any  # the same
    whole: Any  # int32 [num_seqs]: up to there all pages exist that new tokens see
    work: Any  # int32 [rows, ITEM]: see `RaggedPlan`


class Outputs(NamedTuple):
    """Arrays in global memory: a tile that is all of what its rows see writes the last two."""

    part_out: Any  # float32 [parts * block_rows, num_kv_heads, head_dim], or None
    part_lse: Any  # float32, log2 [parts * block_rows, num_kv_heads], or None
    out: Any  # [total_tokens, num_kv_heads, group, head_dim]
    lse: Any  # float32 [total_tokens, num_kv_heads, group], or None


class Shared(NamedTuple):
    """What the warpgroups of a program share.

    Queries and results of a tile lie in one of `q_slots` slots, blocks in one of `stages`.
    """

    query: Any  # see `views_of`
    keys: Any  # [stages, block_kv, head_dim]
    values: Any  # the same
    scales: Any  # float32 [scale_slots, 2, block_kv]: of keys' and values' tokens; or None
    weights: Any  # [warpgroups, ROWS, block_kv]: the interpreter takes no operand from registers
    by_row: Any  # float32 [warpgroups, ROWS]: the LSE on its way out
    tile: Any  # int32 [q_slots, TILE_FIELDS]
    query_there: Any  # barriers [q_slots]
    query_free: Any
    keys_there: Any  # [stages]
    keys_free: Any
    values_there: Any
    values_free: Any
    turn: Any  # [warpgroups]
    cleared: Any


def slabs(pool: Any, problem: RaggedPageAttentionProblem) -> Any:
    """View a pool as one of keys or values alone: of fused pools, pages of each take turns."""
    shape, halves = pool.shape, problem.layout.halves
    if halves is None:
        return pool
    return pool.reshape(*shape[: halves - 1], 2 * shape[halves - 1], *shape[halves + 1 :])


def rows_of_page(
    pool: Any, page: Any, kv_head: Any, first: Any, half: int, sizes: PrefillSizes
) -> Any:
    """Return a KV head's rows of a page of keys (`half` 0) or values (1), from `first` on."""
    problem = sizes.problem
    layout = LAYOUTS[problem.cache_layout]  # of `slabs`
    index: list[Any] = [None] * 3
    index[layout.pages] = 2 * page + half if problem.layout.num_axes == 5 else page
    index[layout.kv_heads] = 2 * kv_head + half if layout.interleaved else kv_head
    index[layout.slots] = pl.ds(first, sizes.copied_rows)
    return pool.at[tuple(index)]


def scales_of_block(shared: Shared, n: Any, sizes: PrefillSizes) -> Any:
    """Return the memory of the scales of block `n`, counted over all tiles: `[2, block_kv]`."""
    return shared.scales.at[lax.rem(n, sizes.scale_slots)]


def heads_by_row(x: Any, problem: RaggedPageAttentionProblem) -> Any:
    """Repeat what each query head has for every row of a warpgroup: `[num_kv_heads, ROWS]`."""
    by_group = x.reshape(problem.num_kv_heads, problem.group)
    return jnp.tile(by_group, (1, -(-ROWS // problem.group)))[:, :ROWS]


class Views(NamedTuple):
    """One memory, as the tensor cores see it and as copies do, whose rows may begin anywhere.

    Mosaic asks that nothing be read through one view that was written through the other. This
    kernel does just that: a row of 128 swizzled bytes lies in the same place in both.
    """

    tiles: Any  # [q_slots, warpgroups, chunks, ROWS, columns]
    rows: Any  # [q_slots, warpgroups, chunks, own_tokens, group, columns], or as `tiles`

    def box(self, slot: Any, warpgroup: Any, chunk: int, sizes: PrefillSizes) -> Any:
        """Return the rows of all tokens of a warpgroup, where one copy takes them."""
        assert sizes.in_one_box
        return self.rows.at[slot, warpgroup, chunk]

    def token(self, slot: Any, warpgroup: Any, chunk: int, token: Any, sizes: PrefillSizes) -> Any:
        """Return the rows of one token of a warpgroup."""
        own = token if sizes.in_one_box else pl.ds(token * sizes.group, sizes.group)
        return self.rows.at[slot, warpgroup, chunk, own]


def views_of(union: Any, sizes: PrefillSizes, of_parts: bool = False) -> Views:
    """Return the memory of queries and results: of the query's type, or of float32 for parts."""
    if sizes.interpret:  # which knows no two views of one memory
        return Views(union[of_parts], union[of_parts])
    return Views(*union[2 * of_parts : 2 * of_parts + 2])


def shared_types(sizes: PrefillSizes) -> Shared:
    """Return how much of what is shared."""
    dtype, head_dim = sizes.problem.query_dtype, sizes.problem.head_dim
    scaled = sizes.problem.scales == "token"

    def barriers(number: int, arrivals: int = sizes.warpgroups) -> Any:
        return plgpu.Barrier(num_arrivals=arrivals, num_barriers=number)

    pairs = [_views(sizes, x) for x in (dtype, jnp.float32)[: 1 + sizes.has_parts]]
    views = [view for pair in pairs for view in pair]
    block = swizzled((sizes.stages, sizes.block_kv, head_dim), dtype)
    weights = swizzled((sizes.warpgroups, ROWS, sizes.block_kv), dtype)
    return Shared(
        query=tuple(views[::2]) if sizes.interpret else plgpu.RefUnion(*views),
        keys=block,
        values=block,
        scales=plgpu.SMEM((sizes.scale_slots, 2, sizes.block_kv), jnp.float32) if scaled else None,
        weights=weights if sizes.interpret else None,
        by_row=plgpu.SMEM((sizes.warpgroups, ROWS), jnp.float32),
        tile=plgpu.SMEM((sizes.q_slots, TILE_FIELDS), jnp.int32),
        query_there=barriers(sizes.q_slots, sizes.query_copies),
        query_free=barriers(sizes.q_slots),
        keys_there=barriers(sizes.stages, sizes.copies + scaled),
        keys_free=barriers(sizes.stages),
        values_there=barriers(sizes.stages, sizes.copies),
        values_free=barriers(sizes.stages),
        turn=barriers(sizes.warpgroups, 1) if sizes.plain else None,
        cleared=barriers(1),
    )


def _views(sizes: PrefillSizes, dtype: Any) -> tuple[Any, Any]:
    width = SWIZZLED_BYTES // jnp.dtype(dtype).itemsize
    slots = (sizes.q_slots, sizes.warpgroups, sizes.chunks)
    rows = (sizes.own_tokens, sizes.group) if sizes.in_one_box else (ROWS,)
    tiles = swizzled((*slots, ROWS, width), dtype)
    return tiles, swizzled((*slots, *rows, width), dtype, tiled=False)
