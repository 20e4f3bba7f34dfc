"""The checks of what arrays hold, and of how pools fit each other."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from ejk._cache_types import CACHE_DTYPES, CacheType, cache_type_of
from ejk._describe import describe
from ejk._typing import Array

DTYPES = ("float32", "bfloat16", "float16")


def as_float32(x: Any) -> Any:
    """Widen what each head has. Gradients come back in its own type."""
    return x if x is None or x.dtype == np.float32 else x.astype(np.float32)


def held_in_float32(name: str, number: Any) -> float:
    """Check that a number is finite in float32, and return Python's."""
    number = number if isinstance(number, int) else float(number)  # which holds no 10**400
    if not abs(number) <= float(np.finfo(np.float32).max):  # nor is NaN
        raise ValueError(f"{name}={describe(number)} must be a finite float32, at most 3.4e38")
    return float(number)


def check_rows(name: str, rows: Array, key_cache: Array) -> None:
    """Check that queries, or new keys, are of a type that products take."""
    if rows.dtype.name in DTYPES:
        return
    how, cache = f"pass {name}.astype(jnp.bfloat16)", key_cache.dtype.name
    if cache in DTYPES:
        how = f"pass {name}.astype(jnp.{cache})"
    elif cache not in CACHE_DTYPES:
        how = "keep the pools in one of " + ", ".join(DTYPES)
    raise TypeError(f"{name}.dtype={rows.dtype.name} must be one of {', '.join(DTYPES)}: {how}")


def check_cache_dtype(argument: str, dtype: Any) -> CacheType:
    """Check that `dtype` is one that a cache may have, and return what it holds."""
    try:
        name = jnp.dtype(dtype).name
    except TypeError:
        name = describe(dtype)
    if name not in CACHE_DTYPES:
        packed = name in ("int4", "uint4")
        how = "int4 has two values a byte" if packed else "make the pools with ejk.empty_kv_cache"
        if name == "float64":
            how = f"pass {argument.removesuffix('.dtype')}.astype(jnp.float32)"
        raise ValueError(
            f"{argument}={name} must be one of {', '.join(CACHE_DTYPES)}, of which uint8 holds "
            f"int4: {how}"
        )
    return cache_type_of(name)


def check_floats(**arrays: Array | None) -> None:
    """Check that each array that is not None is of a type that float32 holds."""
    for name, x in arrays.items():
        if x is not None and x.dtype.name not in DTYPES:
            raise ValueError(
                f"{name}.dtype={x.dtype} must be float32, bfloat16 or float16: "
                f"pass {name}.astype(jnp.float32)"
            )


def check_width(key_cache: Array, head_dim: int, whose: str) -> None:
    """Check that a row of the cache holds `head_dim` values, which are those of `whose`."""
    cache_type, width = cache_type_of(key_cache.dtype), key_cache.shape[-1]
    axis = f"key_cache.shape[{key_cache.ndim - 1}]={width}"
    if cache_type.per_element == 1:
        if width != head_dim:
            raise ValueError(f"{axis} must be {whose} head_dim={head_dim}")
        return
    if head_dim % cache_type.per_element:
        raise ValueError(
            f"head_dim={head_dim} must be even with int4, held as uint8: a byte has two values"
        )
    if width * cache_type.per_element != head_dim:
        as_float8 = "; pass bytes of float8 as key_cache.view(jnp.float8_e4m3fn)"
        raise ValueError(
            f"{axis} must be half of {whose} head_dim={head_dim}: int4, held as uint8, has two "
            "values a byte" + as_float8 * (width == head_dim)
        )
