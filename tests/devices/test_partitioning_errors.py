"""What cannot be split is refused by name, or moves what is small; the rest is split."""

import functools

import jax
import meshes
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import ejk
from ejk.testing.shapes import Shape

pytestmark = [
    pytest.mark.fast,
    pytest.mark.skipif(not meshes.MANY_DEVICES, reason="needs eight devices"),
]

EVEN = Shape("even", 16, 4, 32, 16, num_seqs=8, num_pages=32)
TRITON = ejk.TritonPageAttention(interpret=True, num_sms=6)
BOUNDS = np.arange(9, dtype=np.int32)
each_kind = pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)


def decode(given, **options):
    return ejk.page_attention(**given, **options)


def ragged(given, **options):
    return ejk.ragged_page_attention(**given, cu_q_lens=BOUNDS, **options)


def write(given, **options):
    rows, pools = np.ones((3, 4, 32), np.float32), (given["key_cache"], given["value_cache"])
    return ejk.write_kv_cache(rows, rows, *pools, np.arange(3), **options)


def copy(given, **options):
    pools, slots = (given["key_cache"], given["value_cache"]), np.arange(3)
    return ejk.copy_kv_slots(*pools, slots, slots + 3, **options)


CALLS = {"decode": decode, "ragged": ragged, "write": write}
each_call = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)


def given_arrays(shape=EVEN):
    return meshes.arrays(meshes.split_case(shape, features=()))[0]


@each_call
@each_kind
@pytest.mark.parametrize("name", ["key_cache", "value_cache"])
@pytest.mark.parametrize("axis", [0, 2, 3])
def test_eager_calls_name_the_pool_that_is_split(call, kind, name, axis):
    spec = PartitionSpec(*[None] * axis, "data")
    split_up = meshes.put(meshes.mesh(kind), given_arrays(), {name: spec})
    message = rf"^{name}\.sharding\.spec=.*'data'.* must split only its KV heads, axis 1.*shard_map"
    with pytest.raises(ValueError, match=message):
        call(split_up)


@each_call
@pytest.mark.parametrize("backend", ["xla", None], ids=str)
def test_under_jit_xla_says_so(call, backend):
    """It alone knows how arrays on axes that it manages are split."""
    split_up = meshes.put(meshes.mesh(), given_arrays(), {"key_cache": PartitionSpec("data")})
    with pytest.raises(
        jax.errors.JaxRuntimeError, match=r"ValueError: key_cache\.sharding\.spec=P"
    ):
        jax.jit(functools.partial(call, backend=backend))(split_up)


def test_exported_for_xla_to_split():
    """XLA splits its own program: but for the bounds of loops, nothing moves."""
    given, options = meshes.arrays(meshes.split_case())
    placed = meshes.specs(given, "HND", seqs="data", kv_heads="model")
    split_up = meshes.put(meshes.mesh(), given, placed)
    function = jax.jit(meshes.attend(None, options))
    exported = jax.export.export(function, platforms=["cpu", "cuda", "tpu"])(split_up)
    read = jax.export.deserialize(bytearray(exported.serialize()))
    results, program = meshes.run(read.call, split_up)
    assert all(moved <= 64 for _, moved in meshes.collectives(program))
    for ours, whole in zip(results, function(given)):
        np.testing.assert_allclose(ours, whole, rtol=1e-5, atol=1e-6)


@each_call
def test_xla_runs_what_kernels_cannot_be_split_for(call):
    """On TPUs under plain `jit`, when exporting, and beside axes that `shard_map` leaves to XLA."""
    given = given_arrays()
    specs = {name: PartitionSpec(None, "model") for name in ("key_cache", "value_cache")}
    split_up = meshes.put(meshes.mesh(), given, specs)
    function = jax.jit(call)
    assert function.trace(split_up).lower(lowering_platforms=("tpu",)).as_text()
    assert jax.export.export(function, platforms=["cpu", "cuda", "tpu"])(split_up).platforms

    local = jax.shard_map(
        call,
        mesh=meshes.mesh(),
        in_specs=(jax.tree.map(lambda _: PartitionSpec(), given),),
        out_specs=PartitionSpec(),
        axis_names={"data"},
    )
    found = jax.jit(local)(meshes.put(meshes.mesh(), given, {}))
    for ours, whole in zip(jax.tree.leaves(found), jax.tree.leaves(function(given))):
        np.testing.assert_allclose(ours, whole, rtol=1e-5, atol=1e-6)


def test_kernels_cannot_be_exported_for_plain_jit_to_split():
    given, options = meshes.arrays(meshes.split_case())
    split_up = meshes.put(meshes.mesh(), given, meshes.specs(given, "HND", kv_heads="model"))
    function = jax.jit(meshes.attend(TRITON, options))
    with pytest.raises(ejk.UnsupportedError, match="triton: cannot be exported for plain jit"):
        jax.export.export(function, platforms=["cpu"])(split_up)


