"""The ragged Triton kernels compiled for GPUs that are not here, as in `test_triton_compile`."""

import dataclasses
import functools
import re

import jax.numpy as jnp
import offline
import pytest
from test_triton_compile import EVERY_OPTION, GROUP_OF_3, LATENT, LLAMA, gpu_of, of_dtype

from ejk.backends.gpu import SHARED_MEMORY_ROCM
from ejk.backends.paged_problem import PagedProblem
from ejk.backends.ragged_page_attention import RaggedPageAttentionProblem
from ejk.backends.triton.ragged_page_attention.backend import TritonRaggedPageAttention
from ejk.backends.triton.ragged_page_attention.blocks import HOPPER_LONG, HOPPER_SHORT
from ejk.backends.triton.ragged_page_attention.combine_kernel import ragged_combine_kernel
from ejk.backends.triton.ragged_page_attention.kernel import ragged_page_attention_kernel
from ejk.backends.triton.ragged_page_attention.plan_kernel import ragged_plan_kernel
from ejk.backends.triton.ragged_page_attention.sizes import RaggedSizes

MIXED = RaggedPageAttentionProblem(
    **{field.name: getattr(LLAMA, field.name) for field in dataclasses.fields(PagedProblem)},
    total_tokens=4096,
    has_positions=False,
    tree_width=0,
    q_len_bound=4096,
    visible_bound=4096,
)
LONG = {"max_blocks": 2048, "visible_bound": 32_768}
VARIANTS = {
    "head dimension 128": {},
    "head dimension 128, long contexts": LONG,
    "head dimension 64": {"head_dim": 64, "value_head_dim": 64},
    "every option": EVERY_OPTION,
    "every option but slopes": EVERY_OPTION | {"has_alibi": False},
}
MORE_VARIANTS = {
    "head dimension 64, every option": EVERY_OPTION | {"head_dim": 64, "value_head_dim": 64},
    "head dimension 64, group of 3": GROUP_OF_3,
    "float16": of_dtype("float16"),
    "fused pools": {"fused": True},
    "interleaved pools": {"fused": True, "cache_layout": "INTERLEAVED"},
    "pages of 64": {"page_size": 64, "max_blocks": 64},
    "tree mask": {"tree_width": 8},
}
UNUSUAL = {
    "head dimension 256": {"head_dim": 256, "value_head_dim": 256, "num_heads": 16},
    "head dimension 80": {"head_dim": 80, "value_head_dim": 80},
    "latent attention": LATENT,
    "latent attention, 128 heads": LATENT | {"num_heads": 128},
    "float32": of_dtype("float32"),
    "tree of positions": EVERY_OPTION | {"tree_width": 8, "has_positions": True},
}
QUANTISED = {
    "e4m3": {"cache_dtype": jnp.dtype("float8_e4m3fn"), "scales": "head"},
    "int8, scales of tokens": {"cache_dtype": jnp.dtype("int8"), "scales": "token"},
    "int4": {"cache_dtype": jnp.dtype("uint8"), "scales": "token"},
}
TARGETS = ("sm_80", "sm_89", "sm_90", "sm_100", "sm_120")
NARROW, WIDE = 0, 1
each_launch = pytest.mark.parametrize("which", [NARROW, WIDE], ids=["narrow", "wide"])


def cases(always: list[tuple[str, str]]):
    """Every target with every variant; but for those named, in the thorough tier."""
    pairs = [(target, variant) for target in TARGETS for variant in VARIANTS | MORE_VARIANTS]
    return pytest.mark.parametrize(
        ("target", "variant"),
        [pytest.param(*p, marks=() if p in always else pytest.mark.thorough) for p in pairs],
    )


def sizes_for(target: str, problem, **tuning):
    """How the adapter would launch `problem` on `target`."""
    return RaggedSizes.of(problem, TritonRaggedPageAttention(**tuning), gpu_of(target))


