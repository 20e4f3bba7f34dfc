"""JAX's Pallas TPU kernels: `jax.experimental.pallas.ops.tpu`, both of its paged attentions."""

from typing import Any

import jax
import jax.numpy as jnp

from ejk._describe import describe
from ejk._page_attention import page_attention
from ejk._ragged_page_attention import ragged_page_attention
from ejk._typing import Array, Bounds, Tokens
from ejk.compat._arguments import (
    Count,
    Interleaved,
    Lengths,
    Pool,
    Rows,
    Tables,
    check_arrays,
    check_limits,
    check_mask_value,
    drop_in,
    first_sequences,
)

DEFAULT_MASK_VALUE = -0.7 * float(jnp.finfo(jnp.float32).max)
MAX_INT8 = 127.5  # a code of JAX's `QuantizedTensor` counts 1 / 127.5 of its scale


@drop_in
def paged_attention(
    q: Array,
    k_pages: Any,
    v_pages: Any,
    lengths: Array,
    page_indices: Array,
    *,
    mask_value: float = DEFAULT_MASK_VALUE,
    attn_logits_soft_cap: float | None = None,
    pages_per_compute_block: int,
    megacore_mode: str | None = None,
    inline_seq_dim: bool = True,
) -> jax.Array:
    """Attend from one token a sequence, as `pallas.ops.tpu.paged_attention.paged_attention` does.

    Logits are not scaled: scale `q`. `pages_per_compute_block`, `megacore_mode` and
    `inline_seq_dim` have no effect. A sequence of length 0 is 0.

    Args:
        q: `[batch, num_heads, head_dim]`.
        k_pages: `[num_kv_heads, num_pages, page_size, head_dim]`, or a `QuantizedTensor`: int8
            `weight`, and `scales [..., 1]`, the largest magnitude of each row.
        v_pages: the same.
        lengths: `[batch]`.
        page_indices: `[batch, pages_per_sequence]`.
        mask_value: None or at most -1e4, as what is not visible has no weight.
        attn_logits_soft_cap: as of `ejk.page_attention`.
        pages_per_compute_block: no effect.
        megacore_mode: no effect.
        inline_seq_dim: no effect.

    Returns:
        `[batch, num_heads, head_dim]`.

    Raises:
        ValueError: a `mask_value` above -1e4, scales of another shape, and what
            `ejk.page_attention` refuses.

    Examples:
        >>> import jax.numpy as jnp
        >>> from ejk.compat.jax_tpu import paged_attention
        >>> pages, tables = jnp.ones((2, 8, 16, 64)), jnp.array([[3, 5]])
        >>> args = (jnp.ones((1, 4, 64)), pages, pages, jnp.array([20]), tables)
        >>> paged_attention(*args, pages_per_compute_block=2).shape
        (1, 4, 64)

    Source: the signature of jax 0.12.
    """
    check_mask_value(mask_value)
    (keys, key_scale), (values, value_scale) = _pool("k_pages", k_pages), _pool("v_pages", v_pages)
    check_arrays(
        q=(q, Rows), k_pages=(keys, Pool), v_pages=(values, Pool), lengths=(lengths, Lengths),
        page_indices=(page_indices, Tables),
    )  # fmt: skip
    return page_attention(
        q, keys, values, lengths, page_indices, 1.0,
        cache_layout="KV_HEADS_FIRST", attn_logits_soft_cap=attn_logits_soft_cap,
        key_scale=key_scale, value_scale=value_scale,
    )  # fmt: skip


@drop_in
def ragged_paged_attention(
    q: Array,
    kv_pages: Array,
    kv_lens: Array,
    page_indices: Array,
    cu_q_lens: Array,
    num_seqs: Array,
    *,
    sm_scale: float = 1.0,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    mask_value: float | None = DEFAULT_MASK_VALUE,
    k_scale: float | None = None,
    v_scale: float | None = None,
    num_kv_pages_per_block: int | None = None,
    num_queries_per_block: int | None = None,
    vmem_limit_bytes: int | None = None,
) -> jax.Array:
    """Attend from ragged batches of new tokens, as `pallas.ops.tpu.ragged_paged_attention` does.

    `num_kv_pages_per_block`, `num_queries_per_block` and `vmem_limit_bytes` have no effect.

    Args:
        q: `[total_tokens, num_heads, head_dim]`.
        kv_pages: `[num_pages, page_size, 2 * num_kv_heads, head_dim]`, keys and values in turn.
        kv_lens: `[max_num_seqs]`, the new tokens included.
        page_indices: `[max_num_seqs, pages_per_seq]`.
        cu_q_lens: `[max_num_seqs + 1]`; what is past `num_seqs` may be anything.
        num_seqs: `[1]`. Rows of no sequence are 0.
        sm_scale: multiplies the logits: 1 unless given.
        sliding_window: as of `ejk.ragged_page_attention`.
        soft_cap: likewise.
        mask_value: None or at most -1e4, as what is not visible has no weight.
        k_scale: multiplies the keys.
        v_scale: multiplies the values.
        num_kv_pages_per_block: no effect.
        num_queries_per_block: no effect.
        vmem_limit_bytes: no effect.

    Returns:
        `[total_tokens, num_heads, head_dim]`.

    Raises:
        ValueError: a `mask_value` above -1e4, and what `ejk.ragged_page_attention` refuses.

    Source: the signature of jax 0.12.
    """
    check_mask_value(mask_value)
    check_arrays(
        q=(q, Tokens), kv_pages=(kv_pages, Interleaved), kv_lens=(kv_lens, Lengths),
        page_indices=(page_indices, Tables), cu_q_lens=(cu_q_lens, Bounds),
        num_seqs=(num_seqs, Count),
    )  # fmt: skip
    check_limits(sliding_window, soft_cap)
    return ragged_page_attention(
        q, kv_pages, None, kv_lens, page_indices, first_sequences(cu_q_lens, num_seqs), sm_scale,
        cache_layout="INTERLEAVED", sliding_window=sliding_window, attn_logits_soft_cap=soft_cap,
        key_scale=k_scale, value_scale=v_scale,
    )  # fmt: skip


def _pool(name: str, pages: Any) -> tuple[Any, jax.Array | None]:
    """Return pages, and the scale of each row of a `QuantizedTensor`."""
    if not hasattr(pages, "weight"):
        return pages, None
    if pages.scales.shape[-1] != 1:
        raise ValueError(
            f"{name}.scales={describe(pages.scales)} must have one entry a row on the last axis"
        )
    return pages.weight, pages.scales[..., 0].astype(jnp.float32) / MAX_INT8
