"""Bugs of quantised caches put into XLA one at a time: the properties must catch each of them."""

import jax.numpy as jnp
import numpy as np
import pytest
import test_seeded_bugs
import test_write_seeded_bugs
from edges import LENGTHS, config

import ejk._cache_types as cache_types
import ejk.backends.xla._softmax as softmax
import ejk.backends.xla.write_kv_cache as writing
from ejk.backends import stored_rows
from ejk.testing.bounds import assert_close
from ejk.testing.configurations import BF16, E4M3, E5M2, F16, F32, INT4, INT8
from ejk.testing.page_attention import build
from ejk.testing.write_kv_cache import SHAPES, assert_written
from ejk.testing.write_kv_cache import build as build_write

READ = (
    dict(dtype=F32, cache_dtype=INT8, scales="token"),
    dict(dtype=F16, cache_dtype=E4M3, scales="head"),
    dict(dtype=BF16, cache_dtype=INT4, scales="token", fused=True),
    dict(dtype=F32, cache_dtype=BF16),
)


def reads_hold(entry):
    for changes in READ:
        case = build(config(**changes), LENGTHS, invalid=0.2, share=True)
        assert_close(case, *entry(case))
    wide = build(config(dtype=F16, cache_dtype=E5M2, scales="token"), LENGTHS)
    scale = np.where(np.isnan(wide.scales[1]), np.nan, np.float32(2e5)).astype(F32)
    values = (wide.values.astype(F32) / 2**20).astype(E5M2)
    case = wide.replace(values=values, scales=(wide.scales[0], scale))
    assert_close(case, *entry(case))


def writes_hold(entry):
    rng = np.random.default_rng(0)
    for dtype, cache, scales in (
        (BF16, INT8, "token"), (F32, INT4, "token"), (F32, E4M3, "head"), (F16, INT8, "scalar"),
        (F32, E5M2, "token"), (F32, BF16, "none"),
    ):  # fmt: skip
        for shape in (SHAPES[0], SHAPES[1], SHAPES[3]):
            slots = rng.choice(shape.num_slots, shape.num_tokens, replace=False)
            case = build_write(
                shape, dtype, "HND", slots, cache_dtype=cache, scales=scales, as_jax=False
            )
            assert_written(case, entry(case))


scales, numbers, weights, codes_of, quantise, scales_of, stored = (
    softmax._scales, softmax._numbers, softmax.Block.with_value_scale, softmax.codes_of,
    stored_rows.quantise, stored_rows.scales_of, writing.stored,
)  # fmt: skip


def scales_changed(change):
    """`_scales` with what it read changed."""

    def changed(problem, scale, *rest):
        read = scales(problem, scale, *rest)
        return None if read is None else change(read)

    return changed


def of_the_next_token(read):
    return jnp.roll(read, -1, axis=2)


def of_the_keys(problem, scale, pages, half, seen):
    return scales(problem, scale, pages, softmax.KEYS, seen)


def weights_of_dead_slots(block, p, visible):
    """What nobody sees has a scale that is NaN, and is not selected away."""
    if block.value_scale is None:
        return p, None
    scale = jnp.where(block.visible.any(1)[:, None], block.value_scale, jnp.nan)
    return weights(block._replace(value_scale=scale), p, jnp.ones_like(visible))


def nibbles_swapped(x, cache_type):
    is_int4 = cache_type.per_element == 2
    return codes_of((x << 4) | (x >> 4) if is_int4 else x, cache_type)


def nibbles_without_sign(x, cache_type):
    return codes_of(x, cache_type) & 15 if cache_type.per_element == 2 else codes_of(x, cache_type)


def weights_without_a_unit(block, p, visible):
    if block.value_scale is None:
        return p, None
    scaled = jnp.where(visible, p * block.value_scale[:, :, None], 0.0)
    return scaled, jnp.ones_like(scaled[..., :1])


def weights_of_a_unit_alone(block, p, visible):
    return p, weights(block, p, visible)[1]


def cache_as_queries(problem, pool, *rest):
    """A float cache of another type is rounded to the least of both."""
    block = numbers(problem, pool, *rest)
    is_mixed = problem.cache_dtype != problem.query_dtype
    return block.astype(jnp.float8_e4m3fn).astype(block.dtype) if is_mixed else block


