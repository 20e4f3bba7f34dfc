"""`ejk.ragged_page_attention(axis_name=...)`: ragged batches on pages split over devices."""

import dataclasses
import functools

import context_parallel
import jax
import jax.numpy as jnp
import meshes
import numpy as np
import pytest
from context_parallel import (
    CONFIGURATIONS,
    DEVICES,
    FEW,
    PER_TOKEN,
    PLAIN,
    RAGGED,
    split,
    split_arguments,
)
from entries import counted, each_case
from test_context_parallel_programs import FLOATS, weighted

import ejk
from ejk.testing.bits import bits_equal
from ejk.testing.bounds import assert_close
from ejk.testing.configurations import INT32_MAX, Configuration
from ejk.testing.ragged_page_attention import TOTAL, build_ragged, ragged_cases

pytestmark = pytest.mark.skipif(not meshes.MANY_DEVICES, reason="needs eight devices")

each_entry = pytest.mark.parametrize("entry", RAGGED, ids=lambda entry: entry.name)
BOUNDS = np.array([0, 1, 6, 6, 12], np.int32)  # a decode, two prefills, one with nothing new
LENGTHS = np.array([30, 36, 5, 6], np.int32)
BIDIRECTIONAL = dataclasses.replace(
    CONFIGURATIONS[0], features=CONFIGURATIONS[0].features | {"causal=False"}
)


@each_case(functools.partial(ragged_cases, CONFIGURATIONS + PER_TOKEN), entries=RAGGED)
def test_agrees_with_the_oracle(entry, case):
    assert_close(case, *entry(case))


@each_case(
    functools.partial(ragged_cases, [BIDIRECTIONAL]),
    share=0.5,
    entries=RAGGED,
)
def test_without_a_causal_mask_agrees_with_the_oracle(entry, case):
    assert_close(case, *entry(case))


@each_case(functools.partial(ragged_cases, FEW), share=0.3, entries=RAGGED)
def test_unread_memory_changes_no_bit(entry, case):
    bits_equal(entry(case), entry(case.with_other_junk(seed=1)))


@each_case(functools.partial(ragged_cases, FEW), share=0.3, entries=RAGGED)
def test_any_device_may_hold_any_page(entry, case):
    moved = case.permuted(seed=1)
    assert_close(moved, *entry(moved))


@pytest.mark.one_in(2)
@each_entry
@counted
@pytest.mark.parametrize("window", [1, 4, 5, 12, 35, 36, INT32_MAX])
def test_windows_that_cross_devices(entry, window):
    """Each new token's window counts positions, on all devices."""
    case = build_ragged(
        CONFIGURATIONS[0], LENGTHS, BOUNDS, window=jnp.int32(window), invalid=0.1, seed=window % 97
    )
    assert_close(case, *entry(case))


@each_entry
@counted
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "not causal"])
def test_hostile_lengths_and_bounds(entry, causal):
    """More new tokens than tokens, falling bounds, lengths and ids that nothing has."""
    for lens, bounds in (
        ([3, 0, -1, INT32_MAX], [0, 6, 7, 9, TOTAL]),
        ([36, 37, 1, -INT32_MAX - 1], [-1, 4, 2, INT32_MAX, 5]),
    ):
        bounds = np.array(bounds, np.int32)
        case = build_ragged(
            CONFIGURATIONS[0], np.array(lens, np.int32), bounds, window=jnp.int32(5), invalid=0.3,
            causal=causal,
        )  # fmt: skip
        assert_close(case, *entry(case))
        out, lse = entry(case.replace(options=case.options | {"sliding_window": jnp.int32(0)}))
        assert not out.any()
        sinks = np.broadcast_to(case.options["sinks"], lse.shape)
        np.testing.assert_array_equal(lse, np.where(case.outside[:, None], -np.inf, sinks))


