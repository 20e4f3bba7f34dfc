"""ejkernel's paged attentions: `ejkernel.modules`, and by the same names `ejkernel.kernels`.

Those of `modules` take arrays by place, those of a backend's `kernels` by name; here both will do.
"""

from typing import Any

import jax
import jax.numpy as jnp

from ejk._page_attention import page_attention as _page_attention
from ejk._ragged_page_attention import ragged_page_attention
from ejk._typing import Array, Bounds, Tokens
from ejk.compat._arguments import (
    Count,
    Interleaved,
    Lengths,
    Tables,
    check_arrays,
    check_mask_value,
    drop_in,
    first_sequences,
    refuse,
)
from ejk.compat._packed_pools import check_kinds
from ejk.compat.tpu_inference import attend_and_update

_SHARD = "call it inside jax.shard_map, or hand sharded arrays to jit"
_MESHES: dict[str, str] = dict.fromkeys(("mesh", "in_specs", "out_specs"), _SHARD)


@drop_in
def page_attention(
    query: Array,
    key_cache: Array,
    value_cache: Array,
    context_lens: Array,
    block_tables: Array,
    attn_scale: float | None = None,
    max_context_len: int | None = None,
    num_splits: int = 0,
    *,
    mask_value: float = -2.381976426469702e38,
    attn_logits_soft_cap: float | None = None,
    pages_per_compute_block: int | None = None,
    megacore_mode: str | None = None,
    inline_seq_dim: bool = True,
    sliding_window: int | None = None,
    num_warps: int | None = None,
    num_stages: int | None = None,
    platform: str | None = None,
    cfg: Any = None,
) -> jax.Array:
    """Attend from one token a sequence, as ejkernel's `page_attention` does.

    Its backends take pools of different layouts; here they are `[num_blocks, num_kv_heads,
    block_size, head_dim]`, as its documentation has them. Arguments from `num_warps` on have no
    effect, and neither have `pages_per_compute_block`, `megacore_mode` and `inline_seq_dim`.

    Args:
        query: as of `ejk.page_attention`, and so are all arguments that are not named here.
        key_cache: `[num_blocks, num_kv_heads, block_size, head_dim]`.
        value_cache: the same.
        context_lens: `[num_seqs]`.
        block_tables: `[num_seqs, max_blocks]`.
        attn_scale: `head_dim ** -0.5` if None.
        max_context_len: a hint.
        num_splits: 0 is automatic.
        mask_value: at most -1e4, as what is not visible has no weight.
        attn_logits_soft_cap: None caps nothing.
        pages_per_compute_block: no effect.
        megacore_mode: no effect.
        inline_seq_dim: no effect.
        sliding_window: the token itself included.
        num_warps: no effect.
        num_stages: no effect.
        platform: no effect.
        cfg: no effect.

    Returns:
        `[num_seqs, num_heads, head_dim]`.

    Raises:
        ValueError: a `mask_value` above -1e4, and what `ejk.page_attention` refuses.

    Source: the signature of ejkernel 0.0.80.
    """
    check_mask_value(mask_value)
    return _page_attention(
        query, key_cache, value_cache, context_lens, block_tables, attn_scale, max_context_len,
        num_splits, attn_logits_soft_cap=attn_logits_soft_cap, sliding_window=sliding_window,
    )  # fmt: skip


@drop_in
def ragged_page_attention_v2(
    queries: Array,
    kv_pages: Array,
    context_lens: Array,
    block_tables: Array,
    query_start_loc: Array,
    num_seqs: Array | int,
    softmax_aux: Array | None = None,
    *,
    softmax_scale: float | None = None,
    logits_soft_cap: float | None = None,
    compute_dtype: Any = jnp.bfloat16,
    optimized: bool = False,
    sliding_window: int | None = None,
    mask_value: float | None = None,
    num_kv_pages_per_block: int | None = None,
    num_queries_per_block: int | None = None,
    vmem_limit_bytes: int | None = None,
    num_warps: int | None = None,
    num_stages: int | None = None,
    platform: str | None = None,
    cfg: Any = None,
    mesh: Any = None,
    in_specs: Any = None,
    out_specs: Any = None,
) -> jax.Array:
    """Attend from ragged batches of new tokens, as ejkernel's `ragged_page_attention_v2` does.

    `optimized` and arguments from `num_kv_pages_per_block` to `cfg` have no effect. Nor has
    `compute_dtype`: products are of the queries' type and sums float32, which is never less exact.

    Args:
        queries: `[total_tokens, num_heads, head_dim]`.
        kv_pages: `[num_pages, page_size, 2 * num_kv_heads, head_dim]`, keys and values in turn.
        context_lens: `[num_seqs]`, the new tokens included.
        block_tables: `[num_seqs, pages_per_seq]`.
        query_start_loc: `[num_seqs + 1]`; what is past `num_seqs` may be anything.
        num_seqs: a number, or `[1]`. Rows of no sequence are 0.
        softmax_aux: sinks, `[num_heads]`.
        softmax_scale: `head_dim ** -0.5` if None.
        logits_soft_cap: None caps nothing.
        compute_dtype: no effect.
        optimized: no effect.
        sliding_window: the token itself included.
        mask_value: None or at most -1e4, as what is not visible has no weight.
        num_kv_pages_per_block: no effect.
        num_queries_per_block: no effect.
        vmem_limit_bytes: no effect.
        num_warps: no effect.
        num_stages: no effect.
        platform: no effect.
        cfg: no effect.
        mesh: refused, with `in_specs` and `out_specs`.
        in_specs: refused.
        out_specs: refused.

    Returns:
        `[total_tokens, num_heads, head_dim]`.

    Raises:
        UnsupportedError: a mesh or specs.
        ValueError: a `mask_value` above -1e4, and what `ejk.ragged_page_attention` refuses.

    Source: the signature of ejkernel 0.0.80.
    """
    meshes = {"mesh": mesh, "in_specs": in_specs, "out_specs": out_specs}
    refuse("ragged_page_attention_v2", _MESHES, **meshes)
    check_mask_value(mask_value)
    check_arrays(
        queries=(queries, Tokens), kv_pages=(kv_pages, Interleaved),
        context_lens=(context_lens, Lengths), block_tables=(block_tables, Tables),
        query_start_loc=(query_start_loc, Bounds), num_seqs=(num_seqs, Count),
    )  # fmt: skip
    bounds = first_sequences(query_start_loc, num_seqs)
    return ragged_page_attention(
        queries, kv_pages, None, context_lens, block_tables, bounds, softmax_scale,
        cache_layout="INTERLEAVED", sliding_window=sliding_window,
        attn_logits_soft_cap=logits_soft_cap, sinks=softmax_aux,
    )  # fmt: skip


