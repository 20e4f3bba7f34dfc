"""Keys and values in one array of five axes: its mistakes, and what JAX makes of it.

That the results are right is held by the properties, which draw fused pools as they do layouts.
"""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from edges import LENGTHS, config
from entries import edge
from planned import TRITON, launches, long_case
from test_dispatch import Sevens, kernels
from wrong_calls import NUM_HEADS, zeros
from wrong_calls import decode as arguments

import ejk
from ejk.testing.bits import bits_equal
from ejk.testing.bounds import assert_close
from ejk.testing.configurations import LAYOUTS
from ejk.testing.page_attention import build

POOLS = {
    "HND": (8, 2, 2, 16, 64),
    "NHD": (8, 2, 16, 2, 64),
    "KV_HEADS_FIRST": (2, 8, 2, 16, 64),
}


def fused(*shape, dtype=np.float32, **changes):
    """The arguments of a call, right but for its pool."""
    return arguments(key_cache=zeros(*shape, dtype=dtype), value_cache=None) | changes


MISTAKES = {
    "a pool of values, too": (
        arguments(key_cache=zeros(8, 2, 2, 16, 64)),
        "value_cache=float32[8, 2, 16, 64] must be None with a key_cache of five axes",
    ),
    "twice": (
        arguments(pool=zeros(8, 2, 2, 16, 64)),
        "value_cache=float32[8, 2, 2, 16, 64] must be None with a key_cache of five axes",
    ),
    "beside a pool of keys": (
        arguments(value_cache=zeros(8, 2, 2, 16, 64)),
        "value_cache.shape=(8, 2, 2, 16, 64) must be key_cache.shape=(8, 2, 16, 64) but for the",
    ),
    "latent attention, too": (
        fused(8, 2, 2, 16, 64, value_head_dim=32),
        "value_head_dim=32 must be None with a key_cache of five axes",
    ),
    "one half": (
        fused(8, 1, 2, 16, 64),
        "key_cache.shape[1]=1 must be 2, keys and values "
        "(key_cache[8, 1, 2, 16, 64], cache_layout='HND')",
    ),
    "halves before pages": (
        fused(2, 8, 16, 2, 64, cache_layout="NHD"),
        "key_cache.shape[1]=8 must be 2, keys and values",
    ),
    "halves before pages, KV heads first": (
        fused(2, 2, 8, 16, 64, cache_layout="KV_HEADS_FIRST"),
        "key_cache.shape[2]=8 must be 2, keys and values",
    ),
    "another layout": (
        fused(8, 2, 2, 16, 64, cache_layout="NHD"),
        "num_heads=4 must be a multiple of num_kv_heads=16 "
        "(key_cache[8, 2, 2, 16, 64], cache_layout='NHD')",
    ),
    "another width": (
        fused(8, 2, 2, 16, 32),
        "key_cache.shape[4]=32 must be the query's head_dim=64",
    ),
    "another dtype": (
        fused(8, 2, 2, 16, 64, dtype=np.int16),
        "key_cache.dtype=int16 must be one of float32, bfloat16, float16, int8",
    ),
    "no slots": (fused(8, 2, 2, 0, 64), "page_size=0 must be at least 1"),
}


@pytest.mark.parametrize("call, message", MISTAKES.values(), ids=MISTAKES)
def test_mistakes_are_value_errors(call, message):
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        ejk.page_attention(**call)


@pytest.mark.parametrize("layout", POOLS)
def test_the_right_call_is_right(layout):
    """Or the table above would prove nothing."""
    call = fused(*POOLS[layout], cache_layout=layout)
    assert ejk.page_attention(**call).shape == (2, NUM_HEADS, 64)


