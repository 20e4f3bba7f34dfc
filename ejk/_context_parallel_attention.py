"""`ejk.context_parallel_attention`: pages split over devices, each attending to its own."""

from typing import Literal, overload

import jax

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
from ejk._page_attention import BACKENDS
from ejk._page_attention_problem import problem_of, shared_operands
from ejk._rounding import rounded
from ejk._typing import (
    Cache,
    Flag,
    Lengths,
    PerHead,
    Query,
    Scalar,
    ScalarInt,
    StaticFloat,
    StaticInt,
    Tables,
    typed,
)
from ejk.backends.page_attention import CacheLayout, PageAttentionOperands, PageAttentionProblem
from ejk.backends.reverse_mode.page_attention import differentiable


@overload
def context_parallel_attention(
    query: Query,
    key_cache: Cache,
    value_cache: Cache | None,
    context_lens: Lengths,
    block_tables: Tables,
    attn_scale: Scalar | None = None,
    max_context_len: StaticInt | None = None,
    num_splits: StaticInt = 0,
    *,
    axis_name: AxisName,
    page_offset: ScalarInt = 0,
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
def context_parallel_attention(
    query: Query,
    key_cache: Cache,
    value_cache: Cache | None,
    context_lens: Lengths,
    block_tables: Tables,
    attn_scale: Scalar | None = None,
    max_context_len: StaticInt | None = None,
    num_splits: StaticInt = 0,
    *,
    axis_name: AxisName,
    page_offset: ScalarInt = 0,
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
def context_parallel_attention(
    query: Query,
    key_cache: Cache,
    value_cache: Cache | None,
    context_lens: Lengths,
    block_tables: Tables,
    attn_scale: Scalar | None = None,
    max_context_len: StaticInt | None = None,
    num_splits: StaticInt = 0,
    *,
    axis_name: AxisName,
    page_offset: ScalarInt = 0,
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
def context_parallel_attention(
    query: Query,
    key_cache: Cache,
    value_cache: Cache | None,
    context_lens: Lengths,
    block_tables: Tables,
    attn_scale: Scalar | None = None,
    max_context_len: StaticInt | None = None,
    num_splits: StaticInt = 0,
    *,
    axis_name: AxisName,
    page_offset: ScalarInt = 0,
    cache_layout: CacheLayout = "HND",
    sliding_window: ScalarInt | None = None,
    attn_logits_soft_cap: StaticFloat | None = None,
    sinks: PerHead | None = None,
    alibi_slopes: PerHead | None = None,
    value_head_dim: StaticInt | None = None,
    return_lse: Flag = False,
    backend: str | Backend | None = None,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Attend as `ejk.page_attention` does, to pages that are split over devices.

    For use inside `jax.shard_map`. Each device holds `local_pages` pages of one large pool, and
    the table names them all: page `i` of the device with index `d` along `axis_name` has the id
    `d * local_pages + i`, which is what it is in a pool that is sharded on its axis of pages.
    Devices may hold any pages of any sequence, in any order; a page that none holds, outside
    `[0, devices * local_pages)`, hides its tokens.

    Each device attends to the pages that it holds, found in the table and put next to each other,
    and one `all_gather` of `num_seqs * num_heads * (value_head_dim + 1)` float32 a device, the
    outputs and the LSEs, goes between them: its bytes do not depend on the contexts. The result
    is the same on every device, and known to be: under `check_vma` it does not vary over
    `axis_name`. It has the reverse mode of `ejk.page_attention`, outside `shard_map` or under
    `check_vma`.

    Args:
        query: as in `ejk.page_attention`, the same on every device along `axis_name`.
        key_cache: the pages of this device.
        value_cache: as in `ejk.page_attention`.
        context_lens: tokens of each sequence on all devices together; the same on each of them.
        block_tables: the ids of pages on all devices; the same on each of them.
        attn_scale: as in `ejk.page_attention`, and so are the options below that are not listed.
        max_context_len: a bound on `context_lens`.
        num_splits: parts that each device cuts what it has of a sequence in.
        axis_name: the mesh axis, or axes, of `jax.shard_map` that the pages are split over.
        page_offset: added to a page's place on its device, after it was found. Where each device's
            pool holds those of all layers, one layer after the other, and the table names pages
            of the first, it is `layer * pages_of_a_layer`: the compact table is then made once
            for all layers that one compilation sees. May be traced; at least 0.

    Returns:
        As `ejk.page_attention`.

    Raises:
        TypeError: an argument of the wrong rank or dtype kind.
        ValueError: arguments that do not fit each other, a value out of range, no such axis, or
            an argument that varies over `axis_name` but must not.
        UnsupportedError: no backend that was asked for can run the call; every reason is named.

    Examples:
        >>> import jax, jax.numpy as jnp, ejk
        >>> from jax.sharding import PartitionSpec as P
        >>> mesh = jax.make_mesh((1,), ("pages",), devices=jax.devices()[:1])
        >>> def attend(query, pool, lens, tables):
        ...     return ejk.context_parallel_attention(
        ...         query, pool, pool, lens, tables, axis_name="pages"
        ...     )
        >>> split = jax.shard_map(
        ...     attend, mesh=mesh, in_specs=(P(), P("pages"), P(), P()), out_specs=P()
        ... )
        >>> pool, tables = jnp.ones((8, 2, 16, 64)), jnp.array([[3, 5], [1, 0]])
        >>> pool = jax.device_put(pool, jax.NamedSharding(mesh, P("pages")))
        >>> jax.jit(split)(jnp.ones((2, 4, 64)), pool, jnp.array([20, 1]), tables).shape
        (2, 4, 64)

    Source:
        merging after Flash-Decoding (Dao et al., 2023) and Tree Attention (Shyam et al., 2024,
        arXiv:2408.04093).
    """
    check_alike(
        axis_name,
        page_offset,
        query=query,
        context_lens=context_lens,
        block_tables=block_tables,
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
        max_context_len=max_context_len,
        num_splits=num_splits,
        cache_layout=cache_layout,
        sliding_window=sliding_window,
        soft_cap=attn_logits_soft_cap,
        sinks=sinks,
        alibi_slopes=alibi_slopes,
        value_head_dim=value_head_dim,
        plan=None,
        return_lse=return_lse,
    )
    choice = _dispatch.choose(backend, PageAttentionProblem, BACKENDS)
    part = part_of(problem)
    if 0 in (part.num_seqs, part.capacity, part.num_pages):
        given = (query, key_cache, value_cache, context_lens, block_tables)
        out, lse = nothing_found(part, given)
    else:
        own = own_pages(axis_name, part, context_lens, block_tables, page_offset, sliding_window)
        operands = PageAttentionOperands(
            **shared_operands(query, key_cache, value_cache, attn_scale, None, alibi_slopes),
            context_lens=own.lens,
            block_tables=own.tables,
            sliding_window=own.windows,
            plan=None,
            page_distances=own.distances,
        )
        out, lse = differentiable(part, choice, operands)
    out, lse = merge_over(axis_name, out, lse, sinks)
    out = rounded(out, problem.out_dtype)
    return (out, lse) if return_lse else out