def test_one_small_collective():
    """Its bytes follow from the rows alone."""
    for seed in range(2):
        case = build_ragged(CONFIGURATIONS[0], LENGTHS, BOUNDS, window=jnp.int32(9), seed=seed)
        given, static = split_arguments(case)
        if seed:
            given["block_tables"] = jnp.pad(given["block_tables"], ((0, 0), (0, 81)))
        function = context_parallel.program(RAGGED[0].backend, DEVICES, tuple(given), static)
        text = function.lower(given).compile().as_text()
        assert meshes.collectives(text) == [("all-gather", DEVICES * TOTAL * 8 * 33 * 4)]


def test_gradients_are_those_of_one_device():
    case = build_ragged(CONFIGURATIONS[0], LENGTHS, BOUNDS, window=jnp.int32(21), seed=3)
    case = case.with_other_junk(seed=1, finite=True)
    given, static = split_arguments(case)
    rng = np.random.default_rng(0)
    weights = [rng.standard_normal((TOTAL, 8, *rest)) for rest in ((32,), ())]
    weights = [jnp.asarray(x, jnp.float32) for x in weights]

    def whole(given):
        return ejk.ragged_page_attention(**given, **dict(static), return_lse=True, backend="xla")

    parallel = context_parallel.program(RAGGED[0].backend, DEVICES, tuple(given), static)
    floats = {name: given.pop(name) for name in FLOATS if name in given}
    ours, theirs = (weighted(f, weights)(floats, given) for f in (parallel, whole))
    for name, expected in theirs.items():
        assert np.asarray(expected).any() and np.isfinite(expected).all(), name
        np.testing.assert_allclose(ours[name], expected, rtol=2e-4, atol=2e-5, err_msg=name)


def test_a_stack_of_layers_may_lie_in_one_pool():
    """`page_offset` moves every page of the first layer to that of another."""
    case = build_ragged(FEW[0], LENGTHS, BOUNDS, window=INT32_MAX)
    case = case.with_other_junk(seed=1, finite=True)
    given, static = split_arguments(case)
    static = {name: x for name, x in static if name != "num_splits"}
    local = case.shape.num_pages // DEVICES

    def attend(given):
        return ejk.ragged_page_attention(
            **{"value_cache": None, **given}, **static, axis_name="pages", return_lse=True
        )

    names = (*given, "page_offset")
    function = jax.jit(split(attend, names, case.cache_layout))
    for offset in (0, 3, -1):
        found = function(given | {"page_offset": jnp.int32(offset)})
        tables = case.block_tables.astype(np.int64)
        held = (tables >= 0) & (tables < case.shape.num_pages) & (offset >= 0)
        held &= tables % local + offset < local
        moved = case.replace(block_tables=np.where(held, tables + offset, -1))
        assert_close(moved, *map(np.asarray, found))


def test_what_is_answered_without_a_backend():
    """No new tokens, no sequences, no blocks, no pages: zeros, and the sinks of new tokens."""
    for changes in ({"total": 0}, {"num_seqs": 0}, {"max_blocks": 0}, {"num_pages": 0}):
        sizes = {"total": 5, "num_seqs": 2, "max_blocks": 3, "num_pages": 4} | changes
        pool = jnp.zeros((sizes["num_pages"], 2, 4, 8))
        given = {
            "query": jnp.ones((sizes["total"], 4, 8)),
            "key_cache": pool,
            "value_cache": pool,
            "context_lens": jnp.full(sizes["num_seqs"], 5),
            "block_tables": jnp.zeros((sizes["num_seqs"], sizes["max_blocks"]), jnp.int32),
            "cu_q_lens": jnp.array([1, 3, 4][: sizes["num_seqs"] + 1]),
            "sinks": jnp.arange(4.0),
        }
        function = context_parallel.program(None, 2, tuple(given), (("cache_layout", "HND"),))
        out, lse = function(given)
        assert out.shape == given["query"].shape and not out.any()
        rows = np.arange(sizes["total"])[:, None]
        is_new = (rows >= 1) & (rows < int(given["cu_q_lens"][-1]))
        np.testing.assert_array_equal(lse, np.where(is_new, np.arange(4.0), -np.inf))


