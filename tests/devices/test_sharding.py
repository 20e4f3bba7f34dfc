"""`ejk.page_attention` inside `jax.shard_map`: each device attends with what it has."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from edges import LENGTHS, config
from entries import edge
from jax.sharding import AxisType, PartitionSpec
from planned import TRITON, launches, long_case

import ejk
from ejk.testing.page_attention import build

pytestmark = pytest.mark.skipif(jax.device_count() < 2, reason="needs two devices")

NAMES = ("query", "key_cache", "value_cache", "context_lens", "block_tables",
         "attn_scale", "sinks", "alibi_slopes")  # fmt: skip
FLOATS = (0, 1, 2, 5, 6, 7)
SHARDED = {
    "sequences": dict(query=0, context_lens=0, block_tables=0),
    "KV heads": dict(query=1, key_cache=1, value_cache=1, sinks=0, alibi_slopes=0),
}
RESULTS = {"sequences": (0, 0), "KV heads": (1, 1)}
"""The sharded axis of the output and of the LSE."""
DEVICES = {"sequences": 4 if jax.device_count() >= 4 else 2, "KV heads": 2}


def operands():
    """Eight sequences, two KV heads; no poison, for gradients of whole pools."""
    features = frozenset({"sinks", "alibi_slopes"})
    case = build(config(features=features), LENGTHS[1:].astype(np.int32), seed=3)
    case = case.with_other_junk(seed=1, finite=True)
    values = dict(zip(NAMES, case.operands())) | case.options | {"attn_scale": np.float32(0.1)}
    return [jnp.asarray(values[name]) for name in NAMES]


def specs(axes):
    return tuple(PartitionSpec(*[None] * axis, "x") if axis is not None else PartitionSpec()
                 for axis in axes)  # fmt: skip


def sharded(function, what):
    """Split a function of the operands over devices, all checks of `shard_map` on."""
    count = DEVICES[what]
    devices = jax.devices()[:count]
    mesh = jax.make_mesh((count,), ("x",), axis_types=(AxisType.Auto,), devices=devices)
    inputs = specs(SHARDED[what].get(name) for name in NAMES)
    return jax.jit(
        jax.shard_map(function, mesh=mesh, in_specs=inputs, out_specs=specs(RESULTS[what]))
    )


def attend(backend, *values, plan=None):
    return ejk.page_attention(
        **dict(zip(NAMES, values)), return_lse=True, plan=plan, backend=backend
    )


@edge
@pytest.mark.parametrize("what", SHARDED)
def test_shards_equal_the_whole(entry, what):
    function = functools.partial(attend, entry.backend)
    with entry.refusing():
        expected = function(*operands())
        results = sharded(function, what)(*operands())
    for a, b in zip(results, expected):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.one_in(2)
@edge
@pytest.mark.parametrize("what", SHARDED)
def test_each_shard_plans_for_itself(entry, what):
    def function(*values):
        query, key_cache, _, lens, tables = values[:5]
        plan = ejk.plan_page_attention(
            lens, num_heads=query.shape[1], num_kv_heads=key_cache.shape[1], head_dim=128,
            page_size=16, max_blocks=tables.shape[1], backend=entry.backend,
        )  # fmt: skip
        return attend(entry.backend, *values, plan=plan)

    with entry.refusing():
        expected = attend(entry.backend, *operands())
        results = sharded(function, what)(*operands())
    for a, b in zip(results, expected):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.one_in(2)
@edge
@pytest.mark.parametrize("what", SHARDED)
def test_gradients_of_shards_equal_those_of_the_whole(entry, what):
    """Of what every device has a copy, as of the scale, they are summed over the devices."""
    function = functools.partial(attend, entry.backend)
    rng = np.random.default_rng(0)

    def loss(function):
        def weighted(*values):
            out, lse = function(*values)
            return (out * weights[0]).sum() + (lse * weights[1]).sum()

        return jax.grad(weighted, FLOATS)

    with entry.refusing():
        weights = [rng.standard_normal(x.shape).astype(x.dtype) for x in function(*operands())]
        expected = loss(function)(*operands())
        actual = loss(sharded(function, what))(*operands())
    for i, a, b in zip(FLOATS, actual, expected):
        assert np.asarray(b).any(), NAMES[i]
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5, err_msg=NAMES[i])


def test_what_static_facts_answer_varies_as_the_operands_do():
    """Else it could not be a carry beside them."""
    arrays = [jnp.asarray(x) for x in long_case(features=frozenset()).rows([0, 1]).operands()]
    query, pools, (lens, tables) = arrays[0], arrays[1:3], arrays[3:]

    def repeat(query, key_cache, value_cache, lens, tables):
        def step(query, _):
            out = ejk.page_attention(
                query, key_cache, value_cache, lens, tables[:, :0], cache_layout="NHD"
            )
            return out, None

        return jax.lax.scan(step, query, None, length=2)[0]

    mesh = jax.make_mesh((2,), ("x",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    rows, whole = PartitionSpec("x"), PartitionSpec()
    inputs = (rows, whole, whole, rows, rows)
    split = jax.jit(jax.shard_map(repeat, mesh=mesh, in_specs=inputs, out_specs=rows))
    assert not split(query, *pools, lens, tables).any()


def test_shards_with_long_contexts_are_cut():
    case = long_case(features=frozenset())
    arrays = [jnp.asarray(x) for x in case.rows([*range(7), *range(7)]).operands()]

    def function(*arrays):
        return ejk.page_attention(*arrays, cache_layout="NHD", backend=TRITON.backend)

    mesh = jax.make_mesh((2,), ("x",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    rows = PartitionSpec("x")
    inputs = (rows, PartitionSpec(), PartitionSpec(), rows, rows)
    split = jax.jit(jax.shard_map(function, mesh=mesh, in_specs=inputs, out_specs=rows))
    ours = ["page_attention_plan", "page_attention", "combine_parts"]
    assert sorted(launches(lambda: split(*arrays))) == sorted(2 * ours)
    expected = function(*[jnp.asarray(x) for x in case.operands()])
    np.testing.assert_array_equal(split(*arrays), jnp.concatenate([expected, expected]))
