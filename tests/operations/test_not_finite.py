"""What is not finite and seen is never lost, and what is finite stays so: on every backend."""

import dataclasses

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from edges import SMALL, config
from entries import RAGGED, each_case, edge, ragged_edge
from hypothesis import strategies as st

import ejk
from ejk.testing.bounds import assert_close
from ejk.testing.configurations import Configuration
from ejk.testing.page_attention import build
from ejk.testing.ragged_page_attention import build_ragged

PLACES = ("query", "key", "value", "sink", "slope", "overflow")
FLOAT32 = np.dtype(np.float32)
PLAIN = frozenset({"sinks", "alibi_slopes", "attn_scale"})
NAN_CASES = [
    Configuration(SMALL, FLOAT32, "HND", PLAIN, num_splits=0),
    Configuration(SMALL, FLOAT32, "NHD", PLAIN | {"sliding_window"}, num_splits=1),
    Configuration(SMALL, np.dtype(ml_dtypes.bfloat16), "HND", PLAIN, num_splits=3),
]
LENGTHS = np.array([0, 1, 15, 16, 17, 47, 48, 49, 33])
# Blocks of one new token and of several; the second sequence has more new tokens than tokens.
BOUNDS = np.array([0, 1, 4, 5, 8, 9, 12, 12, 13, 13])


