"""Packed batches over caches that are split: every device runs its own heads, and moves nothing."""

import itertools

import jax
import jax.numpy as jnp
import meshes
import numpy as np
import pytest
from entries import RAGGED_PALLAS, RAGGED_TRITON
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import ejk
from ejk.testing.bounds import assert_close
from ejk.testing.configurations import LAYOUTS, Configuration
from ejk.testing.ragged_page_attention import build_ragged
from ejk.testing.shapes import Shape

pytestmark = pytest.mark.skipif(not meshes.MANY_DEVICES, reason="needs eight devices")

XLA = ejk.XlaRaggedPageAttention(block_q=4, block_kv=16)
LENGTHS = np.array([20, 7, 33, 0, 48, 16, 1, 5], np.int32)
BOUNDS = np.array([0, 1, 8, 9, 9, 12, 12, 13, 14], np.int32)  # of 16 rows: two are no sequence's
each_kernel = pytest.mark.parametrize("backend", [XLA, RAGGED_TRITON], ids=["xla", "triton"])
each_kind = pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)


def ragged_case(features=("sinks", "alibi_slopes"), extras=(), layout="HND", fused=False,
                shape=meshes.SPLIT, lengths=LENGTHS, bounds=BOUNDS, total=16):  # fmt: skip
    config = Configuration(shape, np.dtype(np.float32), layout, frozenset(features), 0, fused)
    return build_ragged(
        config, np.array(lengths, np.int32), np.array(bounds, np.int32), total=total,
        extras=frozenset(extras), window=9, invalid=0.1,
    )  # fmt: skip


def arrays(case):
    """The arrays of a call by name, and what else it is given."""
    names = ("query", "key_cache", "value_cache", "context_lens", "block_tables", "cu_q_lens")
    named = dict(zip(names, case.operands())) | case.semantics()
    options = {name: x for name, x in named.items() if not isinstance(x, np.ndarray)}
    given = {name: jnp.asarray(x) for name, x in named.items() if name not in options}
    options.pop("value_cache", None)
    return given, options


def attend(backend, options):
    def function(given):
        return ejk.ragged_page_attention(
            **{"value_cache": None, **given}, **options, return_lse=True, backend=backend
        )

    return function


def check(case, backend, kind=AxisType.Auto, mesh=None, **split):
    """A split call moves nothing, and gives the bits of the call on one device."""
    mesh = mesh or meshes.mesh(kind)
    given, options = arrays(case)
    function = attend(backend, options)
    split_up = meshes.put(mesh, given, meshes.specs(given, case.cache_layout, **split))
    (out, lse), program = meshes.run(function, split_up)
    assert not meshes.collectives(program)
    [local] = {x.data.shape for x in split_up["key_cache"].addressable_shards}
    assert not meshes.makers(program, local), "the pool is read where it lies"
    wanted = NamedSharding(mesh, PartitionSpec(None, split.get("heads", split.get("kv_heads"))))
    assert out.sharding.is_equivalent_to(wanted, 3) and lse.sharding.is_equivalent_to(wanted, 2)
    assert_close(case, *map(np.asarray, (out, lse)))
    if backend is RAGGED_TRITON:
        for ours, whole in zip((out, lse), function(given)):
            np.testing.assert_array_equal(ours, whole)


@each_kernel
@each_kind
@pytest.mark.parametrize(
    "extras", [(), ("positions", "tree_mask")], ids=["", "positions, tree_mask"]
)
def test_heads_run_where_they_are(backend, kind, extras):
    check(ragged_case(extras=extras), backend, kind, kv_heads="model")


@pytest.mark.one_in(2)
@each_kernel
@pytest.mark.parametrize(
    "layout, fused", [*itertools.product(LAYOUTS, (False, True)), ("INTERLEAVED", False)]
)
def test_layouts(backend, layout, fused):
    features = ("sliding_window", "attn_logits_soft_cap", "sinks", "attn_scale")
    check(ragged_case(features, layout=layout, fused=fused), backend, kv_heads="model")


@each_kernel
def test_latent_attention_splits_its_query_heads(backend):
    shape = Shape("latent", 8, 1, 24, 3, 20, 20, 8, value_head_dim=16, latent=True)
    check(ragged_case((), shape=shape), backend, heads="model")


@each_kernel
def test_fewer_kv_heads_than_devices(backend):
    mesh = meshes.mesh(kv=4, share=2)
    check(ragged_case(), backend, mesh=mesh, kv_heads="kv", heads=("kv", "share"))


