"""What `ejk.write_kv_cache` compiles to: in place, wherever its caches are donated."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_fused_pools import made_of

import ejk
from ejk.testing.configurations import LAYOUTS

LAYERS, NUM_PAGES, PAGE = 3, 1009, 16
IN_PLACE = {"parameter", "get-tuple-element", "scatter", "fusion", "dynamic-update-slice", "while"}
IN_PLACE |= {"opt-barrier", "tuple", "bitcast"}


def struct(*shape, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype)


def pool_shapes(layout, kind, num_pages=NUM_PAGES, heads=8, head_dim=128):
    """The pools of one call of a kind: one or two, None for what there is not."""
    half = (2,) if kind == "fused" else ()
    pool = {
        "HND": (num_pages, *half, heads, PAGE, head_dim),
        "NHD": (num_pages, *half, PAGE, heads, head_dim),
        "KV_HEADS_FIRST": (heads, num_pages, *half, PAGE, head_dim),
    }[layout]
    return struct(*pool), struct(*pool) if kind == "split" else None


def row_shapes(kind, num_tokens, heads=8, head_dim=128):
    rows = struct(num_tokens, heads, head_dim)
    return rows, None if kind == "latent" else rows


def compiled_write(layout, kind, num_tokens):
    function = functools.partial(ejk.write_kv_cache, cache_layout=layout, backend="xla")
    arguments = (*row_shapes(kind, num_tokens), *pool_shapes(layout, kind))
    slots = struct(num_tokens, dtype=jnp.int32)
    return jax.jit(function, donate_argnums=(2, 3)).lower(*arguments, slots).compile()


@pytest.mark.parametrize("num_tokens", [1, 64, 5000])
@pytest.mark.parametrize("kind", ["split", "fused", "latent"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_donated_pool_is_written_in_place(layout, kind, num_tokens):
    compiled = compiled_write(layout, kind, num_tokens)
    assert made_of(compiled.as_text(), NUM_PAGES) <= IN_PLACE
    memory = compiled.memory_analysis()
    rows = num_tokens * 8 * 128 * 2
    assert memory.temp_size_in_bytes <= 2 * rows + 100_000  # fused: keys beside values
    assert memory.alias_size_in_bytes >= NUM_PAGES * 8 * PAGE * 128 * 2


def step(layout, kind, scan, key, value, key_cache, value_cache, slots, query, lens, tables):
    """All layers, each writing its own pages of one pool and reading them."""
    if kind == "fused":
        value_cache = None
    num_pages = NUM_PAGES // LAYERS

    def layer(carry, index):
        query, caches = carry
        own = jnp.where((slots >= 0) & (slots < num_pages * PAGE), slots, -1)
        own = jnp.where(own >= 0, own + index * (num_pages * PAGE), -1)
        rows = (key + query[:, :8], None if value is None else value + query[:, :8])
        caches = ejk.write_kv_cache(*rows, *caches, own, cache_layout=layout)
        read = jnp.where(tables >= 0, tables + index * num_pages, -1)
        width = {"value_head_dim": 64} if kind == "latent" else {}
        out = ejk.page_attention(query, *caches, lens, read, cache_layout=layout, **width)
        return (query + jnp.pad(out, ((0, 0), (0, 0), (0, 128 - out.shape[2]))), caches), None

    carry = (query, (key_cache, value_cache))
    if scan:
        return jax.lax.scan(layer, carry, jnp.arange(LAYERS, dtype=jnp.int32))[0]
    for index in range(LAYERS):
        carry, _ = layer(carry, index)
    return carry


@pytest.mark.one_in(2)
@pytest.mark.parametrize("num_seqs", [1, 4])
@pytest.mark.parametrize("scan", [True, False], ids=["scan", "unrolled"])
@pytest.mark.parametrize("kind", ["split", "fused", "latent"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_stack_of_layers_copies_no_pool(layout, kind, scan, num_seqs):
    """A write of one row, above all: XLA would fuse it with what reads the pool."""
    arguments = (
        *row_shapes(kind, num_seqs),
        *pool_shapes(layout, kind),
        struct(num_seqs, dtype=jnp.int32),
        struct(num_seqs, 16, 128),
        struct(num_seqs, dtype=jnp.int32),
        struct(num_seqs, 8, dtype=jnp.int32),
    )
    function = functools.partial(step, layout, kind, scan)
    compiled = jax.jit(function, donate_argnums=(2, 3)).lower(*arguments).compile()
    text, pool_bytes = compiled.as_text(), NUM_PAGES * 8 * PAGE * 128 * 2
    assert made_of(text, NUM_PAGES) <= IN_PLACE
    assert compiled.memory_analysis().temp_size_in_bytes < pool_bytes / 4


@pytest.mark.parametrize("scales", ["none", "token"])
@pytest.mark.parametrize("num_tokens", [1, 4])
def test_a_donated_pool_of_float8_is_written_in_place(num_tokens, scales):
    """And rows are made once, not for every slot that may be written."""
    rows, pool = row_shapes("latent", num_tokens)[0], pool_shapes("HND", "latent")[0]
    pool = struct(*pool.shape, dtype=jnp.float8_e4m3fn)
    of_tokens = struct(*pool.shape[:-1], dtype=jnp.float32) if scales == "token" else None

    def layers(key, caches, scale, slots, query, lens, tables):
        for _ in range(LAYERS):
            given = {} if scale is None else {"key_scale": scale}
            caches, _, *computed = ejk.write_kv_cache(
                key + query[:, :8], None, caches, None, slots, **given
            )
            scale = computed[0] if computed else None
            given = {} if scale is None else {"key_scale": scale}
            query += ejk.page_attention(
                query, caches, None, lens, tables, value_head_dim=128, **given
            )
        return query, caches, scale

    integers = (struct(num_tokens, dtype=jnp.int32), struct(num_tokens, 8, dtype=jnp.int32))
    arguments = (rows, pool, of_tokens, integers[0], struct(num_tokens, 16, 128), *integers)
    compiled = jax.jit(layers, donate_argnums=(1, 2)).lower(*arguments).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < np.prod(pool.shape) / 4
    makes_a_pool = re.compile(r"ROOT \S+ = f8e4m3fn\[1009,")
    made = [x for x in compiled.as_text().split("\n\n") if makes_a_pool.search(x)]
    assert made and not any("f32[" in x for x in made)


def test_what_would_be_a_copy_is_seen():
    """Not donated, the pool has to be copied: or the tests above would prove nothing."""
    arguments = (*row_shapes("split", 4), *pool_shapes("HND", "split"), struct(4, dtype=jnp.int32))
    text = jax.jit(ejk.write_kv_cache).lower(*arguments).compile().as_text()
    assert "copy" in made_of(text, NUM_PAGES)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_pools_above_2_31_elements_are_not_flattened(layout):
    """Compiled, not run: page, offset and element are indices of their own."""
    sizes = dict(num_pages=2**21 + 9, head_dim=64)
    (rows, _), (pool, _) = (
        row_shapes("latent", 5, head_dim=64),
        pool_shapes(layout, "latent", **sizes),
    )
    assert np.prod(pool.shape, dtype=np.int64) > 2**31
    function = functools.partial(ejk.write_kv_cache, cache_layout=layout)
    lowered = jax.jit(function, donate_argnums=2).lower(
        rows, None, pool, None, struct(5, dtype=jnp.int32)
    )
    assert made_of(lowered.compile().as_text(), 2**21 + 9) <= IN_PLACE
    assert "tensor<5x2xi32>" in lowered.as_text()  # the scatter's indices: page and offset