def spoil(case, place, seed, token=None):
    """Put something into what a row sees that makes it NaN. Return the call, and whose rows."""
    rng = np.random.default_rng(seed)
    rows = [r for r in range(len(case.query)) if not case.outside[r] and len(case.seen(r)[1])]
    row, head = int(rng.choice(rows)), int(rng.integers(case.shape.num_heads))
    kv_head = head * case.shape.num_kv_heads // case.shape.num_heads
    s, seen = case.seen(row)
    j = int(seen[rng.integers(len(seen))][0]) if token is None else token
    page, slot = int(case.block_tables[s][j // case.shape.page_size]), j % case.shape.page_size
    query, keys, values = case.query.copy(), case.keys.copy(), case.values.copy()
    options = {k: x.copy() if isinstance(x, np.ndarray) else x for k, x in case.options.items()}
    if place == "query":
        query[row, head, rng.integers(case.shape.head_dim)] = np.nan
    elif place == "key":
        keys[page, slot, kv_head, rng.integers(case.shape.head_dim)] = np.nan
    elif place == "value":
        values[page, slot, kv_head, rng.integers(case.shape.width)] = np.nan
    elif place in ("sink", "slope"):
        options["sinks" if place == "sink" else "alibi_slopes"][head] = np.nan
    else:
        # One product of all that see the token, 6e38 when it is scaled.
        options["attn_scale"] = 1 / 16
        query[..., 0] = 32
        keys[page, slot, kv_head] = 0
        keys[page, slot, kv_head, 0] = 3e38
    return case.replace(query=query, keys=keys, values=values, options=options), s


SPOILT = st.tuples(st.sampled_from(PLACES), st.integers(0, 2**32 - 1))


@each_case(lambda few: st.tuples(st.sampled_from(NAN_CASES), SPOILT), share=2)
def test_nan_in_what_a_row_sees_is_never_lost(entry, case):
    """Output and LSE are NaN, of a value the output alone; other rows are what they would be."""
    configuration, (place, seed) = case
    case, _ = spoil(build(configuration, LENGTHS, window=9, seed=seed), place, seed)
    assert np.isnan(case.expected()[0].astype(np.float32)).any()
    assert_close(case, *entry(case))


@each_case(lambda few: st.tuples(few.of(NAN_CASES), SPOILT), 1, RAGGED)
def test_nan_in_what_a_new_token_sees_is_never_lost(entry, case):
    configuration, (place, seed) = case
    drawn = build_ragged(configuration, LENGTHS, BOUNDS, window=9, seed=seed)
    case, s = spoil(drawn, place, seed)
    leave_out = ()
    if place == "value":  # which may reach other rows of its sequence
        expected = case.expected()[0]
        leave_out = [
            r for r in range(case.bounds[s], case.bounds[s + 1]) if not np.isnan(expected[r]).any()
        ]
    assert_close(case, *entry(case), leave_out)


@edge
@pytest.mark.parametrize("num_splits", [0, 1, 4])
@pytest.mark.parametrize("place", PLACES)
def test_each_place(entry, place, num_splits):
    case = build(config(features=PLAIN, num_splits=num_splits), LENGTHS, seed=1)
    case, _ = spoil(case, place, 1)
    assert_close(case, *entry(case))


@pytest.mark.one_in(2)
@ragged_edge
@pytest.mark.parametrize("token", [100, 255])
def test_a_logit_that_overflows_where_nothing_is_masked(entry, token):
    """In the last such block, too, after which nothing else would make the sum of weights NaN."""
    shape = dataclasses.replace(SMALL, num_heads=8, max_blocks=20, num_pages=24, num_seqs=1)
    large = config(shape=shape, dtype=np.dtype(ml_dtypes.bfloat16))
    case = build_ragged(large, np.array([300]), np.array([0, 40]), total=40)
    case, _ = spoil(case, "overflow", 1, token)
    out, lse = entry(case)
    assert np.isnan(lse).any()
    assert_close(case, out, lse)


@edge
@pytest.mark.parametrize("place", ["query", "key", "overflow"])
def test_a_merge_keeps_it(entry, place):
    """With a part that is finite, and with one that saw nothing."""
    case = build(config(features=PLAIN), np.full(9, 48), seed=2)
    spoilt, s = spoil(case, place, 2)
    parts = [entry(spoilt), entry(case), entry(case.replace(context_lens=np.zeros(9, int)))]
    out, lse = ejk.merge_attention_states(*(jnp.stack([p[i] for p in parts]) for i in (0, 1)))
    is_nan = np.isnan(parts[0][1])
    assert is_nan[s].any()
    np.testing.assert_array_equal(np.isnan(lse), is_nan)
    np.testing.assert_array_equal(np.isnan(out).all(-1), is_nan)


def sinks_of(value):
    return {"sinks": np.array([value, -np.inf, 0.0, -value], np.float32)}


HUGE = [1e5, 2.3e38, 2.5e38, float(np.finfo(np.float32).max)]


@pytest.mark.one_in(2)
@edge
@pytest.mark.parametrize("num_splits", [0, 1, 3])
@pytest.mark.parametrize("sink", HUGE)
def test_a_huge_sink_is_the_lse(entry, sink, num_splits):
    case = build(config(num_splits=num_splits), LENGTHS).replace(options=sinks_of(sink))
    out, lse = entry(case)
    assert not out[:, 0].any()
    np.testing.assert_array_equal(lse[:, 0], np.float32(sink))
    assert_close(case, out, lse)


@pytest.mark.one_in(2)
@ragged_edge
@pytest.mark.parametrize("sink", HUGE)
def test_a_huge_sink_is_the_lse_of_new_tokens(entry, sink):
    case = build_ragged(config(dtype=entry.dtype), LENGTHS, BOUNDS)
    case = case.replace(options=sinks_of(sink))
    out, lse = entry(case)
    np.testing.assert_array_equal(lse[:12, 0], np.float32(sink))
    assert_close(case, out, lse)


@edge
@pytest.mark.parametrize("sink", [np.nan, np.inf])
def test_a_sink_that_is_no_number_makes_rows_nan_that_see_nothing(entry, sink):
    case = build(config(), LENGTHS).replace(options=sinks_of(sink))
    out, lse = entry(case)
    assert np.isnan(out[:, 0]).all() and np.isnan(lse[:, 0]).all()
    assert np.isfinite(out[:, 1:3]).all()


@pytest.mark.parametrize("sink", [np.nan, np.inf])
@pytest.mark.parametrize("pages", [0, 30])
def test_such_a_sink_does_so_where_static_facts_answer(sink, pages):
    """A pool without pages, or a table of width 0."""
    case = build(config(), LENGTHS).replace(options=sinks_of(sink))
    query, keys, values, lens, tables = case.arguments()
    call = (query, keys[:pages], values[:pages], lens, tables[:, : 0 if pages else None])
    results = [
        ejk.page_attention(*call, **case.options, return_lse=True),
        ejk.ragged_page_attention(*call, np.arange(10), **case.options, return_lse=True),
    ]
    for out, lse in results:
        assert np.isnan(out[:, 0]).all() and np.isnan(lse[:, 0]).all()
        assert not out[:, 1:3].any()
        np.testing.assert_array_equal(lse[:, 1:3], np.broadcast_to([-np.inf, 0], (9, 2)))


def head_scales(**changes):
    """Make a configuration of int8 with a scale per KV head."""
    return config(cache_dtype=np.dtype(np.int8), scales="head", **changes)


@edge
@pytest.mark.parametrize("features", [(), ("sinks",)], ids=["", "sinks"])
@pytest.mark.parametrize("scale", [np.nan, np.inf])
def test_a_scale_of_values_reaches_no_row_that_sees_nothing(entry, scale, features):
    """Of length 0, or with invalid pages alone: the result is zero whatever the scale is."""
    case = build(head_scales(features=frozenset(features)), LENGTHS, seed=1)
    tables = case.block_tables.copy()
    tables[3] = -1
    scales = case.scales[0], np.array([scale, 0.5], np.float32)
    case = case.replace(block_tables=tables, scales=scales)
    out, lse = entry(case)
    assert not out[[0, 3]].any() and not np.isfinite(out[1, :2]).any()
    if np.isnan(scale):
        assert_close(case, out, lse)


@ragged_edge
def test_a_scale_of_values_reaches_no_new_token_that_sees_nothing(entry):
    case = build_ragged(head_scales(features=frozenset({"sinks"})), LENGTHS, BOUNDS, seed=1)
    case = case.replace(scales=(case.scales[0], np.array([np.nan, 0.5], np.float32)))
    out, lse = entry(case)
    assert not out[[0, 1, 2]].any() and np.isnan(out[4, :2]).all()
    assert_close(case, out, lse)


def check_infinite_scales(entry, case, scale, which):
    """Give an infinite one to the last token that each sequence sees."""
    shape, lens = case.shape, case.context_lens.clip(0, case.shape.capacity)
    scales = [x.copy() for x in case.scales]
    last = lens[lens > 0] - 1
    pages = case.block_tables[np.flatnonzero(lens), last // shape.page_size]
    scales[which][pages, last % shape.page_size] = scale
    out, lse = entry(case.replace(scales=tuple(scales)))
    if which == 1:
        assert not np.isfinite(out[lens > 0]).any() and np.isfinite(lse[lens > 0]).all()
        return
    is_nan = np.isnan(lse)
    np.testing.assert_array_equal(is_nan, np.isnan(out).any(-1))
    np.testing.assert_array_equal(is_nan, np.isnan(out).all(-1))
    assert is_nan.any() and not is_nan[lens > 0].all()
    one_less = case.replace(context_lens=np.maximum(lens - 1, 0))
    expected, expected_lse = one_less.expected()
    out = np.where(is_nan[..., None], expected, out).astype(out.dtype)
    assert_close(one_less, out, np.where(is_nan, expected_lse, lse).astype(np.float32))


@edge
@pytest.mark.parametrize("which", [0, 1], ids=["key", "value"])
@pytest.mark.parametrize("scale", [np.inf, -np.inf])
def test_of_an_infinite_scale_a_row_is_nan_or_the_token_weighs_nothing(entry, scale, which):
    called = config(cache_dtype=np.dtype(np.int8), scales="token")
    check_infinite_scales(entry, build(called, LENGTHS, seed=1), scale, which)


@pytest.mark.one_in(2)
@ragged_edge
@pytest.mark.parametrize("which", [0, 1], ids=["key", "value"])
def test_of_an_infinite_scale_a_new_token_is_nan_or_does_not_see_it(entry, which):
    called = config(dtype=entry.dtype, cache_dtype=np.dtype(np.int8), scales="token")
    case = build_ragged(called, LENGTHS, np.arange(10), total=9, seed=1)
    check_infinite_scales(entry, case, np.inf, which)


FLOAT16 = np.dtype(np.float16)
HALF = 0.5 + 2.0**-12 * 1.02  # just above the middle of two float16: its weights are rounded up


def means_of_the_largest(case, sign):
    """Let all values be the largest float16; a first token weighs 1, the others `HALF`."""
    query, keys, values = np.zeros_like(case.query), case.keys.copy(), case.values.copy()
    query[..., 0] = 1
    keys[case.live] = 0
    keys[case.live, :, 0] = 1
    first = [int(page) for page in case.block_tables[:, 0] if page in range(len(keys))]
    keys[first, 0, :, 0] = 0
    values[case.live] = sign * np.float16(65504)
    options = {"attn_scale": float(np.log(HALF))}
    return case.replace(query=query, keys=keys, values=values, options=options)


@edge
@pytest.mark.parametrize("num_splits", [1, 3])
@pytest.mark.parametrize("sign", [1, -1])
def test_finite_float16_stays_finite(entry, sign, num_splits):
    """But a visible infinity stays one."""
    case = means_of_the_largest(build(config(dtype=FLOAT16, num_splits=num_splits), LENGTHS), sign)
    out, lse = entry(case)
    assert np.isfinite(out).all()
    assert_close(case, out, lse)
    values = case.values.copy()
    values[int(case.block_tables[6, 0]), 0, :, :7] = sign * np.inf
    out, _ = entry(case.replace(values=values))
    np.testing.assert_array_equal(out[6, :, :7], sign * np.float16(np.inf))
    np.testing.assert_array_equal(out[6, :, 7:], sign * np.float16(65504))


@ragged_edge
def test_finite_float16_of_new_tokens_stays_finite(entry):
    case = means_of_the_largest(build_ragged(config(dtype=FLOAT16), LENGTHS, BOUNDS), 1)
    out, lse = entry(case)
    assert np.isfinite(out).all()
    assert_close(case, out, lse)


def test_merged_float16_and_large_parts_stay_finite():
    rng, outs = np.random.default_rng(0), np.full((3, 64, 1, 4), 65504, np.float16)
    lses = rng.standard_normal((3, 64, 1)).astype(np.float32)
    out, _ = ejk.merge_attention_states(outs, lses)
    np.testing.assert_array_equal(out, outs[0])
    large = np.full((3, 1, 1, 1), 3e38, np.float32)
    out, _ = ejk.merge_attention_states(large, np.zeros((3, 1, 1), np.float32))
    np.testing.assert_allclose(out, large[0], rtol=1e-6)


CAPS = [1e4, 1e20, 1e29, 1e30, 3e38]


@pytest.mark.one_in(2)
@edge
@pytest.mark.parametrize("cap", CAPS)
def test_a_cap_that_caps_nothing_changes_nothing(entry, cap):
    """Nor are small logits lost beside it."""
    drawn = build(config(), LENGTHS)
    case = drawn.replace(query=drawn.query * np.float32(1e-3), options={})
    capped = dataclasses.replace(case, options={"attn_logits_soft_cap": cap})
    assert_close(capped, *entry(capped))
    for a, b in zip(entry(capped), entry(case)):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.one_in(2)
@edge
@pytest.mark.parametrize("cap", [1.2e-38, 1e-37, 1e-30])
def test_a_tiny_cap_of_logits_of_zero(entry, cap):
    """A scale over the cap might be infinite, and their product NaN."""
    case = build(config(), LENGTHS)
    options = {"attn_logits_soft_cap": cap, "attn_scale": 8.0}
    case = case.replace(query=np.zeros_like(case.query), options=options)
    assert_close(case, *entry(case))


WRONG_CAPS = [0, -1.0, 1e39, 1e300, 10**400, 1e-46, 1e-60, np.float64(1e39), np.inf, np.nan]


@pytest.mark.parametrize("cap", WRONG_CAPS, ids=lambda cap: str(cap)[:7])
def test_a_cap_that_float32_cannot_hold_is_refused(cap):
    case = build(config(), LENGTHS)
    with pytest.raises(ValueError, match=r"^attn_logits_soft_cap=.* must be above 0 and a float32"):
        ejk.page_attention(*case.arguments(), attn_logits_soft_cap=cap)
    case = build_ragged(config(), LENGTHS, BOUNDS)
    with pytest.raises(ValueError, match=r"^attn_logits_soft_cap=.* must be above 0 and a float32"):
        ejk.ragged_page_attention(*case.arguments(), attn_logits_soft_cap=cap)


@pytest.mark.one_in(2)
@edge
@pytest.mark.parametrize("cap", [2, np.float16(2), np.int8(2), np.float64(2)])
def test_kinds_of_caps(entry, cap):
    case = build(config(features=frozenset({"attn_logits_soft_cap"})), LENGTHS)
    assert_close(case, *entry(case, attn_logits_soft_cap=cap))


@edge
@pytest.mark.parametrize("scale", [2e38, 2.5e38, -3.4e38, np.float64(3e38), np.array(3e38)])
def test_a_huge_scale_of_tiny_products(entry, scale):
    case = build(config(), LENGTHS)
    query, keys = np.zeros_like(case.query), case.keys.copy()
    query[..., 0] = 2.0**-63
    keys[case.live] = 0
    # Whole multiples: a product below the normal numbers might be taken for 0.
    whole = np.random.default_rng(0).integers(-3, 4, (case.live.sum(), 2))
    keys[case.live, :, 0] = 2.0**-60 * whole
    case = case.replace(query=query, keys=keys, options={"attn_scale": scale})
    assert_close(case, *entry(case))


@pytest.mark.parametrize(
    "scale", [1e39, -np.inf, np.float64(1e300), np.array(1e39), 10**400, np.nan, np.array(np.nan)]
)
def test_a_scale_that_float32_cannot_hold_is_refused(scale):
    case = build(config(), LENGTHS)
    with pytest.raises(ValueError, match=r"^attn_scale=.* must be a finite float32"):
        ejk.page_attention(*case.arguments(), attn_scale=scale)


@ragged_edge
@pytest.mark.parametrize("extras", [("tree_mask",), ("tree_mask", "positions")], ids="+".join)
def test_rows_before_the_first_token_see_nothing_whatever_their_mask_says(entry, extras):
    drawn = config(features=frozenset({"sinks"}))
    case = build_ragged(drawn, LENGTHS, BOUNDS, extras=frozenset(extras), seed=3)
    mask = np.ones_like(case.options["tree_mask"])
    clean = {name: np.nan_to_num(getattr(case, name), posinf=1, neginf=1, nan=1).clip(-3, 3)
             for name in ("keys", "values", "query")}  # fmt: skip
    case = case.replace(options=case.options | {"tree_mask": mask}, **clean)
    out, lse = entry(case)
    # Three new tokens of a sequence of one, and one of a sequence of none.
    before = [0, 1, 2]
    assert not out[before].any()
    np.testing.assert_array_equal(lse[before], np.broadcast_to(case.options["sinks"], (3, 4)))
    assert out[3].any()
    assert_close(case, out, lse)
