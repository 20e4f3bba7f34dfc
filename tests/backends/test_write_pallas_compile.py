"""The TPU write, compiled ahead of time for every generation by libtpu, through the public call.

The compiler takes what the backend takes, in no more VMEM than the backend predicts, and copies no
pool that is donated.
"""

import functools
import re

import jax
import pytest
from test_pallas_compile import TOPOLOGIES, copied_pools, device, used_vmem
from test_write_programs import pool_shapes, row_shapes, step, struct

import ejk
from ejk.backends.pallas._chip import chip
from ejk.backends.pallas.write_kv_cache import call as caller
from ejk.backends.pallas.write_kv_cache.sizes import WriteSizes

from jax.experimental.layout import Format, Layout  # isort: skip

NUM_PAGES = 1000

# KV heads, head_dim, page size and what else differs from `call`'s defaults.
CALLS = {
    "llama-3-8b": dict(sizes=(8, 128, 16)),
    "llama-3-8b, NHD": dict(sizes=(8, 128, 16), layout="NHD"),
    "llama-3-8b, heads first": dict(sizes=(8, 128, 16), layout="KV_HEADS_FIRST"),
    "llama-3-8b, long pages": dict(sizes=(8, 128, 128)),
    "llama-3-8b, float32": dict(sizes=(8, 128, 16), dtype="float32"),
    "llama-3-8b, fused": dict(sizes=(8, 128, 32), value_head_dim=None),
    "fused, NHD": dict(sizes=(8, 128, 16), value_head_dim=None, layout="NHD"),
    "fused, heads first": dict(sizes=(4, 64, 32), value_head_dim=None, layout="KV_HEADS_FIRST"),
    "a prompt": dict(sizes=(8, 128, 16), num_tokens=2048),
    "one token": dict(sizes=(8, 128, 16), num_tokens=1),
    "smollm2-135m, float32": dict(sizes=(3, 64, 16), dtype="float32", num_tokens=3),
    "qwen2.5-0.5b, NHD": dict(sizes=(2, 64, 16), layout="NHD"),
    "one head, NHD": dict(sizes=(1, 64, 16), layout="NHD"),
    "short pages": dict(sizes=(8, 128, 8)),
    "one slot a page": dict(sizes=(2, 128, 1)),
    "odd pages": dict(sizes=(2, 33, 3), dtype="float32", layout="KV_HEADS_FIRST"),
    "odd everything, NHD": dict(sizes=(3, 33, 3), layout="NHD"),
    "pages of a tile and a half": dict(sizes=(2, 128, 24)),
    "narrow values": dict(sizes=(2, 192, 16), value_head_dim=128),
    "deepseek-v3": dict(sizes=(1, 576, 16), value_head_dim=0),
    "int8, per token": dict(sizes=(8, 128, 128), cache="int8", scales="token"),
    "int8, per token, short pages": dict(sizes=(8, 128, 16), cache="int8", scales="token"),
    "e4m3, per token, fused, NHD": dict(
        sizes=(8, 128, 16), cache="float8_e4m3fn", scales="token", value_head_dim=None, layout="NHD"
    ),
    "e5m2, per token, heads first": dict(
        sizes=(4, 64, 32), cache="float8_e5m2", scales="token", layout="KV_HEADS_FIRST"
    ),
    "deepseek-v3, e4m3": dict(sizes=(1, 576, 64), value_head_dim=0, cache="float8_e4m3fn"),
    "float32 tokens": dict(sizes=(8, 128, 16), dtype="float32", cache="bfloat16"),
}


