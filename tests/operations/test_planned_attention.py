"""`ejk.page_attention` by a plan: its own, the caller's, or one that is wrong."""

import dataclasses
import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from entries import ENTRIES, each_case
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from planned import LONGEST, MANY, TRITON, launches, long_case
from test_triton_memory import ANY_INT32, stored_once

import ejk
from ejk.testing.bits import bits_equal
from ejk.testing.bounds import assert_close
from ejk.testing.configurations import DTYPES, FEATURES, LAYOUTS, Configuration
from ejk.testing.page_attention import build, cases
from ejk.testing.shapes import BY_NAME, Shape

LATENT = Shape(
    "latent, long", 5, 1, 24, page_size=3, max_blocks=1000, num_pages=3050, num_seqs=3,
    value_head_dim=16, latent=True,
)  # fmt: skip
# Short enough for equal parts, whatever the lengths.
SHORT = Shape("short", 4, 2, 128, page_size=16, max_blocks=32, num_pages=70, num_seqs=2)
LONG = (LATENT, MANY, SHORT, *(BY_NAME[n] for n in ("long", "long, short pages", "two blocks")))
EVERYTHING = frozenset(FEATURES)
PLANNED = [
    Configuration(
        shape,
        DTYPES[i % 3],
        LAYOUTS[(i + 1) % 3],
        features,
        fused=shape.fusible and features == EVERYTHING - {"sliding_window"},
    )
    for i, shape in enumerate(LONG)
    for features in (frozenset(), EVERYTHING - {"sliding_window"}, EVERYTHING)
]
EACH = [TRITON, *(entry for entry in ENTRIES if "triton" not in entry.name)]


@each_case(functools.partial(cases, PLANNED), share=2, entries=[TRITON])
def test_planned_attention_agrees_with_the_oracle(entry, case):
    assert_close(case, *entry(case))


@each_case(functools.partial(cases, PLANNED), share=0.2, entries=EACH)
def test_a_plan_changes_no_more_than_last_bits(entry, case):
    """No bit where the call would have made the same plan, or makes none."""
    result = entry(case, plan=case.plan(entry.backend))
    window = case.options.get("sliding_window")
    if entry is TRITON and isinstance(window, int) and window <= 128:
        assert_close(case, *result)  # so little to see is not worth a plan of its own
    else:
        bits_equal(result, entry(case))
    one_pass = entry(case, num_splits=2)
    bits_equal(one_pass, entry(case, num_splits=2, plan=case.plan(entry.backend)))


@each_case(functools.partial(cases, PLANNED), entries=[TRITON])
def test_pages_and_unread_memory_change_no_bit_of_planned_attention(entry, case):
    result = stored_once(functools.partial(entry, case))
    bits_equal(result, entry(case.with_other_junk(seed=1)))
    bits_equal(result, entry(case.permuted(seed=1, more_pages=3)))


@pytest.mark.parametrize("seed", range(3))
def test_long_contexts_among_short_ones_are_cut(seed):
    """Which the properties above rest on: some sequences are combined, others are not."""
    case = long_case(seed)
    plan = case.plan(TRITON.backend, cache_dtype=case.keys.dtype)
    num_pieces, num_splits = map(int, plan.work[0, :2])
    assert 2 <= num_splits <= 3 and num_pieces > 7 + 2 * num_splits - 1
    result = stored_once(lambda: TRITON(case))
    assert_close(case, *result)
    bits_equal(result, stored_once(lambda: TRITON(case, plan=plan)))
    assert launches(lambda: TRITON(case)) == ["page_attention_plan", "page_attention",
                                              "combine_parts"]  # fmt: skip
    assert launches(lambda: TRITON(case, plan=plan)) == ["page_attention", "combine_parts"]


def test_short_contexts_are_cut_evenly_without_a_plan():
    case = build(Configuration(SHORT, np.dtype(np.float32), "NHD"), np.array([500, 3]), as_jax=True)
    plan = case.plan(TRITON.backend)
    for given in ({}, {"plan": plan}):
        run = functools.partial(TRITON, case, **given)
        assert launches(run) == ["page_attention", "combine_parts"]
        assert_close(case, *stored_once(run))

    @jax.jit
    def step(query, keys, values, lens, tables):
        plan = case.plan(TRITON.backend, context_lens=lens)
        return ejk.page_attention(
            query, keys, values, lens, tables, cache_layout="NHD", plan=plan,
            backend=TRITON.backend,
        )  # fmt: skip

    arrays = [jnp.asarray(x) for x in case.operands()]
    assert launches(lambda: step(*arrays)) == ["page_attention", "combine_parts"]  # nor makes one
    few = build(Configuration(SHORT, np.dtype(np.float32), "NHD"), np.array([90, 3]), as_jax=True)
    assert launches(lambda: TRITON(few, max_context_len=100)) == ["page_attention"]


