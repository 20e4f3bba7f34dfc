"""Pools of pages: where their axes lie, and what their numbers stand for."""

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
DType = np.dtype[Any]


def dequantised(
    key_cache: Array,
    value_cache: Array | None,
    key_scale: Any = None,
    value_scale: Any = None,
    cache_layout: str = "HND",
) -> tuple[Array, Array | None]:
    """Return keys and values as they are seen, in float64 where they have scales or are codes."""
    if holds_both(key_cache, cache_layout):
        if np.ndim(key_scale) > 1:
            key_scale, value_scale = halves(key_scale, cache_layout)
        key_cache, value_cache = halves(key_cache, cache_layout)
    keys = _times(codes(key_cache), key_scale, cache_layout)
    if value_cache is None:
        return keys, None
    return keys, _times(codes(value_cache), value_scale, cache_layout)


def codes(cache: Array) -> Array:
    """Take the values of int4, two a byte, apart: in the low four bits the first."""
    if cache.dtype != np.uint8:
        return cache
    pairs = np.stack([cache % 16, cache // 16], axis=-1).astype(np.int8)
    pairs = np.where(pairs < 8, pairs, pairs - 16)
    return pairs.reshape(*cache.shape[:-1], 2 * cache.shape[-1])


def _times(cache: Array, scale: Any, cache_layout: str) -> Array:
    """Multiply a cache by a scale: a number, one a KV head, or one of each token and head."""
    if scale is None:
        return cache
    scale = np.asarray(scale).astype(np.float64)
    if scale.ndim == 1:
        axis = {"HND": 1, "NHD": 2, "KV_HEADS_FIRST": 0, "INTERLEAVED": 2}[cache_layout]
        scale = np.expand_dims(scale, tuple(a for a in range(3) if a != axis))
    with np.errstate(invalid="ignore"):  # of what nobody sees
        return cache.astype(np.float64) * (scale[..., None] if scale.ndim else scale)


def holds_both(pool: Any, cache_layout: str) -> bool:
    """Say whether a pool, of NumPy or traced, holds keys and values."""
    return pool.ndim == 5 or cache_layout == "INTERLEAVED"


def halves(pool: Any, cache_layout: str) -> tuple[Any, Any]:
    """Take a fused pool, of NumPy or traced, apart.

    The axis right after the pages has the keys, then the values. An interleaved pool has a key and
    a value of each head in turn; apart they lie as "NHD".
    """
    if cache_layout == "INTERLEAVED":
        return pool[:, :, 0::2], pool[:, :, 1::2]
    if cache_layout == "KV_HEADS_FIRST":
        return pool[:, :, 0], pool[:, :, 1]
    return pool[:, 0], pool[:, 1]


def token(
    cache: Array, table: Array, position: int, kv_head: int, cache_layout: str = "HND"
) -> Array:
    """Read the key or the value of one position and one KV head."""
    _, page_size, _ = axis_sizes(cache, cache_layout)
    page, slot = int(table[position // page_size]), position % page_size
    if cache_layout == "HND":
        vector = cache[page, kv_head, slot]
    elif cache_layout in ("NHD", "INTERLEAVED"):
        vector = cache[page, slot, kv_head]
    else:
        vector = cache[kv_head, page, slot]
    return vector.astype(np.float64)


LARGEST = {"int8": 127.0, "float8_e4m3fn": 448.0, "float8_e5m2": 57344.0, "uint8": 7.0}


def scales_of(rows: Array, dtype: DType) -> Array:
    """Return the scale of each row of float32 `rows [..., width]`: its largest entry's code is that
    of the type.
    """
    size = np.abs(rows)
    if dtype.name.startswith("float8"):  # it has codes for NaN
        size = np.where(np.isnan(size), np.float32(0), size)
    scale = size.max(-1, initial=0) / np.float32(LARGEST[dtype.name])
    return np.where(scale < np.finfo(np.float32).tiny, np.float32(1), scale)


def quantised(rows: Array, scale: Any, dtype: DType) -> Array:
    """Return what a cache of `dtype` holds of float32 `rows [..., width]`, over their scale."""
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
        x = rows if scale is None else rows * (1 / np.float32(scale))
        if dtype.name not in LARGEST:
            return x.astype(dtype)
        x = np.clip(x, np.float32(-LARGEST[dtype.name]), np.float32(LARGEST[dtype.name]))
        if dtype.name.startswith("float8"):
            return x.astype(dtype)
        x = np.rint(np.where(np.isnan(x), 0, x)).astype(np.int8)
    if dtype != np.uint8:
        return x
    x = x.astype(np.uint8) % 16
    return x[..., 0::2] + 16 * x[..., 1::2]


def row(pool: Array, page: int, offset: int, cache_layout: str) -> Array:
    """All heads of one slot, `[num_kv_heads, head_dim]`."""
    if cache_layout == "HND":
        return pool[page, :, offset]
    if cache_layout in ("NHD", "INTERLEAVED"):
        return pool[page, offset]
    return pool[:, page, offset]


def axis_sizes(cache: Array, cache_layout: str) -> tuple[int, int, int]:
    """Return `num_pages, page_size, num_kv_heads`."""
    if cache.ndim == 5:
        cache, _ = halves(cache, cache_layout)
    if cache_layout == "HND":
        return cache.shape[0], cache.shape[2], cache.shape[1]
    if cache_layout in ("NHD", "INTERLEAVED"):
        return cache.shape[0], cache.shape[1], cache.shape[2]
    return cache.shape[1], cache.shape[2], cache.shape[0]
