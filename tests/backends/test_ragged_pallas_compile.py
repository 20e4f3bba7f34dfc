"""The ragged TPU kernel, compiled ahead of time for every generation, through the public call.

The compiler takes what the backend takes, in no more VMEM than the backend predicts, and copies no
pool. What would not fit is refused by name.
"""

import functools
import json
import re

import jax
import pytest
from test_pallas_compile import TOPOLOGIES, copied_pools, device
from test_pallas_compile import call as decode_call

import ejk
from ejk.backends.pallas.ragged_page_attention import call as caller

# heads, KV heads, head_dim, page size and what else differs from `call`'s defaults.
CALLS = {
    "llama-3-8b": dict(sizes=(32, 8, 128, 16)),
    "llama-3-8b, verified drafts": dict(sizes=(32, 8, 128, 16), max_q_len=8, fused=True),
    "everything": dict(sizes=(12, 4, 128, 16), more="sinks alibi window cap lse"),
    "llama-3-8b, float32": dict(sizes=(32, 8, 128, 16), dtype="float32", more="window"),
    "llama-3-8b, fused NHD": dict(sizes=(32, 8, 128, 16), fused=True, layout="NHD"),
    "a tree of drafts": dict(sizes=(32, 8, 128, 16), max_q_len=8, fused=True, tree_width=8),
    "a tree, everything": dict(
        sizes=(12, 4, 128, 16), more="sinks alibi window cap lse positions", tree_width=40
    ),
    "int8, per token": dict(sizes=(32, 8, 128, 16), cache="int8", scales="token"),
    "interleaved": dict(sizes=(32, 8, 128, 16), fused=True, layout="INTERLEAVED"),
    "e4m3": dict(sizes=(32, 8, 128, 32), cache="float8_e4m3fn", max_q_len=8, fused=True),
    "float32 queries": dict(sizes=(32, 8, 128, 16), dtype="float32", cache="bfloat16"),
}
MORE_CALLS = {
    "heads first": dict(sizes=(32, 8, 128, 16), layout="KV_HEADS_FIRST", more="lse"),
    "qwen2.5-0.5b": dict(sizes=(14, 2, 64, 16), more="window"),
    "smollm2-135m, float32": dict(sizes=(9, 3, 64, 16), dtype="float32", more="lse"),
    "gemma-2-9b": dict(sizes=(16, 8, 256, 32), more="cap window"),
    "gpt-oss-20b, an eighth": dict(sizes=(8, 1, 64, 48), more="sinks window lse"),
    "narrow values": dict(sizes=(8, 2, 192, 16), value_head_dim=128),
    "deepseek-v3, a quarter": dict(sizes=(32, 1, 576, 16), value_head_dim=512, latent=True),
    "phi-2": dict(sizes=(32, 32, 80, 16), fused=True, more="lse"),
    "llama-3-8b, long pages": dict(sizes=(32, 8, 128, 128), fused=True),
    "short pages": dict(sizes=(32, 8, 128, 8), fused=True),
    "one slot a page": dict(sizes=(8, 2, 128, 1), pages_per_block=32),
    "positions, odd sizes": dict(
        sizes=(34, 2, 33, 3), layout="NHD", pages_per_block=4, more="window positions"
    ),
    "float32, a tree of positions": dict(
        sizes=(32, 8, 128, 16), dtype="float32", more="alibi positions", tree_width=200
    ),
    "odd sizes": dict(sizes=(34, 2, 33, 3), layout="NHD", pages_per_block=4),
    "e5m2, NHD, per token": dict(
        sizes=(8, 4, 128, 16), cache="float8_e5m2", scales="token", layout="NHD", more="window"
    ),
    "int8, heads first, per head": dict(
        sizes=(8, 4, 128, 32), cache="int8", scales="head", layout="KV_HEADS_FIRST"
    ),
    "float32 queries, e4m3, latent": dict(
        sizes=(32, 1, 576, 64),
        value_head_dim=512,
        latent=True,
        dtype="float32",
        cache="float8_e4m3fn",
    ),
}