def test_a_plan_may_cut_more_finely_than_the_call_would():
    """It does not know that values as wide as the keys are the keys: its pieces are 64 tokens."""
    shape = Shape(
        "as wide", 4, 1, 256, page_size=16, max_blocks=256, num_pages=770, num_seqs=3,
        value_head_dim=256, latent=True,
    )  # fmt: skip
    lens = np.array([4000, 1500, 777], np.int32)
    case = build(Configuration(shape, DTYPES[1], "HND"), lens, as_jax=True)
    backend = ejk.TritonPageAttention(interpret=True, num_sms=4)
    plan = case.plan(backend)
    assert plan.problem.granule == 64 and plan.work[0, 1] > 1
    out, lse = ejk.page_attention(
        *case.arguments(), **case.semantics(), return_lse=True, backend=backend, plan=plan
    )
    assert_close(case, out, lse)


def test_pieces_may_begin_within_a_block_and_a_page():
    """Of keys that are their own values blocks are larger than a granule, and pages as large."""
    shape = Shape(
        "wide pages", 4, 1, 128, page_size=256, max_blocks=12, num_pages=40, num_seqs=3,
        value_head_dim=128, latent=True,
    )  # fmt: skip
    lens = np.array([2700, 1500, 5], np.int32)
    case = build(Configuration(shape, np.dtype(jnp.bfloat16), "HND"), lens, as_jax=True)
    work = case.plan(TRITON.backend, value_head_dim=128).work
    assert any(begin % 256 for begin in work[1 : 1 + int(work[0, 0]), 1])
    assert_close(case, *TRITON(case))


def test_drawn_cases_are_cut():
    """A third are. No seed says which: Hypothesis draws constants of the loaded modules, too."""
    cut = []

    @hypothesis.seed(0)
    @hypothesis.settings(max_examples=120)
    @hypothesis.given(cases(PLANNED))
    def draw(case):
        cut.append(int(case.plan(TRITON.backend).work[0, 1]) > 0)

    draw()
    assert sum(cut) >= 12


@pytest.mark.parametrize("shape", [LATENT, MANY], ids=lambda shape: shape.name)
def test_sequences_that_see_nothing(shape):
    for lens in (np.zeros(shape.num_seqs, np.int32), np.eye(1, shape.num_seqs, 1, int)[0] * 400):
        config = Configuration(shape, np.dtype(np.float32), "HND", frozenset({"sinks"}))
        case = build(config, lens.astype(np.int32))
        out, lse = stored_once(functools.partial(TRITON, case, plan=case.plan(TRITON.backend)))
        assert_close(case, out, lse)
        assert not out[lens == 0].any()
        sinks = np.broadcast_to(case.options["sinks"], lse.shape)
        np.testing.assert_array_equal(lse[lens == 0], sinks[lens == 0])


@hypothesis.seed(0)
@hypothesis.settings(max_examples=25)
@hypothesis.given(arrays(np.int32, 7, elements=ANY_INT32 | st.integers(0, LONGEST)), st.booleans())
def test_a_plan_for_other_lengths_stays_in_bounds(lens, windowed):
    """And writes every row, once, the right one."""
    features = frozenset({"sinks", *(("sliding_window",) if windowed else ())})
    case = long_case(features=features, window=jnp.int32(200))
    plan = case.plan(TRITON.backend, context_lens=lens, sliding_window=200 if windowed else None)
    assert_close(case, *stored_once(lambda: TRITON(case, plan=plan)))


PLAN = long_case().plan(TRITON.backend)
JUNK = (
    st.sampled_from(
        (-1, 0, 0, 1, 2, 3, 6, 7, 16, 128, LONGEST - 1, LONGEST, LONGEST + 1, 2**31 - 129)
    )
    | ANY_INT32
)


@hypothesis.seed(0)
@hypothesis.settings(max_examples=60)
@hypothesis.given(
    arrays(np.int32, PLAN.work.shape, elements=JUNK, fill=st.nothing()), st.booleans()
)
def test_a_plan_of_junk_stays_in_bounds(work, counted):
    """The interpreter raises for every access outside; what is computed is anybody's guess."""
    if counted:
        work[0, :2] = 2**31 - 1  # or few rows are looked at
    plan = dataclasses.replace(PLAN, work=jnp.asarray(work))
    out, _ = TRITON(long_case(), plan=plan)
    assert out.shape == (7, 2, 64)


def test_a_batch_of_one_is_cut_evenly_without_a_plan():
    case = long_case().rows([0])
    assert launches(lambda: TRITON(case)) == ["page_attention", "combine_parts"]
    assert_close(case, *TRITON(case))
    assert_close(case, *TRITON(case, plan=case.plan(TRITON.backend)))