@pytest.mark.parametrize("layout", POOLS)
def test_check_inputs_knows_how_many_pages_there_are(layout):
    call = fused(*POOLS[layout], cache_layout=layout, context_lens=np.array([49, 0]))
    with pytest.raises(ValueError, match=re.escape("context_lens[0]=49 must be in [0, 48]")):
        ejk.check_page_attention_inputs(**call)
    call |= {"context_lens": np.array([48, 0]), "block_tables": np.array([[0, 7, 8]] * 2)}
    with pytest.raises(ValueError, match=re.escape("block_tables[0, 2]=8 must be in [0, 8)")):
        ejk.check_page_attention_inputs(**call)


def test_a_backend_that_does_not_declare_them_is_passed_over(restored_registry):
    call = fused(8, 2, 2, 16, 64)
    ejk.register_backend(Sevens())
    report = ejk.backend_report(**call, platform="cpu")
    assert report.chosen == "xla"
    assert report.refusals["sevens"][0] == "does not support fused_pools"
    assert not ejk.page_attention(**call).any()
    with pytest.raises(ejk.UnsupportedError, match="sevens: does not support fused_pools"):
        ejk.page_attention(**call, backend="sevens")


def clean_case(seed=0, **changes):
    """A call with no poison, for gradients and maps of whole pools."""
    case = build(config(fused=True, **changes), LENGTHS[1:].astype(np.int32), seed=seed)
    return case.with_other_junk(seed=1, finite=True)


@edge
@pytest.mark.parametrize("batched", [False, True], ids=["one pool", "pools"])
def test_vmap(entry, batched):
    """With one pool the map folds into the sequences; pools of its own it takes in turn."""
    query, pool, _, lens, tables = (
        None if x is None else jnp.asarray(x) for x in clean_case().operands()
    )
    pools = jnp.stack([pool, pool[::-1]]) if batched else pool
    axes = (None, 0) if batched else (0, None)
    queries = query if batched else jnp.stack([query, 2 * query])

    def attend(query, pool):
        return ejk.page_attention(query, pool, None, lens, tables, backend=entry.backend)

    with entry.refusing():
        out = jax.vmap(attend, axes)(queries, pools)
        for i in range(2):
            one = attend(query if batched else queries[i], pools[i] if batched else pool)
            np.testing.assert_allclose(out[i], one, rtol=1e-5, atol=1e-5)


