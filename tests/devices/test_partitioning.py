"""Plain `jax.jit` over arrays that are split: every device runs the kernel on its own shard."""

import contextlib
import itertools

import jax
import jax.numpy as jnp
import meshes
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import ejk
from ejk.testing.bounds import assert_close
from ejk.testing.configurations import LAYOUTS
from ejk.testing.shapes import Shape

pytestmark = pytest.mark.skipif(not meshes.MANY_DEVICES, reason="needs eight devices")

TRITON = ejk.TritonPageAttention(interpret=True, num_sms=6)
XLA = ejk.XlaPageAttention()
each_kernel = pytest.mark.parametrize("backend", [XLA, TRITON], ids=["xla", "triton"])
SPLITS = {
    "sequences": dict(seqs="data"),
    "KV heads": dict(kv_heads="model"),
    "both": dict(seqs="data", kv_heads="model"),
    "sequences, over all": dict(seqs=("data", "model")),
}
INTERLEAVED = ("INTERLEAVED", False)
POOLS = [*itertools.product(LAYOUTS, (False, True)), INTERLEAVED]
each_split = pytest.mark.parametrize("split", SPLITS.values(), ids=SPLITS)
each_kind = pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)


def check(case, backend, split, mesh=None):
    """A split call moves nothing, and gives the bits of the call on one device."""
    mesh = mesh or meshes.mesh()
    given, options = meshes.arrays(case)
    function = meshes.attend(backend, options)
    placed = meshes.specs(given, case.cache_layout, **split)
    split_up = meshes.put(mesh, given, placed)
    (out, lse), program = meshes.run(function, split_up)
    assert not meshes.collectives(program)
    [local] = {x.data.shape for x in split_up["key_cache"].addressable_shards}
    assert not meshes.makers(program, local), "the pool is read where it lies"
    heads = split.get("heads", split.get("kv_heads"))
    wanted = NamedSharding(mesh, PartitionSpec(split.get("seqs"), heads))
    assert out.sharding.is_equivalent_to(wanted, 3) and lse.sharding.is_equivalent_to(wanted, 2)
    assert_close(case, *map(np.asarray, (out, lse)))
    if backend is TRITON and case.num_splits:
        for ours, whole in zip((out, lse), function(jax.tree.map(jnp.asarray, given))):
            np.testing.assert_array_equal(ours, whole)


@pytest.mark.one_in(2)
@each_kernel
@each_split
@each_kind
@pytest.mark.parametrize("num_splits", [0, 2])
def test_shards_run_where_they_are(backend, split, kind, num_splits):
    check(meshes.split_case(num_splits=num_splits), backend, split, meshes.mesh(kind))


@pytest.mark.one_in(2)
@each_kernel
@pytest.mark.parametrize("layout, fused", POOLS)
def test_layouts(backend, layout, fused):
    features = ("sliding_window", "attn_logits_soft_cap", "sinks", "attn_scale")
    case = meshes.split_case(
        layout=layout, fused=fused, features=features, window=17, num_splits=3, invalid=0.2
    )
    check(case, backend, SPLITS["both"])


@pytest.mark.parametrize("layout, fused", [("HND", False), ("HND", True), INTERLEAVED])
@pytest.mark.parametrize("scales", ["head", "token"])
@each_kind
def test_scales_go_with_their_heads(kind, scales, layout, fused):
    """On XLA: kernels that take them are split as they are, by the same axes."""
    pools = {"layout": layout, "fused": fused}
    case = meshes.split_case(cache_dtype=np.dtype(np.int8), scales=scales, **pools)
    check(case, XLA, SPLITS["both"], meshes.mesh(kind))


@each_kernel
def test_latent_attention_splits_its_query_heads(backend):
    """One KV head is on every device; each has its share of the heads that read it."""
    shape = Shape("latent", 8, 1, 24, 3, 6, 20, 8, value_head_dim=16, latent=True)
    lens = np.array([0, 1, 15, 16, 17, 9, 18, 3], np.int32)
    case = meshes.split_case(shape, lens, features=(), num_splits=2)
    check(case, backend, dict(seqs="data", heads="model"))


