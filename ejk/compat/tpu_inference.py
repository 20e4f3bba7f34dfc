"""tpu-inference's ragged paged attentions v3: attention and the write of new tokens in one call."""

from typing import Any

import jax
import jax.numpy as jnp

from ejk._ragged_page_attention import ragged_page_attention
from ejk._slot_mapping import ragged_slot_mapping
from ejk._typing import Array
from ejk._write_kv_cache import write_kv_cache
from ejk.compat._arguments import check_limits, check_mask_value, drop_in, first_sequences
from ejk.compat._packed_pools import check_kinds, check_sizes
from ejk.compat.jax_tpu import DEFAULT_MASK_VALUE


@drop_in
def ragged_paged_attention(
    queries: Array,
    keys: Array,
    values: Array,
    kv_cache: Array,
    kv_lens: Array,
    page_indices: Array,
    cu_q_lens: Array,
    distribution: Array,
    *,
    use_causal_mask: bool = True,
    update_kv_cache: bool = True,
    skip_kv_mask: bool = False,
    sm_scale: float = 1.0,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    out_dtype: Any = None,
    mask_value: float | None = None,
    q_scale: float | None = None,
    k_scale: float | None = None,
    v_scale: float | None = None,
    chunk_prefill_size: int | None = None,
    d_block_sizes: tuple[int, int, int, int] | None = None,
    p_block_sizes: tuple[int, int, int, int] | None = None,
    m_block_sizes: tuple[int, int, int, int] | None = None,
    vmem_limit_bytes: int | None = None,
    debug_mode: bool = False,
    disable_bounds_checks: bool = True,
    disable_semaphore_checks: bool = True,
) -> tuple[jax.Array, jax.Array]:
    """Write new tokens to the cache and attend to it, as `kernels.ragged_paged_attention.v3` does.

    The cache holds the heads `k0, v0, k1, v1, ...` in words of 32 bits, each row as wide as whole
    lanes. It is viewed as an interleaved pool: compiled for a GPU that moves nothing. On a CPU XLA
    copies the whole pool to return it where its third or fourth axis is 1; on a TPU it may have to,
    which was not measured. Queries get zeros for the entries that pad a row, which must be finite:
    tpu-inference writes zeros, and so does this.

    Donate `kv_cache` to your `jit`, so that it is written in place. Arguments from
    `chunk_prefill_size` on have no effect.

    Args:
        queries: `[total_tokens, num_heads, head_dim]`.
        keys: the new tokens' keys, `[total_tokens, num_kv_heads, head_dim]`, of the cache's dtype:
            codes of a float8 cache.
        values: the same of values.
        kv_cache: `[num_pages, page_size, ceil(2 * num_kv_heads / packing), packing, width]`, with
            `packing` elements in 32 bits, and `width` a multiple of 128.
        kv_lens: `[max_num_seqs]`, the new tokens included.
        page_indices: `[max_num_seqs * pages_per_seq]`, one row of the table after the other.
        cu_q_lens: `[max_num_seqs + 1]`.
        distribution: `[3]`, of which the last is the number of sequences.
        use_causal_mask: False: new tokens see later ones.
        update_kv_cache: False: keys and values lie in the cache already, and are not used.
        skip_kv_mask: a promise about lengths. It has no effect with `use_causal_mask=False`, and
            is refused without.
        sm_scale: multiplies the logits: 1 unless given.
        sliding_window: as of `ejk.ragged_page_attention`.
        soft_cap: likewise.
        out_dtype: of the output: float32 for float32 queries, else bfloat16, if None.
        mask_value: None or at most -1e4, as what is not visible has no weight.
        q_scale: queries are divided by it and rounded to the cache's dtype; logits are multiplied.
        k_scale: multiplies the keys in the cache.
        v_scale: multiplies the values in the cache.
        chunk_prefill_size: no effect.
        d_block_sizes: no effect.
        p_block_sizes: no effect.
        m_block_sizes: no effect.
        vmem_limit_bytes: no effect.
        debug_mode: no effect.
        disable_bounds_checks: no effect.
        disable_semaphore_checks: no effect.

    Returns:
        The output `[total_tokens, num_heads, head_dim]`, 0 in rows of no sequence, and the cache.

    Raises:
        ValueError: a `mask_value` above -1e4, `skip_kv_mask` of causal attention, a cache of
            integers, and what `ejk.ragged_page_attention` and `ejk.write_kv_cache` refuse.

    Source: the signature of tpu-inference 0.32.
    """
    check_kinds(
        queries=queries, keys=keys, values=values, kv_cache=kv_cache, kv_lens=kv_lens,
        page_indices=page_indices, cu_q_lens=cu_q_lens, distribution=distribution,
    )  # fmt: skip
    if use_causal_mask and skip_kv_mask:
        raise ValueError("skip_kv_mask=True must come with use_causal_mask=False")
    return attend_and_update(
        queries, keys, values, kv_cache, kv_lens, page_indices, cu_q_lens, distribution,
        causal=use_causal_mask, update=update_kv_cache, sm_scale=sm_scale,
        sliding_window=sliding_window, soft_cap=soft_cap, out_dtype=out_dtype,
        mask_value=mask_value, q_scale=q_scale, k_scale=k_scale, v_scale=v_scale,
    )  # fmt: skip


