"""The types that a cache may have: what they hold, and how numbers become codes and back.

A code times its scale is the number that attention sees. Types of floats are read as they are and
may have scales, too.
"""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ejk._quotient import quotient

Scales = Literal["none", "head", "token"]
"""What has a scale of its own: nothing, a KV head, or a token and KV head."""


class CacheType(NamedTuple):
    """One type of a cache.

    Attributes:
        name: what errors and features call it.
        largest: the code that a row's largest magnitude gets with a computed scale; None of the
            query's types, whose scales nobody computes.
        per_element: values that an element of the array holds. Of two, the first is in the low
            four bits, in two's complement.
    """

    name: str
    largest: float | None = None
    per_element: int = 1

    @property
    def is_quantised(self) -> bool:
        """It is none of the query's types. Its codes are exact in each of those."""
        return self.largest is not None

    @property
    def is_integer(self) -> bool:
        """Its codes hold no NaN."""
        return self.name in ("int8", "uint8 (int4)")


_TYPES = {
    "float32": CacheType("float32"),
    "bfloat16": CacheType("bfloat16"),
    "float16": CacheType("float16"),
    "int8": CacheType("int8", largest=127.0),
    "float8_e4m3fn": CacheType("float8_e4m3fn", largest=448.0),
    "float8_e5m2": CacheType("float8_e5m2", largest=57344.0),
    "uint8": CacheType("uint8 (int4)", largest=7.0, per_element=2),
}
CACHE_DTYPES = tuple(_TYPES)
"""The dtypes of the arrays that hold a cache."""

QUANTISED = frozenset(f"key_cache.dtype={of.name}" for of in _TYPES.values() if of.is_quantised)
"""The features of quantised types: a backend may lack any."""

SCALES = frozenset({"key_scale, value_scale", "key_scale, value_scale per token"})
"""The features of scales: of neither kind are they those of a token."""


def cache_type_of(dtype: Any) -> CacheType:
    """Return what an array of `dtype`, one of `CACHE_DTYPES`, holds as a cache."""
    return _TYPES[np.dtype(dtype).name]


def features_of(cache_type: CacheType, scales: Scales) -> dict[str, bool]:
    """Say which features of `QUANTISED` and `SCALES` a call has."""
    return {
        f"key_cache.dtype={cache_type.name}": cache_type.is_quantised,
        "key_scale, value_scale": scales == "head",
        "key_scale, value_scale per token": scales == "token",
    }


def told_of_gradients(cache_type: CacheType, *names: str) -> dict[str, str]:
    """Return what is said to who asks for the gradient of pools: nothing where there is one."""
    told = (
        "{0}.dtype={1} has no gradient, as codes have none: keep the cache in a float of 16 or "
        "32 bits, or pass jax.lax.stop_gradient({0})"
    )
    return {name: told.format(name, cache_type.name) for name in names * cache_type.is_quantised}


def codes_of(x: jax.Array, cache_type: CacheType) -> jax.Array:
    """Return each code as a number of its own: int4 as int8, all others as they are."""
    if cache_type.per_element == 1:
        return x
    low, high = x & 0xF, x >> 4
    both = jnp.stack([low, high], axis=-1).reshape(*x.shape[:-1], 2 * x.shape[-1])
    return (both ^ 8).astype(jnp.int8) - 8


def scales_of(rows: jax.Array, cache_type: CacheType) -> jax.Array:
    """Return the scale that each row of `rows [..., width]`, float32, is written with.

    Its largest magnitude over the largest code; 1 where that is no normal number, as of a row of
    zeros. A NaN in a row makes it NaN for integers, whose codes cannot hold it.
    """
    assert cache_type.largest is not None
    is_nan = jnp.isnan(rows)  # which a maximum need not return
    largest = jnp.where(is_nan, 0.0, jnp.abs(rows)).max(axis=-1)
    scale = quotient(largest, jnp.full_like(largest, cache_type.largest))
    scale = jnp.where(scale < jnp.finfo(jnp.float32).tiny, 1.0, scale)
    return jnp.where(is_nan.any(axis=-1), jnp.nan, scale) if cache_type.is_integer else scale


def quantise(rows: jax.Array, scale: jax.Array | None, dtype: Any) -> jax.Array:
    """Return the codes of `rows [..., width]`, float32, over `scale [...]`, as a cache has them.

    That is `rows * (1 / scale)`, one division a row, rounded to nearest even. Quantised types
    saturate, and integers take NaN for 0.
    """
    cache_type = cache_type_of(dtype)
    if scale is not None:
        rows = rows * quotient(jnp.ones_like(scale), scale)[..., None]
    if cache_type.largest is None:
        return rows.astype(dtype)
    codes = jnp.clip(rows, -cache_type.largest, cache_type.largest)
    codes = jnp.where(jnp.isnan(rows), 0.0 if cache_type.is_integer else jnp.nan, codes)
    if not cache_type.is_integer:
        return codes.astype(dtype)
    codes = jnp.round(codes).astype(jnp.int8)
    if cache_type.per_element == 1:
        return codes
    pairs = codes.astype(jnp.uint8).reshape(*codes.shape[:-1], -1, 2) & 0xF
    return pairs[..., 0] | (pairs[..., 1] << 4)
