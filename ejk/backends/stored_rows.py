"""Rows of a cache: codes and scales of new tokens, as XLA computes them, and rows that it reads."""

import jax
import jax.numpy as jnp
from jax import lax

from ejk._cache_types import quantise, scales_of
from ejk.backends.pools import PoolsProblem
from ejk.backends.write_kv_cache import WriteKVCacheProblem


def stored(
    problem: WriteKVCacheProblem, rows: jax.Array, scale: jax.Array | None
) -> tuple[jax.Array, jax.Array | None]:
    """Return what the cache holds of `rows [num_tokens, num_kv_heads, width]`, and their scales.

    `scale` is that of each KV head; those of tokens are computed.
    """
    if problem.scales == "none" and not problem.cache_type.is_quantised:
        return rows.astype(problem.cache_dtype), None
    rows = rows.astype(jnp.float32)
    if problem.scales == "token":
        scale = scales_of(rows, problem.cache_type)
    elif scale is not None:
        scale = scale[None]
    return quantise(rows, scale, problem.cache_dtype), scale


def gather(problem: PoolsProblem, pool: jax.Array, at: jax.Array) -> jax.Array:
    """Return what lies at places, `[num_rows, ...]`: zeros outside of the pool."""
    axes = problem.placed_axes
    dimensions = lax.GatherDimensionNumbers(
        offset_dims=tuple(range(1, pool.ndim - len(axes) + 1)),
        collapsed_slice_dims=axes,
        start_index_map=axes,
    )
    sizes = tuple(1 if axis in axes else size for axis, size in enumerate(pool.shape))
    return lax.gather(
        pool, at, dimensions, sizes, mode=lax.GatherScatterMode.FILL_OR_DROP, fill_value=0
    )


def halves_axis(problem: PoolsProblem) -> int:
    """Return which axis of a fused pool's rows has keys and values: its slots go, rows come."""
    return 2 if problem.cache_layout == "KV_HEADS_FIRST" else 1