@drop_in
def ragged_paged_attention_hd64(
    queries: Array,
    keys: Array,
    values: Array,
    kv_cache: Array,
    kv_lens: Array,
    page_indices: Array,
    cu_q_lens: Array,
    distribution: Array,
    attention_sink: Array | None = None,
    *,
    sm_scale: float = 1.0,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    mask_value: float | None = DEFAULT_MASK_VALUE,
    q_scale: float | None = None,
    k_scale: float | None = None,
    v_scale: float | None = None,
    chunk_prefill_size: int | None = None,
    num_kv_pages_per_block: int | None = None,
    num_queries_per_block: int | None = None,
    vmem_limit_bytes: int | None = None,
    debug_mode: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Write and attend with heads of 64, as `kernels.ragged_paged_attention.v3.kernel_hd64` does.

    A row of the cache is 64 entries of a key and 64 of its value, so no entry is padding. Otherwise
    it is `ragged_paged_attention`, with sinks and an output of the queries' dtype. Arguments from
    `chunk_prefill_size` on have no effect.

    Args:
        queries: `[total_tokens, num_heads, 64]`.
        keys: the new tokens' keys, `[total_tokens, num_kv_heads, 64]`, of the cache's dtype.
        values: the same of values.
        kv_cache: `[num_pages, page_size, ceil(num_kv_heads / packing), packing, 128]`, with
            `packing` elements in 32 bits.
        kv_lens: as of `ragged_paged_attention`, and so are the arguments that follow.
        page_indices: `[max_num_seqs * pages_per_seq]`.
        cu_q_lens: `[max_num_seqs + 1]`.
        distribution: `[3]`, of which the last is the number of sequences.
        attention_sink: float32 `[num_heads]`.
        sm_scale: 1 unless given.
        sliding_window: the token itself included.
        soft_cap: None caps nothing.
        mask_value: None or at most -1e4, as what is not visible has no weight.
        q_scale: queries are divided by it and rounded to the cache's dtype; logits are multiplied.
        k_scale: multiplies the keys in the cache.
        v_scale: multiplies the values in the cache.
        chunk_prefill_size: no effect.
        num_kv_pages_per_block: no effect.
        num_queries_per_block: no effect.
        vmem_limit_bytes: no effect.
        debug_mode: no effect.

    Returns:
        The output `[total_tokens, num_heads, 64]`, 0 in rows of no sequence, and the cache.

    Raises:
        ValueError: other sizes, and what `ragged_paged_attention` refuses.

    Source: the signature of tpu-inference 0.32.
    """
    check_kinds(
        queries=queries, keys=keys, values=values, kv_cache=kv_cache, kv_lens=kv_lens,
        page_indices=page_indices, cu_q_lens=cu_q_lens, distribution=distribution,
    )  # fmt: skip
    packing = 4 // jnp.dtype(kv_cache.dtype).itemsize
    words = -(-keys.shape[1] // packing)
    if kv_cache.shape[2:] != (words, packing, 128) or queries.shape[2] != 64:
        raise ValueError(
            f"kv_cache.shape={kv_cache.shape} must end in {(words, packing, 128)}, a row of 128 of "
            f"each of the {keys.shape[1]} heads of keys, and queries.shape={queries.shape} in 64"
        )
    pairs = kv_cache.reshape(*kv_cache.shape[:2], words * packing, 2, 64)
    out, pairs = attend_and_update(
        queries, keys, values, pairs, kv_lens, page_indices, cu_q_lens, distribution,
        causal=True, update=True, sm_scale=sm_scale, sliding_window=sliding_window,
        soft_cap=soft_cap, out_dtype=queries.dtype, mask_value=mask_value, q_scale=q_scale,
        k_scale=k_scale, v_scale=v_scale, sinks=attention_sink, of_words=words * packing,
    )  # fmt: skip
    return out, pairs.reshape(kv_cache.shape)


def attend_and_update(
    queries: Array,
    keys: Array,
    values: Array,
    kv_cache: Array,
    kv_lens: Array,
    page_indices: Array,
    cu_q_lens: Array,
    distribution: Array,
    *,
    causal: bool,
    update: bool,
    sm_scale: float,
    sliding_window: int | None,
    soft_cap: float | None,
    out_dtype: Any,
    mask_value: float | None,
    q_scale: float | None,
    k_scale: float | None,
    v_scale: float | None,
    sinks: Array | None = None,
    of_words: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Do what `ragged_paged_attention` says, with sinks, of a cache of so many words a token."""
    check_mask_value(mask_value)
    check_limits(sliding_window, soft_cap)
    check_sizes(queries, keys, values, kv_cache, kv_lens, page_indices, of_words)
    total_tokens, num_heads, head_dim = queries.shape
    num_pages, page_size, words, packing, width = kv_cache.shape
    pool = jnp.asarray(kv_cache).reshape(num_pages, page_size, words * packing, width)
    num_seqs = kv_lens.shape[0]
    tables = page_indices.reshape(num_seqs, page_indices.shape[0] // max(num_seqs, 1))
    bounds = first_sequences(cu_q_lens, distribution[-1])
    if update:
        new_keys, new_values = (_padded(x, words * packing // 2, width) for x in (keys, values))
        sizes = {"total_tokens": total_tokens, "page_size": page_size, "num_pages": num_pages}
        slots = ragged_slot_mapping(tables, kv_lens, bounds, **sizes)
        pool, _ = write_kv_cache(
            new_keys, new_values, pool, None, slots, cache_layout="INTERLEAVED"
        )
    # Heads that pad a word are read by query heads of zeros, whose rows are left out.
    heads = num_heads // keys.shape[1] * (words * packing // 2)
    query = _padded(_as_codes(queries, q_scale, kv_cache.dtype), heads, width)
    if sinks is not None:
        sinks = jnp.pad(sinks, (0, heads - num_heads))
    scale = sm_scale if q_scale is None else sm_scale * q_scale
    out = ragged_page_attention(
        query, pool, None, kv_lens, tables, bounds, scale, causal=causal,
        cache_layout="INTERLEAVED", sliding_window=sliding_window, attn_logits_soft_cap=soft_cap,
        sinks=sinks, key_scale=k_scale, value_scale=v_scale,
    )  # fmt: skip
    if out_dtype is None:
        out_dtype = jnp.float32 if queries.dtype == jnp.float32 else jnp.bfloat16
    return out[:, :num_heads, :head_dim].astype(out_dtype), pool.reshape(kv_cache.shape)


def _padded(x: Array, heads: int, width: int) -> jax.Array:
    """Return rows of so many heads and entries, zeros where there are none.

    Codes of 8 bits become bfloat16, which holds them all.
    """
    x = jnp.asarray(x)
    x = jnp.pad(x, ((0, 0), (0, heads - x.shape[1]), (0, width - x.shape[2])))
    return x.astype(jnp.bfloat16) if x.dtype.itemsize == 1 else x


def _as_codes(queries: Array, q_scale: float | None, dtype: Any) -> Array:
    """Return queries over their scale, rounded to the cache's type, in their own."""
    if q_scale is None:
        return queries
    limits = jnp.finfo(dtype)
    codes = jnp.clip(queries / q_scale, float(limits.min), float(limits.max)).astype(dtype)
    return codes.astype(queries.dtype)
