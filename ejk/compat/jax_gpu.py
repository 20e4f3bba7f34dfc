"""JAX's Pallas GPU kernel, which is deprecated: `pallas.ops.gpu.paged_attention`."""

import jax
import jax.numpy as jnp

from ejk._dtypes import DTYPES
from ejk._page_attention import page_attention
from ejk._typing import Array
from ejk.compat._arguments import (
    Lengths,
    Pool,
    Rows,
    Tables,
    check_arrays,
    check_mask_value,
    drop_in,
)
from ejk.compat.jax_tpu import DEFAULT_MASK_VALUE


@drop_in
def paged_attention(
    q: Array,
    k_pages: Array,
    v_pages: Array,
    block_tables: Array,
    lengths: Array | None,
    k_scales_pages: Array | None = None,
    v_scales_pages: Array | None = None,
    *,
    block_h: int = 16,
    pages_per_compute_block: int = 8,
    k_splits: int = 16,
    num_warps: int = 8,
    num_stages: int = 2,
    interpret: bool = False,
    debug: bool = False,
    mask_value: float = DEFAULT_MASK_VALUE,
    attn_logits_soft_cap: float | None = None,
) -> jax.Array:
    """Attend from one token a sequence, as `pallas.ops.gpu.paged_attention.paged_attention` does.

    Logits are not scaled: scale `q`. The tables come before the lengths. All arguments from
    `block_h` to `debug` have no effect: on a CPU the call runs without `interpret`. Where keys or
    values alone are quantised, each call makes a copy of their pool in the other's type, which
    holds every code: quantise both, or neither.

    Args:
        q: `[batch, num_heads, head_dim]`.
        k_pages: `[num_kv_heads, num_pages, page_size, head_dim]`.
        v_pages: the same.
        block_tables: `[batch, pages_per_sequence]`.
        lengths: `[batch]`; None: all that the table names.
        k_scales_pages: `[num_kv_heads, num_pages, page_size]`, which keys are multiplied by.
        v_scales_pages: the same of values.
        block_h: no effect.
        pages_per_compute_block: no effect.
        k_splits: no effect.
        num_warps: no effect.
        num_stages: no effect.
        interpret: no effect.
        debug: no effect.
        mask_value: at most -1e4, as what is not visible has no weight.
        attn_logits_soft_cap: as of `ejk.page_attention`.

    Returns:
        `[batch, num_heads, head_dim]`.

    Raises:
        ValueError: a `mask_value` above -1e4, and what `ejk.page_attention` refuses.

    Source: the signature of jax 0.12.
    """
    check_mask_value(mask_value)
    check_arrays(
        q=(q, Rows), k_pages=(k_pages, Pool), v_pages=(v_pages, Pool),
        block_tables=(block_tables, Tables), lengths=(lengths, Lengths | None),
    )  # fmt: skip
    if lengths is None:
        batch, width = block_tables.shape
        lengths = jnp.full(batch, width * k_pages.shape[2], jnp.int32)
    if k_scales_pages is None and v_scales_pages is not None:
        k_scales_pages = jnp.ones_like(v_scales_pages)
    if v_scales_pages is None and k_scales_pages is not None:
        v_scales_pages = jnp.ones_like(k_scales_pages)
    narrow, wide = sorted(
        (jnp.dtype(k_pages.dtype), jnp.dtype(v_pages.dtype)), key=lambda x: x.itemsize
    )
    if narrow.itemsize == 1 and wide.name in DTYPES:
        k_pages, v_pages = (jnp.asarray(pool).astype(wide) for pool in (k_pages, v_pages))
    return page_attention(
        q, k_pages, v_pages, lengths, block_tables, 1.0,
        cache_layout="KV_HEADS_FIRST", attn_logits_soft_cap=attn_logits_soft_cap,
        key_scale=k_scales_pages, value_scale=v_scales_pages,
    )  # fmt: skip
