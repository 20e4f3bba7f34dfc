"""Bounds that size work are rounded up: as many programs as there are values would be compiled."""

import jax.numpy as jnp
import numpy as np
import pytest
from compilations import CompilationCounter
from hypothesis import given
from hypothesis import strategies as st

import ejk
from ejk._indices import rounded_bound

POOL = jnp.ones((64, 2, 16, 16))
TABLES = jnp.zeros((2, 64), jnp.int32)


def decode(lens, **hints):
    return ejk.page_attention(
        jnp.ones((2, 4, 16)), POOL, POOL, lens, TABLES, backend="xla", **hints
    )


def ragged(lens, **hints):
    bounds = jnp.array([0, 300, 600])
    return ejk.ragged_page_attention(
        jnp.ones((600, 4, 16)), POOL, POOL, lens, TABLES, bounds, backend="xla", **hints
    )


@pytest.mark.parametrize(
    "call, hint",
    [(decode, "max_context_len"), (ragged, "max_context_len"), (ragged, "max_q_len")],
)
def test_a_bound_that_grows_step_by_step_compiles_two_programs_at_most(call, hint):
    call(np.array([1, 1])).block_until_ready()
    with CompilationCounter() as compiled:
        for bound in range(120, 132):
            call(np.array([bound, bound]), **{hint: bound}).block_until_ready()
    assert 0 < compiled.count <= 2


@given(st.integers(0, 2**31), st.sampled_from((0, 8)))
def test_a_bound_is_rounded_up_by_less_than_half(bound, exact):
    rounded = rounded_bound("max_q_len", bound, exact_up_to=exact)
    assert bound <= rounded <= max(bound, bound * 3 // 2)
    assert rounded == bound or bound > exact
    assert rounded_bound("max_q_len", rounded, exact_up_to=exact) == rounded


@pytest.mark.parametrize("bound", [1, 64, 96, 1024, 4096, 6144, 131072])
def test_powers_of_two_and_one_and_a_half_of_them_stay(bound):
    assert rounded_bound("max_context_len", np.int64(bound), exact_up_to=0) == bound