def compile_for(target: str, options: dict, which: int):
    """Compile one launch of the attention kernel as the adapter would make it on `target`."""
    problem = dataclasses.replace(MIXED, **options)
    sizes = sizes_for(target, problem)
    blocks, dtype = sizes.blocks[which], problem.query_dtype.name
    cache_dtype = problem.cache_dtype.name
    pointers = {
        "query_ptr": dtype,
        "cu_q_lens_ptr": "int32",
        "key_ptr": cache_dtype,
        "value_ptr": cache_dtype,
        "block_tables_ptr": "int32",
        "attn_scale_ptr": "float32",
        "sliding_window_ptr": "int32",
        "sinks_ptr": "float32",
        "alibi_slopes_ptr": "float32",
        "key_scale_ptr": "float32",
        "value_scale_ptr": "float32",
        "positions_ptr": "int32",
        "tree_mask_ptr": "bool",
        "work_ptr": "int32",
        "part_out_ptr": "float32",
        "part_lse_ptr": "float32",
        "out_ptr": dtype,
        "lse_ptr": "float32",
    }
    compile_kernel = offline.compile_amd
    if target.startswith("sm_"):
        compile_kernel = functools.partial(offline.compile_cuda, max_registers=blocks.max_registers)
    program = compile_kernel(
        ragged_page_attention_kernel,
        pointers,
        sizes.constants(problem, which, gpu_of(target)),
        target,
        num_warps=blocks.num_warps,
        num_stages=blocks.num_stages,
    )
    return problem, blocks, program


@each_launch
@cases(
    [
        *(("sm_90", variant) for variant in VARIANTS),
        ("sm_80", "head dimension 128"),
        ("sm_89", "head dimension 128"),
        ("sm_120", "every option"),
        ("sm_90", "interleaved pools"),
    ]
)
def test_16_bit_variants_neither_spill_nor_overrun_nor_load_narrowly(target, variant, which):
    problem, blocks, program = compile_for(target, (VARIANTS | MORE_VARIANTS)[variant], which)
    few = 64 if blocks.max_registers else 0  # measured to be worth it
    assert max(program.spill_store_bytes, program.spill_load_bytes) <= few
    assert program.shared_bytes <= blocks.shared_memory <= offline.SHARED_MEMORY_BYTES[target]
    # Keys and values, each thread 16 bytes at a time, in the prologue of each loop, one block less
    # than there are stages, and in the loop. Blackwell's products peel off more of the prologue.
    tokens = blocks.num_stages * (
        blocks.block_kv + blocks.edge_kv if blocks.peel else blocks.block_kv
    )
    token_bytes = (problem.head_dim + problem.value_head_dim) * 2
    loads = tokens * token_bytes // (blocks.num_warps * 32 * 16)
    assert set(program.async_copies) <= {16, 4}, "4: table entries and positions"
    if target == "sm_100" and which == WIDE:
        assert program.wide_async_copies >= loads
    else:
        assert program.wide_async_copies == loads
    products = {
        "wgmma": len(re.findall(r"wgmma\.mma_async", program.ptx)),
        "tcgen05": len(re.findall(r"tcgen05\.mma", program.ptx)),
        "mma": len(re.findall(r"\bmma\.sync", program.ptx)),
    }
    expected = {"sm_90": "wgmma", "sm_100": "tcgen05"}.get(target, "mma")
    used = {name for name, count in products.items() if count}
    assert used == {expected if which == WIDE else "mma"}


@each_launch
@pytest.mark.parametrize(
    ("target", "variant"),
    [
        pytest.param(target, variant, marks=pytest.mark.thorough)
        for target in TARGETS
        for variant in UNUSUAL
    ],
)
def test_unusual_variants_fit(target, variant, which):
    _, blocks, program = compile_for(target, UNUSUAL[variant], which)
    assert program.shared_bytes <= blocks.shared_memory <= offline.SHARED_MEMORY_BYTES[target]