@each_kind
@pytest.mark.parametrize("sinks", [False, True], ids=["", "sinks"])
@pytest.mark.parametrize("call", [decode, ragged], ids=["decode", "ragged"])
def test_what_static_facts_answer_is_split_as_a_call_is(call, sinks, kind):
    given, _ = meshes.arrays(meshes.split_case(features=("sinks",) if sinks else ()))
    seqs = "data" if call is decode else None
    given["block_tables"] = given["block_tables"][:, :0]
    mesh = meshes.mesh(kind)
    split_up = meshes.put(mesh, given, meshes.specs(given, "HND", seqs=seqs, kv_heads="model"))
    function = functools.partial(call, return_lse=True)
    with jax.set_mesh(mesh):
        out, lse = jax.jit(function)(split_up)
    assert not np.asarray(out).any()
    expected = given["sinks"][:1].repeat(8) if sinks else -np.inf
    np.testing.assert_array_equal(np.asarray(lse)[:, 0], expected)
    if kind == AxisType.Explicit:
        assert jax.typeof(out).sharding.spec == PartitionSpec(seqs, "model", None)
        assert jax.typeof(lse).sharding.spec == PartitionSpec(seqs, "model")
        assert jax.typeof(function(split_up)[0]).sharding.spec[1] == "model"


@each_kind
def test_fewer_kv_heads_than_devices_of_an_axis(kind):
    """JAX splits no axis of 4 over 8. With the pool on every device the queries are moved."""
    given, options = meshes.arrays(meshes.split_case())
    mesh = meshes.mesh(kind, model=8)
    with pytest.raises(ValueError, match="evenly divide"):
        meshes.put(mesh, given, meshes.specs(given, "HND", kv_heads="model"))
    split_up = meshes.put(mesh, given, {"query": PartitionSpec(None, "model")})
    function = meshes.attend(TRITON, options)
    if kind == AxisType.Explicit:
        with pytest.raises(ValueError, match=r"^query\.sharding\.spec=P\(None, 'model', None\)"):
            meshes.run(function, split_up)
        return
    (out, _), program = meshes.run(function, split_up)
    assert 0 < sum(moved for _, moved in meshes.collectives(program)) <= 2 * given["query"].nbytes
    np.testing.assert_allclose(out, function(given)[0], rtol=1e-6, atol=1e-6)


@each_kind
def test_a_mesh_that_does_not_divide_the_heads(kind):
    """Explicit axes are checked when a call is traced, those that XLA manages when it has split."""
    given = given_arrays(Shape("three", 6, 3, 128, page_size=16, num_seqs=8))
    placed = NamedSharding(meshes.mesh(kind), PartitionSpec(None, "data"))
    place, error, message = {
        AxisType.Explicit: (jax.sharding.reshard, ValueError, "evenly divi"),
        AxisType.Auto: (
            jax.lax.with_sharding_constraint,
            jax.errors.JaxRuntimeError,
            "num_kv_heads=3 must be a multiple of the 2 devices",
        ),
    }[kind]

    def function(given):
        pools = {name: place(given[name], placed) for name in ("key_cache", "value_cache")}
        return decode(given | pools)

    with pytest.raises(error, match=message):
        jax.jit(function)(meshes.put(placed.mesh, given, {}))


@each_call
@each_kind
def test_an_axis_of_one_device_splits_nothing(call, kind):
    """So that one program serves every size of a mesh."""
    given = given_arrays()
    mesh = meshes.mesh(kind, data=1, model=4)
    pools = PartitionSpec("data", "model")
    split_up = meshes.put(mesh, given, {"key_cache": pools, "value_cache": pools})
    for ours, whole in zip(jax.tree.leaves(call(split_up)), jax.tree.leaves(call(given))):
        np.testing.assert_allclose(ours, whole, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("call", [*CALLS.values(), copy], ids=[*CALLS, "copy"])
@each_kind
def test_pools_of_replicas_are_split_on_explicit_axes_alone(call, kind):
    """Elsewhere writes and copies raise, and XLA gathers for attention: see `docs/scaling.md`."""
    mesh = meshes.mesh(kind, replicas=8)
    given = given_arrays()
    of_replicas = {name: np.stack([given[name]] * 8) for name in ("key_cache", "value_cache")}
    rest = {name: x for name, x in given.items() if name not in of_replicas}
    over = dict.fromkeys(of_replicas, PartitionSpec("replicas"))
    arrays = meshes.put(mesh, of_replicas, over), meshes.put(mesh, rest, {})

    def each(arrays):
        pools, rest = arrays
        return jax.vmap(lambda pools: call(rest | pools, backend="xla"))(pools)

    is_explicit = kind == AxisType.Explicit
    if call in (write, copy) and not is_explicit:
        with pytest.raises(jax.errors.JaxRuntimeError, match="must split only its KV heads"):
            meshes.run(each, arrays)
        return
    results, program = meshes.run(each, arrays)
    gathered = [size for _, size in meshes.collectives(program)]
    pool = of_replicas["key_cache"].nbytes
    assert (max(gathered, default=0) >= pool) != is_explicit
    expected = call(given, backend="xla")
    for ours, one in zip(jax.tree.leaves(results), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(np.asarray(ours)[3], one, rtol=1e-5, atol=1e-6)
