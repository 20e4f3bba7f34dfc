"""`ejk.context_parallel_ragged_attention`: ragged batches on pages split over devices."""

from typing import Literal, overload

import jax
import jax.numpy as jnp

from ejk import _dispatch
from ejk._context_parallel import (
    AxisName,
    check_alike,
    merge_over,
    nothing_found,
    own_pages,
    part_of,
)
from ejk._dispatch import Backend
from ejk._indices import as_int32
from ejk._page_attention_problem import shared_operands
from ejk._ragged_page_attention import BACKENDS, problem_of
from ejk._rounding import rounded
from ejk._typing import (
    Bounds,
    Cache,
    Flag,
    Lengths,
    PerHead,
    Scalar,
    ScalarInt,
    StaticFloat,
    StaticInt,
    Tables,
    Tokens,
    typed,
)
from ejk.backends.page_attention import CacheLayout
from ejk.backends.ragged_page_attention import (
    RaggedPageAttentionOperands,
    RaggedPageAttentionProblem,
    sane_bounds,
    sequences_of_rows,
)
from ejk.backends.reverse_mode.ragged_page_attention import differentiable


@overload
def context_parallel_ragged_attention(
    query: Tokens,
    key_cache: Cache,
    value_cache: Cache | None,
    context_lens: Lengths,
    block_tables: Tables,
    cu_q_lens: Bounds,
    attn_scale: Scalar | None = None,
    *,
    axis_name: AxisName,
    page_offset: ScalarInt = 0,
    max_q_len: StaticInt | None = None,
    max_context_len: StaticInt | None = None,
    cache_layout: CacheLayout = "HND",
    sliding_window: ScalarInt | None = None,
    attn_logits_soft_cap: StaticFloat | None = None,
    sinks: PerHead | None = None,
    alibi_slopes: PerHead | None = None,
    value_head_dim: StaticInt | None = None,
    return_lse: Literal[False] = False,
    backend: str | Backend | None = None,
) -> jax.Array: ...
@overload
def context_parallel_ragged_attention(
    query: Tokens,
    key_cache: Cache,
    value_cache: Cache | None,
    context_lens: Lengths,
    block_tables: Tables,
    cu_q_lens: Bounds,
    attn_scale: Scalar | None = None,
    *,
    axis_name: AxisName,
    page_offset: ScalarInt = 0,
    max_q_len: StaticInt | None = None,
    max_context_len: StaticInt | None = None,
    cache_layout: CacheLayout = "HND",
    sliding_window: ScalarInt | None = None,
    attn_logits_soft_cap: StaticFloat | None = None,
    sinks: PerHead | None = None,
    alibi_slopes: PerHead | None = None,
    value_head_dim: StaticInt | None = None,
    return_lse: Literal[True],
    backend: str | Backend | None = None,
) -> tuple[jax.Array, jax.Array]: ...
@overload
def context_parallel_ragged_attention(
    query: Tokens,
    key_cache: Cache,
    value_cache: Cache | None,
    context_lens: Lengths,
    block_tables: Tables,
    cu_q_lens: Bounds,
    attn_scale: Scalar | None = None,
    *,
    axis_name: AxisName,
    page_offset: ScalarInt = 0,
    max_q_len: StaticInt | None = None,
    max_context_len: StaticInt | None = None,
    cache_layout: CacheLayout = "HND",
    sliding_window: ScalarInt | None = None,
    attn_logits_soft_cap: StaticFloat | None = None,
    sinks: PerHead | None = None,
    alibi_slopes: PerHead | None = None,
    value_head_dim: StaticInt | None = None,
    return_lse: Flag,
    backend: str | Backend | None = None,
) -> jax.Array | tuple[jax.Array, jax.Array]: ...
@typed
def context_parallel_ragged_attention(
    query: Tokens,
    key_cache: Cache,
    value_cache: Cache | None,
    context_lens: Lengths,
    block_tables: Tables,
    cu_q_lens: Bounds,
    attn_scale: Scalar | None = None,
    *,
    axis_name: AxisName,
    page_offset: ScalarInt = 0,
    max_q_len: StaticInt | None = None,
    max_context_len: StaticInt | None = None,
    cache_layout: CacheLayout = "HND",
    sliding_window: ScalarInt | None = None,
    attn_logits_soft_cap: StaticFloat | None = None,
    sinks: PerHead | None = None,
    alibi_slopes: PerHead | None = None,
    value_head_dim: StaticInt | None = None,
    return_lse: Flag = False,
    backend: str | Backend | None = None,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Attend as `ejk.ragged_page_attention` does, to pages that are split over devices.

    For use inside `jax.shard_map`, as `ejk.context_parallel_attention`: the pages, the one
    `all_gather`, of `total_tokens * num_heads * (value_head_dim + 1)` float32 a device, and what
    has to be the same on every device are described there. Queries are not split: each device
    attends from all new tokens to the pages that it holds. There are neither positions of the
    caller's own nor tree masks.

    Args:
        query: as in `ejk.ragged_page_attention`, the same on every device along `axis_name`.
        key_cache: the pages of this device.
        value_cache: as in `ejk.page_attention`.
        context_lens: tokens of each sequence on all devices together, the new ones included.
        block_tables: the ids of pages on all devices.
        cu_q_lens: as in `ejk.ragged_page_attention`, and so are the options that are not listed.
        attn_scale: multiplies the logits; `head_dim ** -0.5` if None. May be traced.
        axis_name: the mesh axis, or axes, of `jax.shard_map` that the pages are split over.
        page_offset: as in `ejk.context_parallel_attention`.

    Returns:
        As `ejk.ragged_page_attention`.

    Raises:
        TypeError: an argument of the wrong rank or dtype kind.
        ValueError: arguments that do not fit each other, a value out of range, no such axis, or
            an argument that varies over `axis_name` but must not.
        UnsupportedError: no backend that was asked for can run the call; every reason is named.
    """
    check_alike(
        axis_name,
        page_offset,
        query=query,
        context_lens=context_lens,
        block_tables=block_tables,
        cu_q_lens=cu_q_lens,
        attn_scale=attn_scale,
        sliding_window=sliding_window,
        sinks=sinks,
        alibi_slopes=alibi_slopes,
    )
    problem = problem_of(
        query,
        key_cache,
        value_cache,
        context_lens,
        block_tables,
        cu_q_lens,
        max_q_len=max_q_len,
        max_context_len=max_context_len,
        cache_layout=cache_layout,
        sliding_window=sliding_window,
        soft_cap=attn_logits_soft_cap,
        sinks=sinks,
        alibi_slopes=alibi_slopes,
        value_head_dim=value_head_dim,
        return_lse=return_lse,
    )
    choice = _dispatch.choose(backend, RaggedPageAttentionProblem, BACKENDS)
    part = part_of(problem)
    bounds = sane_bounds(part, jnp.asarray(as_int32(cu_q_lens, part.total_tokens)))
    is_new, seq = sequences_of_rows(part, bounds)
    if 0 in (part.total_tokens, part.num_seqs, part.capacity, part.num_pages):
        given = (query, key_cache, value_cache, context_lens, block_tables, bounds)
        out, lse = nothing_found(part, given)
    else:
        own = own_pages(axis_name, part, context_lens, block_tables, page_offset)
        lens = jnp.clip(as_int32(context_lens, part.capacity), 0, part.capacity)
        left = bounds[seq + 1] - jnp.arange(part.total_tokens, dtype=jnp.int32)
        position = jnp.where(is_new, jnp.maximum(lens[seq] - left, -1), -1)
        row_lens, windows = own.up_to(seq, position, part.page_size), None
        if sliding_window is not None:
            behind = jnp.maximum(as_int32(sliding_window, 2**31 - 1), 0)
            windows = row_lens - own.up_to(seq, position - behind, part.page_size)
        operands = RaggedPageAttentionOperands(
            **shared_operands(query, key_cache, value_cache, attn_scale, None, alibi_slopes),
            context_lens=own.lens,
            block_tables=own.tables,
            cu_q_lens=bounds,
            sliding_window=windows,
            positions=None,
            tree_mask=None,
            row_lens=row_lens,
            page_distances=own.distances,
        )
        out, lse = differentiable(part, choice, operands)
    if sinks is not None:
        sinks = jnp.where(is_new[:, None], jnp.asarray(sinks)[None], -jnp.inf)
    out, lse = merge_over(axis_name, out, lse, sinks)
    out = rounded(out, problem.out_dtype)
    return (out, lse) if return_lse else out
