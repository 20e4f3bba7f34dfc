"""Integers from callers: lengths, page ids, sizes."""

import numbers
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ejk._describe import describe

if TYPE_CHECKING:
    Size = int
else:
    Size = Any  # or a symbolic dimension of `jax.export`

# Up to so many pairs all are compared, for which XLA makes one kernel on a GPU. On two cores of a
# CPU, numbers x limits, us compared, searched and sorted: 1 x 256 5, 5 and 18; 64 x 256 9, 5, 10;
# 64 x 2,048 25, 13 and 25; 1,024 x 256 60, 8 and 22; 256 x 8,192 330, 83 and 108; 1,024 x 8,192
# 11,078, 111 and 116; 8 x 16,384 11, 27 and 211.
MOST_COMPARED = 2**16


def as_int32(x: Any, bound: Size) -> Any:
    """Narrow an integer, or an array of them, to int32.

    What int32 cannot hold becomes -1 or `bound`, never another index: in the array's own dtype and,
    for NumPy, before JAX narrows it, where 2**32 would be 0. int32 arrays are returned as they are.
    What NumPy holds stays there.
    """
    if isinstance(x, numbers.Integral):
        return np.int32(min(max(int(x), -1), bound))
    if x.dtype == np.int32:
        return x
    limits = jnp.iinfo(x.dtype)
    if limits.max > 2**31 - 1:
        x = x.clip(max(limits.min, -1), bound)
    return x.astype(np.int32)


def static_int(name: str, value: Any, *, at_least: int) -> int:
    """Return an argument that has to be known when a call is traced, or say what it must be."""
    if isinstance(value, bool | np.bool_):
        raise TypeError(f"{name}={value} must be an int")
    if value < at_least:
        raise ValueError(f"{name}={describe(value)} must be at least {at_least}")
    return int(value)


def static_size(name: str, value: Any, *, at_least: int) -> Size:
    """Return a size that has to be known when a call is traced, or a symbolic one as it is."""
    return static_int(name, value, at_least=at_least) if is_static(value) else value


def rounded_bound(name: str, value: Any, *, exact_up_to: int) -> int:
    """Check a bound that sizes work, and round it up to a power of two or one and a half of one.

    What is compiled follows from it, and a caller may hand over each step's longest context: so a
    few programs serve all. Up to `exact_up_to` it stays what it is.
    """
    value = static_int(name, value, at_least=0)
    if value <= exact_up_to:
        return value
    power = 1 << (value - 1).bit_length()
    return power * 3 // 4 if value <= power * 3 // 4 else power


def count_up_to(numbers: jax.Array, limits: jax.Array) -> jax.Array:
    """Count the numbers that are at most each of the limits. Both are int32 and ascend."""
    if is_static(pairs := numbers.shape[0] * limits.shape[0]) and pairs <= MOST_COMPARED:
        return (numbers[None] <= limits[:, None]).sum(1, dtype=jnp.int32)
    if is_static(numbers.shape[0]):
        found = jnp.searchsorted(numbers, limits, side="right", method="scan_unrolled")
        return found.astype(jnp.int32)
    both = jnp.concatenate([numbers, limits])  # a size is symbolic, which `searchsorted` refuses
    index = jnp.arange(both.shape[0], dtype=jnp.int32)
    _, order = lax.sort_key_val(both, index)
    rank = jnp.zeros_like(index).at[order].set(index)
    return rank[numbers.shape[0] :] - index[: limits.shape[0]]


def is_static(size: Any) -> bool:
    """Say whether a size is a number, and not a symbolic dimension of `jax.export`."""
    return isinstance(size, numbers.Integral)


def exceeds(size: Any, bound: int) -> bool:
    """Say whether a size is known to exceed a bound."""
    return is_static(size) and size > bound


def least(*sizes: Size) -> Size:
    """Return the least of the sizes that are known; the first if none is."""
    return min(filter(is_static, sizes), default=sizes[0])
