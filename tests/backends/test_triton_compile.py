"""The Triton kernels compiled for GPUs that are not here: shared memory, spills, wide copies."""

import collections
import dataclasses
import re

import jax.numpy as jnp
import offline
import pytest

from ejk.backends.gpu import SHARED_MEMORY, SHARED_MEMORY_ROCM, Target
from ejk.backends.page_attention import PageAttentionProblem
from ejk.backends.triton import _sizes
from ejk.backends.triton._sizes import value_bytes
from ejk.backends.triton.page_attention.backend import TritonPageAttention
from ejk.backends.triton.page_attention.combine_kernel import combine_parts_kernel
from ejk.backends.triton.page_attention.groups_kernel import groups_kernel
from ejk.backends.triton.page_attention.kernel import page_attention_kernel
from ejk.backends.triton.page_attention.members_kernel import members_kernel
from ejk.backends.triton.page_attention.packing import packing_constants, packing_warps
from ejk.backends.triton.page_attention.packs_kernel import packs_kernel
from ejk.backends.triton.page_attention.plan import plan_blocks, plan_constants
from ejk.backends.triton.page_attention.plan_kernel import page_attention_plan_kernel
from ejk.backends.triton.page_attention.sizes import Sizes

LLAMA = PageAttentionProblem(
    num_seqs=64,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    value_head_dim=128,
    num_pages=16384,
    page_size=16,
    max_blocks=256,
    query_dtype=jnp.dtype("bfloat16"),
    cache_dtype=jnp.dtype("bfloat16"),
    cache_layout="NHD",
    fused=False,
    latent=False,
    has_window=False,
    soft_cap=None,
    has_sinks=False,
    has_alibi=False,
    return_lse=False,
    num_splits=0,
    plan=None,
    visible_bound=4096,
)
EVERY_OPTION = {
    "has_window": True,
    "soft_cap": 30.0,
    "has_sinks": True,
    "has_alibi": True,
    "return_lse": True,
}
GROUP_OF_3 = {"head_dim": 64, "value_head_dim": 64, "num_heads": 9, "num_kv_heads": 3}
LATENT = {
    "head_dim": 576,
    "value_head_dim": 512,
    "num_heads": 16,
    "num_kv_heads": 1,
    "latent": True,
    "page_size": 64,
}


def of_dtype(name: str) -> dict:
    return {"query_dtype": jnp.dtype(name), "cache_dtype": jnp.dtype(name)}


VARIANTS = {
    "head dimension 128": {},
    "head dimension 64": {"head_dim": 64, "value_head_dim": 64},
    "head dimension 64, group of 3": GROUP_OF_3,
    "float16": of_dtype("float16"),
    "fused pools": {"fused": True},
    "interleaved pools": {"fused": True, "cache_layout": "INTERLEAVED"},
    "one pass": {"num_splits": 1},
    "splits": {"num_splits": 4},
    "packs": {"num_prefix_groups": 4, "has_alibi": True, "has_sinks": True, "soft_cap": 30.0},
    "every option": EVERY_OPTION,
    "every option, splits": EVERY_OPTION | {"num_splits": 4},
    "pages over devices": {"is_part": True, "return_lse": True},
    "every option, pages over devices": EVERY_OPTION | {"is_part": True},
}
WIDE = {
    "head dimension 256": {"head_dim": 256, "value_head_dim": 256, "num_heads": 16},
    "head dimension 80": {"head_dim": 80, "value_head_dim": 80},
    "latent attention": LATENT,
    "latent attention, pages of 16": LATENT | {"page_size": 16},
    "latent attention, 32 heads": LATENT | {"num_heads": 32},
    "latent attention, 128 heads": LATENT | {"num_heads": 128},
    "latent attention, 128 heads, every option": LATENT | {"num_heads": 128} | EVERY_OPTION,
    "float32": of_dtype("float32"),
    "float32 latent attention": LATENT | of_dtype("float32"),
    "group of 71": {"num_heads": 71, "num_kv_heads": 1, "head_dim": 64, "value_head_dim": 64},
}


