"""What copies of slots and pages compute, on every backend, against the definition, bit for bit."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from entries import COPIERS, copier_edge, each_case

import ejk
from ejk.testing import PROPERTIES
from ejk.testing.bits import bits
from ejk.testing.configurations import BF16, E4M3, F32, INT4, INTEGERS, LAYOUTS
from ejk.testing.copy_kv_cache import (
    SHAPES,
    UNITS,
    CopyConfiguration,
    build,
    copies,
    num_units,
)
from ejk.testing.write_kv_cache import WriteShape, hostile_slots

PROMISED = PROPERTIES["copy_kv_slots"]
assert PROPERTIES["copy_kv_pages"] == PROMISED  # the calls that are drawn are of either


def held(name, share=1.0):
    return each_case(copies, share, COPIERS)(PROMISED[name])


test_agrees_with_the_oracle = pytest.mark.smoke(held("agrees_with_the_oracle"))
test_running_twice_gives_the_same_bits = held("running_twice_gives_the_same_bits", 0.2)
test_jit_equals_eager_and_leaves_its_arguments_alone = held(
    "jit_equals_eager_and_leaves_its_arguments_alone", 0.2
)


def test_every_property_is_tested():
    assert {f"test_{name}" for name in PROMISED} <= {*globals()}


PATTERNS = {
    "shifted down": ([1, 2, 3, 4, 5], [0, 1, 2, 3, 4]),
    "shifted up": ([0, 1, 2, 3, 4], [1, 2, 3, 4, 5]),
    "swapped": ([0, 5, 2, 3], [5, 0, 3, 2]),
    "a cycle and a bystander": ([0, 3, 4, 1], [3, 4, 0, 5]),
    "one to many, then overwritten": ([0, 0, 0, 2], [1, 2, 3, 0]),
    "many to one": ([1, 2, 3, 4], [0, 0, 0, 0]),
    "the later does nothing": ([1, -1, 2, 9999], [0, 0, 5, 5]),
    "onto itself, over an earlier one": ([1, 0, 3], [0, 0, 1]),
}


@pytest.mark.one_in(8)
@copier_edge
@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_sources_that_are_targets_too(entry, pattern, unit):
    sources, targets = (np.array(x, np.int32) for x in PATTERNS[pattern])
    padding = np.full(5 - len(sources), -1, np.int32)  # one compilation for all
    config = CopyConfiguration(SHAPES[1], unit, F32, "HND")
    case = build(config, *(np.concatenate([x, padding]) for x in (sources, targets)))
    case.check(entry(case))


@copier_edge
@pytest.mark.parametrize("num_copies", [33, 50, 64])
@pytest.mark.parametrize("width", [64, 80])
def test_conflicts_among_more_copies_than_a_warp_has_lanes(entry, num_copies, width):
    """Triton 3.6 compared some lanes' copies with others than their own, of some sizes."""
    rng = np.random.default_rng(num_copies)
    shape = WriteShape("few pages", num_copies, 3, width, width, 2, 4)
    config = CopyConfiguration(shape, "page", np.dtype(np.int8), "HND", "token")
    sources, targets = (rng.integers(0, 4, num_copies, np.int32) for _ in range(2))
    case = build(config, sources, targets)
    case.check(entry(case))


@copier_edge
@pytest.mark.parametrize("unit", UNITS)
def test_ids_outside_copy_nothing_whatever_their_type(entry, unit):
    """From there or to there: of each pair one end is a unit of the pool."""
    config = CopyConfiguration(SHAPES[3], unit, F32, "NHD")
    for dtype in INTEGERS[::3]:
        hostile = hostile_slots(dtype, num_units(config))
        hostile = np.resize(np.array(hostile, dtype), 14)  # one compilation for all types
        inside, two, four = (np.resize(np.array(x, dtype), n) for x, n in (
            ([0, 3, 5], 14), ([2], 1), ([4], 1),
        ))  # fmt: skip
        ends = np.concatenate([hostile, inside, two]), np.concatenate([inside, hostile, four])
        case = build(config, *ends, as_jax=False)
        case.check(entry(case))


