"""`ejk.page_attention(axis_name=...)`: what it computes, on every backend."""

import functools

import context_parallel
import jax
import jax.numpy as jnp
import meshes
import numpy as np
import pytest
from context_parallel import (
    CONFIGURATIONS,
    DEVICES,
    EDGES,
    ENTRIES,
    FEW,
    PER_TOKEN,
    PLAIN,
    TRITON,
    XLA,
    each_entry,
    on_device,
    split,
    split_arguments,
)
from entries import each_case
from test_not_finite import spoil

import ejk
from ejk.testing.bits import bits_equal
from ejk.testing.bounds import assert_close
from ejk.testing.configurations import INT32_MAX, Configuration
from ejk.testing.page_attention import build, cases
from ejk.testing.shapes import Shape

pytestmark = pytest.mark.skipif(not meshes.MANY_DEVICES, reason="needs eight devices")

each_parallel = functools.partial(each_case, entries=ENTRIES)
each_quick = functools.partial(each_case, entries=[XLA, TRITON])


@each_parallel(functools.partial(cases, CONFIGURATIONS + PER_TOKEN))
def test_agrees_with_the_oracle(entry, case):
    assert_close(case, *entry(case))


@each_entry(*ENTRIES)
@pytest.mark.parametrize("place", ["query", "key", "value", "sink", "overflow"])
def test_nan_on_one_device_is_never_lost(entry, place):
    """Where the other devices have numbers, or saw nothing."""
    uncapped = Configuration(PLAIN, np.dtype(np.float32), "NHD", frozenset({"sinks", "attn_scale"}))
    case, _ = spoil(build(uncapped, np.array([36, 35, 13, 2], np.int32)), place, seed=1)
    assert np.isnan(case.expected()[0]).any()
    assert_close(case, *entry(case))


@each_quick(functools.partial(cases, FEW), share=0.2)
def test_unread_memory_changes_no_bit(entry, case):
    result = entry(case)
    bits_equal(result, entry(case.with_other_junk(seed=1)))


@each_quick(functools.partial(cases, FEW), share=0.3)
def test_any_device_may_hold_any_page(entry, case):
    moved = case.permuted(seed=1)
    assert_close(moved, *entry(moved))


@each_quick(functools.partial(cases, FEW), share=0.3)
def test_other_sequences_change_no_bit(entry, case):
    """With `num_splits >= 1`, where the pages stay on their devices."""
    order = [3, 1, 0, 2]
    together, others = entry(case), case.rows(order).replace(context_lens=case.context_lens[order])
    if entry.batch_invariant:
        bits_equal([x[order] for x in together], entry(others))
    else:
        assert_close(others, *entry(others))


@each_entry(XLA, TRITON)
def test_one_device_may_hold_everything(entry):
    needed = np.unique(EDGES.block_tables[EDGES.needed])
    needed = needed[(needed >= 0) & (needed < PLAIN.num_pages)]
    few = EDGES.rows([3, 0, 1, 3])  # sequences of six pages at most, of ten on a device
    held = np.unique(few.block_tables[few.needed & (few.block_tables >= 0)])
    for device in range(DEVICES):
        place = np.full(PLAIN.num_pages, DEVICES)
        place[held[held < PLAIN.num_pages]] = device
        free = [d for d in range(DEVICES) for _ in range(10 - (place == d).sum())]
        place[place == DEVICES] = free
        moved = on_device(few, place)
        assert_close(moved, *entry(moved))


@pytest.mark.one_in(2)
@each_entry(XLA, TRITON)
@pytest.mark.parametrize("window", [1, 3, 4, 5, 11, 12, 13, 35, 36, 37, INT32_MAX])
def test_windows_that_cross_devices(entry, window):
    """They count positions: of all devices, and of pages that none holds."""
    lens = np.array([36, 35, 13, 2], np.int32)
    case = build(CONFIGURATIONS[0], lens, window=jnp.int32(window), invalid=0.2, seed=window % 97)
    assert_close(case, *entry(case))


