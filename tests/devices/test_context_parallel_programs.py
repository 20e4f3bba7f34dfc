"""The programs of pages split over devices: what they move, gradients, features."""

import functools
import re

import context_parallel
import jax
import jax.numpy as jnp
import meshes
import numpy as np
import pytest
from context_parallel import (
    CONFIGURATIONS,
    DEVICES,
    EDGES,
    FEW,
    PALLAS,
    PLAIN,
    TRITON,
    XLA,
    each_entry,
    pool_specs,
    split,
    split_arguments,
)
from entries import counted
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import ejk
from ejk import _dispatch
from ejk.testing.bounds import assert_close
from ejk.testing.configurations import BF16, E4M3, E5M2, F32, INT4, INT8, INT32_MAX, Configuration
from ejk.testing.page_attention import build
from ejk.testing.shapes import Shape

pytestmark = pytest.mark.skipif(not meshes.MANY_DEVICES, reason="needs eight devices")

FLOATS = ("query", "key_cache", "value_cache", "attn_scale", "sinks", "alibi_slopes")


@each_entry(XLA, TRITON)
def test_one_small_collective(entry):
    """Its bytes follow from the rows alone, not from the tables; the pools stay where they are."""
    for blocks in (9, 90):
        case = EDGES.rows(range(4), more_blocks=blocks - 9)
        given, static = split_arguments(case)
        function = context_parallel.program(entry.backend, DEVICES, tuple(given), static)
        text = function.lower(given).compile().as_text()
        size = PLAIN.num_seqs * PLAIN.num_heads * (PLAIN.head_dim + 1) * 4
        assert meshes.collectives(text) == [("all-gather", DEVICES * size)]
        pool = given["key_cache"].shape
        assert not meshes.makers(text, (pool[0] // DEVICES, *pool[1:])), "read where it lies"


def layers(case, how):
    """Attend three times, each to a layer of its own in pools of three."""
    given, static = split_arguments(case)
    per_layer = PLAIN.num_pages // DEVICES

    def attend(given, layer):
        return ejk.page_attention(
            **given, **dict(static), axis_name="pages", page_offset=layer * per_layer, backend="xla"
        )

    def step(given):
        if how == "unrolled":
            return jnp.stack([attend(given, layer) for layer in range(3)])
        return jax.lax.scan(lambda c, x: (c, attend(given, x)), None, jnp.arange(3))[1]

    tables = case.block_tables
    device, place = tables // per_layer, tables % per_layer
    named = (tables >= 0) & (tables < PLAIN.num_pages)
    tables = np.where(named, device * 3 * per_layer + place, -1)
    stacked = given | {"block_tables": jnp.asarray(tables)}
    for name in ("key_cache", "value_cache"):
        shards = given[name].reshape(DEVICES, per_layer, *given[name].shape[1:])
        pool = jnp.concatenate([shards, shards * 2, shards * 3], axis=1)
        stacked[name] = pool.reshape(-1, *pool.shape[2:])
    function = jax.jit(split(step, given, case.cache_layout))
    return function, stacked


@pytest.mark.parametrize("how", ["unrolled", "in a scan"])
def test_a_stack_of_layers_compacts_its_table_once(how):
    """As in a table of each layer's own pages; `page_offset` is not seen by the compaction."""
    config = Configuration(PLAIN, context_parallel.F32, "HND")
    case = build(config, np.array([36, 1, 0, 23], np.int32), invalid=0.2)
    case = case.with_other_junk(seed=1, finite=True)
    function, given = layers(case, how)
    compiled = function.lower(given).compile()
    scatters = re.findall(r"^ *(?:ROOT )?%\S+ = s32\S* scatter\(", compiled.as_text(), re.MULTILINE)
    assert len(scatters) == 1
    for layer, out in enumerate(compiled(given)):
        scaled = case.replace(keys=case.keys * (layer + 1), values=case.values * (layer + 1))
        assert_close(scaled, np.asarray(out))


def test_offsets_leave_no_device():
    """A page that an offset moves past the pool is none; nor is one moved below it any."""
    case = build(FEW[0], np.array([36, 1, 12, 23], np.int32), window=INT32_MAX)
    case = case.with_other_junk(seed=1, finite=True)
    given, static = split_arguments(case)

    def attend(given):
        return ejk.page_attention(
            **{"value_cache": None, **given}, **dict(static), axis_name="pages", return_lse=True
        )

    names = (*given, "page_offset")
    function = jax.jit(split(attend, names, case.cache_layout))
    local = PLAIN.num_pages // DEVICES
    named = (case.block_tables >= 0) & (case.block_tables < PLAIN.num_pages)
    tables = case.block_tables.astype(np.int64)
    for offset in (0, 1, local - 1, local, INT32_MAX, -1, -INT32_MAX - 1):
        out, lse = function(given | {"page_offset": jnp.int32(offset)})
        held = named & (tables % local + offset < local) & (offset >= 0)
        moved = case.replace(block_tables=np.where(held, tables + offset, -1))
        assert_close(moved, np.asarray(out), np.asarray(lse))


@pytest.mark.parametrize(
    "entry, kind",
    [(XLA, AxisType.Auto), (TRITON, AxisType.Explicit)],
    ids=["xla, auto", "triton, explicit"],
)
@counted
def test_beside_sequences_and_heads(entry, kind):
    """Pages over one or two axes of a mesh, KV heads and sequences over the others."""
    case = build(
        Configuration(PLAIN, context_parallel.F32, "HND", frozenset({"sinks", "sliding_window"})),
        np.array([36, 1, 0, 23], np.int32), window=jnp.int32(21), invalid=0.1,
    )  # fmt: skip
    given, static = split_arguments(case)
    for axes, others in (("a", {"seqs": "b", "heads": "c"}), (("c", "a"), {"seqs": "b"})):
        pool = PartitionSpec(axes, others.get("heads"))
        row = PartitionSpec(others["seqs"])
        specs = {name: PartitionSpec() for name in given}
        specs |= {"query": PartitionSpec(others["seqs"], others.get("heads"))}
        specs |= {"sinks": PartitionSpec(others.get("heads")), "context_lens": row}
        specs |= {"block_tables": row, "key_cache": pool, "value_cache": pool}
        attend = functools.partial(
            ejk.page_attention, **dict(static), axis_name=axes, return_lse=True,
            backend=entry.backend,
        )  # fmt: skip
        mesh = meshes.mesh(kind, a=2, b=2, c=2)
        function = jax.shard_map(
            lambda given: attend(**given),  # noqa: B023
            mesh=mesh, in_specs=(specs,), out_specs=specs["query"],
        )  # fmt: skip
        (out, lse), text = meshes.run(function, meshes.put(mesh, given, specs))
        assert [name for name, _ in meshes.collectives(text)] == ["all-gather"]
        assert_close(case, np.asarray(out), np.asarray(lse))


@each_entry(XLA, TRITON)
def test_vmap(entry):
    """Queries, lengths and tables fold into more sequences, their windows with them."""
    given, static = split_arguments(EDGES)
    rows = ("query", "context_lens", "block_tables")

    def attend(given):
        def one(*mapped):
            return ejk.page_attention(
                **given | dict(zip(rows, mapped)), **dict(static), axis_name="pages",
                return_lse=True, backend=entry.backend,
            )  # fmt: skip

        two = (x.reshape(2, 2, *x.shape[1:]) for x in (given[name] for name in rows))
        return [x.reshape(4, *x.shape[2:]) for x in jax.vmap(one)(*two)]

    function = jax.jit(split(attend, given, EDGES.cache_layout))
    [(problem, _)] = _dispatch.calls(jax.make_jaxpr(function)(given).jaxpr)
    assert problem.num_seqs == 4
    out, lse = function(given)
    assert_close(EDGES, np.asarray(out), np.asarray(lse))


def weighted(function, weights):
    """A scalar of the results, and its gradient in the floats."""

    def loss(floats, given):
        out, lse = function(given | floats)
        return (out.astype(jnp.float32) * weights[0]).sum() + (
            jnp.where(lse > -jnp.inf, lse, 0.0) * weights[1]
        ).sum()

    return jax.jit(jax.grad(loss))


@pytest.mark.parametrize(
    "entry, config",
    [(XLA, CONFIGURATIONS[0]), (TRITON, CONFIGURATIONS[3])],
    ids=["xla, every option", "triton, latent"],
)
@counted
def test_gradients_are_those_of_one_device(entry, config):
    """In queries, pools, scale, sinks and slopes; exactly zero where nobody looks."""
    config = Configuration(
        config.shape, context_parallel.F32, config.cache_layout, config.features - {"num_splits"}
    )
    lens = np.array([0, 1, config.shape.capacity, 23][: config.shape.num_seqs], np.int32)
    case = build(config, lens, window=jnp.int32(21), seed=3, invalid=0.1)
    given, static = split_arguments(case)
    given.setdefault("attn_scale", jnp.float32(0.2))
    rows = (config.shape.num_seqs, config.shape.num_heads)
    rng = np.random.default_rng(0)
    weights = [rng.standard_normal((*rows, config.shape.width)), rng.standard_normal(rows)]
    weights = [jnp.asarray(x, jnp.float32) for x in weights]

    def whole(given):
        return ejk.page_attention(
            **{"value_cache": None, **given}, **dict(static), return_lse=True, backend="xla"
        )

    parallel = context_parallel.program(entry.backend, DEVICES, tuple(given), static)
    floats = {name: given.pop(name) for name in FLOATS if name in given}
    ours, theirs = (weighted(f, weights)(floats, given) for f in (parallel, whole))
    for name, expected in theirs.items():
        assert np.asarray(expected).any() and np.isfinite(expected).all(), name
        np.testing.assert_allclose(ours[name], expected, rtol=2e-4, atol=2e-5, err_msg=name)
        if name.endswith("cache"):
            np.testing.assert_array_equal(ours[name] == 0, expected == 0)


def test_gradients_of_16_bits():
    """The parts are float32, and so is what comes back for them."""
    case = build(
        Configuration(PLAIN, context_parallel.BF16, "HND", frozenset({"sinks"})),
        np.array([36, 1, 0, 23], np.int32), seed=3,
    )  # fmt: skip
    given, static = split_arguments(case)
    weights = [jnp.ones((4, 8, 32)), jnp.zeros((4, 8))]
    floats = {name: given.pop(name) for name in FLOATS if name in given}
    names = (*floats, *given)
    ours = weighted(context_parallel.program(XLA.backend, DEVICES, names, static), weights)

    def whole(given):
        return ejk.page_attention(**given, **dict(static), return_lse=True, backend="xla")

    theirs = weighted(whole, weights)(floats, given)
    for name, found in ours(floats, given).items():
        expected = np.asarray(theirs[name], np.float32)
        assert found.dtype == floats[name].dtype
        tolerance = 0.02 * np.abs(expected).max()
        np.testing.assert_allclose(np.asarray(found, np.float32), expected, atol=tolerance)


def test_what_is_answered_without_a_backend():
    """No sequences, no blocks, no pages: zeros, and the sinks."""
    for changes in ({"num_seqs": 0}, {"max_blocks": 0}, {"num_pages": 0}):
        sizes = {"num_seqs": 2, "max_blocks": 3, "num_pages": 4} | changes
        pool = jnp.zeros((sizes["num_pages"], 2, 4, 8))
        given = {
            "query": jnp.ones((sizes["num_seqs"], 4, 8)),
            "key_cache": pool,
            "value_cache": pool,
            "context_lens": jnp.full(sizes["num_seqs"], 5),
            "block_tables": jnp.zeros((sizes["num_seqs"], sizes["max_blocks"]), jnp.int32),
            "sinks": jnp.arange(4.0),
        }
        function = context_parallel.program(None, 2, tuple(given), (("cache_layout", "HND"),))
        out, lse = function(given)
        assert out.shape == given["query"].shape and not out.any()
        np.testing.assert_array_equal(lse, np.broadcast_to(np.arange(4.0), lse.shape))


def test_a_tpu_takes_the_xla_program_where_there_are_slopes():
    """Pallas refuses by name; without slopes it is the one that is chosen."""
    for config, chosen in ((CONFIGURATIONS[0], "xla"), (FEW[0], "pallas")):
        case = build(config, np.array([36, 1, 0, 23], np.int32), window=jnp.int32(9))
        given, static = split_arguments(case)
        function = context_parallel.program(None, DEVICES, tuple(given), static)
        [(problem, choice)] = _dispatch.calls(jax.make_jaxpr(function)(given).jaxpr)
        assert choice.select(problem, "tpu").name == chosen
    with pytest.raises(ejk.UnsupportedError, match="axis_name with alibi_slopes"):
        given, static = split_arguments(EDGES)
        context_parallel.program(PALLAS.backend, DEVICES, tuple(given), static)(given)


@pytest.mark.parametrize("generation", ["v5e:2x2", "tpu7x:2x2x1"])
def test_compiles_for_tpus(generation):
    """The kernel on each, and between them one small gather."""
    pytest.importorskip("libtpu")
    topologies = pytest.importorskip("jax.experimental.topologies")
    devices = np.array(topologies.get_topology_desc(generation, "tpu").devices)
    mesh = jax.sharding.Mesh(devices, ("pages",))
    shape = Shape("tpu", 32, 8, 128, 16, max_blocks=64, num_pages=64, num_seqs=5)
    features = frozenset({"sinks", "sliding_window"})
    config = Configuration(shape, context_parallel.BF16, "HND", features)
    given, static = split_arguments(build(config, np.full(5, 1, np.int32), window=jnp.int32(9)))
    specs = pool_specs(given, "HND")
    types = {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, specs[name]))
        for name, x in given.items()
    }
    pool = (2**16, *given["key_cache"].shape[1:])  # too large to be put next to the cores
    types |= {name: types[name].update(shape=pool) for name in ("key_cache", "value_cache")}

    def attend(given):
        return ejk.page_attention(**given, **dict(static), axis_name="pages")

    function = jax.shard_map(attend, mesh=mesh, in_specs=(specs,), out_specs=PartitionSpec())
    text = jax.jit(function).lower(types).compile().as_text()
    assert "tpu_custom_call" in text
    moved = meshes.collectives(text)
    assert [name for name, _ in moved] == ["all-gather"], moved
    assert not meshes.makers(text, (pool[0] // len(devices), *pool[1:])), "read where it lies"


CACHES = (
    Configuration(PLAIN, F32, "HND", cache_dtype=BF16),
    *(
        Configuration(PLAIN, F32, "HND", cache_dtype=of, scales="token")
        for of in (INT8, INT4, E4M3, E5M2)
    ),
)


def test_features_are_known_by_name():
    """All that a call may use: what a backend declares is checked against these names."""
    used = set()
    for config in CONFIGURATIONS + CACHES:
        case = build(config, np.full(config.shape.num_seqs, 5, np.int32), window=jnp.int32(9))
        given, static = split_arguments(case)
        function = context_parallel.program(None, DEVICES, tuple(given), static)
        [(problem, _)] = _dispatch.calls(jax.make_jaxpr(function)(given).jaxpr)
        used |= problem.features
    # Sinks are merged by the public function, a plan is refused, and `program` splits all scales.
    unused = {"sinks", "axis_name with plan", "key_scale, value_scale"}
    assert used == ejk.PageAttentionProblem.feature_names - unused
