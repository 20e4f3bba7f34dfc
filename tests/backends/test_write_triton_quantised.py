"""How the Triton write makes codes and scales of rows, and bugs in that: each is caught."""

import dataclasses
import re
import typing

import jax
import jax.numpy as jnp
import mutants
import numpy as np
import pytest
import triton
import triton.language as tl
from entries import Entry

import ejk
import ejk.backends.triton.write_kv_cache.kernel as kernel
import ejk.backends.triton.write_kv_cache.quantise as quantise
from ejk.backends.triton import _launch
from ejk.testing.configurations import BF16, E4M3, E5M2, F32, INT4, INT8
from ejk.testing.memory import memory_checked
from ejk.testing.write_kv_cache import WriteShape, assert_written, build

SPLIT = WriteShape("split", 9, 3, 34, 18, page_size=8)
FUSED = WriteShape("fused", 9, 3, 20, None, page_size=8)
LATENT = WriteShape("latent", 9, 1, 72, 0, page_size=8)
SLOTS = np.array([7, 40, 7, 48, -1, 12, 40, 3, 47])
CASES = (
    (SPLIT, BF16, INT8, "token", "HND"),
    (FUSED, F32, INT4, "token", "KV_HEADS_FIRST"),
    (LATENT, BF16, E4M3, "token", "NHD"),
    (FUSED, BF16, E4M3, "head", "NHD"),
    (SPLIT, F32, E5M2, "none", "HND"),
    (SPLIT, F32, INT8, "head", "HND"),
    (SPLIT, F32, BF16, "none", "NHD"),
)


@dataclasses.dataclass(frozen=True)
class Mutant(ejk.TritonWriteKVCache):
    """A backend of its own to JAX: no compiled program of the sound one is reused."""

    bug: str = ""


def holds(bug):
    """Rows of every size, odd ones among them, are written as the definition says."""
    entry = Entry(bug, Mutant(interpret=True, bug=bug), examples=0)
    for seed, (shape, dtype, cache, scales, layout) in enumerate(CASES):
        case = build(
            shape, dtype, layout, SLOTS, seed=seed, cache_dtype=np.dtype(cache), scales=scales
        )
        case.key[2, 0, 3], case.key[3, 0, 4], case.key[7, 0] = np.nan, np.inf, 0
        case.key[5, 0] = -np.exp(np.arange(case.key.shape[2]) / 9)
        with memory_checked() as checker:
            assert_written(case, entry(case))
        stays = {slot for slot in SLOTS if 0 <= slot < shape.num_slots}
        halves = 2 if shape.value_head_dim is None else 1
        stored = checker.lanes["store", "key_scale_ptr"]
        assert stored == (scales == "token") * halves * len(stays) * shape.num_kv_heads
    for cache in ("e4m3", "e5m2"):
        round_to_8_bits(floats()[::17], cache, native=False, interpret=True)


BUGS = {
    "the scale of the next head": (
        "tl.store(scale_ptr + row // HEAD_DIM, scales",
        "tl.store(scale_ptr + row // HEAD_DIM, tl.flip(scales, 1)",
    ),
    "a given scale of the next head": (
        "scale_ptr + heads, mask=mask, other=1.0", "scale_ptr + heads // 2, mask=mask, other=1.0",
    ),
    "the scale of the next token": (
        "scale_ptr + row // HEAD_DIM", "scale_ptr + (row + stride_slot) // HEAD_DIM",
    ),
    "the scale applied twice": (
        "rows *= tl.div_rn(1.0, scales)[:, :, None]",
        "rows *= tl.div_rn(1.0, scales * scales)[:, :, None]",
    ),
    "no scale": ("rows *= inverse[None, :, None]", "rows *= 1.0"),
    "no scale is stored": ("scales, mask=writes)", "scales, mask=writes & False)"),
    "halves of a byte swapped": ("(low & 0xF) | (high << 4)", "(high & 0xF) | (low << 4)"),
    "large numbers wrap": ("rows = tl.minimum(rows, LARGEST)", "rows = rows"),
    "large negative numbers wrap": ("rows = tl.maximum(rows, -LARGEST)", "rows = rows"),
    "large 8-bit floats are NaN": (
        "size = tl.minimum(tl.abs(rows), LARGEST)",
        "size = tl.minimum(tl.abs(rows), 2.0 * LARGEST)",
    ),
    "halves are rounded up": ("- 1 + ((bits >> DROPPED) & 1)", "+ 0 * ((bits >> DROPPED) & 1)"),
    "small 8-bit floats are cut": ("size < LEAST_NORMAL", "size < 0"),
    "NaN is a number": ("tl.where(rows == rows, code | sign, NAN8)", "(code | sign)"),
    "rows of zeros divide by zero": (
        "tl.where(scales < TINY, 1.0, scales)", "tl.where(scales < 0, 1.0, scales)",
    ),
    "a row's scale ignores what is negative": ("tl.max(tl.abs(rows), 2)", "tl.max(rows, 2)"),
}  # fmt: skip


