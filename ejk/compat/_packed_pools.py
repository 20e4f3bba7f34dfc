"""Checks of calls on pools of words of 32 bits, as tpu-inference's are."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Integer, Num

from ejk._typing import Array, Bounds
from ejk.compat._arguments import FlatTables, Lengths, Packed, check_arrays


def check_kinds(**given: Any) -> None:
    """Check rank and dtype kind of the eight arrays, named as the caller knows them."""
    rows = Num[Array, "total_tokens num_kv_heads head_dim"]
    kinds = (
        Num[Array, "total_tokens num_heads head_dim"], rows, rows, Packed, Lengths, FlatTables,
        Bounds, Integer[Array, " 3"],
    )  # fmt: skip
    check_arrays(**{name: (x, kind) for (name, x), kind in zip(given.items(), kinds)})


def check_sizes(
    queries: Array,
    keys: Array,
    values: Array,
    kv_cache: Array,
    kv_lens: Array,
    page_indices: Array,
    of_words: int | None,
) -> None:
    """Check what padding and views would hide, and that the cache is of floats."""
    if not jnp.issubdtype(kv_cache.dtype, jnp.floating):
        raise ValueError(
            f"kv_cache.dtype={kv_cache.dtype} must be a float's, as of the original: for integers "
            "use ejk.write_kv_cache and ejk.ragged_page_attention, with key_scale and value_scale"
        )
    num_heads, (num_kv_heads, head_dim) = queries.shape[1], keys.shape[1:]
    if num_heads % num_kv_heads:
        raise ValueError(
            f"queries.shape[1]={num_heads} must be a multiple of keys.shape[1]={num_kv_heads}"
        )
    if values.shape != keys.shape or queries.shape[2] != head_dim:
        raise ValueError(
            f"values.shape={values.shape} must be keys.shape={keys.shape}, and its last axis that "
            f"of queries.shape={queries.shape}"
        )
    *_, words, packing, width = kv_cache.shape
    needed = of_words or -(-2 * num_kv_heads // packing)
    if words != needed or width < head_dim:
        raise ValueError(
            f"kv_cache.shape={kv_cache.shape} must end in {needed} words of {packing}, a key and a "
            f"value of each of the {num_kv_heads} heads of keys, and a width of at least {head_dim}"
        )
    if page_indices.shape[0] % max(kv_lens.shape[0], 1):
        raise ValueError(
            f"page_indices.shape[0]={page_indices.shape[0]} must be a multiple of "
            f"kv_lens.shape[0]={kv_lens.shape[0]}: one row of the table after the other"
        )