def of_cache(name: str, scales: str, query: str = "bfloat16") -> dict:
    return {
        "query_dtype": jnp.dtype(query), "cache_dtype": jnp.dtype(name), "scales": scales,
    }  # fmt: skip


QUANTISED = {
    "e4m3, scales of heads": of_cache("float8_e4m3fn", "head"),
    "e4m3": of_cache("float8_e4m3fn", "none"),
    "e5m2": of_cache("float8_e5m2", "none", "float16"),
    "int8, scales of tokens": of_cache("int8", "token"),
    "int4": of_cache("uint8", "token"),
    "int8, every option": EVERY_OPTION | of_cache("int8", "token"),
    "head dimension 64, e4m3": of_cache("float8_e4m3fn", "head") | VARIANTS["head dimension 64"],
    "head dimension 256, int8": of_cache("int8", "head") | WIDE["head dimension 256"],
    "latent attention, int8": of_cache("int8", "token") | LATENT,
    "latent attention, e4m3": of_cache("float8_e4m3fn", "none") | LATENT,
    "latent attention, 32 heads, e4m3": (
        of_cache("float8_e4m3fn", "none") | LATENT | {"num_heads": 32}
    ),
}
OTHER_FLOATS = {
    "float32 on bfloat16": of_cache("bfloat16", "none", "float32"),
    "float32 on int8": of_cache("int8", "token", "float32"),
    "float16 on bfloat16": of_cache("bfloat16", "none", "float16"),
    "bfloat16 on float16": of_cache("float16", "head"),
    "bytes, as a head dimension of 33 is no words": (
        of_cache("int8", "token") | {"head_dim": 33, "value_head_dim": 33}
    ),
}


# Of the others a quick run compiles a third.
OTHERS = ("sm_80", "sm_89", "sm_100", "sm_120")
each_target = pytest.mark.parametrize(
    "target", ["sm_90", *(pytest.param(name, marks=pytest.mark.one_in(3)) for name in OTHERS)]
)

each_thorough_target = pytest.mark.parametrize(
    "target", ["sm_90", *(pytest.param(name, marks=pytest.mark.thorough) for name in OTHERS)]
)


def gpu_of(target: str) -> Target:
    """Return a GPU of a target, with the multiprocessors of an H100 or an MI300X."""
    if not target.startswith("sm_"):
        return Target(None, num_sms=304, shared_memory=SHARED_MEMORY_ROCM, is_amd=True)
    capability = int(target.removeprefix("sm_"))
    return Target(capability, num_sms=132, shared_memory=SHARED_MEMORY[capability])


def compile_for(target: str, options: dict, packed: bool = False):
    """Compile the attention kernel as the adapter would launch it on `target`, also for packs."""
    problem = dataclasses.replace(LLAMA, **options)
    gpu = gpu_of(target)
    sizes = Sizes.of(problem, TritonPageAttention(), gpu)
    pool = problem.cache_dtype.name
    pool = "uint8" if pool.startswith("float8") else pool  # as jax-triton is told
    pointers = {
        "query_ptr": problem.query_dtype.name,
        "key_ptr": pool,
        "value_ptr": pool,
        "context_lens_ptr": "int32",
        "block_tables_ptr": "int32",
        "attn_scale_ptr": "float32",
        "sliding_window_ptr": "int32",
        "sinks_ptr": "float32",
        "alibi_slopes_ptr": "float32",
        "key_scale_ptr": "float32",
        "value_scale_ptr": "float32",
        "page_distances_ptr": "int32",
        "work_ptr": "int32",
        "part_out_ptr": "float32",
        "part_lse_ptr": "float32",
        "out_ptr": problem.out_dtype.name,
        "lse_ptr": "float32",
    }
    compile_kernel = offline.compile_amd if gpu.is_amd else offline.compile_cuda
    blocks = sizes.pack_blocks if packed else sizes.blocks
    assert blocks is not None
    program = compile_kernel(
        page_attention_kernel,
        pointers,
        sizes.constants(problem, gpu, packed),
        target,
        num_warps=blocks.num_warps,
        num_stages=blocks.num_stages,
    )
    return sizes, problem, program


