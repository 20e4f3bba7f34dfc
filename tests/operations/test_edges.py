"""Edges that are tried every time, on every backend: lengths, windows, invalid pages, dtypes."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from edges import LENGTHS, SMALL, config
from entries import BF16, F32, edge

import ejk
from ejk.testing.bounds import assert_close
from ejk.testing.configurations import INT32_MAX, LAYOUTS
from ejk.testing.page_attention import build
from ejk.testing.shapes import Shape


@edge
@pytest.mark.parametrize("num_splits", [0, 1, 3])
def test_lengths_around_page_edges(entry, num_splits):
    case = build(config(num_splits=num_splits), LENGTHS, invalid=0.2)
    assert_close(case, *entry(case))


@pytest.mark.one_in(6)
@edge
@pytest.mark.parametrize("features", [(), ("sliding_window", "sinks")], ids=["", "windowed"])
@pytest.mark.parametrize("cache_layout", LAYOUTS)
def test_fused_pools(entry, cache_layout, features):
    fused = config(cache_layout=cache_layout, features=frozenset(features), fused=True)
    case = build(fused, LENGTHS, window=17, invalid=0.2)
    assert_close(case, *entry(case))
    assert_close(case, *entry(case, num_splits=3))


@pytest.mark.one_in(2)
@edge
@pytest.mark.parametrize("dtype", ["int8", "int16", "int32", "int64", "uint8", "uint32", "uint64"])
def test_lengths_are_checked_in_their_own_dtype(entry, dtype):
    """Negative ones are 0, those past the capacity the capacity; 2**32 + 1 is not 1."""
    limits = np.iinfo(dtype)
    wanted = [limits.min, limits.max, -1, 2**31, 2**32, 2**32 + 1, 2**32 - 1, 127, 2**63]
    lens = np.array([min(max(n, limits.min), limits.max) for n in wanted], dtype)
    case = build(config(), lens)
    assert_close(case, *entry(case))


@pytest.mark.one_in(4)
@edge
@pytest.mark.parametrize("dtype", ["int8", "int16", "int32", "int64", "uint8", "uint32", "uint64"])
@pytest.mark.parametrize("as_jax", [False, True])
def test_entries_are_checked_in_their_own_dtype(entry, dtype, as_jax):
    """An id that wraps, narrows or clamps to a page is still no page."""
    case = build(config(), LENGTHS, tables_dtype=np.dtype(dtype), invalid=0.5, as_jax=as_jax)
    assert_close(case, *entry(case))


@pytest.mark.one_in(6)
@edge
@pytest.mark.parametrize("window", [1, 2, 16, 17, 48, 49, INT32_MAX])
@pytest.mark.parametrize("traced", [False, True])
def test_windows(entry, window, traced):
    given = jnp.int32(window) if traced else window
    windowed = config(features=frozenset({"sliding_window"}))
    case = build(windowed, LENGTHS, window=given, invalid=0.2)
    assert_close(case, *entry(case))
    case = case.replace(num_splits=3)
    assert_close(case, *entry(case))


@pytest.mark.one_in(3)
@edge
@pytest.mark.parametrize("dtype", [np.int8, np.int64, np.uint16])
def test_windows_of_other_dtypes(entry, dtype):
    windowed = config(features=frozenset({"sliding_window"}))
    case = build(windowed, LENGTHS, window=dtype(17))
    assert_close(case, *entry(case))
    case = build(windowed, LENGTHS, window=np.array(np.iinfo(dtype).max, dtype))
    assert_close(case, *entry(case))


@edge
def test_a_window_on_invalid_entries_sees_nothing(entry):
    """Positions count, whether their entries are valid or not: the window does not slide on."""
    windowed = config(features=frozenset({"sliding_window", "sinks"}))
    case = build(windowed, np.full(9, 48), window=16)
    tables = case.block_tables.copy()
    tables[:, :2], tables[:, 2] = 3, -1
    out, lse = entry(case.replace(block_tables=tables))
    assert not out.any()
    np.testing.assert_array_equal(lse, np.broadcast_to(case.options["sinks"], lse.shape))


@edge
def test_sinks_of_minus_infinity_are_none(entry):
    case = build(config(), LENGTHS, invalid=0.2)
    sinks = np.full(4, -np.inf, np.float32)
    for a, b in zip(entry(case), entry(case, sinks=sinks)):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)
    out, lse = entry(case, sinks=sinks)
    assert not out[0].any() and np.isneginf(lse[0]).all()


@edge
def test_a_large_sink_takes_all_the_weight(entry):
    case = build(config(), LENGTHS)
    out, lse = entry(case, sinks=np.full(4, 1e4, np.float32))
    assert not out.any()
    np.testing.assert_array_equal(lse, 1e4)


@edge
@pytest.mark.parametrize("magnitude", [1e2, 1e4])
def test_large_logits_do_not_overflow(entry, magnitude):
    """One token of a sequence outweighs all others: the answer is its value."""
    case = build(config(), np.full(9, 33))
    query = (magnitude * case.query).astype(np.float32)
    scores = np.einsum("shd,stkd->shtk", query, case.keys[case.block_tables].reshape(9, 48, 2, 128))
    out, lse = entry(case.replace(query=query))
    assert np.isfinite(out).all() and np.isfinite(lse).all()
    for h in range(4):
        row = scores[0, h, :33, h // 2]
        gap = np.diff(np.sort(row))[-1] * 128**-0.5
        if gap > 40:
            page, slot = divmod(int(row.argmax()), 16)
            best = case.values[case.block_tables[0, page], slot, h // 2]
            np.testing.assert_allclose(out[0, h], best, rtol=1e-6)


@pytest.mark.one_in(2)
@edge
@pytest.mark.parametrize("scale", [0.25, np.float32(0.25), np.array(0.25), jnp.float32(0.25), 1])
def test_kinds_of_scale(entry, scale):
    case = build(config(), LENGTHS)
    case = case.replace(options={"attn_scale": scale})
    assert_close(case, *entry(case))


@edge
@pytest.mark.parametrize("sizes", [dict(num_seqs=0), dict(max_blocks=0), dict(num_pages=0)])
@pytest.mark.parametrize("fused", [False, True], ids=["", "fused"])
def test_empty_arrays_are_answered_from_static_facts(entry, sizes, fused):
    shape = dict(num_seqs=2, max_blocks=3, num_pages=4) | sizes
    pool = np.zeros((shape["num_pages"], 2, 16, 128), np.float32)
    pools = (np.stack([pool, pool], 1), None) if fused else (pool, pool)
    sinks = np.arange(4, dtype=np.float32)
    for given in (None, sinks):
        out, lse = ejk.page_attention(
            np.ones((shape["num_seqs"], 4, 128), np.float32), *pools,
            np.full(shape["num_seqs"], 20), np.zeros((shape["num_seqs"], shape["max_blocks"]), int),
            sinks=given, return_lse=True, backend=entry.backend,
        )  # fmt: skip
        assert out.shape == (shape["num_seqs"], 4, 128) and not out.any()
        expected = np.full(4, -np.inf) if given is None else given
        np.testing.assert_array_equal(lse, np.broadcast_to(expected, (shape["num_seqs"], 4)))


@edge
@pytest.mark.parametrize("head_dim", [144, 192])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_codes_of_head_dimensions_that_are_no_power_of_two(entry, head_dim, dtype):
    shape = dataclasses.replace(SMALL, head_dim=head_dim)
    codes = config(shape=shape, dtype=dtype, cache_dtype=np.dtype(np.int8), scales="token")
    case = build(codes, LENGTHS)
    assert_close(case, *entry(case))


@edge
def test_many_sequences(entry):
    """More sequences than a grid axis of 2**16 - 1 would hold on a GPU, most of them empty."""
    shape = Shape("thin", 2, 1, 8, page_size=1, max_blocks=2, num_seqs=9)
    case = build(config(shape=shape), np.array([0, 1, 2, 1, 2, 1, 2, 1, 2]))
    few, _ = entry(case)
    rows = np.zeros(70 if "interpreted" in entry.name else 70_000, int)
    rows[:8], rows[-1] = np.arange(8), 8
    out, lse = entry(case.rows(rows))
    np.testing.assert_allclose(out[[*range(8), -1]], few, rtol=1e-5, atol=1e-6)
    assert not out[8:-1].any() and np.isneginf(lse[8:-1]).all()
