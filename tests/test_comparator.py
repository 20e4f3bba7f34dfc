"""What compares must fail: results that are wrong, and errors on both sides of the bound.

A suite is as good as what it compares with. These are no bugs of `ejk`: each is a result that a
broken kernel, or a call that never ran, would give.
"""

import functools
import itertools

import numpy as np
import pytest
from edges import LENGTHS, config

from ejk.testing.bits import bits
from ejk.testing.bounds import assert_close, bounds
from ejk.testing.configurations import BF16, F16, F32, INT8
from ejk.testing.copy_kv_cache import SHAPES as COPIED
from ejk.testing.copy_kv_cache import CopyConfiguration
from ejk.testing.copy_kv_cache import build as build_copy
from ejk.testing.page_attention import build
from ejk.testing.ragged_page_attention import build_ragged
from ejk.testing.write_kv_cache import SHAPES
from ejk.testing.write_kv_cache import build as build_write

pytestmark = pytest.mark.fast
DTYPES = (F32, BF16, F16)


@functools.cache
def decode(dtype, seed=0):
    called = config(dtype=dtype, features=frozenset({"sinks"}))
    return remembered(build(called, LENGTHS, invalid=0.2, seed=seed))


@functools.cache
def ragged(dtype, seed=0):
    bounds = np.array([1, 5, 5, 9, 10, 11, 12, 12, 12, 12])
    lens = np.array([40, 0, 48, 33, 5, 17, 16, 1, 40])
    return remembered(build_ragged(config(dtype=dtype), lens, bounds, seed=seed))


def remembered(case):
    """Ask the oracle once: it takes nearly all of the time."""
    expected = case.expected()
    object.__setattr__(case, "expected", lambda: expected)
    return case


CASES = {"page_attention": decode, "ragged_page_attention": ragged}


def right(case):
    """What a backend without any error but rounding gives."""
    out, lse = case.expected()
    return out.astype(case.dtype), lse.astype(np.float32)


