"""What is put wherever nothing must be read."""

from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from ejk.testing.oracle import Array


def numbers(rng: np.random.Generator, shape: tuple[Any, ...], dtype: npt.DTypeLike) -> Array:
    """NaN, both infinities and the largest finite numbers; of integers any codes."""
    if np.issubdtype(dtype, np.integer):
        return ordinary(rng, shape, dtype)
    largest = ml_dtypes.finfo(dtype).max
    return rng.choice(np.array([np.nan, np.inf, -np.inf, largest, -largest], dtype), shape)


def ordinary(rng: np.random.Generator, shape: tuple[Any, ...], dtype: npt.DTypeLike) -> Array:
    if np.issubdtype(dtype, np.integer):
        limits = np.iinfo(dtype)
        return rng.integers(limits.min, limits.max, shape, dtype, endpoint=True)
    return rng.standard_normal(shape).astype(dtype)


def junk_entries(
    rng: np.random.Generator, shape: tuple[Any, ...], dtype: npt.DTypeLike, keys: Array
) -> Array:
    """Anything at all: pages of the pool, ids next to it, the ends of the dtype."""
    limits, num_pages = np.iinfo(dtype), keys.shape[0]
    ends = [limits.min, limits.max, num_pages, num_pages + 1, -1, 2**31 - 1, -(2**31)]
    ends = [x for x in ends if limits.min <= x <= limits.max]
    ids = rng.integers(0, num_pages, shape).astype(dtype)
    return np.where(rng.random(shape) < 0.5, rng.choice(np.array(ends, dtype), shape), ids)


def invalid_entries(
    rng: np.random.Generator, shape: tuple[Any, ...], dtype: npt.DTypeLike, num_pages: int
) -> Array:
    """Ids of no page; those that become a page when they are narrowed, wrapped or clamped too."""
    limits = np.iinfo(dtype)
    ids = [-1, -num_pages, num_pages, limits.min, limits.max, 2**31, 2**32, 2**32 + 1, 1 - 2**32]
    ids = [x for x in ids if limits.min <= x <= limits.max and not 0 <= x < num_pages]
    return rng.choice(np.array(ids, dtype), shape)


def is_page(entries: Any, num_pages: int) -> Any:
    return (entries >= 0) & (entries < num_pages)
