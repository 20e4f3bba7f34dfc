"""Integers are counted by comparisons, a search or a sort, which say the same."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ejk import _indices

pytestmark = pytest.mark.fast


def drawn(numbers, limits):
    rng = np.random.default_rng(numbers)
    ends = np.array([-(2**31), 2**31 - 1, *range(-3, 9)])
    return [np.sort(rng.choice(ends, n)).astype(np.int32) for n in (numbers, limits)]


@pytest.mark.parametrize("most", [0, 10**6])
@pytest.mark.parametrize("limits", [0, 1, 40])
@pytest.mark.parametrize("numbers", [0, 1, 7, 40])
def test_numbers_up_to_each_limit(numbers, limits, most, monkeypatch):
    monkeypatch.setattr(_indices, "MOST_COMPARED", most)
    given = drawn(numbers, limits)
    counts = _indices.count_up_to(*map(jnp.asarray, given))
    assert counts.dtype == jnp.int32
    np.testing.assert_array_equal(counts, np.searchsorted(*given, side="right"))


@functools.cache
def exported():
    sizes = jax.export.symbolic_shape("numbers, limits")
    shapes = (jax.ShapeDtypeStruct((size,), jnp.int32) for size in sizes)
    return jax.export.export(jax.jit(_indices.count_up_to))(*shapes).call


@pytest.mark.parametrize("limits", [1, 40])
@pytest.mark.parametrize("numbers", [1, 7, 40])
def test_sizes_that_are_symbolic(numbers, limits):
    given = drawn(numbers, limits)
    np.testing.assert_array_equal(exported()(*given), np.searchsorted(*given, side="right"))
