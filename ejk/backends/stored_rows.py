"""What a cache holds of new tokens: their codes and scales, as XLA computes them."""

import jax
import jax.numpy as jnp

from ejk._cache_types import quantise, scales_of
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