@each_launch
@pytest.mark.parametrize("variant", QUANTISED)
@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_quantised_variants_fit_and_load_words(target, variant, which):
    """Products take tensor cores, and every copy of codes is as wide as a thread's share."""
    problem, blocks, program = compile_for(target, QUANTISED[variant], which)
    few = 352 if blocks.max_registers else 0  # measured to be worth it
    assert max(program.spill_store_bytes, program.spill_load_bytes) <= few
    assert program.shared_bytes <= blocks.shared_memory <= offline.SHARED_MEMORY_BYTES[target]
    token_bytes = 128 // problem.cache_type.per_element
    widths = {
        min(16, n * token_bytes // (32 * blocks.num_warps))
        for n in (blocks.block_kv, blocks.edge_kv)
    }
    assert widths <= set(program.async_copies) <= widths | {4}  # 4: table entries and scales
    expected = "wgmma" if target == "sm_90" and which == WIDE else "mma.sync"
    assert expected in program.ptx


@each_launch
@pytest.mark.parametrize(
    "variant",
    [
        "head dimension 128",
        *(
            pytest.param(variant, marks=pytest.mark.thorough)
            for variant in (*VARIANTS, *MORE_VARIANTS, *UNUSUAL)
            if variant != "head dimension 128"
        ),
    ],
)
def test_amd_variants_fit_and_16_bits_spill_no_vector_registers(variant, which):
    options = (VARIANTS | MORE_VARIANTS | UNUSUAL)[variant]
    _, blocks, program = compile_for("gfx942", options, which)
    assert program.lds_bytes <= blocks.shared_memory <= SHARED_MEMORY_ROCM
    if variant not in UNUSUAL:
        assert program.vgpr_spills == 0


def test_tuned_blocks_of_an_h100_fit():
    """What `benchmarks/tune_ragged.py` tries fits by the bound, or is refused before it runs."""
    long = dataclasses.replace(MIXED, **LONG)
    assert sizes_for("sm_90", MIXED).blocks[WIDE].rows == HOPPER_SHORT[0]
    assert sizes_for("sm_90", long).blocks[WIDE].rows == HOPPER_LONG[0]
    few = dataclasses.replace(long, total_tokens=512)
    assert sizes_for("sm_90", few).blocks[WIDE].max_registers is None, "too few"
    wide = {"block_rows": 128, "block_kv": 128, "num_warps": 8, "num_stages": 3}
    blocks = sizes_for("sm_90", MIXED, **wide).blocks[WIDE]
    assert (blocks.rows, blocks.block_kv, blocks.num_stages) == (128, 128, 3)
    assert 229_376 <= blocks.shared_memory <= offline.SHARED_MEMORY_BYTES["sm_90"]


@pytest.mark.parametrize("target", ["sm_90", pytest.param("sm_120", marks=pytest.mark.thorough)])
def test_planning_and_combining_do_not_spill(target):
    sizes = sizes_for(target, MIXED)
    integers = {"cu_q_lens_ptr": "int32", "context_lens_ptr": "int32"}
    integers |= {"sliding_window_ptr": "int32", "work_ptr": "int32"}
    parts = {"part_out_ptr": "float32", "part_lse_ptr": "float32"}
    results = {"out_ptr": "bfloat16", "lse_ptr": "float32"}
    plan = offline.compile_cuda(
        ragged_plan_kernel, integers, sizes.plan_constants(MIXED), target, num_stages=1
    )
    assert plan.spill_store_bytes == 0
    inputs = parts | {"sinks_ptr": "float32", "work_ptr": "int32"}
    for which in (NARROW, WIDE):
        combination = offline.compile_cuda(
            ragged_combine_kernel, inputs | results, sizes.combine_constants(MIXED, which), target,
            num_stages=2,
        )  # fmt: skip
        assert combination.spill_store_bytes == 0
