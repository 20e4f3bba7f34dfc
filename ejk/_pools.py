"""The checks of pools: their layout, their axes, and whether they hold keys and values."""

from typing import Any

from ejk._describe import ALL_LAYERS, describe
from ejk._indices import Size, exceeds
from ejk._nearest import did_you_mean
from ejk._typing import Array
from ejk.backends.layouts import LAYOUTS, layout_of


def check_layout(cache_layout: Any) -> None:
    """Check that a layout is one of those that there are."""
    if not isinstance(cache_layout, str) or cache_layout not in LAYOUTS:
        near = did_you_mean(cache_layout, LAYOUTS) if isinstance(cache_layout, str) else ""
        raise ValueError(
            f"cache_layout={describe(cache_layout)} must be one of "
            f"{', '.join(map(repr, LAYOUTS))}{near}"
        )


def holds_both(key_cache: Array, cache_layout: Any) -> bool:
    """Say whether a pool holds keys and values, under a layout that may be none."""
    return key_cache.ndim == 5 or cache_layout == "INTERLEAVED"


def both_in(key_cache: Array) -> str:
    """Name a pool that holds keys and values."""
    return "a key_cache of " + (
        "five axes" if key_cache.ndim == 5 else 'cache_layout="INTERLEAVED"'
    )


def check_pool(key_cache: Array, cache_layout: Any, **sizes: Size) -> tuple[Size, int, int]:
    """Check a pool's axes, and that `sizes` and its own are not 0.

    Returns its pages, its KV heads and the slots of a page.
    """
    check_layout(cache_layout)
    layout = layout_of(key_cache, cache_layout)
    pool = f"(key_cache{list(key_cache.shape)}, cache_layout={cache_layout!r})"
    if key_cache.ndim != layout.num_axes:
        raise ValueError(
            f"key_cache must have {layout.num_axes} axes, keys and values side by side on that of "
            f"the heads {pool}"
        )
    if layout.interleaved and key_cache.shape[layout.kv_heads] % 2:
        raise ValueError(
            f"key_cache.shape[{layout.kv_heads}]={key_cache.shape[layout.kv_heads]} must be even, "
            f"a key and a value of each head {pool}"
        )
    if layout.halves is not None and key_cache.shape[layout.halves] != 2:
        raise ValueError(
            f"key_cache.shape[{layout.halves}]={key_cache.shape[layout.halves]} must be 2, keys "
            f"and values {pool}: " + _unstack(key_cache)
        )
    num_pages, num_kv_heads, page_size = (
        key_cache.shape[axis] for axis in (layout.pages, layout.kv_heads, layout.slots)
    )
    num_kv_heads //= layout.heads_of_head
    sizes |= {"num_kv_heads": num_kv_heads, "page_size": page_size}
    for name, size in sizes.items():
        if size == 0:
            raise ValueError(f"{name}={size} must be at least 1 {pool}")
    return num_pages, num_kv_heads, page_size


def check_value_cache(key_cache: Array, value_cache: Array | None, cache_layout: Any) -> None:
    """Check the pool of values, if there is one, against that of the keys."""
    if value_cache is None:
        return
    if holds_both(key_cache, cache_layout):
        raise ValueError(
            f"value_cache={describe(value_cache)} must be None with {both_in(key_cache)}, which "
            "holds keys and values"
        )
    if value_cache.dtype != key_cache.dtype:
        is_code = 1 in (value_cache.dtype.itemsize, key_cache.dtype.itemsize)
        mend = "write both with ejk.write_kv_cache: a cast leaves scales out"
        raise ValueError(
            f"value_cache.dtype={value_cache.dtype} must be key_cache.dtype={key_cache.dtype}: "
            + (mend if is_code else "pass value_cache.astype(key_cache.dtype)")
        )
    if value_cache.shape[:-1] != key_cache.shape[:-1]:
        raise ValueError(
            f"value_cache.shape={value_cache.shape} must be key_cache.shape={key_cache.shape} "
            "but for the last axis: make both with one ejk.empty_kv_cache"
        )
    if value_cache.shape[-1] < 1:
        raise ValueError(f"value_cache.shape[3]={value_cache.shape[-1]} must be at least 1")


def check_slots(key_cache: Array, cache_layout: Any, num_pages: Size, page_size: int) -> None:
    """Check that 32 bits number the slots of a pool."""
    if exceeds(num_pages * page_size, 2**31 - 1):
        raise ValueError(
            f"num_pages * page_size={num_pages * page_size} must be below 2**31: slots are 32-bit "
            f"(key_cache{list(key_cache.shape)}, cache_layout={cache_layout!r})"
        )


def _unstack(pools: Array) -> str:
    """Say how pools that are stacked on the first of five axes are passed."""
    if pools.shape[0] == 2:
        return "of [2, num_pages, ...] pass kv_cache[0], kv_cache[1] as key_cache, value_cache"
    return ALL_LAYERS.format("key_cache")
