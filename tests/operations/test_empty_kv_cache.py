"""`ejk.empty_kv_cache`: pools that the operations take, and hand back with the same types."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ejk

pytestmark = pytest.mark.fast
DTYPES = ("float32", "bfloat16", "float16", "int8", "float8_e4m3fn", "float8_e5m2", "int4")
POOLS = ({}, {"fused": True}, {"latent": True}, {"value_head_dim": 4})
LAYOUTS = ("HND", "NHD", "KV_HEADS_FIRST")


@pytest.mark.parametrize(("number", "dtype"), list(enumerate(DTYPES)))
def test_a_step_over_all_layers_compiles_once(number, dtype):
    """Two steps write and attend in every layer; the second finds the first one's token."""
    pools, layout = POOLS[number % 4], LAYOUTS[number % 3]
    layers, num_pages, page_size = 2, 3, 4
    cache = ejk.empty_kv_cache(
        num_pages, 2, page_size, 8, dtype=dtype, num_layers=layers, cache_layout=layout, **pools
    )
    tables, rng = np.array([[2, -1]]), np.random.default_rng(0)
    latent, compiled = "latent" in pools, []

    @jax.jit
    def step(cache, position, key, value):
        compiled.append(1)
        slots = ejk.slot_mapping(tables, position, page_size=page_size, num_pages=num_pages)
        scales = {"key_scale": cache.key_scale, "value_scale": cache.value_scale}
        outs = []
        for layer in range(layers):
            of_layer = ejk.layer_slot_mapping(
                slots, layer, num_pages=num_pages, page_size=page_size
            )
            cache = ejk.KVCache(
                *ejk.write_kv_cache(
                    key + layer, None if latent else value + layer, cache.key_cache,
                    cache.value_cache, of_layer, cache_layout=layout, **scales,
                )
            )  # fmt: skip
            scales = {"key_scale": cache.key_scale, "value_scale": cache.value_scale}
            table = ejk.layer_block_tables(tables, layer, num_pages=num_pages)
            outs.append(
                ejk.page_attention(
                    jnp.zeros((1, 2, 8)), cache.key_cache, cache.value_cache, position + 1, table,
                    cache_layout=layout, value_head_dim=8 if latent else None, **scales,
                )
            )  # fmt: skip
        return cache, jnp.stack(outs)

    key = rng.standard_normal((2, 1, 2, 8)).astype(np.float32)
    value = rng.standard_normal((2, 1, 2, pools.get("value_head_dim", 8))).astype(np.float32)
    first, _ = step(cache, jnp.array([0]), key[0], value[0])
    assert jax.tree.map(jax.typeof, first) == jax.tree.map(jax.typeof, cache)
    _, outs = step(first, jnp.array([1]), key[1], value[1])
    assert len(compiled) == 1
    mean = (key if latent else value).mean(0)
    expected = np.stack([mean + layer for layer in range(layers)])
    coarse = {"int4": 0.3, "float8_e5m2": 0.5, "float8_e4m3fn": 0.25}
    np.testing.assert_allclose(outs, expected, atol=coarse.get(dtype, 0.03))


def test_bytes_of_all_pools():
    whole = ejk.empty_kv_cache(8, 2, 16, 64)
    half = ejk.empty_kv_cache(8, 2, 16, 64, dtype="float8_e4m3fn")
    assert whole.nbytes == 2 * half.nbytes == 2 * 8 * 2 * 16 * 64 * 2
    scaled = ejk.empty_kv_cache(8, 2, 16, 64, dtype=jnp.float8_e4m3fn, token_scales=True)
    assert scaled.nbytes == half.nbytes + 2 * 8 * 2 * 16 * 4
    assert scaled.key_scale is not None and scaled.key_scale.dtype == np.float32
