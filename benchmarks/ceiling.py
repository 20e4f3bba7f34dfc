"""How fast this GPU reads, copies and multiplies: yardsticks of the same run."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import timing  # first: it says where `ejk.cli` is
import workloads

from ejk.cli._ceiling import copy_ceiling as copy_ceiling
from ejk.cli._ceiling import read_ceiling as read_ceiling

SIZES = tuple(4**n for n in range(11, 17))  # bytes: 4 MiB to 4 GiB
MATMUL = 8192
PRODUCTS = 4


@functools.cache
def matmul_rate(size: int = MATMUL, lock: str | None = None) -> float:
    """Return TFLOP/s of a bfloat16 product of two square matrices of normal values."""
    with timing.exclusive(lock):
        a, b = (
            jax.random.normal(jax.random.key(i), (size, size), jnp.bfloat16) * size**-0.5
            for i in range(2)
        )
        run = jax.jit(lambda a, b: functools.reduce(lambda a, _: a @ b, range(PRODUCTS), a))
        busy_us = timing.busy_us(timing.device_kernels(lambda: run(a, b)))
    return 2 * size**3 * PRODUCTS * timing.REPEATS / busy_us / 1e6


class Yardsticks(NamedTuple):
    """Rates that were measured in one run."""

    read_gb_per_s: Sequence[float]  # of each of SIZES
    matmul_tflops: float

    def shares(self, workload: workloads.Workload, device_us: float) -> dict[str, float]:
        """Say what a time is of the read ceiling, and for latent attention of the larger floor."""
        gb_per_s = workload.kv_bytes / device_us / 1e3
        ceiling = np.interp(np.log(workload.kv_bytes), np.log(SIZES), self.read_gb_per_s)
        found = {
            "gb_per_s": round(gb_per_s, 1),
            "of_ceiling": round(float(gb_per_s / ceiling), 4),
            "ceiling_gb_per_s": round(float(ceiling), 1),
        }
        if not workload.latent:
            return found
        tflops = workload.flops / device_us / 1e6
        return found | {
            "tflops": round(tflops, 1),
            "of_floor": round(float(max(gb_per_s / ceiling, tflops / self.matmul_tflops)), 4),
            "matmul_tflops": round(self.matmul_tflops, 1),
        }
