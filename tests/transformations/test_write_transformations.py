"""`ejk.write_kv_cache` under `grad`, `vmap`, `scan` and `shard_map`, on every backend."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from entries import writer_edge
from jax.sharding import AxisType, PartitionSpec

import ejk
from ejk.testing import oracle
from ejk.testing.configurations import LAYOUTS
from ejk.testing.write_kv_cache import SHAPES, assert_written, build

F32 = np.dtype(np.float32)
SPLIT, FUSED, LATENT = SHAPES[:3]
KINDS = {"split": SPLIT, "fused": FUSED, "latent": LATENT}


def numbers(shape, layout, slots, seed=0):
    """A call of ordinary numbers."""
    case = build(shape, F32, layout, np.asarray(slots, np.int32))
    rng = np.random.default_rng(seed)

    def normal(x):
        return None if x is None else rng.standard_normal(x.shape, np.float32)

    names = ("key", "value", "key_cache", "value_cache")
    return case.replace(**{name: normal(getattr(case, name)) for name in names})


def write(case, backend, *arrays):
    return ejk.write_kv_cache(*arrays, cache_layout=case.cache_layout, backend=backend)


def present(arrays):
    return [np.asarray(x) for x in arrays if x is not None]


@writer_edge
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_gradients(entry, kind, layout):
    """Each number of a cache that is returned comes from one number that was given."""
    num_slots = KINDS[kind].num_slots
    slots = [7, num_slots, 7, 40, -1, 40, 9][: KINDS[kind].num_tokens]
    case = numbers(KINDS[kind], layout, slots)
    arrays = [None if x is None else jnp.asarray(x) for x in case.operands()]
    with entry.refusing():
        caches, pullback = jax.vjp(
            lambda *floats: write(case, entry.backend, *floats, arrays[4]), *arrays[:4]
        )
        weights = jax.tree.map(lambda x: jnp.arange(1.0, x.size + 1).reshape(x.shape), caches)
        grads = pullback(weights)
    # Where each number came from: the oracle, of the places of numbers instead of numbers.
    count, places = 0, []
    for x in arrays[:4]:
        size = 0 if x is None else x.size
        places.append(None if x is None else np.arange(count, count + size).reshape(x.shape))
        count += size
    origins = oracle.write_kv_cache(*places, np.array(slots), cache_layout=layout)
    expected = np.zeros(count)
    for origin, weight in zip(present(origins), present(weights)):
        expected[origin] = weight
    for grad, place in zip(present(grads), present(places)):
        np.testing.assert_array_equal(grad, expected[place])
    assert (expected == 0).any() and not present(grads)[0][1].any()


@writer_edge
def test_gradients_through_the_attention_that_reads(entry):
    """Of a key that was written: as if it had been in the cache."""
    case = numbers(SPLIT, "HND", [16, 17, 18, 19, 20, -1, -1])
    key, value, key_cache, value_cache, slots = map(jnp.asarray, case.operands())
    query = jnp.asarray(np.random.default_rng(1).standard_normal((1, 4, 128), np.float32))
    lens, tables = jnp.array([21]), jnp.array([[0, 1]])

    def attend(key_cache, value_cache):
        return ejk.page_attention(query, key_cache, value_cache, lens, tables, backend="xla").sum()

    def through(key, value, key_cache, value_cache):
        return attend(*write(case, entry.backend, key, value, key_cache, value_cache, slots))

    with entry.refusing():
        grads = jax.grad(through, (0, 1, 2, 3))(key, value, key_cache, value_cache)
        written = write(case, entry.backend, key, value, key_cache, value_cache, slots)
    of_caches = jax.grad(attend, (0, 1))(*written)
    for of_rows, of_pool, of_cache in zip(grads[:2], grads[2:], of_caches):
        np.testing.assert_array_equal(of_rows[:5], of_cache[1, :, :5].swapaxes(0, 1))
        assert of_rows[:5].all() and not of_rows[5:].any()
        assert not of_pool[1, :, :5].any() and of_pool[0].any()


@writer_edge
@pytest.mark.parametrize("batched", ["rows and slots", "pools", "everything"])
def test_vmap(entry, batched):
    cases = [
        numbers(SPLIT, "NHD", np.roll([3, 80, 3, -1, 50, 96, 17], seed), seed) for seed in range(3)
    ]
    axes = {"rows and slots": (0, 0, None, None, 0), "pools": (None, None, 0, 0, None)}
    axes = axes.get(batched, (0,) * 5)
    operands = [case.operands() for case in cases]
    stacked = [
        jnp.stack([x[i] for x in operands]) if axis == 0 else jnp.asarray(operands[0][i])
        for i, axis in enumerate(axes)
    ]
    with entry.refusing():
        caches = jax.vmap(functools.partial(write, cases[0], entry.backend), axes)(*stacked)
    for seed in range(3):
        one = [operands[seed if axis == 0 else 0][i] for i, axis in enumerate(axes)]
        names = ("key", "value", "key_cache", "value_cache", "slot_mapping")
        assert_written(cases[0].replace(**dict(zip(names, one))), [x[seed] for x in caches])


@writer_edge
@pytest.mark.parametrize("unroll", [1, 2])
def test_a_loop_over_layers_of_one_donated_pool(entry, unroll):
    case = numbers(SPLIT, "HND", [3, 8, 8, -1, 15, 32, 20])  # three layers of two pages

    @functools.partial(jax.jit, donate_argnums=(2, 3))
    def step(key, value, key_cache, value_cache, slots):
        def layer(caches, index):
            own = jnp.where((slots >= 0) & (slots < 32), slots + index * 32, -1)
            rows = (key + index.astype(key.dtype), value * index.astype(value.dtype))
            return write(case, entry.backend, *rows, *caches, own), None

        return jax.lax.scan(layer, (key_cache, value_cache), jnp.arange(3), unroll=unroll)[0]

    with entry.refusing():
        caches = step(*map(jnp.array, case.operands()))
    written = case.key_cache, case.value_cache
    slots = case.slot_mapping
    for index in range(3):
        own = np.where((slots >= 0) & (slots < 32), slots + index * 32, -1)
        rows = case.key + np.float32(index), case.value * np.float32(index)
        written = oracle.write_kv_cache(*rows, *written, own)
    np.testing.assert_array_equal(caches[0], written[0])
    np.testing.assert_array_equal(caches[1], written[1])


@pytest.mark.one_in(2)
@writer_edge
@pytest.mark.skipif(jax.device_count() < 2, reason="needs two devices")
@pytest.mark.parametrize("what", ["KV heads", "pages"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_shards_and_their_gradients_equal_the_whole(entry, layout, what):
    """Each device has some heads of every page, or some pages and the slots that are its own."""
    case = numbers(SPLIT, layout, [3, 80, 3, -1, 50, 96, 17])
    arrays = [jnp.asarray(x) for x in case.operands()]
    mesh = jax.make_mesh((2,), ("x",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    heads = {"HND": 1, "NHD": 2, "KV_HEADS_FIRST": 0}[layout]
    pages = 1 if layout == "KV_HEADS_FIRST" else 0

    def on(axis):
        return PartitionSpec(*[None] * axis, "x")

    pool, rows = (on(heads), on(1)) if what == "KV heads" else (on(pages), PartitionSpec())

    def local(key, value, key_cache, value_cache, slots):
        if what == "pages":
            first = jax.lax.axis_index("x") * 48
            slots = jnp.where(slots >= first, slots - first, -1)
        return write(case, entry.backend, key, value, key_cache, value_cache, slots)

    sharded = jax.shard_map(
        local, mesh=mesh, in_specs=(rows, rows, pool, pool, PartitionSpec()), out_specs=(pool, pool)
    )
    weights = [jnp.arange(1.0, x.size + 1).reshape(x.shape) for x in arrays[2:4]]

    def loss(function):
        def weighted(*arrays):
            caches = function(*arrays)
            return sum((c * w).sum() for c, w in zip(caches, weights)), caches

        return jax.jit(jax.grad(weighted, (0, 1, 2, 3), has_aux=True))

    with entry.refusing():
        grads, caches = loss(sharded)(*arrays)
        expected, _ = loss(functools.partial(write, case, entry.backend))(*arrays)
    assert_written(case, caches)
    for a, b in zip(grads, expected):
        assert np.asarray(b).any()
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("layout, axis", [("HND", 0), ("NHD", 0), ("KV_HEADS_FIRST", 1)])
def test_vmap_over_donated_pools_is_in_place(layout, axis):
    """The batched axis right before that of the pages makes one pool of all."""
    rows = jnp.ones((2, 2, 8), jnp.bfloat16)
    shape = {"HND": (64, 2, 16, 8), "NHD": (64, 16, 2, 8), "KV_HEADS_FIRST": (2, 64, 16, 8)}[layout]

    def one(pool, slots):
        return ejk.write_kv_cache(rows, None, pool, None, slots, cache_layout=layout)[0]

    pools = jax.ShapeDtypeStruct((*shape[:axis], 4, *shape[axis:]), jnp.bfloat16)
    mapped = jax.jit(jax.vmap(one, (axis, 0), axis), donate_argnums=0)
    lowered = mapped.lower(pools, jax.ShapeDtypeStruct((4, 2), jnp.int32))
    memory = lowered.compile().memory_analysis()
    assert memory.temp_size_in_bytes < pools.size * 2 / 16


def test_what_is_written_nowhere_changes_no_gradient_of_a_scale():
    """A row without a slot, and one that a later one replaces, may hold NaN."""
    rows = jnp.ones((3, 1, 4)).at[:2].set(jnp.nan)
    pool, slots = jnp.zeros((1, 1, 4, 4)), jnp.array([-1, 2, 2])

    def written(key_scale, value_scale):
        scales = {"key_scale": key_scale, "value_scale": value_scale}
        keys, values = ejk.write_kv_cache(rows, 3 * rows, pool, pool, slots, **scales)
        return keys.sum() + values.sum()

    grads = jax.grad(written, argnums=(0, 1))(jnp.array([2.0]), jnp.array([1.0]))
    np.testing.assert_array_equal(grads, [[-4 / 2**2], [-4 * 3.0]])