@each_entry(*ENTRIES)
def test_windows_without_slopes(entry):
    """Nor is anything seen through a window below 1 that only the device knows."""
    for window in (1, 9):
        lens = np.array([36, 35, 13, 2], np.int32)
        case = build(CONFIGURATIONS[1], lens, window=jnp.int32(window), seed=window)
        assert_close(case, *entry(case))
    for window in (0, -1, -INT32_MAX - 1):
        out, lse = entry(case.replace(options=case.options | {"sliding_window": jnp.int32(window)}))
        assert not out.any()
        np.testing.assert_array_equal(lse, np.broadcast_to(case.options["sinks"], lse.shape))


@each_entry(XLA, TRITON)
def test_pages_of_no_device(entry):
    """Next to those that there are, and at the ends of the integers."""
    case = EDGES.replace(block_tables=EDGES.block_tables.copy())
    for block, page in enumerate((-1, PLAIN.num_pages, INT32_MAX, -INT32_MAX - 1, -INT32_MAX)):
        case.block_tables[2, block] = page
    assert_close(case, *entry(case))
    nothing = case.replace(block_tables=np.full_like(case.block_tables, PLAIN.num_pages))
    out, lse = entry(nothing)
    assert not out.any()
    np.testing.assert_array_equal(lse, np.broadcast_to(case.options["sinks"], lse.shape))


@each_entry(XLA, TRITON)
def test_lengths_that_no_table_has(entry):
    case = build(CONFIGURATIONS[0], np.array([-INT32_MAX - 1, -1, 37, INT32_MAX], np.int32))
    assert_close(case, *entry(case))


def test_integers_of_64_bits_are_checked_before_they_are_narrowed():
    """Those that NumPy holds, where `2**32` would become page 0."""
    case = build(FEW[0], np.array([2**32 + 1, 30, 5, -(2**32) + 1]), window=INT32_MAX)
    tables = case.block_tables.astype(np.int64)
    tables[1, :3] = 2**32, -(2**32), 2**32 + 1
    case = case.replace(block_tables=tables)
    given, static = split_arguments(case)
    pools = {name: given[name] for name in ("key_cache", "value_cache") if name in given}
    static = {name: x for name, x in static if name != "num_splits"}

    def attend(pools):
        return ejk.page_attention(
            **{"value_cache": None, **pools}, query=case.query, context_lens=case.context_lens,
            block_tables=tables, **case.options | static, axis_name="pages", return_lse=True,
        )  # fmt: skip

    out, lse = jax.jit(split(attend, pools, case.cache_layout))(pools)
    assert_close(case, np.asarray(out), np.asarray(lse))


@each_entry(XLA, TRITON)
def test_parts_are_not_rounded_before_they_are_merged(entry):
    """Of three parts 0.6, 0.6 and 0.2 of a bfloat16's last place the mean rounds to nothing."""
    shape = Shape("thirds", 1, 1, 16, page_size=5, max_blocks=3, num_pages=4, num_seqs=1)
    config = Configuration(shape, context_parallel.BF16, "HND", num_splits=1)
    case = build(config, np.array([15], np.int32)).replace(
        block_tables=np.array([[0, 2, 3]], np.int32)
    )
    keys, values = np.zeros_like(case.keys), np.ones_like(case.values)
    for page, larger in ((0, 3), (2, 3), (3, 1)):
        values[page, :larger] = 1 + 2**-7
    out, _ = entry(case.replace(keys=keys, values=values))
    np.testing.assert_array_equal(out, np.ones_like(out))


@each_entry(XLA)
def test_sinks_of_16_bits(entry):
    narrow = jnp.asarray(EDGES.options["sinks"]).astype(jnp.bfloat16)
    results = [
        entry(EDGES.replace(options=EDGES.options | {"sinks": sinks}))
        for sinks in (narrow, narrow.astype(jnp.float32))
    ]
    for of_16_bits, of_32_bits in zip(*results):
        np.testing.assert_array_equal(of_16_bits, of_32_bits)