@pytest.mark.one_in(2)
@pytest.mark.parametrize("variant", VARIANTS)
@each_target
def test_16_bit_variants_neither_spill_nor_overrun_nor_load_narrowly(target, variant):
    sizes, problem, program = compile_for(target, VARIANTS[variant])
    assert program.spill_store_bytes == program.spill_load_bytes == 0
    assert program.shared_bytes <= sizes.blocks.shared_memory
    assert sizes.blocks.shared_memory <= offline.SHARED_MEMORY_BYTES[target]
    assert program.matrix_products > 0
    # Keys and values of a block, each thread 16 bytes at a time, in the prologue's loads, one less
    # than there are stages, and the loop's: a stride of unknown divisibility would make these 2 or
    # 4 bytes wide.
    block_bytes = sizes.blocks.block_kv * (problem.head_dim + problem.value_head_dim) * 2
    assert program.async_copies == {
        16: sizes.blocks.num_stages * block_bytes // (sizes.blocks.num_warps * 32 * 16)
    }


PACKS = {  # options, rows where there is room for 64
    "64 sequences": (VARIANTS["packs"], 64),
    "8 sequences": (VARIANTS["packs"] | {"num_seqs": 8, "visible_bound": 32768}, 32),
    "4 sequences": (VARIANTS["packs"] | {"num_seqs": 4, "visible_bound": 65536}, 16),
    "plain": ({"num_prefix_groups": 4}, 64),
    "head dimension 64": ({"num_prefix_groups": 4} | VARIANTS["head dimension 64"], 64),
    "head dimension 80": ({"num_prefix_groups": 4} | WIDE["head dimension 80"], 64),
    "group of 3": ({"num_prefix_groups": 4} | GROUP_OF_3, 64),
    "float16, fused pools": ({"num_prefix_groups": 4, "fused": True} | of_dtype("float16"), 64),
}


@pytest.mark.one_in(2)
@pytest.mark.parametrize("variant", PACKS)
@each_target
def test_packs_hardly_spill_and_neither_overrun_nor_load_narrowly(target, variant):
    options, rows = PACKS[variant]
    sizes, problem, program = compile_for(target, options, packed=True)
    blocks = sizes.pack_blocks
    assert blocks is not None
    assert blocks.block_group == (rows if target in ("sm_90", "sm_100") else min(rows, 32))
    # Of 64 rows, and of 32 without products of warpgroups, a few registers spill; of 16 on sm_89 3.
    spilled = max(program.spill_store_bytes, program.spill_load_bytes)
    few = 12 if target == "sm_89" else 0
    assert spilled <= (64 if blocks.block_group >= 32 else few)
    assert program.shared_bytes <= blocks.shared_memory <= offline.SHARED_MEMORY_BYTES[target]
    assert program.matrix_products > 0
    block_bytes = blocks.block_kv * (problem.head_dim + problem.value_head_dim) * 2
    copies = blocks.num_stages * block_bytes // (blocks.num_warps * 32 * 16)
    assert set(program.async_copies) == {16} and program.wide_async_copies >= copies
    if target == "sm_90" and rows >= 64:  # products of warpgroups, the weights in registers
        assert "wgmma" in program.ptx and not program.warnings


@pytest.mark.one_in(3)
@pytest.mark.parametrize("variant", VARIANTS)
def test_16_bit_variants_spill_no_vector_registers_on_amd(variant):
    *_, program = compile_for("gfx942", VARIANTS[variant])
    assert program.vgpr_spills == 0


@pytest.mark.parametrize(
    "variant",
    [
        *VARIANTS,
        *WIDE,
        *(pytest.param(name, marks=pytest.mark.thorough) for name in (*QUANTISED, *OTHER_FLOATS)),
    ],
)
def test_amd_variants_fit(variant):
    options = (VARIANTS | WIDE | QUANTISED | OTHER_FLOATS)[variant]
    sizes, _, program = compile_for("gfx942", options)
    assert program.lds_bytes <= sizes.blocks.shared_memory <= SHARED_MEMORY_ROCM


