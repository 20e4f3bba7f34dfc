"""How the Triton kernels make numbers of the codes of a quantised cache, and of queries."""

import typing

import jax
import jax.numpy as jnp
import ml_dtypes
import mutants
import numpy as np
import pytest
import triton
import triton.language as tl
from edges import LENGTHS, config
from entries import Entry

import ejk
import ejk.backends.triton._quantised as quantised
from ejk._cache_types import cache_type_of, codes_of
from ejk.backends.triton import _launch
from ejk.backends.triton._quantised import normalised, pool_ptr, tiles_of
from ejk.testing.bounds import assert_close
from ejk.testing.configurations import BF16, F16
from ejk.testing.page_attention import build

CACHES = {
    "int8": "int8", "int4": "uint8", "e4m3": "float8_e4m3fn", "e5m2": "float8_e5m2",
    "int8 + 128": "int8", "int4 + 8": "uint8",
}  # fmt: skip
INTERPRETED = ejk.TritonPageAttention(interpret=True, num_sms=6, block_kv=16)


@triton.jit
@typing.no_type_check
def codes_kernel(
    pool_ptr_, out_ptr, ELEMENTS: tl.constexpr, CACHE: tl.constexpr, TILES: tl.constexpr,
    PTX: tl.constexpr,
):  # fmt: skip
    offs = tl.arange(0, ELEMENTS)
    tiles = tiles_of(
        tl.load(pool_ptr(pool_ptr_, CACHE, TILES) + offs), tl.float16, CACHE, TILES, PTX
    )
    for i in tl.static_range(TILES):
        tl.store(out_ptr + offs * TILES + i, tiles[i])


def codes(cache: str, is_words: bool, ptx: bool, interpret: bool) -> tuple[np.ndarray, np.ndarray]:
    """Return what the kernel makes of every code, and what they are."""
    every = np.arange(256, dtype=np.uint8) * np.uint8(37)  # neighbours differ in both halves
    pool = jnp.asarray(every).view(CACHES[cache])
    parts = (2 if CACHES[cache] == "uint8" else 1) * (2 if is_words else 1)
    elements = 256 // (2 if is_words else 1)
    [found] = _launch.call(
        codes_kernel,
        {"pool_ptr_": pool},
        {"out_ptr": jax.ShapeDtypeStruct((elements * parts,), jnp.float16)},
        {"ELEMENTS": elements, "CACHE": cache, "TILES": parts, "PTX": ptx},
        grid=1,
        num_warps=1,
        num_stages=1,
        compute_capability=None,
        interpret=interpret,
    )
    expected = np.asarray(codes_of(pool, cache_type_of(pool.dtype)).astype(jnp.float32))
    if cache == "int8 + 128":
        expected = (expected + 128) * 2.0**-24
    if cache == "int4 + 8":  # of a byte the upper half is 16 times as large
        expected = (expected.reshape(-1, 2) + 8) * [2.0**-24, 2.0**-20]
    return np.asarray(found), expected.ravel()


each_form = pytest.mark.parametrize("is_words", [True, False], ids=["words", "bytes"])
each_cache = pytest.mark.parametrize("cache", CACHES)


@pytest.mark.cpu
@each_form
@each_cache
def test_every_code_is_its_number(cache, is_words):
    found, expected = codes(cache, is_words, ptx=False, interpret=True)
    np.testing.assert_array_equal(found, expected)  # NaN where NaN is


@pytest.mark.gpu
@each_form
@each_cache
@pytest.mark.parametrize("ptx", [True, False], ids=["PTX", "plain"])
def test_every_code_is_its_number_on_a_gpu(cache, is_words, ptx):
    found, expected = codes(cache, is_words, ptx, interpret=False)
    np.testing.assert_array_equal(found, expected)


BUGS = {
    "halves of a byte swapped": ("int4", ">> (i * (4 if", ">> ((i ^ 1) * (4 if"),
    "bytes of a word swapped": ("int8", ">> (i * (4 if", ">> ((1 - i) * (4 if"),
    "no sign of four bits": ("int4", "^ 0x6408).to(tl.float16, bitcast=True) - 1032.0",
        "^ 0x6400).to(tl.float16, bitcast=True) - 1024.0",
    ),
    "a sign is taken for a part of the number": ("int8 + 128", "0xFF) ^ 0x80)", "0xFF) ^ 0)"),
    "upper halves are not told apart": ("int4 + 8", "(x & 0xF0)", "(x & 0xFF)"),
    "upper halves of the first byte": ("int4 + 8", "((i - 1) * 4)", "((i - i) * 4)"),
    "NaN of e4m3 becomes 480": ("e4m3", "0x3F80, 0x7E00", "0x3F80, 0x3F80"),
    "the bias of e5m2": ("e4m3", "* 256.0", "* 1.0"),
}  # fmt: skip


