"""Integers are counted by comparisons or by a sort, which say the same."""

import jax.numpy as jnp
import numpy as np
import pytest

from ejk import _indices

pytestmark = pytest.mark.fast


@pytest.mark.parametrize("most", [0, 10**6])
@pytest.mark.parametrize("limits", [0, 1, 40])
@pytest.mark.parametrize("numbers", [0, 1, 7, 40])
def test_numbers_up_to_each_limit(numbers, limits, most, monkeypatch):
    monkeypatch.setattr(_indices, "MOST_COMPARED", most)
    rng = np.random.default_rng(numbers)
    ends = np.array([-(2**31), 2**31 - 1, *range(-3, 9)])
    given = [np.sort(rng.choice(ends, n)).astype(np.int32) for n in (numbers, limits)]
    counts = _indices.count_up_to(*map(jnp.asarray, given))
    assert counts.dtype == jnp.int32
    np.testing.assert_array_equal(counts, np.searchsorted(*given, side="right"))
