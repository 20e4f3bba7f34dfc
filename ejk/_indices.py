"""Integers from callers: lengths, page ids, slots."""

import numbers

import jax
import jax.numpy as jnp
import numpy as np


def as_int32(x: int | np.integer | np.ndarray | jax.Array, bound: int) -> jax.Array:
    """Narrow to int32: values outside `[0, bound]` become -1 or `bound`, never another index.

    In the array's own dtype and, for NumPy, before JAX narrows it: 2**32 is not 0. int32 arrays
    are returned as they are.
    """
    if isinstance(x, numbers.Integral):
        return jnp.int32(min(max(int(x), -1), bound))
    if x.dtype == jnp.int32:
        return jnp.asarray(x)
    limits = jnp.iinfo(x.dtype)
    return jnp.asarray(x.clip(max(limits.min, -1), min(limits.max, bound)).astype(jnp.int32))
