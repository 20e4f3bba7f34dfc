"""The offline compiler reads the numbers that it claims to read."""

import typing

import offline
import pytest
import triton
import triton.language as tl


@triton.jit
@typing.no_type_check
def matmul_kernel(
    a_ptr, b_ptr, out_ptr, K: tl.constexpr, STRIDE: tl.constexpr, BLOCK: tl.constexpr
):
    offs = tl.arange(0, BLOCK)
    acc = tl.zeros([BLOCK, BLOCK], dtype=tl.float32)
    for start in range(0, K, BLOCK):
        a = tl.load(a_ptr + offs[:, None] * STRIDE + start + offs[None, :])
        b = tl.load(b_ptr + (start + offs)[:, None] * STRIDE + offs[None, :])
        acc = tl.dot(a, b, acc)
    tl.store(out_ptr + offs[:, None] * STRIDE + offs[None, :], acc)


POINTERS = {"a_ptr": "bfloat16", "b_ptr": "bfloat16", "out_ptr": "float32"}
CONSTANTS = {"K": 1024, "STRIDE": 1024, "BLOCK": 64}


@pytest.mark.parametrize("target", offline.CUDA_TARGETS)
def test_cuda(target):
    program = offline.compile_cuda(matmul_kernel, POINTERS, CONSTANTS, target)
    assert 0 < program.registers <= 255
    assert program.spill_store_bytes == program.spill_load_bytes == 0
    assert 2 * 64 * 64 * 2 <= program.shared_bytes <= offline.SHARED_MEMORY_BYTES[target]
    assert program.wide_async_copies > 0
    assert set(program.async_copies) == {16}
    assert program.matrix_products > 0
    assert ".visible .entry matmul_kernel" in program.ptx


def test_odd_strides_cost_the_wide_copies():
    constants = CONSTANTS | {"STRIDE": 1022}
    program = offline.compile_cuda(matmul_kernel, POINTERS, constants, "sm_80")
    assert program.wide_async_copies == 0
    assert program.async_copies[4] > 0


def test_spills_are_seen():
    constants = CONSTANTS | {"BLOCK": 128}
    program = offline.compile_cuda(matmul_kernel, POINTERS, constants, "sm_80", num_warps=1)
    assert program.spill_store_bytes > 0
    assert program.spill_load_bytes > 0


@pytest.mark.parametrize("target", offline.AMD_TARGETS)
def test_amd(target):
    program = offline.compile_amd(matmul_kernel, POINTERS, CONSTANTS, target)
    assert 0 < program.vgprs <= 512
    assert program.vgpr_spills == program.sgpr_spills == 0
    assert 0 < program.lds_bytes <= offline.SHARED_MEMORY_BYTES[target]
    assert program.matrix_products > 0