def values(case, row, head):
    """The values that a row sees: `[tokens, value_head_dim]`."""
    held = case.values if case.values is not None else case.keys
    kv_head = head // (case.shape.num_heads // case.shape.num_kv_heads)
    seq, seen = case.seen(row)
    size = case.shape.page_size
    places = [(case.block_tables[seq, int(j) // size], int(j) % size) for j, *_ in seen]
    return np.array([held[page, slot, kv_head] for page, slot in places], np.float64)


def of_values(case, choose):
    """Put `choose` of the values that a row sees in place of their weighted mean."""
    out, lse = right(case)
    for row, head in itertools.product(*map(range, lse.shape)):
        if len(seen := values(case, row, head)):
            out[row, head] = choose(seen).astype(case.dtype)
    return out, lse


def stale(case):
    """The last call's results, which lie in the same memory."""
    make = ragged if "Ragged" in type(case).__name__ else decode
    return right(make(case.dtype, seed=1))


def other_dtype(case):
    out, lse = right(case)
    return out.astype(BF16 if case.dtype == F32 else F32), lse


WRONG = {
    "zeros": lambda case: tuple(map(np.zeros_like, right(case))),
    "zeros, the LSE right": lambda case: (np.zeros_like(right(case)[0]), right(case)[1]),
    "the last value": lambda case: of_values(case, lambda seen: seen[-1]),
    "the mean of the values": lambda case: of_values(case, lambda seen: seen.mean(0)),
    "the last call's result": stale,
    "the LSE of another row": lambda case: (right(case)[0], np.roll(right(case)[1], 1, axis=0)),
    "the LSE of another head": lambda case: (right(case)[0], right(case)[1][:, ::-1]),
    "no LSE": lambda case: (right(case)[0], np.full_like(right(case)[1], -np.inf)),
    "NaN": lambda case: tuple(np.full_like(x, np.nan) for x in right(case)),
    "NaN in one place": lambda case: (with_one(right(case)[0], np.nan), right(case)[1]),
    "an infinity in one place": lambda case: (with_one(right(case)[0], np.inf), right(case)[1]),
    "NaN in one LSE": lambda case: (right(case)[0], with_one(right(case)[1], np.nan)),
    "another dtype": other_dtype,
    "an LSE of 64 bits": lambda case: (right(case)[0], right(case)[1].astype(np.float64)),
    "rows in another order": lambda case: tuple(x[::-1] for x in right(case)),
    "heads in another order": lambda case: tuple(x[:, ::-1] for x in right(case)),
    "entries in another order": lambda case: (right(case)[0][..., ::-1], right(case)[1]),
    "a row too few": lambda case: tuple(x[:-1] for x in right(case)),
    "one row for all": lambda case: (right(case)[0][2:3], right(case)[1][2:3]),
    "the other sign": lambda case: (-right(case)[0], right(case)[1]),
}


def with_one(x, value):
    """Change one entry of a row that sees something."""
    x = x.copy()
    x[np.unravel_index(np.flatnonzero(np.isfinite(x) & (x != 0))[3], x.shape)] = value
    return x


@pytest.mark.parametrize("operation", CASES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_right_passes(operation, dtype):
    case = CASES[operation](dtype)
    assert_close(case, *right(case))


@pytest.mark.parametrize("operation", CASES)
@pytest.mark.parametrize("wrong", WRONG)
def test_what_is_wrong_fails(wrong, operation):
    for dtype in (F32, BF16):
        case = CASES[operation](dtype)
        with pytest.raises(AssertionError):
            assert_close(case, *WRONG[wrong](case))


def off_by(case, factor, rows):
    """What is right, but for an entry and the LSE of some rows: so many times the bound off."""
    expected, expected_lse = case.expected()
    out, lse = expected.astype(case.dtype), expected_lse.astype(np.float32)
    for row in rows:
        exact = expected[row, 0]
        allowed, allowed_lse = bounds(case, row, 0, exact, expected_lse[row, 0])
        out[row, 0, 1] = (exact[1] + factor * allowed).astype(case.dtype)
        lse[row, 0] = expected_lse[row, 0] + factor * allowed_lse
    return out, lse


@pytest.mark.parametrize("operation", CASES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_bound_from_both_sides(operation, dtype):
    """Just inside passes, twice as far out fails: of each row, its output and its LSE alone."""
    case = CASES[operation](dtype)
    out, lse = right(case)
    rows = [row for row in range(len(out)) if len(case.seen(row)[1])]
    assert len(rows) >= 5
    if dtype == F32:  # of 16 bits a step between two numbers is wider than what is left
        assert_close(case, *off_by(case, 0.9, rows))
        assert_close(case, *off_by(case, -0.9, rows))
    for row in rows:
        other_out, other_lse = off_by(case, 2.0, [row])
        others = {*range(len(out))} - {row}
        for wrong in ((other_out, lse), (out, other_lse)):
            with pytest.raises(AssertionError, match=rf"\[{row}, 0\] is off by"):
                assert_close(case, *wrong, leave_out=others)


def written(dtype_and_scales, seed=0):
    """A write, and a copy of pools of the same types."""
    dtype, cache, scales = dtype_and_scales
    slots = np.array([7, 40, 7, 48, -1, 12, 40])
    return build_write(
        SHAPES[0], dtype, "HND", slots, cache_dtype=cache, scales=scales, seed=seed, as_jax=False
    )


def copied(kind, seed=0):
    sources, targets = np.array([1, 0, 3, 3, -1, 40, 41]), np.array([0, 1, 2, 39, 6, 7, 6])
    configuration = CopyConfiguration(COPIED[0], "slot", kind[0], "HND", kind[2])
    return build_copy(configuration, sources, targets, seed=seed, as_jax=False)


def held(case):
    """The pools, and scales, as they were: nothing was written."""
    scales = [x for x in case.scales if x is not None and np.ndim(x) > 1]
    return [np.asarray(x) for x in (case.key_cache, case.value_cache, *scales) if x is not None]


OPERATIONS = {
    "write_kv_cache": written,
    "copy_kv_cache": copied,
}
KINDS = {"float32": (F32, None, "none"), "codes": (F32, INT8, "token")}
WRONG_POOLS = {
    "nothing is written": lambda case, pools, stale: held(case),
    "zeros": lambda case, pools, stale: [np.zeros_like(x) for x in pools],
    "the last call's result": lambda case, pools, stale: stale,
    "one bit of what is written": lambda case, pools, stale: with_a_bit(case, pools, True),
    "one bit of what is not": lambda case, pools, stale: with_a_bit(case, pools, False),
    "pages in another order": lambda case, pools, stale: [np.roll(x, 1, 0) for x in pools],
    "slots in another order": lambda case, pools, stale: [np.roll(x, 1, 2) for x in pools],
    "keys and values change places": lambda case, pools, stale: [pools[1], pools[0], *pools[2:]],
    "a pool too few": lambda case, pools, stale: pools[:-1],
    "another dtype, the same bits": lambda case, pools, stale: [bits(pools[0]), *pools[1:]],
}


def with_a_bit(case, pools, is_written):
    """Change the last bit of an element of the first pool."""
    before, after = (x.view(f"u{x.itemsize}").copy() for x in (held(case)[0], pools[0]))
    [place] = np.argwhere((before != after) == is_written)[-1:]
    after[tuple(place)] ^= 1
    return [after.view(pools[0].dtype), *pools[1:]]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_wrong_pools_fail(operation, kind):
    make = OPERATIONS[operation]
    if operation == "copy_kv_cache" and kind == "codes":
        kind = (INT8, None, "token")
    else:
        kind = KINDS[kind]
    case = make(kind)
    pools = case.expected()
    case.check(pools)
    for wrong in WRONG_POOLS.values():
        with pytest.raises((AssertionError, ValueError)):  # a `zip` of other lengths
            case.check(wrong(case, pools, make(kind, seed=1).expected()))
