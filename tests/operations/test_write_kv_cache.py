"""What `ejk.write_kv_cache` computes, on every backend, against the definition, bit for bit."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from compilations import CompilationCounter
from entries import WRITERS, each_case, writer_edge

import ejk
from ejk.testing import PROPERTIES
from ejk.testing.bits import bits
from ejk.testing.configurations import DTYPES, INTEGERS, LAYOUTS
from ejk.testing.write_kv_cache import (
    CONFIGURATIONS,
    SHAPES,
    assert_written,
    build,
    hostile_slots,
    writes,
)

F32, BF16 = np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16)

QUANTISED = [config for config in CONFIGURATIONS if config.is_quantised]


def check(entry, case):
    assert_written(case, entry(case))


PROMISED = PROPERTIES["write_kv_cache"]


def held(name, share=1.0):
    return each_case(writes, share, WRITERS)(PROMISED[name])


test_agrees_with_the_oracle = pytest.mark.smoke(held("agrees_with_the_oracle"))
test_running_twice_gives_the_same_bits = held("running_twice_gives_the_same_bits", 0.2)
test_jit_equals_eager_and_leaves_its_arguments_alone = held(
    "jit_equals_eager_and_leaves_its_arguments_alone", 0.3
)


def test_every_property_is_tested():
    assert {f"test_{name}" for name in PROMISED} <= {*globals()}


@writer_edge
@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_slots_outside_write_nothing_whatever_their_type(entry, dtype):
    shape = SHAPES[0]
    hostile = hostile_slots(dtype, shape.num_slots)
    slots = np.array([5, *hostile, 90], dtype)
    case = build(shape, F32, "HND", slots, as_jax=False)
    caches = entry(case)
    assert_written(case, caches)
    changed = bits(caches[0]) != bits(case.key_cache)
    assert set(zip(*np.nonzero(changed.any(axis=(1, 3))))) == {(0, 5), (5, 10)}


@pytest.mark.one_in(2)
@writer_edge
@pytest.mark.parametrize("num_tokens", [2, 150])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_last_of_several_tokens_stays(entry, layout, num_tokens):
    """All to one slot; then each slot twice, far apart."""
    slots = np.full(num_tokens, 37, np.int32)
    check(entry, build(SHAPES[0], BF16, layout, slots))
    slots = np.resize(np.random.default_rng(0).permutation(96)[: -(-num_tokens // 2)], num_tokens)
    check(entry, build(SHAPES[0], F32, layout, slots.astype(np.int32)))


@pytest.mark.one_in(4)
@writer_edge
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_shape_layout_and_dtype(entry, layout, shape, dtype):
    slots = np.random.default_rng(1).integers(-1, shape.num_slots, shape.num_tokens)
    check(entry, build(shape, dtype, layout, slots.astype(np.int32)))


@pytest.mark.one_in(3)
@writer_edge
@pytest.mark.parametrize("config", QUANTISED, ids=lambda c: f"{c.cache_dtype} {c.scales} {c[2]}")
def test_every_cache_and_kind_of_scale(entry, config):
    """Among the rows are zeros, NaN, infinities and the ends of float32."""
    shape, dtype, layout, cache_dtype, scales = config
    slots = np.random.default_rng(1).integers(-1, shape.num_slots, shape.num_tokens)
    slots = slots.astype(np.int32)
    check(entry, build(shape, dtype, layout, slots, cache_dtype=cache_dtype, scales=scales))


@writer_edge
@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[1], SHAPES[2]], ids=lambda shape: shape.name)
def test_no_tokens_and_no_pages_leave_the_caches(entry, shape):
    case = build(shape, F32, "NHD", np.zeros(0, np.int32))
    assert_written(case, entry(case))
    empty = np.zeros((0, *case.key_cache.shape[1:]), F32)
    case = build(shape, F32, "NHD", np.zeros(3, np.int32))
    case = case.replace(key_cache=empty)
    if case.value_cache is not None:
        case = case.replace(value_cache=np.zeros((0, *case.value_cache.shape[1:]), F32))
    assert_written(case, entry(case))


@writer_edge
def test_new_tokens_and_slots_do_not_compile_again(entry):
    shape, rng = SHAPES[0], np.random.default_rng(0)
    slots = rng.integers(-1, shape.num_slots, (4, 7)).astype(np.int32)
    first, *others = (build(shape, F32, "HND", s, seed=i) for i, s in enumerate(slots))
    entry(first)
    with CompilationCounter() as compiled:
        for case in others:
            assert_written(case, entry(case))
    assert compiled.count == 0


@writer_edge
def test_64_bit_types_change_no_bit(entry):
    case = build(SHAPES[3], F32, "HND", np.random.default_rng(0).integers(-5, 200, 33))
    with jax.enable_x64(True):
        wide = case.arguments()[:4], jnp.asarray(case.slot_mapping)
        assert wide[1].dtype == jnp.int64
        with entry.refusing():
            caches = ejk.write_kv_cache(*wide[0], wide[1], backend=entry.backend)
    assert_written(case, [np.asarray(cache) for cache in caches])
