"""Shared memory of swizzled rows, which the tensor cores read in tiles."""

from typing import Any

import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from ejk.backends.mosaic_gpu._tensor_cores import SWIZZLED_BYTES, TILE_ROWS


def swizzled(shape: tuple[int, ...], dtype: Any, tiled: bool = True) -> Any:
    """Return memory in such tiles, or in rows of its own each."""
    return plgpu.SMEM(shape, dtype, transforms=transforms(dtype, tiled))


def transforms(dtype: Any, tiled: bool = True) -> tuple[Any, Any]:
    """Return what tells Mosaic how such memory lies."""
    tile = (*[TILE_ROWS] * tiled, SWIZZLED_BYTES // jnp.dtype(dtype).itemsize)
    return (
        plgpu.TilingTransform(tile),  # pyright: ignore[reportAbstractUsage]
        plgpu.SwizzleTransform(SWIZZLED_BYTES),  # pyright: ignore[reportAbstractUsage]
    )
