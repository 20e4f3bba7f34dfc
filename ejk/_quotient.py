"""Quotients to the last bit, where a platform's division is only near.

XLA divides on NVIDIA GPUs by `div.approx.f32`, up to two units in the last place off, and takes the
reciprocal of a constant on all platforms.
"""

import jax
import jax.numpy as jnp
from jax import lax

_STEPS = 3  # at most so many units are mended
_HIDDEN = 1 << 23  # the bit of a normal number that is not stored


@jax.custom_jvp
def quotient(a: jax.Array, b: jax.Array) -> jax.Array:
    """Return `a / b`, of float32, rounded to nearest: the same bits on every platform.

    As long as it is a normal number: some platforms have no others.
    """
    return mended(a, b, a / b)


quotient.defjvps(
    lambda of_a, q, a, b: of_a / b,
    lambda of_b, q, a, b: -q * of_b / b,
)


def mended(a: jax.Array, b: jax.Array, near: jax.Array) -> jax.Array:
    """Return the float32 nearest to `a / b`, given one at most three units from it.

    What remains, `a - q * b`, is a whole number of units that fits in 32 bits, so a product that
    wraps gives it exactly.
    """
    (a_digits, a_power), (b_digits, b_power) = _parts(a), _parts(b)
    bits = lax.bitcast_convert_type(near, jnp.int32)
    for _ in range(_STEPS):
        digits, power = _parts(lax.bitcast_convert_type(bits, jnp.float32))
        rest = (a_digits << (a_power - power - b_power)) - digits * b_digits
        # Half a unit is too much; below a power of two units are half as large.
        down = jnp.where((digits == _HIDDEN) & (power > -149), -4 * rest, -2 * rest) > b_digits
        bits += (2 * rest > b_digits).astype(jnp.int32) - down.astype(jnp.int32)
    is_number = jnp.isfinite(near) & (near != 0) & jnp.isfinite(b)
    return jnp.where(is_number, lax.bitcast_convert_type(bits, jnp.float32), near)


def _parts(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return digits and power of `abs(x) = digits * 2**power`, both int32."""
    bits = lax.bitcast_convert_type(x, jnp.int32)
    exponent = (bits >> 23) & 0xFF
    digits = (bits & (_HIDDEN - 1)) | jnp.where(exponent > 0, _HIDDEN, 0)
    return digits, jnp.maximum(exponent, 1) - 150
