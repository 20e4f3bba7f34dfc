"""Quantised caches under `vmap`, `jax.export` and 64-bit types, and what their programs hold."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from edges import LENGTHS, config
from entries import edge, writer_edge
from jax import export

import ejk
from ejk.testing.bits import bits_equal
from ejk.testing.configurations import BF16, E4M3, E5M2, F32, INT4, INT8
from ejk.testing.page_attention import build
from ejk.testing.write_kv_cache import SHAPES, assert_written
from ejk.testing.write_kv_cache import build as build_write

CACHES = {
    "int8 per token": dict(cache_dtype=INT8, scales="token"),
    "e4m3 per head": dict(cache_dtype=E4M3, scales="head"),
    "int4, fused": dict(cache_dtype=INT4, scales="token", fused=True),
    "bfloat16 for float32": dict(cache_dtype=BF16),
}
each_cache = pytest.mark.parametrize("changes", CACHES.values(), ids=CACHES)
SCALES = ("key_scale", "value_scale")


def call(backend, case, **options):
    return functools.partial(
        ejk.page_attention, **case.semantics() | options, num_splits=1, backend=backend
    )


@pytest.mark.one_in(2)
@edge
@each_cache
def test_vmap_over_sequences_is_one_call(entry, changes):
    """Pools and scales are shared: they stay what they are."""
    case = build(config(**changes), LENGTHS)
    query, keys, values, lens, tables = case.operands()
    attend = call(entry.backend, case)

    def one(query, lens, tables):
        return attend(query[None], keys, values, lens[None], tables[None])[0]

    with entry.refusing():
        mapped = jax.vmap(one)(*map(jnp.asarray, (query, lens, tables)))
        whole = attend(query, keys, values, lens, tables)
    np.testing.assert_allclose(mapped, whole, rtol=1e-5, atol=1e-5 * np.abs(whole).max())


@edge
def test_vmap_over_scales_maps_the_call(entry):
    case = build(config(cache_dtype=INT8, scales="head"), LENGTHS)
    scale = jnp.asarray(case.scales[0])

    def attend(scale):
        return call(entry.backend, case, key_scale=scale)(*case.arguments())

    with entry.refusing():
        mapped = jax.vmap(attend)(jnp.stack([scale, 2 * scale]))
        for got, one in zip(mapped, (attend(scale), attend(2 * scale))):
            np.testing.assert_allclose(got, one, rtol=1e-5, atol=1e-6)


@writer_edge
@pytest.mark.parametrize("scales", ["token", "head"])
@pytest.mark.parametrize("batched", ["pools", "rows"])
def test_vmap_of_a_write(entry, batched, scales):
    shape, rng = SHAPES[0], np.random.default_rng(0)
    cases = [
        build_write(
            shape, BF16, "NHD", rng.permutation(shape.num_slots)[: shape.num_tokens], seed=seed,
            cache_dtype=INT8, scales=scales,
        )
        for seed in range(2)
    ]  # fmt: skip
    names = ("key", "value", "key_cache", "value_cache", "slot_mapping", *SCALES)
    given = [dict(zip(names, (*case.operands(), *case.scales))) for case in cases]
    along = {"rows": ("key", "value", "slot_mapping"), "pools": names}[batched]
    if scales == "head":  # they are the model's
        along = tuple(name for name in along if name not in SCALES)
    axes = {name: 0 if name in along else None for name in names}
    stacked = {
        n: jnp.stack([x[n] for x in given]) if n in along else jnp.asarray(given[0][n])
        for n in names
    }

    def write(given):
        return ejk.write_kv_cache(**given, cache_layout="NHD", backend=entry.backend)

    with entry.refusing():
        pools = jax.vmap(write, (axes,))(stacked)
    for i, case in enumerate(cases):
        own = {name: given[i if name in along else 0][name] for name in names}
        one = case.replace(scales=(own.pop("key_scale"), own.pop("value_scale")), **own)
        assert_written(one, [np.asarray(pool[i]) for pool in pools])


@pytest.mark.one_in(2)
@edge
@each_cache
def test_64_bit_types_change_no_bit(entry, changes):
    case = build(config(**changes), LENGTHS)
    with entry.refusing():
        narrow = entry(case)
        with jax.enable_x64(True):
            wide = entry(case)
    bits_equal(narrow, wide)


@writer_edge
def test_64_bit_types_change_no_bit_of_a_write(entry):
    case = build_write(SHAPES[0], F32, "HND", np.arange(7), cache_dtype=INT8, scales="token")
    with jax.enable_x64(True):
        assert_written(case, entry(case))


@each_cache
def test_an_export_of_any_number_of_sequences_and_pages(changes):
    case = build(config(**changes), LENGTHS)
    names = ("query", "key_cache", "value_cache", "context_lens", "block_tables")
    given = dict(zip(names, case.operands())) | case.semantics()
    layout = given.pop("cache_layout")
    given = {name: jnp.asarray(x) for name, x in given.items() if x is not None}

    def attend(given):
        return ejk.page_attention(**{"value_cache": None} | given, cache_layout=layout)

    n, pages = export.symbolic_shape("n, pages")
    first = dict.fromkeys(("query", "context_lens", "block_tables"), n)
    per_page = [x for x in given if x.endswith("cache") or (x in SCALES and given[x].ndim > 1)]
    first |= dict.fromkeys(per_page, pages)
    types = {
        name: jax.ShapeDtypeStruct((first.get(name, x.shape[0]), *x.shape[1:]), x.dtype)
        for name, x in given.items()
    }
    exported = export.export(jax.jit(attend))(types)
    np.testing.assert_allclose(exported.call(given), attend(given), rtol=1e-5, atol=1e-6)


@pytest.mark.cpu
@pytest.mark.parametrize("dtype", [INT8, INT4, E4M3, E5M2, BF16], ids=str)
@pytest.mark.parametrize("operation", ["page", "ragged", "write"])
def test_xla_neither_converts_nor_copies_a_pool(operation, dtype):
    """A program's own memory is that of blocks, and a donated pool is written in place."""
    width = 64 // (1 + (dtype == INT4))
    pool = jax.ShapeDtypeStruct((4000, 2, 16, width), dtype)
    scale = jax.ShapeDtypeStruct((4000, 2, 16), jnp.float32)
    kinds = (scale, scale) if dtype in (INT8, INT4) else (None, None)
    rows, ints = jax.ShapeDtypeStruct((4, 2, 64), jnp.float32), jnp.zeros(4, jnp.int32)
    tables = jnp.zeros((4, 8), jnp.int32)

    def run(rows, other, pools, scales):
        named = dict(zip(SCALES, scales))
        if operation == "page":
            return ejk.page_attention(rows, *pools, ints, tables, backend="xla", **named)
        if operation == "ragged":
            bounds = jnp.arange(5, dtype=jnp.int32)
            return ejk.ragged_page_attention(
                rows, *pools, ints, tables, bounds, backend="xla", **named
            )
        return ejk.write_kv_cache(rows, other, *pools, ints, backend="xla", **named)

    donated = (2, 3) if operation == "write" else ()
    compiled = jax.jit(run, donate_argnums=donated, keep_unused=True).lower(
        rows, rows, (pool, pool), kinds
    ).compile()  # fmt: skip
    used = compiled.memory_analysis()
    size = np.prod(pool.shape) * dtype.itemsize
    assert used.temp_size_in_bytes < size / 4
    if operation == "write":
        assert used.alias_size_in_bytes >= 2 * size


def test_a_report_takes_scales():
    pool = jax.ShapeDtypeStruct((8, 2, 16, 32), jnp.uint8)
    scale = jax.ShapeDtypeStruct((8, 2, 16), jnp.float32)
    args = (jnp.ones((1, 4, 64)), pool, pool, jnp.array([20]), jnp.array([[3, 5]]))
    report = ejk.backend_report(*args, key_scale=scale, value_scale=scale, platform="cpu")
    assert report.chosen == "xla"
    with pytest.raises(ValueError, match="must come with key_scale"):
        ejk.backend_report(*args)