@pytest.mark.one_in(5)
@edge
@pytest.mark.skipif(jax.device_count() < 2, reason="needs two devices")
@pytest.mark.parametrize("what", ["sequences", "KV heads"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_shards_and_their_gradients_equal_the_whole(entry, layout, what):
    query, pool, _, lens, tables = clean_case(cache_layout=layout).operands()
    values = [jnp.asarray(x) for x in (query, pool, lens, tables)]
    heads = {"HND": 2, "NHD": 3, "KV_HEADS_FIRST": 0}[layout]
    axes = {"sequences": (0, None, 0, 0), "KV heads": (1, heads, None, None)}[what]
    spec = jax.sharding.PartitionSpec
    mesh = jax.make_mesh(
        (2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:2]
    )

    def attend(query, pool, lens, tables):
        return ejk.page_attention(
            query, pool, None, lens, tables, cache_layout=layout, backend=entry.backend
        )

    sharded = jax.shard_map(
        attend,
        mesh=mesh,
        in_specs=tuple(spec() if axis is None else spec(*[None] * axis, "x") for axis in axes),
        out_specs=spec(*[None] * axes[0], "x"),
    )

    def loss(function):
        return lambda *values: (function(*values) * weights).sum()

    weights = jnp.asarray(np.random.default_rng(0).standard_normal(query.shape), jnp.float32)
    with entry.refusing():
        whole, parts = (jax.jit(jax.value_and_grad(loss(f), (0, 1))) for f in (attend, sharded))
        expected, actual = whole(*values), parts(*values)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert np.asarray(b).any()
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5)


@pytest.mark.cpu
def test_a_plan_fits_split_and_fused_pools_alike():
    case = dataclasses.replace(long_case(features=frozenset()), fused=True)
    plan = case.plan(TRITON.backend)
    run = functools.partial(TRITON, case, plan=plan)
    assert launches(run) == ["page_attention", "combine_parts"]
    assert_close(case, *run())
    bits_equal(run(), TRITON(case.replace(fused=False), plan=plan))


def shapes(layout, num_pages=1009, dtype=jnp.float32):
    """The arguments of a call with a pool so large that a copy of it cannot be overlooked."""
    pool = {
        "HND": (num_pages, 2, 8, 16, 128),
        "NHD": (num_pages, 2, 16, 8, 128),
        "KV_HEADS_FIRST": (8, num_pages, 2, 16, 128),
    }[layout]
    array = jax.ShapeDtypeStruct
    integers = (array((4,), jnp.int32), array((4, 64), jnp.int32))
    return array((4, 32, 128), dtype), array(pool, dtype), *integers


def attend(query, pool, lens, tables, **keywords):
    return ejk.page_attention(query, pool, None, lens, tables, **keywords)


def made_of(text: str, num_pages: int = 1009) -> set[str]:
    """Name the operations of a compiled program whose result has all pages."""
    pattern = rf"= \w+\[(?:\d+,)*{num_pages}(?:,\d+)*\]\S* ([\w-]+)\("
    return set(re.findall(pattern, text))


@pytest.mark.cpu
@pytest.mark.parametrize("layout", LAYOUTS)
def test_xla_copies_no_pool(layout):
    """Nor takes it apart: no operation has a result of its size, and memory is two blocks'."""
    query, pool, *integers = shapes(layout)
    function = jax.jit(functools.partial(attend, cache_layout=layout, backend="xla"))
    compiled = function.lower(query, pool, *integers).compile()
    assert made_of(compiled.as_text()) == {"parameter", "get-tuple-element"}
    assert compiled.memory_analysis().temp_size_in_bytes < 5 * 2**20


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_gradient_is_added_up_in_one_array_of_the_pools_size(layout):
    def loss(query, pool, lens, tables):
        return attend(query, pool, lens, tables, cache_layout=layout, backend="xla").sum()

    query, pool, *integers = shapes(layout)
    compiled = jax.jit(jax.grad(loss, 1)).lower(query, pool, *integers).compile()
    assert not made_of(compiled.as_text()) & {"copy", "transpose", "concatenate", "gather"}
    assert compiled.memory_analysis().temp_size_in_bytes < 32 * 2**20


@pytest.fixture
def for_an_h100(restored_registry, jax_triton):
    ejk.register_backend(ejk.TritonPageAttention(compute_capability=90, num_sms=132))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_triton_kernel_is_given_the_pool_as_it_is(layout, for_an_h100):
    function = jax.jit(functools.partial(attend, cache_layout=layout))
    text = function.trace(*shapes(layout)).lower(lowering_platforms=("cuda",)).as_text()
    assert kernels(text) == {"cuda"}
    # It is an argument, and no operation has another array with all pages for its result.
    assert not re.findall(r"-> .*[<x]1009x", text)
    assert len(set(re.findall(r"tensor<[\dx]*1009x[\dx]*f32>", text))) == 1


@pytest.mark.parametrize("layout", LAYOUTS)
def test_exports(layout, for_an_h100):
    case = build(config(cache_layout=layout, fused=True), LENGTHS.astype(np.int32), invalid=0.2)
    query, pool, _, *integers = case.operands()
    arguments = (query, pool, *integers)
    function = jax.jit(functools.partial(attend, cache_layout=layout))
    exported = jax.export.export(
        function, platforms=("cpu", "cuda"), disabled_checks=ejk.export_disabled_checks()
    )(*arguments)
    assert kernels(exported.mlir_module()) == {"cuda"}
    again = jax.export.deserialize(exported.serialize())
    if jax.default_backend() == "cpu":
        np.testing.assert_array_equal(again.call(*arguments), function(*arguments))
        assert_close(case, np.asarray(again.call(*arguments)))
