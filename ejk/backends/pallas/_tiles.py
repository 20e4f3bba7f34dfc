"""Tiles of a TPU's vector memory, and arrays cut in parts of one size."""

import jax
import jax.numpy as jnp
import numpy as np

LANES = 128
SUBLANES = 8


def round_up(a: int, b: int) -> int:
    return -(-a // b) * b


def tiled(shape: tuple[int, ...], dtype: np.dtype) -> int:
    """Return the bytes of an array in VMEM, its last two axes padded to whole tiles."""
    *lead, rows, lanes = shape
    packing = max(1, 4 // dtype.itemsize)
    tile = SUBLANES * packing
    while tile > packing and tile >= 2 * rows:
        tile //= 2  # short arrays have short tiles
    size = dtype.itemsize * round_up(rows, tile) * round_up(lanes, LANES)
    for axis in lead:
        size *= axis
    return size


def in_parts(x: jax.Array, parts: int, size: int) -> jax.Array:
    """Divide what has a row for each sequence in parts, the last filled up with zeros."""
    x = jnp.pad(x, ((0, parts * size - x.shape[0]),) + ((0, 0),) * (x.ndim - 1))
    return x.reshape(parts, size, *x.shape[1:])
