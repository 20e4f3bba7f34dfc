"""What `ejk.ragged_page_attention` computes, on every backend."""

import dataclasses
from functools import partial

import gpu_interpreter
import jax.numpy as jnp
import numpy as np
import pytest
from edges import LENS, SMALL, config
from entries import RAGGED, each_case, ragged_edge
from tiers import THOROUGH

import ejk
from ejk.backends.triton._sizes import GRANULE
from ejk.testing import PROPERTIES
from ejk.testing.bits import bits_equal
from ejk.testing.bounds import assert_close
from ejk.testing.configurations import MANY_CONFIGURATIONS
from ejk.testing.page_attention import cases
from ejk.testing.ragged_page_attention import (
    EXTRAS,
    RAGGED_CONFIGURATIONS,
    RaggedPageAttentionCase,
    build_ragged,
    ragged_cases,
    with_own_options,
)

F32, BF16 = np.dtype(np.float32), np.dtype(jnp.bfloat16)
PROMISED = PROPERTIES["ragged_page_attention"]
CONFIGURATIONS = with_own_options(MANY_CONFIGURATIONS) if THOROUGH else RAGGED_CONFIGURATIONS


@pytest.mark.smoke
@ragged_edge
def test_plain_call_is_a_causal_softmax(entry):
    """The defaults, on clean memory, against the definition of attention."""
    rng = np.random.default_rng(0)
    query, key_cache, value_cache = (
        rng.standard_normal(shape, np.float32).astype(entry.dtype)
        for shape in ((8, 4, 64), (8, 2, 16, 64), (8, 2, 16, 64))
    )
    context_lens, block_tables = np.array([20, 7], np.int32), np.array([[3, 5], [1, 0]], np.int32)
    cu_q_lens = np.array([0, 1, 8], np.int32)

    with entry.refusing():
        out = ejk.ragged_page_attention(
            query, key_cache, value_cache, context_lens, block_tables, cu_q_lens,
            backend=entry.backend,
        )  # fmt: skip

    query, key_cache, value_cache, out = (
        np.asarray(x).astype(np.float32) for x in (query, key_cache, value_cache, out)
    )
    most = 4e-6 if entry.dtype == F32 else 2e-2
    for row, pages, length in ((0, [3, 5], 20), *((1 + i, [1], 1 + i) for i in range(7))):
        for head in range(4):
            keys = np.concatenate([key_cache[page, head // 2] for page in pages])[:length]
            values = np.concatenate([value_cache[page, head // 2] for page in pages])[:length]
            weights = np.exp(keys @ query[row, head] / np.sqrt(64))
            expected = weights @ values / weights.sum()
            np.testing.assert_allclose(out[row, head], expected, rtol=0, atol=most)


def held(name, share=0.5, configurations=CONFIGURATIONS):
    return each_case(partial(ragged_cases, configurations), share, RAGGED)(PROMISED[name])


# Without options of a ragged batch's own.
ORDINARY = [c for c in CONFIGURATIONS if not c.features & {*EXTRAS, "causal=False"}]
BIDIRECTIONAL = [c for c in CONFIGURATIONS if "causal=False" in c.features]
test_agrees_with_the_oracle = held("agrees_with_the_oracle", 1.5)
# Rows see all of their sequence, if it has fewer tokens than new ones, too.
test_without_a_causal_mask_unread_memory_changes_no_bit = held(
    "unread_memory_changes_no_bit", configurations=BIDIRECTIONAL
)
test_without_a_causal_mask_agrees_with_the_oracle = held(
    "agrees_with_the_oracle", configurations=BIDIRECTIONAL
)
test_order_of_pages_changes_no_bit = held("order_of_pages_changes_no_bit")
test_unread_memory_changes_no_bit = held("unread_memory_changes_no_bit")
test_rows_of_no_sequence_are_zero = held("rows_of_no_sequence_are_zero")
test_a_batch_is_its_sequences = held("a_batch_is_its_sequences", 0.25)
test_chunks_equal_one_shot = held("chunks_equal_one_shot", 0.25, ORDINARY)
test_defaults_may_be_given = held("defaults_may_be_given", 0.5, ORDINARY)
test_jit_changes_no_bit = held("jit_changes_no_bit")
test_what_is_seen_and_not_finite_is_never_lost = held("what_is_seen_and_not_finite_is_never_lost")
test_running_twice_gives_the_same_bits = held("running_twice_gives_the_same_bits", 0.25)
test_hints_change_no_more_than_last_bits = held("hints_change_no_more_than_last_bits")
test_layouts_and_fused_pools_equal_each_other = pytest.mark.one_in(2)(
    held("layouts_and_fused_pools_equal_each_other", 0.25)
)
test_asking_for_the_lse_changes_no_bit_of_the_output = held(
    "asking_for_the_lse_changes_no_bit_of_the_output", 0.25
)


def test_every_property_is_tested():
    assert {f"test_{name}" for name in PROMISED} <= {*globals()}


@each_case(cases, 0.5, RAGGED)
def test_single_tokens_are_page_attention(entry, case):
    """Within the bound; bit for bit where both kernels take the same blocks and cut nothing.

    And the cache as it is: decode has ways of its own with codes, and with narrower floats.
    """
    bounds = np.arange(len(case.context_lens) + 1)
    with entry.refusing():
        out, lse = ejk.ragged_page_attention(
            *case.arguments(), bounds, **case.semantics(), max_q_len=1, return_lse=True,
            backend=entry.backend,
        )  # fmt: skip
    assert_close(case, out, np.asarray(lse))
    uncut = case.shape.capacity <= GRANULE and "sliding_window" not in case.options
    if entry.decode is not None and uncut and case.keys.dtype == case.dtype:
        decoded = ejk.page_attention(
            *case.arguments(), **case.semantics(), num_splits=1, return_lse=True,
            backend=entry.decode,
        )  # fmt: skip
        bits_equal((np.asarray(out), np.asarray(lse)), [np.asarray(x) for x in decoded])


@pytest.mark.one_in(4)
@ragged_edge
@pytest.mark.parametrize(
    "bounds",
    [
        [0, 5, 5, 10, 11, 12, 13, 13, 13, 13],
        [4, 4, 4, 4, 4, 4, 4, 4, 4, 4],
        [3, 9, 7, 8, 8, 20, 13, 12, 4, 4],
        [-3, -(2**40), 2**33, 2, 2, 2, 2, 2, 2, 2],
        [0, 0, 0, 13, 13, 13, 13, 13, 13, 13],
    ],
    ids=["tight", "no row", "falling", "hostile", "more new tokens than tokens"],
)
@pytest.mark.parametrize("features", [(), ("sliding_window", "sinks", "alibi_slopes")])
def test_bounds(entry, bounds, features):
    drawn = config(features=frozenset(features), dtype=entry.dtype)
    case = build_ragged(drawn, LENS, np.array(bounds), window=17)
    assert_close(case, *entry(case))


@pytest.mark.one_in(2)
@ragged_edge
@pytest.mark.parametrize("dtype", ["int8", "int16", "uint8", "uint32", "uint64", "int64"])
def test_bounds_are_checked_in_their_own_dtype(entry, dtype):
    limits = np.iinfo(dtype)
    wanted = [limits.min, 2, 3, limits.max, 5, 2**32 + 5, 13, 2**31, 0, 13]
    bounds = np.array([min(max(c, limits.min), limits.max) for c in wanted], dtype)
    case = build_ragged(config(dtype=entry.dtype), LENS, bounds)
    assert_close(case, *entry(case))


# So many new tokens of a context of so many, and their window: a GPU's blocks are large.
NEW, LENGTH, WINDOW = (80, 301, 139) if gpu_interpreter.ON_GPU else (14, 75, 37)
LONG = dataclasses.replace(SMALL, num_heads=8, max_blocks=20, num_pages=60, num_seqs=3)
PREFILLS = {
    "16 bits": (BF16, (), ()),
    "16 bits, windowed": (BF16, ("sliding_window", "alibi_slopes"), ()),
    "windowed": (F32, ("sliding_window", "alibi_slopes"), ()),
    "as a tree": (F32, ("sliding_window", "alibi_slopes"), EXTRAS),
}


@pytest.mark.one_in(2)
@ragged_edge
@pytest.mark.parametrize("dtype, features, extras", PREFILLS.values(), ids=PREFILLS)
def test_a_long_prefill(entry, dtype, features, extras):
    """Several blocks of queries and of keys, of which some are seen altogether.

    Those of 16 bits are refused by none. On an H100 said to be small they are taken in the blocks
    of a large batch.
    """
    if dtype == BF16:
        entry = dataclasses.replace(entry, may_refuse=())
    drawn = config(shape=LONG, dtype=dtype, features=frozenset(features))
    lens, bounds = np.array([17, LENGTH, LENGTH // 2]), np.array([1, 4, 4 + NEW, 5 + NEW])
    case = build_ragged(drawn, lens, bounds, total=7 + NEW, window=WINDOW, extras=frozenset(extras))
    assert_close(case, *entry(case))
    bits_equal(entry(case), entry(case.with_other_junk(seed=3)))


@ragged_edge
@pytest.mark.parametrize(
    "width", [0, 20, *(pytest.param(width, marks=pytest.mark.thorough) for width in (1, 13))]
)
def test_widths_of_tree_masks(entry, width):
    case = build_ragged(config(), LENS, np.array([0, 5, 5, 9, 10, 11, 12, 13, 13, 13]))
    mask = np.random.default_rng(0).random((13, width)) < 0.5
    case = case.replace(options={"tree_mask": mask})
    # What was live under causality may be seen by other rows now: write it all.
    case = case.replace(
        keys=np.nan_to_num(case.keys, posinf=1, neginf=1, nan=1).clip(-3, 3),
        values=np.nan_to_num(case.values, posinf=1, neginf=1, nan=1).clip(-3, 3),
        query=np.nan_to_num(case.query, posinf=1, neginf=1, nan=1).clip(-3, 3),
    )
    assert_close(case, *entry(case))


@ragged_edge
@pytest.mark.parametrize("sizes", [dict(total=0), dict(seqs=0), dict(blocks=0), dict(pages=0)])
def test_empty_arrays_are_answered_from_static_facts(entry, sizes):
    sizes = dict(total=5, seqs=2, blocks=3, pages=4) | sizes
    pool = np.zeros((sizes["pages"], 2, 16, 128), np.float32)
    bounds = np.array([1, 2, 4])[: sizes["seqs"] + 1]
    for sinks in (None, np.arange(4, dtype=np.float32)):
        out, lse = ejk.ragged_page_attention(
            np.ones((sizes["total"], 4, 128), np.float32), pool, pool,
            np.full(sizes["seqs"], 20), np.zeros((sizes["seqs"], sizes["blocks"]), int), bounds,
            sinks=sinks, return_lse=True, backend=entry.backend,
        )  # fmt: skip
        assert out.shape == (sizes["total"], 4, 128) and not out.any()
        expected = np.full((sizes["total"], 4), -np.inf)
        if sinks is not None and sizes["seqs"]:
            expected[1:4] = sinks
        np.testing.assert_array_equal(lse, expected)


def test_cases_are_what_they_claim():
    """Or the properties would prove little: some rows see much, some nothing, some are none's."""
    case = build_ragged(config(), LENS, np.array([1, 5, 5, 9, 10, 11, 12, 12, 12, 12]))
    assert isinstance(case, RaggedPageAttentionCase)
    rows = map(case.rows_seen.get, range(13))
    seen = [row and len(row[1]) for row in rows]
    assert seen == [None, 45, 46, 47, 48, 2, 3, 4, 5, 48, 33, 17, None]
