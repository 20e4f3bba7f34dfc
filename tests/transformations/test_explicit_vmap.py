"""`vmap` over an axis that explicit mesh axes split: what the plain call gives, split as it was."""

import jax
import jax.numpy as jnp
import meshes
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import ejk

pytestmark = pytest.mark.skipif(not meshes.MANY_DEVICES, reason="needs eight devices")

DRAW = np.random.default_rng(0)
QUERY = DRAW.standard_normal((4, 4, 16), np.float32)
POOLS = DRAW.standard_normal((4, 8, 2, 4, 16), np.float32)
LENS = np.array([3, 4, 1, 8], np.int32)
TABLES = np.array([[1, 2], [3, 0], [4, 7], [6, 5]], np.int32)
TOKENS = DRAW.standard_normal((4, 1, 2, 16), np.float32)
SLOTS = np.array([[0], [33], [-1], [7]], np.int32)


def attend(query, pool, length, table):
    return ejk.page_attention(query[None], pool, pool, length[None], table[None])[0]


def attend_ragged(query, pool, length, table):
    bounds = np.array([0, 1])
    return ejk.ragged_page_attention(query[None], pool, pool, length[None], table[None], bounds)[0]


def write(tokens, pool, slots):
    return ejk.write_kv_cache(tokens, tokens, pool, pool, slots)[0]


CALLS = {
    "page_attention": (attend, (QUERY, POOLS[0], LENS, TABLES)),
    "page_attention, pools too": (attend, (QUERY, POOLS, LENS, TABLES)),
    "ragged_page_attention": (attend_ragged, (QUERY, POOLS[0], LENS, TABLES)),
    "write_kv_cache": (write, (TOKENS, POOLS, SLOTS)),
}
each_call = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)


def placed(arrays):
    """The mesh, the arrays with their batched axis split, and which of them have one."""
    mesh = meshes.mesh(AxisType.Explicit, s=4)
    axes = tuple(None if x is POOLS[0] or x.shape[0] != 4 else 0 for x in arrays)
    specs = (PartitionSpec() if axis is None else PartitionSpec("s") for axis in axes)
    return mesh, [jax.device_put(x, NamedSharding(mesh, s)) for x, s in zip(arrays, specs)], axes


def one_by_one(function, arrays, axes):
    parts = [[x if axis is None else x[i] for x, axis in zip(arrays, axes)] for i in range(4)]
    return np.stack([function(*part) for part in parts])


@each_call
@pytest.mark.parametrize("options", [{}, {"spmd_axis_name": "s"}], ids=["", "spmd_axis_name"])
@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_as_the_plain_call(call, options, wrap):
    function, arrays = call
    _, given, axes = placed(arrays)
    out = wrap(jax.vmap(function, axes, **options))(*given)
    assert out.sharding.spec[0] == "s"
    np.testing.assert_allclose(out, one_by_one(function, arrays, axes), rtol=1e-5, atol=1e-6)


@each_call
def test_gradients(call):
    function, arrays = call
    mesh, given, axes = placed(arrays)

    def gradients(arrays):
        def loss(query, pool):
            return (jax.vmap(function, axes)(query, pool, *arrays[2:]) ** 2).sum()

        return jax.grad(loss, (0, 1))(*arrays[:2])

    with jax.set_mesh(mesh):
        split = jax.jit(gradients)(given)
    for ours, whole in zip(split, gradients(list(map(jnp.asarray, arrays)))):
        np.testing.assert_allclose(ours, whole, rtol=1e-4, atol=1e-5)


def test_nothing_to_see():
    """Static facts answer a call of tables without columns; the answer is split, too."""
    _, given, _ = placed((QUERY, POOLS[0], LENS, TABLES[:, :0]))
    out = jax.vmap(attend, (0, None, 0, 0))(*given)
    assert out.sharding.spec[0] == "s" and not np.asarray(out).any()