@pytest.mark.one_in(8)
@copier_edge
@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[1], SHAPES[3]], ids=lambda shape: shape.name)
@pytest.mark.parametrize("dtype", [BF16, E4M3, INT4], ids=str)
def test_every_shape_layout_and_unit(entry, dtype, shape, layout, unit):
    scales = "none" if dtype == BF16 else "token"
    config = CopyConfiguration(shape, unit, dtype, layout, scales)
    rng = np.random.default_rng(1)
    ends = rng.integers(-1, min(12, num_units(config)), (2, shape.num_tokens)).astype(np.int32)
    case = build(config, *ends)
    case.check(entry(case))


@copier_edge
def test_no_copies_and_no_pages_leave_the_pools(entry):
    config = CopyConfiguration(SHAPES[0], "page", F32, "HND")
    case = build(config, *np.zeros((2, 0), np.int32))
    case.check(entry(case))
    empty = case.key_cache[:0]
    some = np.zeros(3, np.int32)
    case = case.replace(key_cache=empty, value_cache=empty, sources=some, targets=some)
    case.check(entry(case))


@copier_edge
@pytest.mark.parametrize("unit", UNITS)
def test_jit_leaves_its_arguments_alone_and_donation_does_not_matter(entry, unit):
    config = CopyConfiguration(SHAPES[3], unit, F32, "HND")
    rng = np.random.default_rng(0)
    case = build(config, *rng.integers(0, 6, (2, 12)).astype(np.int32))
    before = [x.copy() for x in case.operands()]
    run = functools.partial(getattr(ejk, case.operation), backend=entry.backend)
    with entry.refusing():
        plain = jax.jit(run)(*case.arguments())
        donated = jax.jit(run, donate_argnums=(0, 1))(*map(jnp.array, case.operands()))
    for pools in (plain, donated):
        case.check([np.asarray(x) for x in pools])
    for x, y in zip(case.operands(), before):
        assert (bits(x) == bits(y)).all()


@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3fn"])
@pytest.mark.parametrize("operation, slots", [(ejk.copy_kv_slots, 1), (ejk.copy_kv_pages, 16)])
def test_a_donated_pool_is_copied_in_place_by_xla(operation, slots, dtype):
    """Of float8 too, which XLA would convert on a CPU: no number of the pool's size is wider."""
    pool = jax.ShapeDtypeStruct((1009, 8, 16, 128), dtype)
    ids = jax.ShapeDtypeStruct((64,), jnp.int32)
    copy = functools.partial(operation, key_scale=1.0, value_scale=1.0)
    compiled = jax.jit(copy, donate_argnums=(0, 1)).lower(pool, pool, ids, ids).compile()
    memory = compiled.memory_analysis()
    assert memory.temp_size_in_bytes <= 4 * 64 * slots * 8 * 128 * 2 + 100_000
    assert memory.alias_size_in_bytes >= 2 * 1009 * 8 * 16 * 128 * pool.dtype.itemsize
    wide = re.findall(r"= (?:f16|f32)\[1009,8,16,128\]", compiled.as_text())
    assert not wide


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2"])
def test_every_code_is_copied_bit_for_bit(dtype):
    """NaN has six codes in float8_e5m2. XLA on a CPU makes them one where it converts a pool."""
    codes = np.arange(256, dtype=np.uint8).reshape(4, 1, 4, 16)
    pool, pages = jnp.asarray(codes.view(dtype)), jnp.arange(4)
    copied, _ = ejk.copy_kv_pages(pool, pool, pages, pages[::-1], key_scale=1.0, value_scale=1.0)
    np.testing.assert_array_equal(np.asarray(copied).view(np.uint8), codes[::-1])


def test_accepted_drafts_move_to_where_the_sequence_goes_on():
    """Two trees: of the first nodes 0, 2, 5; of the second 0, 1; and what is no node of theirs."""
    rng = np.random.default_rng(0)
    slots = rng.permutation(40)[:10].astype(np.int32)
    bounds = np.array([1, 7, 9])
    accepted = np.array([[0, 2, 5, -1], [0, 1, 2, 2**40]])
    sources, targets = ejk.accepted_slots(slots, accepted, bounds)
    expected = [(slots[1 + n], slots[1 + k]) for k, n in enumerate((0, 2, 5))] + [(-1, -1)]
    expected += [(slots[7], slots[7]), (slots[8], slots[8]), (-1, -1), (-1, -1)]
    assert [*zip(sources.tolist(), targets.tolist())] == expected
    none = ejk.accepted_slots(slots[:0], accepted, bounds)
    assert all((x == -1).all() for x in none)
