"""How fast this GPU reads and copies: the best of several shapes of a kernel that only does so."""

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
def read_ceiling(num_bytes: int) -> float:
    """Return the best rate in GB/s of reading `num_bytes`, of buffers that exceed the caches."""
    buffers = _buffers(num_bytes)
    best_us = min(_device_us(read_kernel, "sums_ptr", buffers, *shape) for shape in SHAPES)
    return 4 * buffers[0].size / best_us / 1e3


@functools.cache
def copy_ceiling(num_bytes: int) -> float:
    """Return the best rate in GB/s, bytes read and bytes written, of copying `num_bytes`."""
    buffers = _buffers(num_bytes)
    best_us = min(_device_us(copy_kernel, "target_ptr", buffers, *shape) for shape in SHAPES)
    return 2 * 4 * buffers[0].size / best_us / 1e3


def _buffers(num_bytes: int) -> list[jax.Array]:
    elements = num_bytes // 4 // 8192 * 8192
    copies = max(1, -(-(2**28) // num_bytes))
    return [jax.random.normal(jax.random.key(i), (elements,), jnp.float32) for i in range(copies)]


def _device_us(kernel, output: str, buffers, programs_per_sm: int, block: int, num_warps: int):
    programs = programs_per_sm * jax.devices()[0].core_count
    constants = {"NUM_ELEMENTS": buffers[0].size, "NUM_PROGRAMS": programs, "BLOCK": block}
    size = programs if output == "sums_ptr" else buffers[0].size

    @jax.jit
    def run(*buffers):
        return [
            _launch.call(
                kernel,
                {"source_ptr": buffer},
                {output: jax.ShapeDtypeStruct((size,), jnp.float32)},
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
    return statistics.median(k.end_us - k.begin_us for k in found if k.name == kernel.fn.__name__)
