"""Copies on TPUs, compiled ahead of time for every generation: in place, and no pool is copied."""

import functools

import jax
import pytest
from test_pallas_compile import TOPOLOGIES, copied_pools, device

import ejk

from jax.experimental.layout import Format, Layout  # isort: skip

NUM_PAGES = 1000
# KV heads, head_dim, page size, and what differs from `compile_for`'s defaults.
CALLS = {
    "llama-3-8b": dict(sizes=(8, 128, 16)),
    "llama-3-8b, NHD": dict(sizes=(8, 128, 16), layout="NHD"),
    "llama-3-8b, heads first": dict(sizes=(8, 128, 16), layout="KV_HEADS_FIRST"),
    "fused": dict(sizes=(8, 128, 32), fused=True),
    "fused, heads first": dict(sizes=(4, 64, 32), fused=True, layout="KV_HEADS_FIRST"),
    "odd pages, float32": dict(sizes=(3, 33, 3), dtype="float32"),
    "int8, per token": dict(sizes=(8, 128, 32), dtype="int8", scales=True),
    "e4m3, per token, NHD": dict(sizes=(8, 128, 16), dtype="float8_e4m3fn", scales=True,
                                 layout="NHD"),
    "e5m2, per token, heads first": dict(sizes=(4, 64, 32), dtype="float8_e5m2", scales=True,
                                         layout="KV_HEADS_FIRST"),
    "deepseek-v3": dict(sizes=(1, 576, 64), latent=True),
}  # fmt: skip


def compile_for(
    generation, unit, sizes, layout="HND", dtype="bfloat16", fused=False, latent=False,
    scales=False,
):  # fmt: skip
    """Return the text of a compiled call that is given its pools for good."""
    heads, width, slots = sizes
    half = (2,) if fused else ()
    sharding = device(generation)

    def pool(*last, dtype):
        shape = {
            "HND": (NUM_PAGES, *half, heads, slots, *last),
            "NHD": (NUM_PAGES, *half, slots, heads, *last),
            "KV_HEADS_FIRST": (heads, NUM_PAGES, *half, slots, *last),
        }[layout]
        row_major = Format(Layout(tuple(range(len(shape)))), sharding)
        return jax.ShapeDtypeStruct(shape, dtype, sharding=row_major)

    kinds = [pool(width, dtype=dtype)] + [pool(dtype="float32")] * scales
    pools = [x for kind in kinds for x in (kind, None if fused or latent else kind)]
    ids = [jax.ShapeDtypeStruct((37,), "int32", sharding=sharding)] * 2
    operation = {"slot": ejk.copy_kv_slots, "page": ejk.copy_kv_pages}[unit]

    def run(pools, ids):
        named = dict(zip(("key_scale", "value_scale"), pools[2:]))
        return operation(*pools[:2], *ids, cache_layout=layout, backend="pallas", **named)

    formats = tuple(x and x.format for x in pools)
    function = jax.jit(functools.partial(run), donate_argnums=0, out_shardings=formats)
    with jax.sharding.use_abstract_mesh(sharding.mesh.abstract_mesh):
        return function.lower(pools, ids).compile().as_text()


@pytest.mark.one_in(6)
@pytest.mark.parametrize("generation", TOPOLOGIES)
@pytest.mark.parametrize("unit", ["slot", "page"])
@pytest.mark.parametrize("name", CALLS)
def test_compiles_in_place(name, unit, generation):
    text = compile_for(generation, unit, **CALLS[name])
    assert not copied_pools(text, NUM_PAGES)
    assert "input_output_alias" in text and "tpu_custom_call" in text


REFUSED = {
    "dtype=float16: the chip takes": dict(sizes=(8, 128, 16), dtype="float16"),
    "one token's window of 1000 slots needs": dict(sizes=(64, 128, 1000), latent=True),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_refuses_by_name_before_the_compiler(reason):
    with pytest.raises(ejk.UnsupportedError) as caught:
        compile_for("v4", "slot", **REFUSED[reason])
    assert f"pallas: {reason}" in str(caught.value)