@each_kernel
def test_fewer_kv_heads_than_devices(backend):
    """The devices of a second mesh axis share a KV head and split the query heads of its group."""
    mesh = meshes.mesh(kv=4, share=2)
    split = dict(kv_heads="kv", heads=("kv", "share"))
    check(meshes.split_case(num_splits=2), backend, split, mesh)


@pytest.mark.parametrize("features", [(), ("sliding_window",)], ids=["", "window"])
@each_split
def test_a_plan_for_the_whole_batch_is_left_out(split, features):
    """It is for all sequences and all heads: every shard deals out its own work."""
    case = meshes.split_case(features=features, window=17)
    given, options = meshes.arrays(case)
    mesh = meshes.mesh()

    def function(given):
        plan = ejk.plan_page_attention(
            given["context_lens"], num_heads=16, num_kv_heads=4, head_dim=32, page_size=16,
            max_blocks=3, sliding_window=options.get("sliding_window"), backend=TRITON,
        )  # fmt: skip
        return meshes.attend(TRITON, options | {"plan": plan})(given)

    placed = meshes.specs(given, case.cache_layout, **split)
    results, program = meshes.run(function, meshes.put(mesh, given, placed))
    assert not meshes.collectives(program)
    assert_close(case, *map(np.asarray, results))


@each_kind
def test_eager_calls_are_split_too(kind):
    case = meshes.split_case(num_splits=1)
    given, options = meshes.arrays(case)
    placed = meshes.specs(given, case.cache_layout, **SPLITS["both"])
    function = meshes.attend(TRITON, options)
    out, _ = function(meshes.put(meshes.mesh(kind), given, placed))
    assert out.sharding.spec[:2] == ("data", "model")
    np.testing.assert_array_equal(out, function(given)[0])


@each_kind
def test_inside_a_mesh_and_a_loop(kind):
    case = meshes.split_case(num_splits=1)
    given, options = meshes.arrays(case)
    mesh = meshes.mesh(kind)

    def function(given):
        def layer(query, _):
            out, _ = meshes.attend(TRITON, options)(given | {"query": query})
            return out, None

        return jax.lax.scan(layer, given["query"], None, length=2)[0]

    placed = meshes.specs(given, case.cache_layout, **SPLITS["both"])
    with jax.set_mesh(mesh):
        out, program = meshes.run(function, meshes.put(mesh, given, placed))
    assert not meshes.collectives(program)
    np.testing.assert_array_equal(out, function(jax.tree.map(jnp.asarray, given)))


def test_small_arrays_follow_the_pools():
    """Queries that are split otherwise are moved; the pools never are."""
    case = meshes.split_case(num_splits=1)
    given, options = meshes.arrays(case)
    placed = meshes.specs(given, case.cache_layout, kv_heads="model")
    placed |= {"query": PartitionSpec("model"), "sinks": PartitionSpec()}
    results, program = meshes.run(
        meshes.attend(TRITON, options), meshes.put(meshes.mesh(), given, placed)
    )
    assert meshes.collectives(program)
    assert sum(moved for _, moved in meshes.collectives(program)) <= 2 * given["query"].nbytes
    assert_close(case, *map(np.asarray, results))