def call(
    generation,
    sizes,
    layout="HND",
    dtype="bfloat16",
    value_head_dim=-1,
    num_tokens=37,
    cache=None,
    scales="none",
):
    """Return a jitted call that is given its pools for good, and its abstract arguments."""
    heads, head_dim, slots = sizes
    value_head_dim = head_dim if value_head_dim == -1 else value_head_dim
    half = (2,) if value_head_dim is None else ()
    sharding = device(generation)

    def array(*shape, dtype=dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    def pool(width, dtype=cache or dtype):
        shape = {
            "HND": (NUM_PAGES, *half, heads, slots, width),
            "NHD": (NUM_PAGES, *half, slots, heads, width),
            "KV_HEADS_FIRST": (heads, NUM_PAGES, *half, slots, width),
        }[layout]
        shape = shape if width else shape[:-1]
        row_major = Format(Layout(tuple(range(len(shape)))), sharding)
        return jax.ShapeDtypeStruct(shape, dtype, sharding=row_major)

    value = None if value_head_dim == 0 else array(num_tokens, heads, value_head_dim or head_dim)
    arguments = (
        array(num_tokens, heads, head_dim),
        value,
        pool(head_dim),
        pool(value_head_dim) if value_head_dim else None,
        array(num_tokens, dtype="int32"),
    )
    pools, given = arguments[2:4], (2, 3)
    if scales == "token":
        of_values = pool(0, "float32") if value_head_dim else None
        arguments = (*arguments, pool(0, "float32"), of_values)
        pools, given = (*pools, *arguments[5:]), (2, 3, 5, 6)
    function = functools.partial(write, cache_layout=layout)
    # By default a program's results lie in memory as XLA likes best, whatever its arguments do.
    formats = tuple(x and x.format for x in pools)
    return jax.jit(function, donate_argnums=given, out_shardings=formats), arguments


def write(*arguments, cache_layout):
    scales = dict(zip(("key_scale", "value_scale"), arguments[5:]))
    return ejk.write_kv_cache(*arguments[:5], **scales, cache_layout=cache_layout, backend="pallas")


def compile_for(generation, monkeypatch, **options):
    """Compile; returns the compiled program and the VMEM that the backend predicts."""
    predicted = []
    write = caller.write

    def watched(sizes: WriteSizes, *rest):
        predicted.append(sum(sizes.vmem().values()))
        assert predicted[0] <= chip().vmem_limit_bytes
        return write(sizes, *rest)

    monkeypatch.setattr(caller, "write", watched)
    function, arguments = call(generation, **options)
    with jax.sharding.use_abstract_mesh(device(generation).mesh.abstract_mesh):
        lowered = function.lower(*arguments)
    return lowered.compile(), predicted[0]


@pytest.mark.one_in(2)
@pytest.mark.parametrize("generation", TOPOLOGIES)
@pytest.mark.parametrize("name", CALLS)
def test_compiles_in_place_in_the_memory_that_was_predicted(name, generation, monkeypatch):
    compiled, predicted = compile_for(generation, monkeypatch, **CALLS[name])
    text = compiled.as_text()
    assert used_vmem(text) <= predicted
    assert not copied_pools(text, NUM_PAGES)
    assert "input_output_alias" in text


@pytest.mark.one_in(3)
@pytest.mark.parametrize("generation", ["v5e", "v7x"])
@pytest.mark.parametrize("scan", [True, False], ids=["scan", "unrolled"])
@pytest.mark.parametrize("kind", ["split", "latent"])
@pytest.mark.parametrize("layout", ["HND", "NHD"])
def test_a_stack_of_layers_copies_no_pool(layout, kind, scan, generation):
    """Each layer writes its own pages of one pool, and the attention kernel reads them."""
    sharding = device(generation)

    def here(x, row_major=False):
        where = Format(Layout(tuple(range(len(x.shape)))), sharding) if row_major else sharding
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)

    rows, pools = row_shapes(kind, 4), pool_shapes(layout, kind, NUM_PAGES)
    pools = [x and here(x, row_major=True) for x in pools]
    slots, lens = (struct(4, dtype="int32") for _ in range(2))
    rest = (slots, struct(4, 16, 128), lens, struct(4, 8, dtype="int32"))
    arguments = (*(x and here(x) for x in rows), *pools, *map(here, rest))
    function = jax.jit(
        functools.partial(step, layout, kind, scan),
        donate_argnums=(2, 3),
        out_shardings=(sharding, tuple(x and x.format for x in pools)),
    )
    with jax.sharding.use_abstract_mesh(sharding.mesh.abstract_mesh):
        text = function.lower(*arguments).compile().as_text()
    assert len(re.findall("ejk_write_kv_cache", text)) and "ejk_page_attention" in text
    assert not copied_pools(text, NUM_PAGES)


REFUSED = {
    "dtype=float16: the chip takes": dict(sizes=(8, 128, 16), dtype="float16"),
    "num_tokens=245761: their slots must fit in 983040 bytes of scalar memory": dict(
        sizes=(1, 128, 16), num_tokens=245_761
    ),
    "one token's window of 1000 slots needs": dict(sizes=(64, 128, 1000), value_head_dim=0),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_refuses_by_name_before_the_compiler(reason):
    function, arguments = call("v4", **REFUSED[reason])
    mesh = device("v4").mesh.abstract_mesh
    with jax.sharding.use_abstract_mesh(mesh), pytest.raises(ejk.UnsupportedError) as caught:
        function.trace(*arguments)
    assert f"pallas: {reason}" in str(caught.value)


def test_the_scalar_memory_that_is_used_is_there(monkeypatch):
    compile_for("v5e", monkeypatch, sizes=(1, 128, 16), value_head_dim=0, num_tokens=245_760)


def test_lowers_with_no_tpu_in_sight():
    _, arguments = call("v5e", sizes=(8, 128, 16))
    plain = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), arguments)
    text = jax.jit(ejk.write_kv_cache).trace(*plain).lower(lowering_platforms=("tpu",)).as_text()
    assert "tpu_custom_call" in text
