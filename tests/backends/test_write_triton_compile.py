"""The Triton write compiled for GPUs that are not here: no spills, and 16 bytes at a time."""

import re

import jax.numpy as jnp
import offline
import pytest

from ejk.backends.gpu import Target
from ejk.backends.triton.write_kv_cache.kernel import write_kv_cache_kernel
from ejk.backends.triton.write_kv_cache.sizes import WriteSizes
from ejk.backends.write_kv_cache import WriteKVCacheProblem
from ejk.testing.configurations import LAYOUTS

pytestmark = pytest.mark.one_in(3)  # a fixed choice of targets, layouts and caches

NVIDIA = Target(90, num_sms=132, shared_memory=0)
AMD = Target(None, num_sms=304, shared_memory=0, is_amd=True)
POOLS = {
    "HND": lambda *half: (16384, *half, 8, 16, 128),
    "NHD": lambda *half: (16384, *half, 16, 8, 128),
    "KV_HEADS_FIRST": lambda *half: (8, 16384, *half, 16, 128),
}
VARIANTS = {
    **{layout: dict(layout=layout) for layout in LAYOUTS},
    **{f"{layout}, fused": dict(layout=layout, fused=True) for layout in LAYOUTS},
    "float16": dict(dtype="float16"),
    "float32": dict(dtype="float32"),
    "head dimension 80": dict(key_shape=(16384, 32, 16, 80)),
    "head dimension 96": dict(key_shape=(16384, 3, 16, 96)),
    "narrow values": dict(key_shape=(16384, 4, 16, 192), value_head_dim=128),
    "latent": dict(key_shape=(16384, 1, 64, 576), value_head_dim=0),
    "many heads": dict(key_shape=(16384, 64, 16, 128)),
}
QUANTISED = {
    "int8": dict(cache_dtype="int8", scales="token"),
    "int8, given scales": dict(cache_dtype="int8", scales="head"),
    "int4": dict(cache_dtype="uint8", scales="token", key_shape=(16384, 8, 16, 64)),
    "e4m3": dict(cache_dtype="float8_e4m3fn", scales="token"),
    "e5m2": dict(cache_dtype="float8_e5m2", scales="token"),
    "e4m3 without scales": dict(cache_dtype="float8_e4m3fn"),
    "e4m3, fused": dict(cache_dtype="float8_e4m3fn", scales="token", layout="NHD", fused=True),
    "e4m3, latent": dict(
        cache_dtype="float8_e4m3fn", scales="token", key_shape=(16384, 1, 64, 576), value_head_dim=0
    ),
    "float32 in bfloat16": dict(dtype="float32", cache_dtype="bfloat16"),
}


def problem_of(
    num_tokens, layout="HND", fused=False, dtype="bfloat16", key_shape=None, value_head_dim=None,
    cache_dtype=None, scales="none",
):  # fmt: skip
    key_shape = key_shape or POOLS[layout](*[2] * fused)
    width = key_shape[-1] if value_head_dim is None else value_head_dim
    value_shape = None if fused or not width else (*key_shape[:-1], width)
    return WriteKVCacheProblem(
        key_shape, value_shape, jnp.dtype(cache_dtype or dtype), layout, num_tokens,
        jnp.dtype(dtype), scales=scales,
    )  # fmt: skip


def compile_for(target, num_tokens, options):
    """Compile the kernel as the adapter would launch it on `target`."""
    problem = problem_of(num_tokens, **options)
    dtype, cache_dtype = problem.row_dtype.name, problem.cache_dtype.name
    pointers = {
        "key_ptr": dtype,
        "value_ptr": dtype,
        "slot_mapping_ptr": "int32",
        "value_scale_ptr": "float32",
        "key_scale_ptr": "float32",
        "key_cache_ptr": cache_dtype,
        "value_cache_ptr": cache_dtype,
    }
    is_cuda = target.startswith("sm_")
    compile_kernel = offline.compile_cuda if is_cuda else offline.compile_amd
    gpu = Target(int(target.removeprefix("sm_")), 132, 0) if is_cuda else AMD
    sizes = WriteSizes.of(problem, gpu)
    program = compile_kernel(
        write_kv_cache_kernel, pointers, sizes.constants(problem, gpu), target,
        num_warps=sizes.num_warps, num_stages=1,
    )  # fmt: skip
    return problem, sizes, program


def accesses(ptx):
    """Count the accesses to global memory by kind and bytes; those of slots have 32 bits each."""
    found = {}
    for kind, vector, bits in re.findall(r"(ld|st)\.global\S*?(?:\.(v\d))?\.b(\d+)", ptx):
        width = int(bits) // 8 * int((vector or "v1")[1:])
        found[kind, width] = found.get((kind, width), 0) + 1
    return found


@pytest.mark.parametrize("num_tokens", [64, 8192])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("target", ["sm_80", "sm_89", "sm_90", "sm_100", "sm_120"])
def test_rows_are_copied_16_bytes_at_a_time(target, variant, num_tokens):
    problem, sizes, program = compile_for(target, num_tokens, VARIANTS[variant])
    assert program.spill_store_bytes == program.spill_load_bytes == 0
    assert program.shared_bytes <= 8192
    # Keys and values of the block, each once; slots are loaded 4 bytes and more at a time.
    pools, threads = (1 if problem.latent else 2), 32 * sizes.num_warps
    block_bytes = sizes.tokens * sizes.row * problem.cache_dtype.itemsize
    assert block_bytes % (16 * threads) == 0
    found = accesses(program.ptx)
    assert {width: n for (kind, width), n in found.items() if kind == "st"} == {
        16: pools * block_bytes // (16 * threads)
    }
    assert found["ld", 16] >= found["st", 16]


