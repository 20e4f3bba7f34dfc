"""Writes and copies, one token or slot after the other."""

from typing import Any

import numpy as np

from ejk.testing.oracle._pools import (
    Array,
    axis_sizes,
    halves,
    holds_both,
    quantised,
    row,
    scales_of,
)


def write_kv_cache(
    key: Array,
    value: Array | None,
    key_cache: Array,
    value_cache: Array | None,
    slot_mapping: Array,
    *,
    cache_layout: str = "HND",
    key_scale: Any = None,
    value_scale: Any = None,
) -> list[Any]:
    """Return the caches, then the scales if each token has some, after one token after the other.

    Keys and values of the cache's type without scales keep their bits.
    """
    per_token = np.ndim(key_scale) > 1
    caches = key_cache.copy(), None if value_cache is None else value_cache.copy()
    scales = [x.copy() if np.ndim(x) > 1 else x for x in (key_scale, value_scale)]
    pools, scale_pools = caches, scales
    if holds_both(key_cache, cache_layout):
        pools = halves(caches[0], cache_layout)
        scale_pools = halves(scales[0], cache_layout) if per_token else scales
    num_pages, page_size, _ = axis_sizes(pools[0], cache_layout)
    for i, slot in enumerate(slot_mapping):
        page, offset = divmod(int(slot), page_size)
        if not 0 <= page < num_pages:
            continue
        for pool, rows, scale in zip(pools, (key, value), scale_pools):
            if rows is None or pool is None:
                continue
            new = rows[i]
            if per_token:
                new = new.astype(np.float32)
                row(scale, page, offset, cache_layout)[...] = scales_of(new, pool.dtype)
                new = quantised(new, scales_of(new, pool.dtype)[..., None], pool.dtype)
            elif scale is not None or new.dtype != pool.dtype:
                scale = None if scale is None else np.reshape(scale, (-1, 1))
                new = quantised(new.astype(np.float32), scale, pool.dtype)
            row(pool, page, offset, cache_layout)[...] = new
    return [*caches, *scales] if per_token else [*caches]


def copy_kv_cache(
    unit: str,
    key_cache: Array,
    value_cache: Array | None,
    sources: Array,
    targets: Array,
    *,
    cache_layout: str = "HND",
    key_scale: Any = None,
    value_scale: Any = None,
) -> list[Any]:
    """Return the caches, then the scales if each token has some, after one copy after the other.

    Of slots, or of pages slot by slot. Sources are read in the arrays that were given.
    """
    given: list[Any] = [key_cache, value_cache]
    if np.ndim(key_scale) > 1:
        given += [key_scale, value_scale]
    copied: list[Any] = [None if x is None else x.copy() for x in given]
    pairs = [(old, new) for old, new in zip(given, copied) if old is not None]
    if key_cache.ndim == 5:
        split = [(halves(old, cache_layout), halves(new, cache_layout)) for old, new in pairs]
        pairs = [pair for olds, news in split for pair in zip(olds, news)]
    num_pages, page_size, _ = axis_sizes(key_cache, cache_layout)
    slots = page_size if unit == "page" else 1
    num_units = num_pages * page_size // slots
    for source, target in zip(map(int, sources), map(int, targets)):
        if not (0 <= source < num_units and 0 <= target < num_units):
            continue
        for i in range(slots):
            at, to = (divmod(x * slots + i, page_size) for x in (source, target))
            for old, new in pairs:
                row(new, *to, cache_layout)[...] = row(old, *at, cache_layout)
    return copied