@pytest.mark.fault("write_kv_cache", "triton")
@pytest.mark.cpu
@pytest.mark.fast
@pytest.mark.parametrize("bug", BUGS)
def test_a_bug_is_caught(bug, monkeypatch, tmp_path):
    faulty = mutants.load(quantise, *BUGS[bug], tmp_path)
    monkeypatch.setattr(kernel, "store_heads", faulty.store_heads)
    monkeypatch.setitem(globals(), "quantise", faulty)
    with pytest.raises((AssertionError, jax.errors.JaxRuntimeError)) as info:
        holds(bug)
    if isinstance(info.value, jax.errors.JaxRuntimeError):  # and not of a kernel that cannot run
        assert re.search("(RaceError|MemoryAccessError): ", str(info.value))


@pytest.mark.cpu
def test_the_sound_write_is_not_accused(monkeypatch, tmp_path):
    same = mutants.load(quantise, "import typing", "import typing", tmp_path)
    monkeypatch.setattr(kernel, "store_heads", same.store_heads)
    holds("none")


@triton.jit
@typing.no_type_check
def float8_kernel(
    x_ptr, out_ptr, BLOCK: tl.constexpr, CACHE: tl.constexpr, LARGEST: tl.constexpr,
    NATIVE: tl.constexpr,
):  # fmt: skip
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs)
    codes = quantise.codes_of(x, x == x, False, CACHE, LARGEST, 1, NATIVE, tl.uint8)
    tl.store(out_ptr + offs, codes)


def round_to_8_bits(x, cache, native, interpret):
    x = x[: len(x) // 1024 * 1024]
    largest = {"e4m3": 448.0, "e5m2": 57344.0}[cache]
    constants = {"BLOCK": 1024, "CACHE": cache, "LARGEST": largest, "NATIVE": native}
    [codes] = _launch.call(
        float8_kernel, {"x_ptr": jnp.asarray(x)},
        {"out_ptr": jax.ShapeDtypeStruct(x.shape, jnp.uint8)}, constants,
        grid=len(x) // 1024, num_warps=4, num_stages=1, compute_capability=None,
        interpret=interpret,
    )  # fmt: skip
    dtype = np.dtype({"e4m3": E4M3, "e5m2": E5M2}[cache])
    found, isnan = np.asarray(codes), np.isnan(x)
    expected = np.clip(np.where(isnan, 0, x), -np.float32(largest), np.float32(largest))
    expected = expected.astype(dtype)
    assert np.isnan(found.view(dtype).astype(np.float32))[isnan].all()
    np.testing.assert_array_equal(found[~isnan], expected.view(np.uint8)[~isnan])


def floats():
    """Every number of 16 bits, with the next ones on both sides, and what lies between codes."""
    half = np.arange(2**16, dtype=np.uint16).view(np.float16).astype(np.float32)
    upper = (np.arange(2**16, dtype=np.uint32) << 16).view(np.float32)
    x = np.concatenate([half, upper])
    with np.errstate(all="ignore"):
        return np.concatenate([x, np.nextafter(x, np.float32(np.inf)), np.nextafter(x, -x)])


@pytest.mark.cpu
@pytest.mark.parametrize("native", [False, True], ids=["by bits", "by the target"])
@pytest.mark.parametrize("cache", ["e4m3", "e5m2"])
def test_8_bit_floats_are_the_nearest_ones(cache, native):
    with np.errstate(all="ignore"):
        round_to_8_bits(floats(), cache, native, interpret=True)


@pytest.mark.gpu
@pytest.mark.parametrize("native", [False, True], ids=["by bits", "by the target"])
@pytest.mark.parametrize("cache", ["e4m3", "e5m2"])
def test_8_bit_floats_are_the_nearest_ones_on_a_gpu(cache, native):
    with np.errstate(all="ignore"):
        round_to_8_bits(floats(), cache, native, interpret=False)