READING = {
    "a scale of another head": ("_scales", scales_changed(lambda x: jnp.roll(x, 1, axis=1))),
    "a scale of the next token": ("_scales", scales_changed(of_the_next_token)),
    "scales are applied twice": ("_scales", scales_changed(lambda x: x * x)),
    "scales are missing": ("_scales", scales_changed(jnp.ones_like)),
    "values have the scales of keys": ("_scales", of_the_keys),
    "scales of dead slots are read": ("with_value_scale", weights_of_dead_slots),
    "nibbles are swapped": ("codes_of", nibbles_swapped),
    "nibbles have no sign": ("codes_of", nibbles_without_sign),
    "a value scale overflows float16": ("with_value_scale", weights_without_a_unit),
    "the largest value scale stands for all": ("with_value_scale", weights_of_a_unit_alone),
    "a float cache is rounded": ("_numbers", cache_as_queries),
}


@pytest.mark.fault("page_attention", "xla")
@pytest.mark.fast(4)
@pytest.mark.parametrize("bug", READING)
def test_bugs_of_reading_are_caught(bug, monkeypatch):
    name, replacement = READING[bug]
    target = softmax.Block if hasattr(softmax.Block, name) else softmax
    monkeypatch.setattr(target, name, replacement)
    with pytest.raises(AssertionError):
        reads_hold(test_seeded_bugs.mutant(bug))


def unsaturated(rows, scale, dtype):
    kind = cache_types.cache_type_of(dtype)
    rows = rows if scale is None else rows * (1 / scale)[..., None]
    if kind.is_quantised and not kind.is_integer:
        return rows.astype(dtype)
    return quantise(rows, None, dtype) if kind.per_element == 2 else rows.astype(dtype)


def truncated(rows, scale, dtype):
    kind = cache_types.cache_type_of(dtype)
    rows = rows if scale is None else rows * (1 / scale)[..., None]
    return quantise(jnp.trunc(rows) if kind.is_integer else rows, None, dtype)


def half_up(rows, scale, dtype):
    kind = cache_types.cache_type_of(dtype)
    rows = rows if scale is None else rows * (1 / scale)[..., None]
    return quantise(jnp.floor(rows + 0.5) if kind.is_integer else rows, None, dtype)


def packed_the_other_way(rows, scale, dtype):
    codes = quantise(rows, scale, dtype)
    return (codes << 4) | (codes >> 4) if codes.dtype == jnp.uint8 else codes


def scales_of_zeros(rows, cache_type):
    scale = scales_of(rows, cache_type)
    return jnp.where((rows == 0).all(-1), 0.0, scale)


def stored_with(change):
    def changed(problem, rows, scale):
        codes, scale = stored(problem, rows, scale)
        return codes, None if scale is None else change(scale)

    return changed


def of_both_heads(rows, cache_type):
    scale = scales_of(rows, cache_type)
    return jnp.broadcast_to(scale.max(-1, keepdims=True), scale.shape)


WRITING = {
    "codes do not saturate": ("quantise", unsaturated),
    "codes are cut off": ("quantise", truncated),
    "codes are rounded up from one half": ("quantise", half_up),
    "nibbles are swapped": ("quantise", packed_the_other_way),
    "a row of zeros has no scale": ("scales_of", scales_of_zeros),
    "heads share a scale": ("scales_of", of_both_heads),
    "a scale of the next token": ("stored", stored_with(lambda x: jnp.roll(x, -1, axis=0))),
    "a scale of another head": ("stored", stored_with(lambda x: jnp.roll(x, 1, axis=1))),
    "scales are missing": ("stored", stored_with(jnp.ones_like)),
    "scales are inverted": ("stored", stored_with(lambda x: 1 / x)),
}


@pytest.mark.fault("write_kv_cache", "xla")
@pytest.mark.fast(4)
@pytest.mark.parametrize("bug", WRITING)
def test_bugs_of_writing_are_caught(bug, monkeypatch):
    name, replacement = WRITING[bug]
    monkeypatch.setattr(writing if name == "stored" else stored_rows, name, replacement)
    with pytest.raises(AssertionError):
        writes_hold(test_write_seeded_bugs.mutant(bug))


def test_the_sound_backend_is_not_accused():
    reads_hold(test_seeded_bugs.mutant("none"))
    writes_hold(test_write_seeded_bugs.mutant("none"))