@drop_in
def ragged_page_attention_v3(
    queries: Array,
    keys: Array,
    values: Array,
    kv_cache: Array,
    kv_lens: Array,
    block_tables: Array,
    query_start_loc: Array,
    distribution: Array,
    softmax_aux: Array | None = None,
    *,
    softmax_scale: float = 1.0,
    sliding_window: int | None = None,
    logits_soft_cap: float | None = None,
    q_scale: float | None = None,
    k_scale: float | None = None,
    v_scale: float | None = None,
    chunk_prefill_size: int | None = None,
    num_kv_pages_per_block: int | None = None,
    num_queries_per_block: int | None = None,
    vmem_limit_bytes: int | None = None,
    platform: str | None = None,
    cfg: Any = None,
    mesh: Any = None,
    in_specs: Any = None,
    out_specs: Any = None,
) -> tuple[jax.Array, jax.Array]:
    """Write new tokens to the cache and attend to it, as ejkernel's `ragged_page_attention_v3`.

    It is `ejk.compat.tpu_inference.ragged_paged_attention` with sinks, and an output of the
    queries' dtype. Arguments from `chunk_prefill_size` to `cfg` have no effect.

    A key and its value are two rows, as its documentation has them. Of heads of 64 its TPU kernel
    takes one row of 128 for both: that is
    `ejk.compat.tpu_inference.ragged_paged_attention_hd64`.

    Args:
        queries: `[total_tokens, num_heads, head_dim]`.
        keys: the new tokens' keys, of the cache's dtype.
        values: their values.
        kv_cache: five axes: see `ejk.compat.tpu_inference`.
        kv_lens: `[max_num_seqs]`, the new tokens included.
        block_tables: `[max_num_seqs * pages_per_seq]`, flat.
        query_start_loc: `[max_num_seqs + 1]`.
        distribution: `[3]`, of which the last is the number of sequences.
        softmax_aux: sinks, `[num_heads]`.
        softmax_scale: 1 unless given.
        sliding_window: the token itself included.
        logits_soft_cap: None caps nothing.
        q_scale: as of `ejk.compat.tpu_inference`, and so are the next two.
        k_scale: multiplies the keys.
        v_scale: multiplies the values.
        chunk_prefill_size: no effect.
        num_kv_pages_per_block: no effect.
        num_queries_per_block: no effect.
        vmem_limit_bytes: no effect.
        platform: no effect.
        cfg: no effect.
        mesh: refused, with `in_specs` and `out_specs`.
        in_specs: refused.
        out_specs: refused.

    Returns:
        The output `[total_tokens, num_heads, head_dim]`, and the cache.

    Raises:
        UnsupportedError: a mesh or specs.
        ValueError: what `ejk.ragged_page_attention` and `ejk.write_kv_cache` refuse.

    Source: the signature of ejkernel 0.0.80.
    """
    meshes = {"mesh": mesh, "in_specs": in_specs, "out_specs": out_specs}
    refuse("ragged_page_attention_v3", _MESHES, **meshes)
    check_kinds(
        queries=queries, keys=keys, values=values, kv_cache=kv_cache, kv_lens=kv_lens,
        block_tables=block_tables, query_start_loc=query_start_loc, distribution=distribution,
    )  # fmt: skip
    return attend_and_update(
        queries, keys, values, kv_cache, kv_lens, block_tables, query_start_loc, distribution,
        causal=True, update=True, sm_scale=softmax_scale, sliding_window=sliding_window,
        soft_cap=logits_soft_cap, out_dtype=queries.dtype, mask_value=None, q_scale=q_scale,
        k_scale=k_scale, v_scale=v_scale, sinks=softmax_aux,
    )  # fmt: skip
