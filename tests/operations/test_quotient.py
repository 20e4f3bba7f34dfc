"""Quotients are those of IEEE 754 whatever a platform's division is off by."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ejk._quotient import mended, quotient

LARGEST = {"int8": 127, "int4": 7, "float8_e4m3fn": 448, "float8_e5m2": 57344}


def operands(divisor):
    """Return magnitudes of every size over a largest code, or 1 over scales of every size."""
    bits = np.random.default_rng(0).integers(0, 255 << 23, 100_000, np.int32)
    edges = (np.arange(1, 255)[:, None] << 23) + np.array([-3, -2, -1, 0, 1, 2, 3, 1 << 22])
    x = np.concatenate([bits, edges.ravel().astype(np.int32)]).view(np.float32)
    return (np.ones_like(x), x) if divisor is None else (x, np.full_like(x, divisor))


@pytest.mark.parametrize("units", range(-3, 4))
@pytest.mark.parametrize("divisor", [None, *LARGEST.values()])
def test_what_a_division_is_off_by_is_mended(divisor, units):
    a, b = operands(divisor)
    with np.errstate(all="ignore"):
        exact = a / b
    off = exact.view(np.int32) + units
    is_normal = (exact >= np.finfo(np.float32).tiny) & (off < 255 << 23) & np.isfinite(exact)
    near = np.where(is_normal, off, exact.view(np.int32)).view(np.float32)
    found = np.asarray(jax.jit(mended)(a, b, near))
    np.testing.assert_array_equal(found[is_normal], exact[is_normal])


@pytest.mark.parametrize("a", [0.0, 1.0, np.inf, np.nan])
@pytest.mark.parametrize("b", [0.0, -0.0, -3.0, 7.0, np.inf, np.nan])
def test_what_is_no_number_is_left_alone(a, b):
    a, b = jnp.float32(a), jnp.float32(b)
    with np.errstate(all="ignore"):
        np.testing.assert_array_equal(quotient(a, b), np.float32(a) / np.float32(b))


def test_its_gradient_is_that_of_a_quotient():
    found = jax.grad(quotient, (0, 1))(jnp.float32(3), jnp.float32(7))
    np.testing.assert_allclose(found, [1 / 7, -3 / 49], rtol=1e-6)