@pytest.mark.parametrize("num_tokens", [64, 8192])
@pytest.mark.parametrize("variant", VARIANTS)
def test_amd_variants_do_not_spill(variant, num_tokens):
    _, _, program = compile_for("gfx942", num_tokens, VARIANTS[variant])
    assert program.vgpr_spills == program.sgpr_spills == 0
    assert program.lds_bytes <= 8192
    assert "global_store_dwordx4" in program.assembly
    assert not re.findall(r"global_store_(?!dwordx4)", program.assembly)


@pytest.mark.parametrize("variant", QUANTISED)
@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_codes_are_stored_as_wide_as_a_thread_has_them(target, variant):
    problem, sizes, program = compile_for(target, 8192, QUANTISED[variant])
    assert program.spill_store_bytes == program.spill_load_bytes == 0
    pools, threads = (1 if problem.latent else 2), 32 * sizes.num_warps
    codes = sizes.tokens * sizes.row // problem.cache_type.per_element
    own = codes * problem.cache_dtype.itemsize // threads
    found = {width: n for (kind, width), n in accesses(program.ptx).items() if kind == "st"}
    if problem.scales == "token":
        assert found.pop(4) >= pools + (own == 4) * pools
    if own != 4 or problem.scales != "token":
        assert found == {min(own, 16): pools * max(1, own // 16)}
    # The target's own rounding, or bits: no other one is as exact.
    has_own = "cvt.rn.satfinite.e" in program.ptx
    assert has_own == (problem.cache_dtype.name.startswith("float8") and target == "sm_90")
    packs = "cvt.pack.sat.s8.s32" in program.ptx
    assert packs == (problem.cache_dtype.kind in "iu" and target == "sm_90")
    assert ("div.rn.f32" in program.ptx) == (problem.scales != "none")
    assert not re.findall(r"div\.(approx|full)", program.ptx)


@pytest.mark.parametrize("num_tokens", [64, 8192])
@pytest.mark.parametrize("variant", ["HND", "int8", "int4", "e4m3"])
def test_rows_are_on_their_way_before_slots_are_compared(variant, num_tokens):
    """A barrier keeps the assembler from loading them afterwards."""
    problem, sizes, program = compile_for("sm_90", num_tokens, (VARIANTS | QUANTISED)[variant])
    before, _, after = program.ptx.partition("bar.sync")
    row_bytes = 2 * sizes.tokens * sizes.row * problem.row_dtype.itemsize
    rows = row_bytes // (16 * 32 * sizes.num_warps)
    assert accesses(before)["ld", 16] in (rows, rows + 1)  # and the program's own slots
    assert accesses(after)["ld", 16] >= 1  # of slots


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("width", [1, 2, 4, 33, 64, 80])
@pytest.mark.parametrize("variant", ["int8", "int8, given scales", "int4"])
def test_codes_are_packed_where_a_thread_has_four(variant, width, dtype):
    """Fewer do not compile: threads of short rows round by the bits of a sum."""
    options = QUANTISED[variant] | dict(key_shape=(128, 1, 16, width), dtype=dtype)
    for num_tokens in (3, 8192):
        _, sizes, program = compile_for("sm_90", num_tokens, options)
        codes = sizes.tokens * sizes.row // (2 if variant == "int4" else 1)
        packs = "cvt.pack.sat.s8.s32" in program.ptx
        assert packs == (codes >= 128 * sizes.num_warps)


@pytest.mark.parametrize("value_head_dim", [1, 2])
@pytest.mark.parametrize("variant", ["int8", "int8, given scales"])
def test_values_of_fewer_than_four_codes_beside_wide_keys(variant, value_head_dim):
    """The keys' are packed four at a time; a block of such values has not got four."""
    shape = dict(key_shape=(128, 1, 16, 256), value_head_dim=value_head_dim)
    _, sizes, program = compile_for("sm_90", 3, QUANTISED[variant] | shape)
    assert sizes.tokens * value_head_dim < 4
    assert "cvt.pack.sat.s8.s32" in program.ptx


@pytest.mark.parametrize("variant", QUANTISED)
def test_amd_variants_that_quantise_do_not_spill(variant):
    _, _, program = compile_for("gfx942", 8192, QUANTISED[variant])
    assert program.vgpr_spills == program.sgpr_spills == 0


def test_narrow_stores_are_seen():
    """Or the tests above would prove nothing: a head of 33 is no multiple of 16 bytes."""
    _, _, program = compile_for("sm_90", 64, dict(key_shape=(128, 3, 16, 33)))
    assert ("st", 16) not in accesses(program.ptx)


def test_many_tokens_share_a_program_and_few_do_not():
    wide = problem_of(64, key_shape=(128, 64, 16, 128))
    assert WriteSizes.of(problem_of(64), NVIDIA) == (1, 1024, None, 4)
    assert WriteSizes.of(problem_of(64), AMD) == (1, 1024, None, 2)
    assert WriteSizes.of(problem_of(8192), NVIDIA) == (4, 1024, None, 4)
    assert WriteSizes.of(problem_of(8192, dtype="float32"), NVIDIA) == (2, 1024, None, 4)
    assert WriteSizes.of(wide, NVIDIA) == (1, 2048, None, 4)
    assert WriteSizes.of(wide, NVIDIA).grid(wide) == 64 * 4