def call(
    generation, *, total_tokens=300, max_q_len=None, num_splits=0, tree_width=0, **options
):  # fmt: skip
    """Return a jitted call and its abstract arguments, pools in memory as their axes say."""
    fields = {name: options.pop(name) for name in FIELDS & options.keys()}
    decode, arguments = decode_call(generation, **options)
    named = dict(decode.__wrapped__.keywords)
    del named["num_splits"]
    named |= dict(backend=ejk.PallasRaggedPageAttention(**fields), max_q_len=max_q_len)
    query, sharding = arguments["query"], device(generation)
    shape = (total_tokens, *query.shape[1:])
    arguments["query"] = jax.ShapeDtypeStruct(shape, query.dtype, sharding=sharding)
    bounds = (query.shape[0] + 1,)
    arguments["cu_q_lens"] = jax.ShapeDtypeStruct(bounds, "int32", sharding=sharding)
    if "positions" in options.get("more", ""):
        arguments["positions"] = jax.ShapeDtypeStruct((total_tokens,), "int32", sharding=sharding)
    if tree_width:
        shape = (total_tokens, tree_width)
        arguments["tree_mask"] = jax.ShapeDtypeStruct(shape, "bool", sharding=sharding)
    return jax.jit(functools.partial(ejk.ragged_page_attention, **named)), arguments


FIELDS = {"block_q", "pages_per_block", "vmem_limit_bytes"}


def used_vmem(text: str) -> list[int]:
    """Read what each kernel of a compiled program uses, in the order of its launches."""
    found = {}
    for line in text.splitlines():
        if "tpu_custom_call" in line:
            number = re.search(r"ejk_ragged_page_attention\.?(\d*)", line)
            memories = json.loads(re.search(r'"used_scoped_memory_configs":(\[.*?\])', line)[1])
            sizes = [int(memory["size"]) for memory in memories if memory["memory_space"] == "1"]
            found[int(number[1] or 0)] = max(sizes)
    return [found[number] for number in sorted(found)]


def check(generation, monkeypatch, **options):
    predicted = []
    attend = caller.attend

    def watched(launches, *rest):
        predicted.extend(sum(sizes.vmem().values()) for sizes in launches)
        return attend(launches, *rest)

    monkeypatch.setattr(caller, "attend", watched)
    function, arguments = call(generation, **options)
    with jax.sharding.use_abstract_mesh(device(generation).mesh.abstract_mesh):
        text = function.lower(**arguments).compile().as_text()
    used = used_vmem(text)
    assert len(used) == len(predicted)
    assert all(a <= b for a, b in zip(sorted(used), sorted(predicted)))
    assert not copied_pools(text)
    return sorted(used), sorted(predicted)


@pytest.mark.one_in(16)
@pytest.mark.parametrize("generation", TOPOLOGIES)
@pytest.mark.parametrize("name", CALLS)
def test_compiles_in_the_memory_that_was_predicted(name, generation, monkeypatch):
    check(generation, monkeypatch, **CALLS[name])


@pytest.mark.thorough
@pytest.mark.parametrize("generation", TOPOLOGIES)
@pytest.mark.parametrize("name", MORE_CALLS)
def test_compiles_more(name, generation, monkeypatch):
    check(generation, monkeypatch, **MORE_CALLS[name])


def test_tables_too_large_for_scalar_memory_are_run_in_parts_by_the_same_kernels(monkeypatch):
    options = dict(sizes=(8, 2, 128, 16), num_seqs=200, max_blocks=2000, fused=True)
    used, _ = check("v6e", monkeypatch, **options)
    assert len(used) == 2


def test_a_hint_that_says_less_than_is_true_refuses_nothing():
    sizes = dict(sizes=(8, 2, 128, 16), num_seqs=8, max_blocks=512, total_tokens=65536)
    function, arguments = call("v5e", max_q_len=1, **sizes)
    with jax.sharding.use_abstract_mesh(device("v5e").mesh.abstract_mesh):
        function.trace(**arguments)


REFUSED = {
    "dtype=float16: ": dict(sizes=(8, 2, 128, 16), dtype="float16"),
    "max_blocks=250000, total_tokens=300: ": dict(sizes=(8, 2, 128, 16), max_blocks=250000),
    "above vmem_limit_bytes=500000": dict(sizes=(8, 2, 128, 16), vmem_limit_bytes=500_000),
    "blocks of 300 new tokens and 9 pages": dict(
        sizes=(64, 64, 256, 256), pages_per_block=9, block_q=300
    ),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_refuses_by_name_before_the_compiler(reason):
    function, arguments = call("v4", **REFUSED[reason])
    mesh = device("v4").mesh.abstract_mesh
    with jax.sharding.use_abstract_mesh(mesh), pytest.raises(ejk.UnsupportedError) as caught:
        function.trace(**arguments)
    assert f"pallas: {reason}" in str(caught.value) or f" {reason}" in str(caught.value)


def test_lowers_with_no_tpu_in_sight():
    function, arguments = call("v5e", **CALLS["everything"])
    plain = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), arguments)
    text = function.trace(**plain).lower(lowering_platforms=("tpu",)).as_text()
    assert len(re.findall("tpu_custom_call", text)) == 2
