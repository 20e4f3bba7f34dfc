"""How fast this GPU reads: the best of several shapes of a kernel that does nothing else."""

import functools
import itertools
import statistics
import typing

import jax
import jax.numpy as jnp
import timing
import triton
import triton.language as tl

from ejk.backends.triton import _launch

# Programs a multiprocessor, elements a block, warps.
SHAPES = tuple(itertools.product((4, 8, 16), (4096, 8192), (4, 8)))


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


@functools.cache
def read_ceiling(num_bytes: int) -> float:
    """Return the best rate in GB/s of reading `num_bytes`, of buffers that exceed the caches."""
    elements = num_bytes // 4 // 8192 * 8192
    copies = max(1, -(-(2**28) // num_bytes))
    buffers = [
        jax.random.normal(jax.random.key(i), (elements,), jnp.float32) for i in range(copies)
    ]
    best_us = min(_read_us(buffers, *shape) for shape in SHAPES)
    return 4 * elements / best_us / 1e3


def _read_us(buffers, programs_per_sm: int, block: int, num_warps: int) -> float:
    programs = programs_per_sm * jax.devices()[0].core_count
    constants = {"NUM_ELEMENTS": buffers[0].size, "NUM_PROGRAMS": programs, "BLOCK": block}

    @jax.jit
    def run(*buffers):
        return [
            _launch.call(
                read_kernel,
                {"source_ptr": buffer},
                {"sums_ptr": jax.ShapeDtypeStruct((programs,), jnp.float32)},
                constants,
                grid=programs,
                num_warps=num_warps,
                num_stages=3,
                compute_capability=None,
                interpret=False,
            )
            for buffer in buffers
        ]

    found = timing.kernels(lambda: run(*buffers), repeats=3)
    return statistics.median(k.end_us - k.begin_us for k in found if k.name == "read_kernel")
