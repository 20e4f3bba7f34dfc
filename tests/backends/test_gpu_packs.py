"""Decode whose sequences share first pages on an NVIDIA GPU, where these are read once."""

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from packs import SharedCase, shared_case

import ejk

pytestmark = pytest.mark.gpu

PACKING, PLAIN = ejk.TritonPageAttention(least_saved_bytes=0), ejk.TritonPageAttention()
BF16 = ml_dtypes.bfloat16
GROUPS = [0] * 21 + [1] * 3 + [-1] * 2 + [2] + [0] * 6
"""More than a pack holds, a few, none, one alone."""
SHAPES = {
    "32/8/128": ((32, 8), 128),
    "8/1/128, a group of 8": ((8, 1), 128),
    "9/3/64, a group of 3": ((9, 3), 64),
    "4/4/80": ((4, 4), 80),
    "4/2/256": ((4, 2), 256),
}
CACHES = {"int8": (jnp.int8, 1), "e4m3": (jnp.float8_e4m3fn, 1), "int4": (jnp.uint8, 2)}
OPTIONS = {"sinks": np.full(32, 0.5, np.float32), "alibi_slopes": np.full(32, 0.01, np.float32),
           "attn_logits_soft_cap": 20.0}  # fmt: skip


def batch(dtype, heads=(32, 8), head_dim=128) -> SharedCase:
    """Prefixes of 70, 9 and 5 pages, of which the longest is cut; own tokens of 1 to 180."""
    own = np.random.default_rng(1).integers(1, 180, len(GROUPS))
    return shared_case(
        GROUPS, (70, 9, 5), own, dtype=dtype, heads=heads, head_dim=head_dim, blocks=288,
        num_pages=640,
    )  # fmt: skip


def assert_groups_change_last_bits_alone(case, atol, **options):
    """What packs give is near what sequences give by themselves, and twice the same bits."""
    given = [jnp.asarray(x) for x in case.arrays()]
    groups = tuple(map(jnp.asarray, case.prefix_groups))

    @jax.jit
    def both(given):
        own = dict(return_lse=True, **options)
        plain = ejk.page_attention(*given, backend=PLAIN, **own)
        return ejk.page_attention(*given, backend=PACKING, prefix_groups=groups, **own), plain

    (packed, plain), (again, _) = both(given), both(given)
    for one, other, twice in zip(packed, plain, again, strict=True):
        one, other, twice = (np.asarray(x, np.float32) for x in (one, other, twice))
        np.testing.assert_allclose(one, other, rtol=0, atol=atol)
        np.testing.assert_array_equal(one, twice)
    assert (np.asarray(packed[1]) != np.asarray(plain[1])).any(), "nothing was read once"


@pytest.mark.parametrize("dtype", [np.float32, np.float16, BF16], ids=lambda x: np.dtype(x).name)
@pytest.mark.parametrize("shape", SHAPES)
def test_packs_change_last_bits_alone(shape, dtype):
    case = batch(dtype, *SHAPES[shape])
    assert_groups_change_last_bits_alone(case, 2e-5 if dtype == np.float32 else 2e-2)


def test_packs_with_every_option():
    assert_groups_change_last_bits_alone(batch(BF16), 2e-2, **OPTIONS)


@pytest.mark.parametrize("scales", ["head", "token"])
@pytest.mark.parametrize("cache", CACHES)
def test_packs_on_quantised_caches(cache, scales):
    dtype, per_byte = CACHES[cache]
    if cache == "int4" and scales == "head":
        return
    case, rng = batch(BF16), np.random.default_rng(2)
    pages, heads, slots, width = case.key_cache.shape
    axes = (heads,) if scales == "head" else (pages, heads, slots)
    is_dead = np.isnan(np.float32(case.key_cache[..., 0]))
    pools = {}
    for name in ("key", "value"):
        codes = rng.integers(-100, 100, (pages, heads, slots, width // per_byte))
        pools[f"{name}_cache"] = jnp.asarray(codes, jnp.int32).astype(dtype)
        scale = np.float32(0.02 if cache == "int8" else 0.3) * rng.uniform(0.5, 2, axes)
        if scales == "token":
            scale = np.where(is_dead, np.nan, scale)
        pools[f"{name}_scale"] = jnp.asarray(scale, jnp.float32)
    case = dataclasses.replace(
        case, key_cache=pools.pop("key_cache"), value_cache=pools.pop("value_cache")
    )
    most = 100 * 0.04 if cache == "int8" else 120.0
    assert_groups_change_last_bits_alone(case, 2e-2 * most, **pools)


def test_a_plan_with_packs_serves_other_tables_and_lengths():
    case = batch(BF16)
    clean = (jnp.nan_to_num(jnp.asarray(x), nan=1) for x in (case.key_cache, case.value_cache))
    query, pools = jnp.asarray(case.query), list(clean)
    plan = case.plan(PACKING)
    other = np.where(case.block_tables >= 640, -1, (case.block_tables + 7) % 640)
    other[4] = np.roll(other[4], 3)  # it shares nothing now
    for tables, lens in ((case.block_tables, case.context_lens // 2), (other, case.context_lens)):
        given = query, *pools, jnp.asarray(lens), jnp.asarray(tables)
        found = ejk.page_attention(*given, plan=plan, backend=PACKING)
        alone = ejk.page_attention(*given, backend=PLAIN)
        np.testing.assert_allclose(np.float32(found), np.float32(alone), rtol=0, atol=2e-2)