@each_kind
@pytest.mark.parametrize("what", ["sequences", "KV heads"])
def test_gradients_gather_no_pool(what, kind):
    case = meshes.split_case(features=("sinks",)).with_other_junk(seed=1, finite=True)
    given, options = meshes.arrays(case)
    mesh = meshes.mesh(kind)
    floats = ("query", "key_cache", "value_cache", "sinks")
    weights = np.random.default_rng(0).standard_normal((8, 16, 32)).astype(np.float32)

    def gradients(given):
        def loss(*values):
            out, lse = meshes.attend(XLA, options)(given | dict(zip(floats, values)))
            return (out * weights).sum() + jnp.where(lse > -jnp.inf, lse, 0.0).sum()

        return jax.grad(loss, (0, 1, 2, 3))(*(given[name] for name in floats))

    placed = meshes.specs(given, case.cache_layout, **SPLITS[what])
    results, program = meshes.run(gradients, meshes.put(mesh, given, placed))
    moved = meshes.collectives(program)
    if what == "KV heads":
        assert not moved
    else:  # of a pool that every device has, the gradients are summed
        assert "all-gather" not in [name for name, _ in moved]
        assert sum(size for _, size in moved) < 2 * given["key_cache"].nbytes + 2**10
    for ours, whole in zip(results, gradients(jax.tree.map(jnp.asarray, given))):
        np.testing.assert_allclose(ours, whole, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("name", ["key_cache", "value_cache"])
@pytest.mark.parametrize("axis", [0, 2, 3])
def test_other_axes_of_a_pool_are_refused(name, axis):
    """Rather than gathered: with explicit axes when traced, or else when compiled."""
    case = meshes.split_case(shape=Shape("even", 16, 4, 32, 16, num_seqs=8, num_pages=32))
    given, options = meshes.arrays(case)
    spec = PartitionSpec(*[None] * axis, "data")
    message = rf"{name}\.sharding\.spec=.*'data'.* must split only its KV heads, axis 1, or"
    for kind, error in (
        (AxisType.Explicit, ValueError),
        (AxisType.Auto, jax.errors.JaxRuntimeError),
    ):
        split_up = meshes.put(meshes.mesh(kind), given, {name: spec})
        for backend in (XLA, TRITON):
            with pytest.raises(error, match=message):
                meshes.run(meshes.attend(backend, options), split_up)


def test_pools_have_to_be_split_alike():
    given, options = meshes.arrays(meshes.split_case())
    split_up = meshes.put(
        meshes.mesh(AxisType.Explicit), given, {"key_cache": PartitionSpec(None, "model")}
    )
    with pytest.raises(
        ValueError, match=r"^value_cache\.sharding\.spec=.* must split its KV heads as key_cache"
    ):
        meshes.run(meshes.attend(XLA, options), split_up)


@each_kind
@pytest.mark.parametrize("name", ["key_cache", "value_cache"])
def test_a_pool_alone_may_be_traced(name, kind):
    """Nobody knows where a tracer lies: not what is differentiated, nor what `jit` is handed."""
    mesh = meshes.mesh(kind)
    given, options = meshes.arrays(meshes.split_case(features=()))
    split_up = meshes.put(mesh, given, meshes.specs(given, "HND", kv_heads="model"))
    within = jax.set_mesh(mesh) if kind == AxisType.Explicit else contextlib.nullcontext()

    def weighed(pool, given):
        out, _ = meshes.attend(XLA, options)(given | {name: pool})
        return out.sum()

    expected = jax.value_and_grad(weighed)(given[name], given)
    with within:
        found = jax.value_and_grad(weighed)(split_up[name], split_up)
        closed_over = jax.jit(lambda pool: weighed(pool, split_up))(split_up[name])
    for ours, whole in zip((*found, closed_over), (*expected, expected[0])):
        np.testing.assert_allclose(ours, whole, rtol=1e-4, atol=1e-5)


def test_a_mesh_that_does_not_divide_the_heads():
    shape = Shape("three", 6, 3, 128, page_size=16, num_seqs=8)
    given, options = meshes.arrays(meshes.split_case(shape))
    placed = meshes.specs(given, "HND", kv_heads="data")
    with pytest.raises(ValueError, match="evenly divide"):
        meshes.put(meshes.mesh(), given, placed)

    def constrained(given):
        held = {
            name: jax.lax.with_sharding_constraint(x, NamedSharding(meshes.mesh(), placed[name]))
            for name, x in given.items()
        }
        return meshes.attend(XLA, options)(held)

    everywhere = meshes.put(meshes.mesh(), given, {})
    with pytest.raises((ValueError, jax.errors.JaxRuntimeError), match=r"divi|multiple of"):
        meshes.run(constrained, everywhere)


def test_explicit_axes_are_never_gathered_unasked():
    given, options = meshes.arrays(meshes.split_case())
    split_up = meshes.put(
        meshes.mesh(AxisType.Explicit), given, {"query": PartitionSpec(None, "model")}
    )
    with pytest.raises(
        ValueError, match=r"^query\.sharding\.spec=P\(None, 'model', None\) must be"
    ):
        meshes.run(meshes.attend(XLA, options), split_up)


@each_kernel
def test_shard_map_over_some_axes(backend):
    """What it leaves to XLA no kernel is split over: automatic choice takes the XLA program."""
    case = meshes.split_case()
    given, options = meshes.arrays(case)
    mesh = meshes.mesh()
    placed = meshes.specs(given, "HND", **SPLITS["both"])
    rows = meshes.specs(given, "HND", seqs="data")

    def function(given):
        attend = meshes.attend(backend, options)
        return jax.shard_map(
            attend, mesh=mesh, in_specs=(rows,), out_specs=PartitionSpec("data"),
            axis_names={"data"},
        )(given)  # fmt: skip

    refused = pytest.raises(
        ejk.UnsupportedError, match="the mesh axes model, which shard_map leaves"
    )
    with refused if backend is TRITON else contextlib.nullcontext():
        results, program = meshes.run(function, meshes.put(mesh, given, placed))
        assert not meshes.collectives(program)
        assert_close(case, *map(np.asarray, results))


def test_vmap_of_a_split_batch():
    """With explicit axes each device folds the rows that it has."""
    case = meshes.split_case(num_splits=1)
    given, options = meshes.arrays(case)
    mesh = meshes.mesh(AxisType.Explicit)
    placed = meshes.specs(given, case.cache_layout, **SPLITS["both"])
    split_up = meshes.put(mesh, given, placed)

    def function(given):
        def scaled(factor):
            return meshes.attend(TRITON, options)(given | {"query": given["query"] * factor})[0]

        return jax.vmap(scaled)(jnp.ones(2))

    out, program = meshes.run(function, split_up)
    assert not meshes.collectives(program)
    once, _ = meshes.attend(TRITON, options)(jax.tree.map(jnp.asarray, given))
    np.testing.assert_array_equal(out, jnp.stack([once, once]))


def test_explicit_axes_can_be_exported():
    given, options = meshes.arrays(meshes.split_case())
    placed = meshes.specs(given, "HND", **SPLITS["both"])
    split_up = meshes.put(meshes.mesh(AxisType.Explicit), given, placed)
    function = jax.jit(meshes.attend(XLA, options))
    exported = jax.export.export(function, platforms=["cpu", "cuda", "tpu"])(split_up)
    read = jax.export.deserialize(bytearray(exported.serialize()))
    for ours, whole in zip(jax.jit(read.call)(split_up), function(given)):
        np.testing.assert_allclose(ours, whole, rtol=1e-5, atol=1e-6)


def on_tpus(kind):
    mesh = meshes.tpus(kind)
    given, options = meshes.arrays(meshes.split_case(Shape("tpu", 16, 4, 128, 16, num_seqs=8)))
    return meshes.types(mesh, given, meshes.specs(given, "HND", **SPLITS["both"])), options


def test_explicit_axes_on_tpus():
    types, options = on_tpus(AxisType.Explicit)
    options |= {"num_splits": 1}
    program = jax.jit(meshes.attend("pallas", options)).lower(types).compile().as_text()
    assert "tpu_custom_call" in program and not meshes.collectives(program)


def test_tpus_do_not_ask_for_shards():
    """The XLA program is split instead: libtpu knows no custom partitioning."""
    types, options = on_tpus(AxisType.Auto)
    with pytest.raises(ejk.UnsupportedError, match="pallas: cannot be split by plain jit"):
        jax.jit(meshes.attend("pallas", options)).lower(types)
    program = jax.jit(meshes.attend(None, options)).lower(types).compile().as_text()
    assert all(moved <= 64 for _, moved in meshes.collectives(program)), "but for loop bounds"


@each_kind
def test_a_mesh_axis_of_one_device_splits_nothing(kind):
    """Whether an array names it or not."""
    mesh = meshes.mesh(kind, one=1, model=4)
    given, options = meshes.arrays(meshes.split_case())
    heads = meshes.specs(given, "HND", kv_heads="model")
    for name, spec in (
        ("value_cache", PartitionSpec(None, ("one", "model"))),
        ("query", PartitionSpec(None, ("one", "model"))),
        ("key_cache", PartitionSpec("one", "model")),
    ):
        split_up = meshes.put(mesh, given, heads | {name: spec})
        (out, lse), _ = meshes.run(meshes.attend(XLA, options), split_up)
        assert_close(meshes.split_case(), *map(np.asarray, (out, lse)))
