"""How fast this GPU reads, copies and multiplies: yardsticks of the same run.

A rate of reading or copying is the best of several shapes of a kernel that only does so.
"""

import functools
import itertools
import typing
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import timing
import triton
import triton.language as tl
import workloads

from ejk.backends.triton import _launch

# Programs a multiprocessor, elements a block, warps.
SHAPES = tuple(itertools.product((4, 8, 16), (4096, 8192), (4, 8)))
SIZES = tuple(4**n for n in range(11, 17))  # bytes: 4 MiB to 4 GiB
MATMUL = 8192
PRODUCTS = 4


@triton.jit
@typing.no_type_check
def read_kernel(
    source_ptr,  # float32 [num_elements]
    sums_ptr,  # float32 [programs]
    NUM_ELEMENTS: tl.constexpr,
    NUM_PROGRAMS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sum every `NUM_PROGRAMS`-th block of the source."""
    pid = tl.program_id(0)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(pid, NUM_ELEMENTS // BLOCK, NUM_PROGRAMS):
        total += tl.load(source_ptr + start.to(tl.int64) * BLOCK + tl.arange(0, BLOCK))
    tl.store(sums_ptr + pid, tl.sum(total, 0))


@triton.jit
@typing.no_type_check
def copy_kernel(
    source_ptr,  # float32 [num_elements]
    target_ptr,
    NUM_ELEMENTS: tl.constexpr,
    NUM_PROGRAMS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Copy every `NUM_PROGRAMS`-th block of the source."""
    pid = tl.program_id(0)
    for start in range(pid, NUM_ELEMENTS // BLOCK, NUM_PROGRAMS):
        offs = start.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        tl.store(target_ptr + offs, tl.load(source_ptr + offs))


@functools.cache
def read_ceiling(num_bytes: int, lock: str | None = None) -> float:
    """Return the best rate in GB/s of reading `num_bytes`, of buffers that exceed the caches."""
    return _best_rate(read_kernel, "sums_ptr", num_bytes, lock)


@functools.cache
def copy_ceiling(num_bytes: int) -> float:
    """Return the best rate in GB/s, bytes read and bytes written, of copying `num_bytes`."""
    return 2 * _best_rate(copy_kernel, "target_ptr", num_bytes, None)


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


def _best_rate(kernel, output: str, num_bytes: int, lock: str | None) -> float:
    """Compile every shape, then time them all in one trace."""
    elements = num_bytes // 4 // 8192 * 8192
    copies = max(1, -(-(2**28) // num_bytes))
    runs = [jax.jit(functools.partial(_run, kernel, output, shape)) for shape in SHAPES]
    for run in runs:
        run.lower(*[jax.ShapeDtypeStruct((elements,), jnp.float32)] * copies).compile()

    def every_shape():
        for run in runs:
            result = run(*buffers)
        return result

    with timing.exclusive(lock):
        buffers = [
            jax.random.normal(jax.random.key(i), (elements,), jnp.float32) for i in range(copies)
        ]
        found = timing.kernels(every_shape, repeats=3)
    took = [k.end_us - k.begin_us for k in found if k.name == kernel.fn.__name__]
    best_us = np.median(np.reshape(took, (3, len(runs), copies)), axis=(0, 2)).min()
    return 4 * elements / best_us / 1e3


def _run(kernel, output: str, shape: tuple[int, int, int], *buffers: jax.Array) -> list[Any]:
    programs_per_sm, block, num_warps = shape
    programs = programs_per_sm * jax.devices()[0].core_count
    size = programs if output == "sums_ptr" else buffers[0].size
    return [
        _launch.call(
            kernel,
            {"source_ptr": buffer},
            {output: jax.ShapeDtypeStruct((size,), jnp.float32)},
            {"NUM_ELEMENTS": buffer.size, "NUM_PROGRAMS": programs, "BLOCK": block},
            grid=programs,
            num_warps=num_warps,
            num_stages=3,
            compute_capability=None,
            interpret=False,
        )
        for buffer in buffers
    ]
