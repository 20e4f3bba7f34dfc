"""Caches split over devices under plain `jit`: each device writes its own heads, and moves none."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from meshes import COLLECTIVE, mesh

import ejk
from ejk.testing.configurations import LAYOUTS
from ejk.testing.write_kv_cache import WriteShape, assert_written, build

pytestmark = pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices")

F32 = np.dtype(np.float32)
KINDS = {
    "split": WriteShape("split", 9, 4, 16, 8, page_size=16),
    "fused": WriteShape("fused", 9, 4, 16, None, page_size=16),
    "latent": WriteShape("latent", 9, 4, 16, 0, page_size=16),
}
SLOTS = np.array([3, 80, 3, -1, 50, 96, 17, 80, 5], np.int32)
# Pallas' interpreter orders its callbacks, which a split program cannot: it would run whole.
BACKENDS = (ejk.XlaWriteKVCache(), ejk.TritonWriteKVCache(interpret=True))


def placed(case, kind=AxisType.Auto, axis=None):
    """The call's arrays on a mesh, the pools' KV heads (or another axis) over four devices."""
    devices = mesh(kind)
    heads = {"HND": 1, "NHD": 2, "KV_HEADS_FIRST": 0, "INTERLEAVED": 2}[case.cache_layout]
    if case.key_cache.ndim == 5 and heads:
        heads += 1
    pool = PartitionSpec(*[None] * (heads if axis is None else axis), "model")
    specs = (PartitionSpec(), PartitionSpec(), pool, pool, PartitionSpec())
    return [
        None if x is None else jax.device_put(x, NamedSharding(devices, spec))
        for x, spec in zip(case.operands(), specs)
    ]


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda backend: backend.name)
@pytest.mark.parametrize(
    "layout, kind", [*itertools.product(LAYOUTS, KINDS), ("INTERLEAVED", "fused")]
)
def test_each_device_writes_its_own_heads(layout, kind, backend):
    case = build(KINDS[kind], F32, layout, SLOTS)
    arrays = placed(case)
    write = jax.jit(functools.partial(ejk.write_kv_cache, cache_layout=layout, backend=backend))
    caches = [x for x in write(*arrays) if x is not None]
    assert_written(case, caches)
    assert all(x.sharding.spec == arrays[2].sharding.spec for x in caches)
    assert not COLLECTIVE.findall(write.lower(*arrays).compile().as_text())


@pytest.mark.parametrize("layout", [*LAYOUTS, "INTERLEAVED"])
def test_scales_are_written_where_their_heads_are(layout):
    """On XLA: kernels that take them are split as they are, by the same axes."""
    for kind in [KINDS["fused"]] if layout == "INTERLEAVED" else KINDS.values():
        case = build(kind, F32, layout, SLOTS, cache_dtype=np.dtype(np.int8), scales="token")
        arrays = placed(case)
        scales = {
            name: jax.device_put(
                x, NamedSharding(mesh(), PartitionSpec(*arrays[2].sharding.spec[: x.ndim]))
            )
            for name, x in zip(("key_scale", "value_scale"), case.scales)
            if x is not None
        }
        write = jax.jit(functools.partial(ejk.write_kv_cache, cache_layout=layout, backend="xla"))
        pools = [x for x in write(*arrays, **scales) if x is not None]
        assert_written(case, pools)
        assert all(x.sharding.spec == arrays[2].sharding.spec for x in pools)
        assert not COLLECTIVE.findall(write.lower(*arrays, **scales).compile().as_text())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_gather_no_pool(layout):
    case = build(KINDS["split"], F32, layout, SLOTS)
    arrays = [jnp.nan_to_num(x) if x.dtype == F32 else x for x in placed(case)]

    def loss(key, value, key_cache, value_cache, slots):
        caches = ejk.write_kv_cache(
            key, value, key_cache, value_cache, slots, cache_layout=layout, backend="xla"
        )
        return sum((x * x).sum() for x in caches)

    grad = jax.jit(jax.grad(loss, (0, 1, 2, 3)))
    moved = COLLECTIVE.findall(grad.lower(*arrays).compile().as_text())
    assert not [shape for shape, _ in moved if "6,16" in shape or "16,6" in shape]
    assert grad(*arrays)[2].sharding.spec == arrays[2].sharding.spec


@pytest.mark.parametrize("axis", [0, 2])
def test_other_axes_of_a_pool_are_refused(axis):
    case = build(WriteShape("", 9, 4, 16, 8, page_size=16, num_pages=8), F32, "HND", SLOTS)
    with pytest.raises(Exception, match="must split only its KV heads, axis 1"):
        jax.jit(ejk.write_kv_cache)(*placed(case, axis=axis))


@pytest.mark.parametrize("layout, kind", [("HND", "split"), ("INTERLEAVED", "fused")])
def test_explicit_axes_stay(layout, kind):
    case = build(KINDS[kind], F32, layout, SLOTS)
    arrays = placed(case, AxisType.Explicit)
    write = functools.partial(ejk.write_kv_cache, cache_layout=layout)
    with jax.set_mesh(mesh(AxisType.Explicit)):
        caches = jax.jit(write)(*arrays)
    assert_written(case, [x for x in caches if x is not None])
    assert caches[0].sharding.is_equivalent_to(arrays[2].sharding, caches[0].ndim)


@pytest.mark.fast
@pytest.mark.parametrize("jit", [jax.jit, lambda function: function], ids=["jit", "eager"])
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_slots_of_tables_that_are_split(kind, jit):
    """By sequences, as attention takes them. A write wants all slots on each device."""
    lens, tables = np.array([7, 3, 8, 1], np.int32), np.arange(8, dtype=np.int32).reshape(4, 2)
    bounds, sizes = np.array([0, 2, 3, 6, 7], np.int32), {"page_size": 4, "num_pages": 16}

    def slots(tables, lens):
        one = ejk.slot_mapping(tables, lens - 1, **sizes)
        return one, ejk.ragged_slot_mapping(tables, lens, bounds, total_tokens=8, **sizes)

    devices = mesh(kind)
    over = NamedSharding(devices, PartitionSpec("data"))
    with jax.set_mesh(devices):
        found = jit(slots)(jax.device_put(tables, over), jax.device_put(lens, over))
    for ours, expected in zip(found, slots(tables, lens)):
        np.testing.assert_array_equal(ours, expected)
        if kind == AxisType.Explicit:
            assert not any(ours.sharding.spec)
