"""Copies of slots and pages under `grad`, `vmap`, `scan`, `shard_map` and split pools."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from entries import copier_edge
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from meshes import COLLECTIVE, mesh

import ejk
from ejk.testing import oracle
from ejk.testing.configurations import E4M3, F32, LAYOUTS
from ejk.testing.copy_kv_cache import SHAPES, UNITS, CopyConfiguration, build
from ejk.testing.write_kv_cache import WriteShape

KINDS = {"split": SHAPES[3], "fused": SHAPES[1], "latent": SHAPES[2]}
ENDS = np.array([[1, 2, 5, 5, -1], [2, 1, 0, 3, 4]], np.int32)
HEADS = {"HND": 1, "NHD": 2, "KV_HEADS_FIRST": 0}


def copy(case, backend, *arrays):
    return getattr(ejk, case.operation)(*arrays, cache_layout=case.cache_layout, backend=backend)


def present(arrays):
    return [np.asarray(x) for x in arrays if x is not None]


@copier_edge
@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("kind", KINDS)
def test_gradients(entry, kind, unit):
    """Each number of a pool that is returned comes from one number that was given."""
    case = build(CopyConfiguration(KINDS[kind], unit, F32, "HND"), *ENDS)
    pools = [None if x is None else jnp.nan_to_num(x) for x in case.operands()[:2]]
    with entry.refusing():
        results, pullback = jax.vjp(lambda *pools: copy(case, entry.backend, *pools, *ENDS), *pools)
        weights = jax.tree.map(lambda x: jnp.arange(1.0, x.size + 1).reshape(x.shape), results)
        grads = pullback(weights)
    for pool, weight, grad in zip(present(pools), present(weights), present(grads), strict=True):
        places = np.arange(pool.size).reshape(pool.shape)
        origins, _ = oracle.copy_kv_cache(unit, places, None, *ENDS)
        expected = np.zeros(pool.size)
        np.add.at(expected, origins.reshape(-1), weight.reshape(-1))
        np.testing.assert_array_equal(grad.reshape(-1), expected)


def test_codes_have_no_gradient_by_name():
    case = build(CopyConfiguration(SHAPES[0], "page", E4M3, "HND"), *ENDS)
    with pytest.raises(ValueError, match=r"^key_cache has no gradient with key_cache\.dtype=floa"):
        jax.grad(lambda pool: ejk.copy_kv_pages(pool, pool, *ENDS)[0].astype(F32).sum())(
            case.key_cache
        )


@copier_edge
@pytest.mark.parametrize("batched", ["ids", "everything"])
def test_vmap(entry, batched):
    config = CopyConfiguration(SHAPES[3], "slot", F32, "NHD")
    ends = np.stack([ENDS, ENDS[::-1], np.array([[17, 18, 3, 0, 1], [18, 17, 2, 1, -1]])])
    cases = [build(config, *x.astype(np.int32), seed=i) for i, x in enumerate(ends)]
    axes = (0 if batched == "everything" else None,) * 2 + (0, 0)
    stacked = [
        np.stack([case.operands()[i] for case in cases]) if axis == 0 else cases[0].operands()[i]
        for i, axis in enumerate(axes)
    ]
    with entry.refusing():
        pools = jax.vmap(functools.partial(copy, cases[0], entry.backend), axes)(*stacked)
    for i, case in enumerate(cases):
        if batched == "ids":
            case = case.replace(key_cache=stacked[0], value_cache=stacked[1])
        case.check([np.asarray(x[i]) for x in pools])


@pytest.mark.parametrize("unit", UNITS)
def test_a_loop_over_layers_of_one_donated_pool(unit):
    """Each layer copies its own pages; with XLA nothing as large as the pool is made."""
    pool = jax.ShapeDtypeStruct((1009, 2, 16, 64), jnp.bfloat16)
    ids = jax.ShapeDtypeStruct((8,), jnp.int32)
    operation = {"slot": ejk.copy_kv_slots, "page": ejk.copy_kv_pages}[unit]

    def step(keys, values, sources, targets):
        def layer(pools, first):
            return operation(*pools, sources + first, targets + first), None

        return jax.lax.scan(layer, (keys, values), jnp.arange(3))[0]

    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(pool, pool, ids, ids).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < pool.size * 2 / 4


@pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices")
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "backend", [ejk.XlaCopyKVCache(), ejk.TritonCopyKVCache(interpret=True)], ids=lambda b: b.name
)
def test_each_device_copies_its_own_heads(backend, layout, kind):
    shape = WriteShape("", 5, 4, 16, 8, page_size=8)
    case = build(CopyConfiguration(shape, "page", F32, layout), *ENDS)
    spec = PartitionSpec(*[None] * HEADS[layout], "model")
    pools = [jax.device_put(x, NamedSharding(mesh(kind), spec)) for x in case.operands()[:2]]
    ids = [jax.device_put(x, NamedSharding(mesh(kind), PartitionSpec())) for x in ENDS]
    run = jax.jit(functools.partial(copy, case, backend))
    with jax.set_mesh(mesh(kind)):
        copied = run(*pools, *ids)
        text = run.lower(*pools, *ids).compile().as_text()
    case.check([np.asarray(x) for x in copied])
    assert all(x.sharding.spec[HEADS[layout]] == "model" for x in copied)
    assert not COLLECTIVE.findall(text)


@pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices")
def test_pages_on_several_devices_are_refused():
    shape = WriteShape("", 5, 4, 16, 8, page_size=8, num_pages=8)
    case = build(CopyConfiguration(shape, "page", F32, "HND"), *ENDS)
    where = NamedSharding(mesh(AxisType.Auto), PartitionSpec("model"))
    pools = [jax.device_put(x, where) for x in case.operands()[:2]]
    with pytest.raises(Exception, match="must split only its KV heads, axis 1, or"):
        jax.jit(ejk.copy_kv_pages)(*pools, *ENDS)


def test_symbolic_sizes_are_xlas():
    n, pages = jax.export.symbolic_shape("n, pages")
    pool = jax.ShapeDtypeStruct((pages, 2, 8, 16), jnp.float32)
    ids = jax.ShapeDtypeStruct((n,), jnp.int32)
    exported = jax.export.export(
        jax.jit(ejk.copy_kv_slots), platforms=("cpu", "cuda", "tpu"),
        disabled_checks=ejk.export_disabled_checks(),
    )(pool, pool, ids, ids)  # fmt: skip
    shape = WriteShape("", 5, 2, 16, 16, page_size=8)
    case = build(CopyConfiguration(shape, "slot", F32, "HND"), *ENDS)
    if jax.default_backend() == "cpu":
        case.check([np.asarray(x) for x in exported.call(*case.arguments())])
