"""How a cache that is timed holds its keys and values: types, scales, and what they mean.

Written apart from `ejk`, which is checked against it.
"""

import dataclasses
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

LARGEST = {"int8": 127.0, "int4": 7.0, "float8_e4m3fn": 448.0, "float8_e5m2": 57344.0}
SHORT = {"float8_e4m3fn": "e4m3", "float8_e5m2": "e5m2"}


@dataclasses.dataclass(frozen=True)
class Cache:
    """A type of cache; `dtype` "int4" is held as uint8, two values in a byte."""

    dtype: str
    scales: Literal["none", "head", "token"] = "none"  # token: one for each token and head

    @property
    def name(self) -> str:
        kind = {"none": "", "head": " per head", "token": " per token"}[self.scales]
        return SHORT.get(self.dtype, self.dtype) + kind

    @property
    def quantised(self) -> bool:
        return self.dtype in LARGEST

    @property
    def held_as(self) -> jnp.dtype:
        return jnp.dtype("uint8" if self.dtype == "int4" else self.dtype)

    def row_bytes(self, head_dim: int) -> int:
        """Bytes of the row of a token and head, and of its scale."""
        codes = head_dim // 2 if self.dtype == "int4" else head_dim * self.held_as.itemsize
        return codes + 4 * (self.scales == "token")


# What is timed; of each batch the first takes turns with the others, which are compared with it.
BFLOAT16 = Cache("bfloat16")
INT8, E4M3, E5M2 = (Cache(name, "head") for name in ("int8", "float8_e4m3fn", "float8_e5m2"))
INT8_TOKEN, E4M3_TOKEN, INT4 = (Cache(name, "token") for name in ("int8", "float8_e4m3fn", "int4"))
CACHES = (BFLOAT16, INT8, E4M3, E5M2, INT8_TOKEN, E4M3_TOKEN, INT4)
SOME_CACHES = (BFLOAT16, INT8, E4M3, INT8_TOKEN, INT4)
FEW_CACHES = (BFLOAT16, E4M3, INT8_TOKEN, INT4)  # where two kernels are compiled for each
TINY_CACHES = (BFLOAT16, E4M3, INT4)
# Of which accuracy is measured.
ALL = (
    BFLOAT16,
    INT8,
    INT8_TOKEN,
    Cache("float8_e4m3fn"),
    E4M3,
    E4M3_TOKEN,
    Cache("float8_e5m2"),
    Cache("float8_e5m2", "token"),
    INT4,
)


class Pool(NamedTuple):
    """Keys, or values: `codes [..., head_dim]`, of int4 `[..., head_dim // 2]`, and scales."""

    codes: jax.Array | None  # None where there are no values of their own
    scale: jax.Array | None  # [num_kv_heads], or `codes.shape[:-1]`


def quantise(cache: Cache, rows: ArrayLike, head_axis: int) -> Pool:
    """Round rows to the nearest value that the cache holds: ties to even, saturated.

    A scale is the largest magnitude of its row, or head, over the type's largest value.
    """
    rows = jnp.asarray(rows, jnp.float32)
    if not cache.quantised:
        return Pool(rows.astype(cache.held_as), None)
    largest, scale = LARGEST[cache.dtype], None
    if cache.scales != "none":
        axes = [axis for axis in range(rows.ndim) if axis != head_axis]
        over = tuple(axes) if cache.scales == "head" else -1
        most = jnp.abs(rows).max(over)
        scale = jnp.where(most > 0, most / largest, 1.0)
    scaled = jnp.clip(rows / _along(rows, scale, head_axis), -largest, largest)
    if cache.dtype in SHORT:
        return Pool(scaled.astype(cache.held_as), scale)
    codes = jnp.round(scaled).astype(jnp.int8)
    if cache.dtype == "int4":
        low, high = (codes[..., i::2].astype(jnp.uint8) for i in range(2))
        codes = (low & 15) | (high << 4)
    return Pool(codes, scale)


def dequantise(cache: Cache, pool: Pool, head_axis: int) -> jax.Array:
    """Return in float32 what the pool holds."""
    rows = pool.codes
    if cache.dtype == "int4":
        signed = jax.lax.bitcast_convert_type(rows, jnp.int8)
        pairs = jnp.stack([(signed << 4) >> 4, signed >> 4], axis=-1)
        rows = pairs.reshape(*rows.shape[:-1], -1)
    rows = rows.astype(jnp.float32)
    return rows * _along(rows, pool.scale, head_axis)


def _along(rows: jax.Array, scale: jax.Array | None, head_axis: int) -> jax.Array:
    """Give scales the axes of the rows."""
    if scale is None:
        return jnp.ones((), jnp.float32)
    if scale.ndim == rows.ndim - 1:
        return scale[..., None]
    return scale.reshape([-1 if axis == head_axis else 1 for axis in range(rows.ndim)])
