"""vLLM's write of new tokens: `vllm._custom_ops.reshape_and_cache_flash`, on JAX arrays."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Float, Num

from ejk._dtypes import DTYPES, check_floats, held_in_float32
from ejk._typing import Array, Slots
from ejk._write_kv_cache import write_kv_cache
from ejk.compat._arguments import Scale, check_arrays, drop_in

_TYPES = {"fp8": "float8_e4m3fn", "fp8_e4m3": "float8_e4m3fn", "fp8_e5m2": "float8_e5m2"}


@drop_in
def reshape_and_cache_flash(
    key: Array,
    value: Array,
    key_cache: Array,
    value_cache: Array,
    slot_mapping: Array,
    kv_cache_dtype: str,
    k_scale: Any,
    v_scale: Any,
) -> tuple[jax.Array, jax.Array]:
    """Write new tokens to their slots, as vLLM's function of this name does, and return the caches.

    Donate the caches to your `jit`, so that they are written in place. A slot below 0 writes
    nothing, nor does one past the pool. Of two tokens for one slot the later one stays.

    Args:
        key: `[num_tokens, num_kv_heads, head_dim]`. Rows past the slots are padding.
        value: the same.
        key_cache: `[num_blocks, block_size, num_kv_heads, head_dim]`. Quantised, it is float8, or
            bytes of it as uint8, which it stays.
        value_cache: the same.
        slot_mapping: `[num_tokens]`.
        kv_cache_dtype: `"auto"`, which uses no scales, `"fp8"`, `"fp8_e4m3"` or `"fp8_e5m2"`.
        k_scale: keys are divided by it: a number, or an array of one or of `[num_kv_heads]`.
        v_scale: the same of values.

    Returns:
        `(key_cache, value_cache)`.

    Raises:
        ValueError: another `kv_cache_dtype`, a cache of another dtype than it says, caches of two
            dtypes, scales of another dtype or shape, and what `ejk.write_kv_cache` refuses.

    Examples:
        >>> import jax.numpy as jnp
        >>> from ejk.compat.vllm import reshape_and_cache_flash
        >>> pool, rows, slots = jnp.zeros((8, 16, 2, 64)), jnp.ones((2, 2, 64)), jnp.array([5, -1])
        >>> pools = reshape_and_cache_flash(rows, rows, pool, pool, slots, "auto", 1.0, 1.0)
        >>> print(pools[0][0, 4:7, 0, 0])
        [0. 1. 0.]

    Source: the signature of vLLM 0.11.
    """
    if kv_cache_dtype != "auto" and kv_cache_dtype not in _TYPES:
        raise ValueError(
            f"kv_cache_dtype={kv_cache_dtype!r} must be one of 'auto', "
            f"{', '.join(map(repr, _TYPES))}: scales per token are ejk.write_kv_cache's"
        )
    rows = Float[Array, "num_tokens num_kv_heads head_dim"]
    pool = Num[Array, "num_pages page_size num_kv_heads head_dim"]
    check_arrays(
        key=(key, rows), value=(value, rows), key_cache=(key_cache, pool),
        value_cache=(value_cache, pool), slot_mapping=(slot_mapping, Slots),
    )  # fmt: skip
    tokens, held = slot_mapping.shape[0], key_cache.dtype
    fits = DTYPES if kv_cache_dtype == "auto" else ("uint8", _TYPES[kv_cache_dtype])
    if held.name not in fits:
        raise ValueError(
            f"key_cache.dtype={held.name} must be one of {', '.join(fits)} with "
            f"kv_cache_dtype={kv_cache_dtype!r}"
        )
    if value_cache.dtype != held:
        raise ValueError(
            f"value_cache.dtype={value_cache.dtype} must be key_cache.dtype={held}: make both alike"
        )
    key_scale = value_scale = None
    if kv_cache_dtype != "auto":
        num_kv_heads = key_cache.shape[2]
        key_scale = _scale("k_scale", k_scale, num_kv_heads)
        value_scale = _scale("v_scale", v_scale, num_kv_heads)
        if held == jnp.uint8:
            of = _TYPES[kv_cache_dtype]
            key_cache, value_cache = (
                jax.lax.bitcast_convert_type(pool, of) for pool in (key_cache, value_cache)
            )
    keys, values, *_ = write_kv_cache(
        key[:tokens], value[:tokens], key_cache, value_cache, slot_mapping,
        cache_layout="NHD", key_scale=key_scale, value_scale=value_scale,
    )  # fmt: skip
    assert values is not None
    if keys.dtype != held:
        keys, values = (jax.lax.bitcast_convert_type(pool, held) for pool in (keys, values))
    return keys, values


def _scale(name: str, scale: Any, num_kv_heads: int) -> Any:
    """Check a scale, and return a number or one a KV head; an array of one is a number."""
    check_arrays(**{name: (scale, Scale)})
    if not isinstance(scale, Array):
        return scale if scale is None else held_in_float32(name, scale)
    check_floats(**{name: scale})
    if scale.size == 1:
        return scale.reshape(())
    if scale.shape != (num_kv_heads,):
        raise ValueError(
            f"{name}.shape={scale.shape} must be num_kv_heads={(num_kv_heads,)}, or that of one: "
            "scales per token are ejk.write_kv_cache's"
        )
    return scale
