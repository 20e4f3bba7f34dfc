"""The Triton write touches only what is its own, whatever slots are passed, and in 64 bits."""

import re

import hypothesis
import jax
import mutants
import numpy as np
import pytest
from entries import Entry
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from test_triton_large_arrays import little_memory, on_numpy, sparse
from test_triton_memory import ANY_INT32
from tiers import THOROUGH

import ejk
from ejk.backends.triton.interpreter.memory import MemoryAccessError
from ejk.backends.triton.write_kv_cache import kernel
from ejk.backends.triton.write_kv_cache import sizes as write_kv_cache_sizes
from ejk.backends.write_kv_cache import WriteKVCacheOperands, WriteKVCacheProblem
from ejk.testing import oracle
from ejk.testing.configurations import LAYOUTS
from ejk.testing.memory import RaceError, memory_checked
from ejk.testing.write_kv_cache import SHAPES, assert_written, build

F32, F16 = np.dtype(np.float32), np.dtype(np.float16)
TRITON = Entry("", ejk.TritonWriteKVCache(interpret=True), examples=0)
__all__ = ["little_memory", "on_numpy"]  # fixtures


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_hostile_slots(shape):
    """No access outside, and no element is stored by two programs."""
    few = st.integers(0, min(3, shape.num_slots - 1))
    slots = few | st.integers(0, shape.num_slots - 1) | ANY_INT32

    @hypothesis.seed(0)
    @hypothesis.settings(max_examples=300 if THOROUGH else 10)
    @hypothesis.given(
        arrays(np.int32, shape.num_tokens, elements=slots, fill=st.nothing()),
        st.sampled_from(LAYOUTS),
    )
    def holds(slots, layout):
        case = build(shape, F32, layout, slots)
        with memory_checked() as checker:
            caches = TRITON(case)
        assert_written(case, caches)
        stays = {slot: i for i, slot in enumerate(slots) if 0 <= slot < shape.num_slots}
        stored = len(stays) * shape.num_kv_heads * shape.head_dim
        halves = 2 if case.key_cache.ndim == 5 else 1
        assert checker.lanes["store", "key_cache_ptr"] == halves * stored

    holds()


def test_tokens_that_are_not_compared_would_race(monkeypatch):
    constants = write_kv_cache_sizes.WriteSizes.constants

    def without_duplicates(*facts):
        return constants(*facts) | {"HAS_DUPLICATES": False}

    monkeypatch.setattr(write_kv_cache_sizes.WriteSizes, "constants", without_duplicates)
    case = build(SHAPES[0], F32, "HND", np.array([3, 4, 3, 9, 10, 11, 12]))
    with memory_checked(), pytest.raises(Exception, match=RaceError.__name__):
        jax.block_until_ready(
            ejk.write_kv_cache(
                *case.arguments(), backend=ejk.TritonWriteKVCache(90, interpret=True)
            )
        )


def test_many_tokens_are_marked_before_the_launch(monkeypatch):
    """Then none is compared: each program loads its own slots alone."""
    monkeypatch.setattr(write_kv_cache_sizes, "MAX_COMPARED", 100)
    slots = np.random.default_rng(0).integers(-4, 100, 150).astype(np.int32)
    case = build(SHAPES[0], F16, "HND", slots)
    with memory_checked() as checker:
        assert_written(case, TRITON(case))
    assert checker.lanes["load", "slot_mapping_ptr"] == 150


@pytest.mark.parametrize("num_tokens", [1, 2, 1500])
def test_programs_of_several_tokens(monkeypatch, num_tokens):
    monkeypatch.setattr(write_kv_cache_sizes, "ENOUGH_PROGRAMS", 40)
    slots = np.random.default_rng(0).integers(0, 3000, num_tokens).astype(np.int32)
    shape = SHAPES[5].__class__("small rows", num_tokens, 1, 16, 16, page_size=16, num_pages=190)
    case = build(shape, F32, "NHD", slots)
    with memory_checked():
        assert_written(case, TRITON(case))


# The pools have 2**32 elements.
LARGE = {
    "HND": ((2**21 + 8, 2, 16, 64), "HND"),
    "NHD": ((2**21 + 8, 16, 2, 64), "NHD"),
    "KV_HEADS_FIRST": ((4, 2**20 + 8, 16, 64), "KV_HEADS_FIRST"),
    "fused": ((2**20 + 8, 2, 2, 16, 64), "HND"),
    "one page": ((1, 2**21, 32, 64), "NHD"),
    "heads of 2**30": ((1, 3, 2**20, 1024), "HND"),
}


def write_large(shape, layout):
    """Write to both ends of pools; return what has to be there and what is."""
    rng = np.random.default_rng(0)
    fused = len(shape) == 5
    pools = [sparse(shape) for _ in range(1 if fused else 2)]
    assert pools[0].size > 2**31
    value_shape = None if fused else shape
    problem = WriteKVCacheProblem(shape, value_shape, F16, layout, 3, F16)
    key, value = rng.standard_normal((2, 3, problem.num_kv_heads, problem.head_dim)).astype(F16)
    slots = np.array([problem.num_slots - 1, 0, problem.num_slots // 2 + 3], np.int32)
    operands = WriteKVCacheOperands(key, value, *[*pools, None][:2], slots)
    backend = ejk.TritonWriteKVCache(interpret=True)
    assert not backend.refusals(problem, "cpu")
    caches = backend.run(problem, operands, "cpu")
    halves = oracle.halves(caches[0], layout) if fused else caches
    for i, slot in enumerate(slots):
        for pool, rows in zip(halves, (key, value)):
            page, offset = divmod(int(slot), problem.page_size)
            np.testing.assert_array_equal(oracle.row(pool, page, offset, layout), rows[i])


@pytest.mark.parametrize("name", LARGE)
def test_pools_above_2_31_elements(on_numpy, name):
    write_large(*LARGE[name])


@pytest.mark.fault("write_kv_cache", "triton")
@pytest.mark.parametrize(
    ("name", "bug"),
    [
        ("HND", "(slots // PAGE_SIZE).to(tl.int64)"),
        ("NHD", "(slots // PAGE_SIZE).to(tl.int64)"),
        ("KV_HEADS_FIRST", "(offs_row // HEAD_DIM).to(tl.int64)"),
        ("one page", "(slots % PAGE_SIZE).to(tl.int64)"),
    ],
)
def test_offsets_of_32_bits_are_caught(on_numpy, monkeypatch, tmp_path, name, bug):
    narrow = mutants.load(kernel, bug, bug.removesuffix(".to(tl.int64)"), tmp_path)
    monkeypatch.setattr(kernel, "write_kv_cache_kernel", narrow.write_kv_cache_kernel)
    with pytest.raises((MemoryAccessError, AssertionError)):
        write_large(*LARGE[name])


def test_more_programs_than_a_grid_holds_are_refused():
    problem = WriteKVCacheProblem((64, 2**10, 16, 128), None, F16, "HND", 2**30, F16)
    backend = ejk.TritonWriteKVCache(interpret=True)
    assert re.fullmatch(
        r"its grid of \d+ programs exceeds 2147483647", backend.refusals(problem, "cpu")[0]
    )
