"""A plan for other lengths, or another window, is slow, never wrong: on every backend."""

import dataclasses
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from entries import ENTRIES, Entry, each_case
from hypothesis import strategies as st
from planned import LONGEST, MANY, long_case

import ejk
from ejk.testing.bounds import assert_close
from ejk.testing.configurations import INT32_MAX, Configuration
from ejk.testing.page_attention import cases, lengths
from ejk.testing.shapes import Shape

INTERPRETED = not os.environ.get("EJK_TEST_GPU")
# Processors that a batch of a few thousand tokens keeps busy if contexts are cut.
SMALL = ejk.TritonPageAttention(num_sms=16, interpret=INTERPRETED)
FEW = Shape("few, long", 4, 2, 16, page_size=16, max_blocks=24, num_pages=40, num_seqs=3)
WINDOWED = frozenset({"sliding_window", "sinks"})
PLANNED = [
    Configuration(MANY, np.dtype(np.float32), "NHD", WINDOWED),
    Configuration(MANY, np.dtype(jnp.bfloat16), "HND"),
    Configuration(FEW, np.dtype(np.float32), "HND", WINDOWED | {"alibi_slopes"}),
]
CUTTING = Entry("triton that cuts", SMALL, examples=16)
EACH = [CUTTING, *(entry for entry in ENTRIES if "triton interpreted" not in entry.name)]


@st.composite
def calls_with_stale_plans(draw, few):
    """A call, and what its plan was made for."""
    case = draw(cases(PLANNED, few))
    one = lengths(case.shape, np.dtype(np.int32)) | st.just(case.shape.capacity)
    lens = [draw(one) for _ in case.context_lens]
    window = draw(st.integers(1, case.shape.capacity + 3) | st.just(INT32_MAX))
    return case, np.array(lens, np.int32), jnp.int32(window)


@each_case(calls_with_stale_plans, entries=EACH)
def test_any_plan_gives_the_right_numbers(entry, case):
    case, lens, window = case
    given = {} if "sliding_window" not in case.options else {"sliding_window": window}
    plan = case.plan(entry.backend, context_lens=lens, **given)
    assert_close(case, *entry(case, plan=plan))


OTHERS = {
    "ones": [1] * 7,
    "nothing": [0] * 7,
    "everything": [LONGEST] * 7,
    "others are long": [3, LONGEST, LONGEST, 0, 300, 1, 128],
}


@pytest.mark.parametrize("window", [None, 1, 40, 200, INT32_MAX])
@pytest.mark.parametrize("lens", OTHERS.values(), ids=OTHERS)
def test_contexts_that_the_plan_did_not_cut_and_pieces_that_are_empty(lens, window):
    features = frozenset({"sinks"} if window is None else WINDOWED)
    call = long_case(features=features, window=jnp.int32(130))
    window = None if window is None else jnp.int32(window)
    plan = call.plan(SMALL, context_lens=np.array(lens, np.int32), sliding_window=window)
    assert_close(call, *CUTTING(call, plan=plan))


def test_a_right_plan_is_the_calls_own():
    """Bit for bit, in the pieces that the call would make."""
    for features in (frozenset(), WINDOWED):
        call = long_case(features=features, window=jnp.int32(400))
        plan = call.plan(SMALL, cache_dtype=call.keys.dtype)
        own, given = CUTTING(call), CUTTING(call, plan=plan)
        for a, b in zip(own, given, strict=True):
            np.testing.assert_array_equal(a, b)


def test_one_plan_for_all_steps_of_a_loop():
    """Made before it, for lengths that grow in it."""
    call = dataclasses.replace(long_case(features=frozenset()), num_splits=0)
    plan = call.plan(SMALL, context_lens=np.ones(7, np.int32))
    query, keys, values, lens, tables = map(jnp.asarray, call.operands())
    lens = jnp.clip(lens, 0, 570)

    def step(lens, _):
        out = ejk.page_attention(
            query, keys, values, lens, tables, cache_layout=call.cache_layout, plan=plan,
            backend=SMALL,
        )  # fmt: skip
        return lens - 1, out

    _, outs = jax.lax.scan(step, lens, length=3)
    for i in range(3):
        grown = call.replace(context_lens=np.asarray(lens - i))
        assert_close(grown, outs[i])