@pytest.mark.one_in(2)
@pytest.mark.parametrize("variant", QUANTISED)
@each_thorough_target
def test_quantised_variants_neither_spill_nor_overrun_nor_load_narrowly(target, variant):
    sizes, problem, program = compile_for(target, QUANTISED[variant])
    assert program.spill_store_bytes == program.spill_load_bytes == 0
    assert program.shared_bytes <= sizes.blocks.shared_memory
    assert program.matrix_products > 0
    # Codes are copied 16 bytes at a time, as 16 bits are; a thread has too few of 64 entries.
    width = 512 if problem.latent else problem.head_dim + problem.value_head_dim
    block_bytes = sizes.blocks.block_kv * width * value_bytes(problem)
    copies = sizes.blocks.num_stages * block_bytes / (sizes.blocks.num_warps * 32 * 16)
    assert program.wide_async_copies >= copies
    assert 2 not in program.async_copies and program.async_copies.get(8, 0) <= copies / 4
    converts_itself = "e4m3" in variant and target in ("sm_89", "sm_90", "sm_100", "sm_120")
    assert ("cvt.rn.f16x2.e4m3x2" in program.ptx) == converts_itself
    if "int" in variant:  # taken as subnormals, with no arithmetic
        assert not re.search(r"(sub|fma\.rn)\.f16x2", program.ptx)


@pytest.mark.parametrize("variant", OTHER_FLOATS)
@each_thorough_target
def test_variants_of_other_floats_fit(target, variant):
    sizes, _, program = compile_for(target, OTHER_FLOATS[variant])
    assert program.matrix_products > 0  # also of float32
    assert program.shared_bytes <= sizes.blocks.shared_memory
    assert sizes.blocks.shared_memory <= offline.SHARED_MEMORY_BYTES[target]


@pytest.mark.one_in(2)
@pytest.mark.parametrize("variant", WIDE)
@each_target
def test_wide_variants_fit(target, variant):
    sizes, _, program = compile_for(target, WIDE[variant])
    assert program.shared_bytes <= sizes.blocks.shared_memory
    assert sizes.blocks.shared_memory <= offline.SHARED_MEMORY_BYTES[target]


LARGE = {"num_seqs": 64, "max_blocks": 256, "visible_bound": 4096}  # of 16 tokens
TOGETHER = {
    "group of 71": (2, WIDE["group of 71"]),
    "group of 32, head dimension 64": (
        2, {"num_heads": 256, "head_dim": 64, "value_head_dim": 64} | LARGE,
    ),
    **{
        f"head dimension {width}": (
            3, {"head_dim": width, "value_head_dim": width, "num_heads": 16} | LARGE,
        )
        for width in (64, 80, 96, 128, 192, 256)
    },
    "every option": (3, EVERY_OPTION | LARGE),
}  # fmt: skip


@pytest.mark.parametrize("variant", TOGETHER)
def test_programs_that_run_together_fit_on_a_multiprocessor(variant):
    count, options = TOGETHER[variant]
    sizes, _, program = compile_for("sm_90", options)
    blocks = sizes.blocks
    assert blocks.per_sm == count and sizes.plan is not None and sizes.plan.resident == count * 132
    assert count * (program.shared_bytes + 1024) <= 228 * 1024
    assert count * program.registers * 32 * blocks.num_warps <= 2**16


def test_a_page_is_looked_up_once_for_all_its_tokens(monkeypatch):
    def loads(page_size):
        return compile_for("sm_90", LATENT | {"page_size": page_size})[2].ptx.count("ld.global")

    found = {page_size: loads(page_size) for page_size in (64, 32, 16, 4)}
    monkeypatch.setattr(_sizes, "SMALLEST_PAGE", 128)
    assert max(found[32], found[16]) < found[4] == loads(16)
    assert found[64] == loads(64) < found[32]


