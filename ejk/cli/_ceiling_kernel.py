"""Kernels that do nothing but read, or copy: what a GPU's memory gives at most."""

import typing

import triton
import triton.language as tl


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
