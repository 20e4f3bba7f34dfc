"""Float32 results in the types that callers get."""

from typing import Any

import jax
import jax.numpy as jnp


def rounded(x: jax.Array, dtype: Any) -> jax.Array:
    """Round weighted means of numbers of type `dtype` to it. What is finite stays so.

    No mean exceeds the largest of its numbers, but its error may; float16 ends at 65,504.
    """
    if dtype == jnp.float16:
        x = jnp.where(jnp.isfinite(x), jnp.clip(x, -65504.0, 65504.0), x)
    return x.astype(dtype)
