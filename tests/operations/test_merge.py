"""`ejk.merge_attention_states` against the whole, and against loops in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import ejk
from ejk.testing import oracle

pytestmark = pytest.mark.fast


def parts(seed, shape=(3, 4, 2, 8), empty=0.3, dtype=np.float32):
    rng = np.random.default_rng(seed)
    outs = rng.standard_normal(shape).astype(dtype)
    lses = (10 * rng.standard_normal(shape[:-1])).astype(np.float32)
    nothing = rng.random(shape[:-1]) < empty
    lses[nothing], outs[nothing] = -np.inf, np.nan
    return outs, lses


@given(st.integers(0, 2**32 - 1), st.sampled_from((0.0, 0.3, 1.0)), st.booleans())
@settings(max_examples=30)
def test_agrees_with_the_oracle(seed, empty, jit):
    """Parts that saw nothing hold NaN and are selected away."""
    outs, lses = parts(seed, empty=empty)
    merge = jax.jit(ejk.merge_attention_states) if jit else ejk.merge_attention_states
    out, lse = merge(outs, lses)
    expected, expected_lse = oracle.merge_attention_states(outs, lses)
    assert out.dtype == np.float32 and lse.dtype == np.float32
    np.testing.assert_allclose(out, expected, rtol=0, atol=1e-5)
    np.testing.assert_allclose(lse, expected_lse, rtol=1e-6, atol=1e-5)


def test_parts_of_the_keys_merge_into_the_whole():
    rng = np.random.default_rng(0)
    query = rng.standard_normal((2, 4, 64), np.float32)
    pool = rng.standard_normal((8, 2, 16, 64), np.float32)
    tables, lens = np.array([[3, 5, 1], [0, 2, 4]], np.int32), np.array([40, 16], np.int32)

    def attend(lens, tables):
        return ejk.page_attention(query, pool, pool, lens, tables, return_lse=True)

    first, second = attend(np.minimum(lens, 16), tables), attend(lens - 16, tables[:, 1:])
    outs, lses = (jnp.stack(pair) for pair in zip(first, second))
    for merged, whole in zip(ejk.merge_attention_states(outs, lses), attend(lens, tables)):
        np.testing.assert_allclose(merged, whole, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, np.float16])
def test_sums_in_float32_and_returns_the_dtype_of_the_parts(dtype):
    outs, lses = parts(0, shape=(1000, 1, 1, 4), empty=0, dtype=dtype)
    out, _ = ejk.merge_attention_states(outs, np.zeros_like(lses))
    expected, _ = oracle.merge_attention_states(outs, np.zeros_like(lses))
    assert out.dtype == dtype
    rounding = float(jnp.finfo(dtype).eps) * np.abs(expected).max()
    np.testing.assert_allclose(np.asarray(out, np.float64), expected, rtol=0, atol=rounding)


def test_large_logits_do_not_overflow():
    outs, lses = parts(0, empty=0)
    merged, _ = ejk.merge_attention_states(outs, lses)
    shifted, lse = ejk.merge_attention_states(outs, lses + 1e4)
    assert np.isfinite(lse).all()
    np.testing.assert_allclose(shifted, merged, atol=1e-2)


def test_no_parts_saw_nothing():
    out, lse = ejk.merge_attention_states(
        np.zeros((0, 4, 2, 8), np.float32), np.zeros((0, 4, 2), np.float32)
    )
    assert out.shape == (4, 2, 8) and not out.any() and np.isneginf(lse).all()


@pytest.mark.parametrize("less", [0, 200])
def test_gradients_are_finite_and_zero_on_what_was_selected_away(less):
    """Also of LSEs whose weights would be infinite beside a part that saw nothing."""
    outs, lses = parts(0)
    lses = lses - np.float32(less)

    def loss(outs, lses):
        out, lse = ejk.merge_attention_states(outs, lses)
        return out.sum() + jnp.where(jnp.isfinite(lse), lse, 0.0).sum()

    for grad in jax.grad(loss, argnums=(0, 1))(jnp.asarray(outs), jnp.asarray(lses)):
        assert np.isfinite(grad).all() and np.any(grad)
        assert not np.asarray(grad)[np.isneginf(lses)].any()


@pytest.mark.parametrize("lse", [np.nan, np.inf])
def test_a_part_that_is_lost_makes_its_row_nan(lse):
    """In the definition, too. Other rows are their parts'."""
    lses = np.array([[[lse], [0.0]], [[1.0], [-np.inf]]], np.float32)
    for merge in (ejk.merge_attention_states, oracle.merge_attention_states):
        out, merged = (np.asarray(x) for x in merge(np.ones((2, 2, 1, 3), np.float32), lses))
        assert np.isnan(out[0]).all() and np.isnan(merged[0]).all()
        assert (out[1] == 1).all() and merged[1] == 0
