"""What kernels for Hopper compute with: in log2 units, of tiles in registers."""

import math
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

LOG2E, LN2 = math.log2(math.e), math.log(2)
# By so much, in log2, a logit may exceed what stands for the maximum before sums are rescaled.
SLACK = 8.0


def divide_up(x: Any, by: Any) -> Any:
    return lax.div(x + (by - 1), jnp.int32(by))


def spread(x: Any, width: int) -> Any:
    """Repeat what each row has once."""
    return lax.broadcast_in_dim(x, (*x.shape, width), [0])


def rounded(out: Any, dtype: Any) -> Any:
    """Round to the output's type. What is finite stays so: float16 ends where values may be."""
    if dtype == jnp.float16:
        most = float(jnp.finfo(dtype).max)
        nearest = jnp.minimum(jnp.maximum(out, -most), most)
        out = jnp.where(jnp.abs(out) < jnp.inf, nearest, out)
    return out.astype(dtype)


def accumulator(rows: int, columns: int) -> Any:
    """Return what a product of the tensor cores adds to, in registers."""
    return plgpu.ACC((rows, columns), jnp.float32)  # pyright: ignore[reportPrivateImportUsage]


def fill(interpret: bool, acc_ref: Any, acc: Any) -> None:
    """Have products add to `acc`. The interpreter's accumulators begin with zeros: see `added`."""
    if not interpret:
        acc_ref[...] = acc


def added(interpret: bool, acc_ref: Any, acc: Any) -> Any:
    """Wait for products, and return what they and `acc` add up to."""
    return acc_ref[...] + acc if interpret else acc_ref[...]
