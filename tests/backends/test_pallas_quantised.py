"""The TPU kernels on caches of 8 bits and of other floats, interpreted: poison, NaN, seeded bugs.

The properties of `tests/operations` draw such caches for the interpreted kernels, as a v4 would
compile them. Here chips come in whose matrix unit takes float8 as it is.
"""

import dataclasses

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import tpu_interpreter

from ejk.backends.pallas import _chip, _codes, _products
from ejk.backends.pallas.page_attention import kernel
from ejk.testing.bounds import assert_close
from ejk.testing.configurations import LAYOUTS, Configuration
from ejk.testing.page_attention import build
from ejk.testing.shapes import Shape

F32, BF16, INT8 = np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16), np.dtype(np.int8)
E4M3, E5M2 = np.dtype(ml_dtypes.float8_e4m3fn), np.dtype(ml_dtypes.float8_e5m2)
SHAPE = Shape("two pages a block", 4, 2, 128, page_size=16, max_blocks=4, num_pages=14)
LENGTHS = np.array((64, 17, 40), np.int32)


@pytest.fixture(autouse=True)
def _fresh_interpreter():
    yield
    tpu_interpreter.reset()


def check(config, chip="v4", number=0, **options):
    """Interpret a call as `chip` would run it: a field of its own keeps programs apart."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_chip, "UNKNOWN", _chip.CHIPS[chip])
        number += 2**27 + 100 * list(_chip.CHIPS).index(chip)
        case = build(config, LENGTHS, invalid=0.1, seed=2, **options)
        backend = tpu_interpreter.backend(vmem_limit_bytes=number)
        assert_close(case, *tpu_interpreter.run(case, backend))


CACHES = {
    "int8 per head": (BF16, INT8, "head"),
    "int8 per token": (BF16, INT8, "token"),
    "int8 per token, float32 queries": (F32, INT8, "token"),
    "e4m3": (BF16, E4M3, "none"),
    "e4m3 per token": (BF16, E4M3, "token"),
    "e5m2 per head": (BF16, E5M2, "head"),
    "bfloat16, float32 queries": (F32, BF16, "none"),
    "float32": (BF16, F32, "head"),
}


def config_of(name, layout="HND", fused=False, shape=SHAPE):
    dtype, cache, scales = CACHES[name]
    return Configuration(shape, dtype, layout, fused=fused, cache_dtype=cache, scales=scales)


@pytest.mark.one_in(3)
@pytest.mark.parametrize("chip", ["v4", "v6e", "7x"])
@pytest.mark.parametrize("name", CACHES)
def test_caches(name, chip):
    check(config_of(name), chip)


@pytest.mark.one_in(3)
@pytest.mark.parametrize("fused", [False, True], ids=["split", "fused"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["int8 per token", "e4m3 per token"])
def test_layouts(name, layout, fused):
    check(config_of(name, layout, fused), "v6e")


@pytest.mark.parametrize("place", ["keys", "values"])
@pytest.mark.parametrize("chip", ["v6e", "7x"])
def test_a_nan_code_that_products_miss_is_not_lost(chip, place, monkeypatch):
    """In a block that nothing masks: the matrix unit of a v6e takes it for 480."""
    monkeypatch.setattr(_chip, "UNKNOWN", _chip.CHIPS[chip])
    product = _products.product

    def unit(a, b, *, contract):
        if chip == "v6e" and b.dtype == E4M3:
            b = jnp.nan_to_num(b.astype(BF16), nan=480.0)
        return product(a, b, contract=contract)

    monkeypatch.setattr(kernel, "product", unit)
    case = build(config_of("e4m3"), LENGTHS, seed=2)
    cache = getattr(case, place).copy()
    cache[case.block_tables[0, 0], 3, 1, 5] = np.nan
    case = case.replace(**{place: cache})
    backend = tpu_interpreter.backend(vmem_limit_bytes=2**26 + 7 * (place == "keys") + len(chip))
    out, lse = tpu_interpreter.run(case, backend)
    assert np.isnan(out[0].astype(np.float32)).any()
    assert_close(case, out, lse)


def of_the_wrong_head(x, scales, head):
    return _codes_scaled(x, scales, head ^ 1)


def of_the_next_token(*arguments):
    found = token_scales(*arguments)
    return None if found is None else jnp.concatenate([found[:, 1:], found[:, :1]], axis=1)


def twice(x, scales, head):
    return _codes_scaled(_codes_scaled(x, scales, head), scales, head)


def missing(x, scales, head):
    return x


def of_the_other_half(bufs, slot, k, half, sizes):
    return token_scales(bufs[::-1], slot, k, half, sizes)


def unmasked(x, begin, end, hidden, other):
    return x if other == 0 else hide(x, begin, end, hidden, other)


_codes_scaled, token_scales, hide = _codes.scaled, _codes.token_scales, kernel.hide
FAULTS = {
    "the wrong head's scale": ("scaled", of_the_wrong_head),
    "the next token's scale": ("token_scales", of_the_next_token),
    "scales twice": ("scaled", twice),
    "no scales": ("scaled", missing),
    "keys' scales are the values'": ("token_scales", of_the_other_half),
    "scales unmasked": ("hide", unmasked),
}


def test_the_sound_kernel_passes_where_faults_are_caught():
    check(config_of("int8 per token"), number=50)


@pytest.mark.fault("page_attention", "pallas")
@pytest.mark.parametrize("bug", FAULTS)
def test_a_seeded_bug_is_caught(bug, monkeypatch):
    monkeypatch.setattr(kernel, *FAULTS[bug])
    with pytest.raises(AssertionError):
        check(config_of("int8 per token"), number=51 + list(FAULTS).index(bug))


def test_heads_scale_keys_and_values(monkeypatch):
    """Left out, of keys or of values, the scales of heads are missed."""
    call = kernel.page_attention_kernel
    for number, name in enumerate(("key_scale_ref", "value_scale_ref")):
        with monkeypatch.context() as patch:

            def without(*refs, name=name, **named):
                return call(*refs, **named | {name: None})

            patch.setattr("ejk.backends.pallas.page_attention.call.page_attention_kernel", without)
            without.__name__ = call.__name__
            with pytest.raises(AssertionError):
                check(config_of("int8 per head"), number=70 + number)


def test_float16_is_refused_by_name():
    config = dataclasses.replace(config_of("float32"), cache_dtype=np.dtype(np.float16))
    case = build(config, LENGTHS)
    with pytest.raises(Exception, match="dtype=float16: the matrix unit takes"):
        tpu_interpreter.run(case, tpu_interpreter.backend())