@triton.jit
@typing.no_type_check
def normalised_kernel(q_ptr, scale_ptr, out_ptr, row_scale_ptr, ROWS: tl.constexpr):
    offs = tl.arange(0, ROWS)[:, None] * 16 + tl.arange(0, 16)
    q, scale = normalised((tl.load(q_ptr + offs),), tl.load(scale_ptr))
    tl.store(out_ptr + offs, q[0])
    tl.store(row_scale_ptr + tl.arange(0, ROWS), scale)


def normalise(q, scale):
    """Return queries `[rows, 16]` in float16, and what scales their products."""
    rows = len(q)
    outputs = {
        "out_ptr": jax.ShapeDtypeStruct((rows, 16), jnp.float16),
        "row_scale_ptr": jax.ShapeDtypeStruct((rows,), jnp.float32),
    }
    inputs = {"q_ptr": jnp.asarray(q), "scale_ptr": jnp.asarray(scale, jnp.float32)}
    found = _launch.call(
        normalised_kernel, inputs, outputs, {"ROWS": rows}, grid=1, num_warps=1, num_stages=1,
        compute_capability=None, interpret=True,
    )  # fmt: skip
    return [np.asarray(x, np.float64) for x in found]


@pytest.mark.cpu
@pytest.mark.parametrize("scale", [0.25, -3.0])
def test_bfloat16_queries_are_exact_in_float16(scale):
    """From the least normal number to the largest, with entries 2^20 times smaller than a row's."""
    rng = np.random.default_rng(0)
    exponents = np.array([-126, -60, -14, 0, 7, 60, 107, 127.0])
    q = rng.uniform(1, 2, (8, 16)) * 2 ** (exponents[:, None] - rng.integers(0, 20, (8, 16)))
    q = np.where(q < 2.0**-126, 2.0**-126, q) * rng.choice([-1, 1], (8, 16))
    q = q.astype(ml_dtypes.bfloat16)
    half, row_scale = normalise(q, scale)
    assert (row_scale > 0).all() and (np.abs(half).max(1) < 2**16).all()
    exact = np.asarray(q, np.float64) * scale
    held = np.abs(exact) >= 1e-37  # what the scale's own range holds
    np.testing.assert_array_equal((half * row_scale[:, None])[held], exact[held])


@pytest.mark.cpu
def test_queries_that_are_not_finite_stay_so():
    q = np.ones((4, 16), ml_dtypes.bfloat16)
    q[0, 3], q[1, 5], q[2] = np.nan, -np.inf, 0
    half, row_scale = normalise(q, 0.5)
    assert np.isnan(half[0, 3]) and np.isfinite(np.delete(half[0], 3)).all()
    assert half[1, 5] == -np.inf and np.isfinite(np.delete(half[1], 5)).all()
    assert (half[2] == 0).all() and (row_scale > 0).all()
    _, row_scale = normalise(q, np.nan)
    assert np.isnan(row_scale).all()
    assert (normalise(q, 0.0)[1] > 0).all()  # or a token that is not seen, -inf, would be NaN


@pytest.mark.fault("page_attention", "triton")
@pytest.mark.cpu
@pytest.mark.fast
@pytest.mark.parametrize("bug", BUGS)
def test_a_bug_in_a_conversion_is_caught(bug, monkeypatch, tmp_path):
    cache, old, new = BUGS[bug]
    faulty = mutants.load(quantised, old, new, tmp_path)
    monkeypatch.setitem(globals(), "tiles_of", faulty.tiles_of)
    found, expected = codes(cache, True, ptx=False, interpret=True)
    with pytest.raises(AssertionError):
        np.testing.assert_array_equal(found, expected)


# Bytes of which all codes are the least, the largest, or those next to zero.
ONE_SIGN = {"int8": (0x80, 0x81, 0x7F, 1, 0xFF), "int4": (0x88, 0x99, 0x77, 0x11, 0xFF)}


@pytest.mark.cpu
@pytest.mark.parametrize(
    ("cache", "scales"), [("int8", "token"), ("int8", "head"), ("int4", "token")]
)
@pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
def test_what_all_codes_have_in_addition_cancels(dtype, cache, scales):
    """Of integers as subnormals: also where all codes have one sign, or are small, in float16's
    bound; and where queries are far from 1, whose logits are not.
    """
    cache_dtype = np.dtype(CACHES[cache])
    changes = dict(dtype=dtype, cache_dtype=cache_dtype, scales=scales)
    case = build(config(**changes), LENGTHS, share=True)
    entry = Entry("of one sign", INTERPRETED, examples=0)
    for number, byte in enumerate(ONE_SIGN[cache]):
        same = np.full(case.values.shape, byte, np.uint8).view(cache_dtype)
        keys = same if number % 2 else case.keys
        assert_close(one := case.replace(keys=keys, values=same), *entry(one))
    if dtype == BF16:
        assert case.scales is not None
        for exponent in (-100, 100):
            query = (np.asarray(case.query, np.float64) * 2.0**exponent).astype(dtype)
            with np.errstate(over="ignore"):  # of what is in dead slots
                key_scale = np.ldexp(np.asarray(case.scales[0]), -exponent)
            far = case.replace(query=query, scales=(key_scale, case.scales[1]))
            assert_close(far, *entry(far))
