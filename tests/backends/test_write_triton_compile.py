"""The Triton write compiled for GPUs that are not here: no spills, and 16 bytes at a time."""

import re

import jax.numpy as jnp
import offline
import pytest
from strategies import LAYOUTS

from ejk.backends.gpu import Target
from ejk.backends.triton.write_kv_cache.kernel import write_kv_cache_kernel
from ejk.backends.triton.write_kv_cache.sizes import WriteSizes
from ejk.backends.write_kv_cache import WriteKVCacheProblem

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


def problem_of(
    num_tokens, layout="HND", fused=False, dtype="bfloat16", key_shape=None, value_head_dim=None
):
    key_shape = key_shape or POOLS[layout](*[2] * fused)
    width = key_shape[-1] if value_head_dim is None else value_head_dim
    value_shape = None if fused or not width else (*key_shape[:-1], width)
    return WriteKVCacheProblem(
        num_tokens, key_shape, value_shape, jnp.dtype(dtype), jnp.dtype(dtype), layout
    )


def compile_for(target, num_tokens, options):
    """Compile the kernel as the adapter would launch it on `target`."""
    problem = problem_of(num_tokens, **options)
    dtype = problem.cache_dtype.name
    pointers = {
        "key_ptr": dtype,
        "value_ptr": dtype,
        "slot_mapping_ptr": "int32",
        "key_cache_ptr": dtype,
        "value_cache_ptr": dtype,
    }
    is_cuda = target.startswith("sm_")
    compile_kernel = offline.compile_cuda if is_cuda else offline.compile_amd
    sizes = WriteSizes.of(problem, NVIDIA if is_cuda else AMD)
    program = compile_kernel(
        write_kv_cache_kernel, pointers, sizes.constants(problem), target,
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


def test_narrow_stores_are_seen():
    """Or the tests above would prove nothing: a head of 33 is no multiple of 16 bytes."""
    _, _, program = compile_for("sm_90", 64, dict(key_shape=(128, 3, 16, 33)))
    assert ("st", 16) not in accesses(program.ptx)


def test_many_tokens_share_a_program_and_few_do_not():
    wide = problem_of(64, key_shape=(128, 64, 16, 128))
    assert WriteSizes.of(problem_of(64), NVIDIA) == (1, 1024, 4)
    assert WriteSizes.of(problem_of(64), AMD) == (1, 1024, 2)
    assert WriteSizes.of(problem_of(8192), NVIDIA) == (4, 1024, 4)
    assert WriteSizes.of(problem_of(8192, dtype="float32"), NVIDIA) == (2, 1024, 4)
    assert WriteSizes.of(wide, NVIDIA) == (1, 2048, 4)
    assert WriteSizes.of(wide, NVIDIA).grid(wide) == 64 * 4