def test_two_warpgroups_share_the_products_of_64_rows():
    """Each has half of a block's tokens in the logits, and half of the values' entries."""
    sizes, problem, program = compile_for("sm_90", WIDE["latent attention, 128 heads"])
    tokens = sizes.blocks.block_kv
    products = collections.Counter(re.findall(r"wgmma\.mma_async\S+\.m64(n\d+)k16", program.ptx))
    assert products == {
        f"n{tokens // 2}": problem.head_dim // 16,
        f"n{problem.value_head_dim // 2}": tokens // 16,
    }
    assert program.spill_store_bytes == 0 and not program.warnings


def test_the_compiler_keeps_chains_of_float32_products_apart(monkeypatch):
    """It makes one chain of a product and a plain sum; 576 = 9 * 64 leaves 8 sums to add."""

    def additions(longest_chain):
        monkeypatch.setattr(_sizes, "LONGEST_CHAIN", longest_chain)
        *_, program = compile_for("sm_90", LATENT | of_dtype("float32") | {"latent": False})
        return len(re.findall(r"add(?:\.rn)?\.f32", program.ptx))

    assert additions(64) == additions(512) + 8, "a thread holds one logit"


@pytest.mark.parametrize("num_seqs", [64, 256, 1024, 1025])
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_120"])
def test_planning_does_not_spill(target, num_seqs):
    sizes, *_ = compile_for(target, {"num_seqs": num_seqs})
    assert sizes.plan is not None
    block_seqs, num_warps = plan_blocks(num_seqs)
    names = ("context_lens_ptr", "sliding_window_ptr", "floors_ptr", "places_ptr", "work_ptr")
    program = offline.compile_cuda(
        page_attention_plan_kernel,
        dict.fromkeys(names, "int32"),
        plan_constants(sizes.plan, block_seqs),
        target,
        num_warps=num_warps,
        num_stages=1,
    )
    assert program.spill_store_bytes == 0


@pytest.mark.parametrize("num_seqs", [64, 1024])
@pytest.mark.parametrize("kernel", [groups_kernel, members_kernel, packs_kernel])
def test_finding_packs_does_not_spill(kernel, num_seqs):
    sizes, problem, _ = compile_for("sm_90", {"num_seqs": num_seqs, "num_prefix_groups": 1})
    assert sizes.plan is not None and sizes.plan.packs is not None
    constants = packing_constants(sizes.plan, 1, problem.max_blocks)[kernel.__name__]
    program = offline.compile_cuda(
        kernel,
        {name: "int32" for name in kernel.arg_names if name.endswith("_ptr")},
        constants,
        "sm_90",
        num_warps=packing_warps(num_seqs),
        num_stages=1,
    )
    assert program.spill_store_bytes == 0 and program.registers <= 64


@pytest.mark.parametrize("tokens", [1, 8])
@pytest.mark.parametrize("options", [{}, {"num_splits": 1024}], ids=["planned", "splits"])
def test_combining_does_not_spill_and_is_no_more_code_for_many_splits(options, tokens):
    def compile_combination(options):
        problem = dataclasses.replace(LLAMA, **options)
        sizes = Sizes.of(problem, TritonPageAttention(), gpu_of("sm_90"))
        return offline.compile_cuda(
            combine_parts_kernel,
            {
                "part_out_ptr": "float32",
                "part_lse_ptr": "float32",
                "sinks_ptr": "float32",
                "work_ptr": "int32",
                "spans_ptr": "int32",
                "out_ptr": "bfloat16",
                "lse_ptr": "float32",
            },
            sizes.combine_constants(problem, tokens),
            "sm_90",
            num_warps=sizes.combine_warps,
            num_stages=1,
        )

    program = compile_combination(options)
    assert program.spill_store_bytes == 0
    few = compile_combination(options | {"num_splits": options.get("num_splits", 0) and 16})
    assert len(program.ptx.splitlines()) <= 1.1 * len(few.ptx.splitlines())
