"""What one row sees has no part in the rounding of another's values."""

import jax.numpy as jnp
import numpy as np
import pytest

import ejk

pytestmark = pytest.mark.fast


def test_a_large_value_scale_that_a_row_does_not_see_costs_it_nothing():
    """Float16 would hold no weight of the first seven rows over the scale of the last token."""
    rng = np.random.default_rng(0)
    codes = rng.integers(-127, 128, (2, 1, 4, 8)).astype(np.int8)
    query = jnp.asarray(rng.standard_normal((8, 1, 8)), jnp.float16)
    scale = np.full((2, 1, 4), 1e-3, np.float32)
    with_large = scale.copy()
    with_large[1, 0, 3] = 1e5
    found, expected = (
        ejk.ragged_page_attention(
            query, codes, codes, jnp.array([8]), jnp.array([[0, 1]]), jnp.array([0, 8]),
            key_scale=scale, value_scale=values, backend="xla",
        )
        for values in (with_large, scale)
    )  # fmt: skip
    np.testing.assert_allclose(
        found[:7].astype(jnp.float32), expected[:7].astype(jnp.float32), rtol=2e-3, atol=1e-3
    )