@each_kind
def test_packed_tokens_stay_whole(kind):
    """No axis of theirs divides sequences. They are moved, or refused: the pools stay."""
    case = ragged_case()
    given, options = arrays(case)
    placed = meshes.specs(given, "HND", kv_heads="model") | {"query": PartitionSpec("data")}
    split_up = meshes.put(meshes.mesh(kind), given, placed)
    if kind == AxisType.Explicit:
        with pytest.raises(
            ValueError, match=r"^query\.sharding\.spec=P\('data', None, None\) must"
        ):
            meshes.run(attend(XLA, options), split_up)
        return
    results, program = meshes.run(attend(RAGGED_TRITON, options), split_up)
    assert 0 < sum(moved for _, moved in meshes.collectives(program)) <= 2 * given["query"].nbytes
    assert_close(case, *map(np.asarray, results))


@pytest.mark.parametrize("axis", [0, 2, 3])
def test_other_axes_of_a_pool_are_refused(axis):
    shape = Shape("even", 16, 4, 32, 16, num_seqs=8, num_pages=32)
    given, options = arrays(ragged_case(shape=shape))
    placed = {"key_cache": PartitionSpec(*[None] * axis, "data")}
    split_up = meshes.put(meshes.mesh(AxisType.Explicit), given, placed)
    with pytest.raises(ValueError, match=r"^key_cache\.shard.* only its KV heads, axis 1"):
        meshes.run(attend(XLA, options), split_up)


@each_kind
def test_gradients_gather_no_pool(kind):
    case = ragged_case(("sinks",)).with_other_junk(seed=1, finite=True)
    given, options = arrays(case)
    floats = ("query", "key_cache", "value_cache", "sinks")
    weights = np.random.default_rng(0).standard_normal((16, 16, 32)).astype(np.float32)

    def gradients(given):
        def loss(*values):
            out, lse = attend(XLA, options)(given | dict(zip(floats, values)))
            return (out * weights).sum() + jnp.where(lse > -jnp.inf, lse, 0.0).sum()

        return jax.grad(loss, (0, 1, 2, 3))(*(given[name] for name in floats))

    placed = meshes.specs(given, case.cache_layout, kv_heads="model")
    results, program = meshes.run(gradients, meshes.put(meshes.mesh(kind), given, placed))
    assert not meshes.collectives(program)
    for ours, whole in zip(results, gradients(given)):
        np.testing.assert_allclose(ours, whole, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize(
    "backend", [XLA, RAGGED_TRITON, RAGGED_PALLAS], ids=["xla", "triton", "pallas"]
)
def test_heads_inside_shard_map(backend):
    small = Shape("small", 4, 2, 32, page_size=16, num_seqs=2)
    case = ragged_case(shape=small, lengths=[20, 5], bounds=[0, 1, 4], total=4)
    given, options = arrays(case)
    function, inputs = attend(backend, options), meshes.specs(given, "HND", kv_heads="x")
    split = jax.jit(
        jax.shard_map(
            function, mesh=meshes.mesh(x=2), in_specs=(inputs,), out_specs=PartitionSpec(None, "x")
        )
    )
    results, program = meshes.run(split, given)
    assert not meshes.collectives(program)
    assert_close(case, *map(np.asarray, results))


def test_batches_inside_shard_map():
    """How sequences are split: each device packs its own, with bounds of its own."""
    given, options = arrays(ragged_case())
    function = attend(RAGGED_TRITON, options)
    half = {"query": 8, "context_lens": 4, "block_tables": 4}
    bounds = [BOUNDS[:5].clip(max=8), BOUNDS[4:] - BOUNDS[4]]

    def of_device(i):
        own = {name: given[name][i * size :][:size] for name, size in half.items()}
        return given | own | {"cu_q_lens": jnp.asarray(bounds[i])}

    inputs = {name: PartitionSpec(*["x"] * (name in (*half, "cu_q_lens"))) for name in given}
    split = jax.shard_map(
        function, mesh=meshes.mesh(x=2), in_specs=(inputs,), out_specs=PartitionSpec("x")
    )
    results, program = meshes.run(split, given | {"cu_q_lens": jnp.concatenate(bounds)})
    assert not meshes.collectives(program)
    for ours, *alone in zip(results, function(of_device(0)), function(of_device(1))):
        np.testing.assert_array_equal(ours, jnp.concatenate(alone))


def test_explicit_axes_on_tpus():
    given, options = arrays(ragged_case((), shape=Shape("tpu", 16, 4, 128, 16, num_seqs=8)))
    mesh = meshes.tpus(AxisType.Explicit)
    types = meshes.types(mesh, given, meshes.specs(given, "HND", kv_heads="model"))
    program = jax.jit(attend("pallas", options)).lower(types).compile().as_text()
    assert "tpu_custom_call" in program and not meshes.collectives(program)
