"""What `ejk.page_attention` computes, on every backend."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from entries import each_case, edge
from hypothesis import strategies as st

import ejk
from ejk.testing.bits import bits_equal
from ejk.testing.bounds import assert_close
from ejk.testing.configurations import CONFIGURATIONS
from ejk.testing.page_attention import cases

FUSED = [config for config in CONFIGURATIONS if config.fused]


@pytest.mark.smoke
@edge
def test_plain_call_is_a_softmax_over_the_tokens(entry):
    """The defaults, on clean memory, against the definition of attention."""
    rng = np.random.default_rng(0)
    query = rng.standard_normal((2, 4, 64), np.float32)
    key_cache = rng.standard_normal((8, 2, 16, 64), np.float32)
    value_cache = rng.standard_normal((8, 2, 16, 64), np.float32)
    context_lens, block_tables = np.array([20, 5], np.int32), np.array([[3, 5], [1, 0]], np.int32)

    with entry.refusing():
        out = ejk.page_attention(
            query, key_cache, value_cache, context_lens, block_tables, backend=entry.backend
        )

    for sequence, pages, length in ((0, [3, 5], 20), (1, [1], 5)):
        for head in range(4):
            keys = np.concatenate([key_cache[page, head // 2] for page in pages])[:length]
            values = np.concatenate([value_cache[page, head // 2] for page in pages])[:length]
            weights = np.exp(keys @ query[sequence, head] / np.sqrt(64))
            expected = weights @ values / weights.sum()
            np.testing.assert_allclose(out[sequence, head], expected, rtol=0, atol=4e-6)


@pytest.mark.fast
@each_case(cases, share=2)
def test_agrees_with_the_oracle(entry, case):
    assert_close(case, *entry(case))


@each_case(cases, share=0.5)
def test_order_of_pages_changes_no_bit(entry, case):
    bits_equal(entry(case), entry(case.permuted(seed=1)))


@each_case(cases)
def test_unread_memory_changes_no_bit(entry, case):
    """Neither what is poison nor what looks like ordinary keys, values and pages."""
    result = entry(case)
    bits_equal(result, entry(case.with_other_junk(seed=1)))
    bits_equal(result, entry(case.with_other_junk(seed=2, finite=True)))


@each_case(cases, share=0.5)
def test_alone_equals_in_a_batch(entry, case):
    """Another row, other mates, a wider table, a larger pool: bit-equal on the kernels."""
    case = case.replace(num_splits=max(1, case.num_splits))
    together = entry(case)
    others = case.rows(range(len(case.context_lens))[::-1])
    alone = case.rows([0], more_blocks=2).permuted(seed=2, more_pages=3)
    alone = alone.with_other_junk(seed=3)
    for other, row in ((others, -1), (alone, 0)):
        result = entry(other)
        if entry.invariant:
            bits_equal([x[0] for x in together], [x[row] for x in result])
        else:
            assert_close(other, *result)


@each_case(cases, share=0.5)
def test_jit_changes_no_bit(entry, case):
    """Every array traced, the scale and the window with them."""
    static = ("cache_layout", "attn_logits_soft_cap", "value_head_dim")
    keywords = case.semantics()
    traced = {name: keywords.pop(name) for name in list(keywords) if name not in static}
    arrays = [None if x is None else _narrow(x) for x in case.operands()]

    def run(arrays, traced):
        return ejk.page_attention(
            *arrays, **traced, **keywords, num_splits=case.num_splits, return_lse=True,
            backend=entry.backend,
        )  # fmt: skip

    with entry.refusing():
        eager, compiled = run(arrays, traced), jax.jit(run)(arrays, traced)
    bits_equal([np.asarray(x) for x in eager], [np.asarray(x) for x in compiled])
    bits_equal(entry(case), [np.asarray(x) for x in compiled])


def _narrow(x):
    """`jit` takes no 64-bit integers; a caller must have narrowed them with care before."""
    if x.dtype.kind in "iu" and x.dtype.itemsize == 8:
        x = np.clip(x, max(np.iinfo(x.dtype).min, -1), 2**31 - 1).astype(np.int32)
    return jnp.asarray(x)


@each_case(cases, share=0.5)
def test_running_twice_gives_the_same_bits(entry, case):
    bits_equal(entry(case), entry(case))


SPLITS = st.sampled_from((1, 2, 3, 7, 40))
BOUNDS = st.sampled_from((None, 0, 1, 17, 10**6))


@each_case(lambda few: st.tuples(cases(few=few), SPLITS, BOUNDS), share=0.5)
def test_hints_change_no_more_than_last_bits(entry, case):
    """Any number of splits, more than there are blocks too; any bound, too small a one too."""
    case, num_splits, max_context_len = case
    assert_close(case, *entry(case, num_splits=num_splits, max_context_len=max_context_len))


@each_case(cases, share=0.5)
def test_layouts_equal_each_other(entry, case):
    results = [
        entry(case.replace(cache_layout=layout)) for layout in ("HND", "NHD", "KV_HEADS_FIRST")
    ]
    if entry.invariant:
        bits_equal(results[0], results[1])
        bits_equal(results[0], results[2])
    for layout, result in zip(("HND", "NHD", "KV_HEADS_FIRST"), results):
        assert_close(case.replace(cache_layout=layout), *result)


@each_case(partial(cases, FUSED), share=0.5)
def test_fused_pools_equal_split_ones(entry, case):
    """And interleaved ones: no bit depends on where keys and values lie."""
    layouts = {"cache_layout": "INTERLEAVED"}, {"fused": True}, {"fused": False}
    cases = [case.replace(**layout) for layout in layouts]
    results = [entry(case) for case in cases]
    if entry.invariant:
        bits_equal(results[0], results[1])
        bits_equal(results[0], results[2])
    for case, result in zip(cases, results):
        assert_close(case, *result)


@each_case(cases, share=0.25)
def test_asking_for_the_lse_changes_no_bit_of_the_output(entry, case):
    with entry.refusing():
        out = ejk.page_attention(
            *case.arguments(), **case.semantics(), num_splits=case.num_splits,
            backend=entry.backend,
        )  # fmt: skip
    bits_equal([np.asarray(out)], entry(case)[:1])


@each_case(cases, share=0.25)
def test_a_row_that_sees_nothing_is_zero(entry, case):
    """Length 0 and tables without a page; the LSE is the sink."""
    sinks = case.options.get("sinks", np.full(case.shape.num_heads, -np.inf, np.float32))
    nothing = np.broadcast_to(sinks, (len(case.context_lens), case.shape.num_heads))
    no_length = case.replace(context_lens=np.zeros_like(case.context_lens))
    no_page = case.replace(block_tables=np.full_like(case.block_tables, case.shape.num_pages))
    for empty in (no_length, no_page):
        out, lse = entry(empty)
        assert not out.any()
        np.testing.assert_array_equal(lse, nothing)


@each_case(cases, share=0.25)
def test_results_are_finite_on_poisoned_memory(entry, case):
    out, lse = entry(case)
    assert np.isfinite(out.astype(np.float32)).all()
    assert not np.isnan(lse).any() and not np.isposinf(lse).any()
