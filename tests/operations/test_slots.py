"""Slots and tables that are made on the device, against loops over Python's integers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import ejk

pytestmark = pytest.mark.fast

EXTREMES = (-(2**63), -(2**32), -(2**31), -1, 2**31 - 1, 2**31, 2**32, 2**32 + 1, 2**63 - 1)


@st.composite
def integers(draw, shape, most):
    """Draw indices in an integer type: of half of the arrays all are from 0 to below `most`.

    Were some of each wild, hardly a token would have a slot.
    """
    dtype = np.dtype(draw(st.sampled_from(("int32", "int64", "uint8", "uint32"))))
    limits = np.iinfo(dtype)
    small = st.integers(max(-3, limits.min), min(most + 2, limits.max))
    hostile = st.sampled_from([x for x in EXTREMES if limits.min <= x <= limits.max] or [0])
    count = int(np.prod(shape))
    valid = st.integers(0, max(0, most - 1))
    elements = draw(st.sampled_from((valid, st.one_of(small, small, hostile))))
    values = draw(st.lists(elements, min_size=count, max_size=count))
    return np.array(values, dtype).reshape(shape)


def slot(table, position, page_size, num_pages):
    """Return a token's slot, or -1 where it has none."""
    if not 0 <= position < len(table) * page_size:
        return -1
    page = int(table[position // page_size])
    return page * page_size + position % page_size if 0 <= page < num_pages else -1


def called(function, jit, *arrays, **sizes):
    function = functools.partial(function, **sizes)
    found = (jax.jit(function) if jit else function)(*arrays)
    assert found.dtype == np.int32 and not found.weak_type
    return np.asarray(found)


@st.composite
def tables(draw):
    num_seqs, max_blocks = draw(st.integers(0, 4)), draw(st.integers(0, 4))
    page_size, num_pages = draw(st.integers(1, 5)), draw(st.integers(0, 6))
    table = draw(integers((num_seqs, max_blocks), num_pages))
    return table, page_size, num_pages


@given(st.data(), tables(), st.booleans())
@settings(max_examples=60)
def test_slots_of_one_token_a_sequence(data, drawn, jit):
    table, page_size, num_pages = drawn
    positions = data.draw(integers(table.shape[:1], table.shape[1] * page_size))
    with jax.enable_x64(True):
        found = called(
            ejk.slot_mapping, jit, table, positions, page_size=page_size, num_pages=num_pages
        )
    expected = [slot(row, int(p), page_size, num_pages) for row, p in zip(table, positions)]
    np.testing.assert_array_equal(found, np.array(expected, np.int32))


@given(st.data(), tables(), st.booleans())
@settings(max_examples=60)
def test_slots_of_a_ragged_batch(data, drawn, jit):
    table, page_size, num_pages = drawn
    num_seqs, capacity, total = len(table), table.shape[1] * page_size, data.draw(st.integers(0, 9))
    lens = data.draw(integers((num_seqs,), capacity))
    bounds = data.draw(integers((num_seqs + 1,), total))
    if data.draw(st.booleans()):
        bounds = np.sort(bounds)
    sizes = {"total_tokens": total, "page_size": page_size, "num_pages": num_pages}
    with jax.enable_x64(True):
        found = called(ejk.ragged_slot_mapping, jit, table, lens, bounds, **sizes)
    expected = [-1] * total
    sane = np.maximum.accumulate([min(max(int(b), 0), total) for b in bounds])
    for s, row in enumerate(table):
        n = min(max(int(lens[s]), 0), 2**31 - 1)
        for i in range(sane[s], sane[s + 1]):
            expected[i] = slot(row, n - (int(sane[s + 1]) - i), page_size, num_pages)
    np.testing.assert_array_equal(found, np.array(expected, np.int32))


def test_slots_at_the_ends_of_a_ragged_batch():
    """Two tokens past a table, a bound that falls, and an entry past the pool."""
    table, lens, bounds = np.array([[1, 2], [3, 3], [0, 9]]), np.array([6, 2, 4]), [0, 3, 2, 6]
    sizes = {"total_tokens": 6, "page_size": 2, "num_pages": 6}
    found = called(ejk.ragged_slot_mapping, False, table, lens, np.array(bounds), **sizes)
    np.testing.assert_array_equal(found, [5, -1, -1, 1, -1, -1])


def test_a_slot_is_where_attention_looks():
    """What is written to the slots of a ragged batch is what its rows see."""
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((5, 2, 8)).astype(np.float32)
    pool = np.full((6, 2, 4, 8), np.nan, np.float32)
    table, lens = np.array([[3, 1], [5, -1]]), np.array([7, 2])
    pool[3, :, :4] = pool[1, :, :0] = 1.0
    bounds = np.array([0, 3, 5])
    slots = ejk.ragged_slot_mapping(table, lens, bounds, total_tokens=5, page_size=4, num_pages=6)
    keys, values = ejk.write_kv_cache(rows, rows, pool, pool, slots)
    out = ejk.ragged_page_attention(rows, keys, values, lens, table, bounds)
    np.testing.assert_array_equal(slots, [4, 5, 6, 20, 21])
    assert np.isfinite(out).all()
    np.testing.assert_allclose(out[3], rows[3], rtol=1e-6)


@given(st.data(), st.integers(0, 9), st.integers(0, 4), st.booleans())
@settings(max_examples=40)
def test_what_is_invalid_stays_invalid_in_every_layer(data, num_pages, layer, jit):
    page_size = 4
    table = data.draw(integers((2, 3), num_pages))
    slots = data.draw(integers((5,), num_pages * page_size))
    given_layer = jnp.int32(layer) if data.draw(st.booleans()) else layer
    with jax.enable_x64(True):
        of_table = called(
            lambda x: ejk.layer_block_tables(x, given_layer, num_pages=num_pages), jit, table
        )
        of_slots = called(
            lambda x: ejk.layer_slot_mapping(
                x, given_layer, num_pages=num_pages, page_size=page_size
            ), jit, slots,
        )  # fmt: skip
    for found, of, size in ((of_table, table, num_pages), (of_slots, slots, num_pages * page_size)):
        expected = [int(x) + layer * size if 0 <= int(x) < size else -1 for x in of.ravel()]
        np.testing.assert_array_equal(found.ravel(), np.array(expected, np.int32))


@given(st.data(), st.integers(0, 4), st.integers(0, 8), st.integers(0, 5), st.booleans())
@settings(max_examples=60)
def test_tables_of_lists_end_to_end(data, num_seqs, num_indices, max_blocks, jit):
    indptr = data.draw(integers((num_seqs + 1,), num_indices))
    indices = data.draw(integers((num_indices,), 100))
    with jax.enable_x64(True):
        found = called(ejk.dense_block_tables, jit, indptr, indices, max_blocks=max_blocks)
    expected = np.full((num_seqs, max_blocks), -1, np.int32)
    for s in range(num_seqs):
        begin, end = int(indptr[s]), int(indptr[s + 1])
        for i in range(min(max_blocks, end - begin)):
            if begin >= 0 and begin + i < num_indices:
                value = int(indices[begin + i])
                expected[s, i] = min(max(value, -(2**31)), 2**31 - 1)
    is_id = (found >= 0) & (found < 2**31 - 1)
    np.testing.assert_array_equal(np.where(is_id, found, -1), np.where(is_id, expected, -1))
    np.testing.assert_array_equal(is_id, (expected >= 0) & (expected < 2**31 - 1))