@pytest.mark.parametrize(
    "backend",
    [ejk.TritonRaggedPageAttention(interpret=True), ejk.PallasRaggedPageAttention(interpret=True)],
    ids=["triton", "pallas"],
)
def test_kernels_refuse_by_name(backend):
    given, static = split_arguments(build_ragged(FEW[0], LENGTHS, BOUNDS, window=INT32_MAX))
    static = tuple((name, x) for name, x in static if name != "num_splits")
    with pytest.raises(ejk.UnsupportedError, match="does not support axis_name"):
        context_parallel.program(backend, DEVICES, tuple(given), static)(given)


@pytest.mark.parametrize("backend", [None, "xla"])
@pytest.mark.parametrize("name", ["positions", "tree_mask"])
def test_what_is_refused_as_a_feature(name, backend):
    """When the call is traced, under automatic choice, too: no backend has it."""
    case = build_ragged(CONFIGURATIONS[0], LENGTHS, BOUNDS, window=INT32_MAX)
    given, static = split_arguments(case)
    given |= {
        "positions": {"positions": jnp.arange(TOTAL)},
        "tree_mask": {"tree_mask": jnp.ones((TOTAL, 6), bool)},
    }[name]
    function = context_parallel.program(backend, DEVICES, tuple(given), static)
    with pytest.raises(ejk.UnsupportedError) as info:
        jax.eval_shape(function, given)
    lines = str(info.value).splitlines()
    assert f"  xla: does not support axis_name with {name}" in lines
    assert [f"  {b}: does not support axis_name" in lines for b in ("triton", "pallas")] == (
        [backend is None] * 2
    )


def test_positions_that_nothing_counts_change_nothing():
    """Only windows and slopes count from them."""
    config = Configuration(PLAIN, context_parallel.F32, "HND")
    given, static = split_arguments(build_ragged(config, LENGTHS, BOUNDS))
    plain = context_parallel.program(None, DEVICES, tuple(given), static)(given)
    given["positions"] = jnp.arange(TOTAL)
    bits_equal(plain, context_parallel.program(None, DEVICES, tuple(given), static)(given))


def test_bounds_are_the_same_everywhere():
    given, _ = split_arguments(build_ragged(FEW[0], LENGTHS, BOUNDS, window=INT32_MAX))
    given["cu_q_lens"] = jax.ShapeDtypeStruct((20,), jnp.int32)

    def attend(given):
        return ejk.ragged_page_attention(
            **{"value_cache": None, **given}, cache_layout="NHD", axis_name="pages"
        )

    specs = context_parallel.pool_specs(given, "NHD")
    specs["cu_q_lens"] = jax.sharding.PartitionSpec("pages")
    function = jax.shard_map(
        attend, mesh=meshes.mesh(pages=DEVICES), in_specs=(specs,),
        out_specs=jax.sharding.PartitionSpec(),
    )  # fmt: skip
    with pytest.raises(ValueError, match="cu_q_lens must be the same on every device"):
        jax.eval_shape(function, given)


def test_new_tokens_far_before_their_context_count_no_further():
    """Positions below all tokens, and a window as wide as integers go: no sum leaves 32 bits."""
    rng = np.random.default_rng(0)
    query = rng.standard_normal((5, 2, 8)).astype(np.float32)
    pool = rng.standard_normal((4, 1, 4, 8)).astype(np.float32)

    def run(query, pool, **axis):
        return ejk.ragged_page_attention(
            query, pool, pool, np.array([2]), np.array([[0, 3]]), np.array([0, 5]),
            sliding_window=INT32_MAX, causal=False, **axis,
        )  # fmt: skip

    mesh, spec = meshes.mesh(pages=2), jax.sharding.PartitionSpec
    local = jax.shard_map(
        functools.partial(run, axis_name="pages"), mesh=mesh,
        in_specs=(spec(), spec("pages")), out_specs=spec(),
    )  # fmt: skip
    np.testing.assert_allclose(local(query, pool), run(query, pool), atol=1e-5)
