"""Few new tokens a sequence, as in verification of drafts: their blocks, and who takes them."""

import dataclasses
import functools

import jax.numpy as jnp
import numpy as np
import offline
import pytest
from test_ragged_triton_compile import MIXED, compile_for, sizes_for
from test_triton_compile import LATENT, gpu_of

import ejk
from ejk.backends.ragged_page_attention import RaggedPageAttentionOperands
from ejk.backends.triton import _launch
from ejk.backends.triton.ragged_page_attention.blocks import FEW_TOKENS, UNPEELED_TOKENS
from ejk.backends.triton.ragged_page_attention.steps import list_work
from ejk.testing.bounds import assert_close
from ejk.testing.configurations import BF16, E4M3, INT8, Configuration
from ejk.testing.ragged_page_attention import build_ragged
from ejk.testing.shapes import Shape

SLOTS = 132
# Query heads, new tokens and lengths of each sequence.
BATCHES = {
    "a wave of halves": (16, [4] * 64, [4096] * 64),
    "a wave": (32, [4] * 64, [4096] * 64),
    "four waves": (128, [4] * 64, [4096] * 64),
    "two more than half a wave": (16, [4] * 70, [4096] * 70),
    "less than a wave": (32, [4] * 40, [4096] * 40),
    "few long ones": (128, [4] * 3, [8192] * 3),
    "of unequal length": (16, [1, 4] * 32, [130 * i for i in range(1, 65)]),
}
DRAFTS = Shape("drafts", 6, 2, 16, page_size=32, max_blocks=40, num_pages=130)
SHAPE = Shape("latent", 33, 1, 20, 32, 12, 40, value_head_dim=17, latent=True)
PAGES = {8: (48, 160), 32: (12, 40), 128: (3, 10)}


def problem_of(heads, q_lens, lens):
    sizes = {"num_seqs": len(lens), "total_tokens": sum(q_lens), "q_len_bound": max(q_lens)}
    sizes |= {"visible_bound": max(lens), "max_blocks": -(-max(lens) // 64)}
    return dataclasses.replace(MIXED, **(LATENT | {"num_heads": heads}), **sizes)


@pytest.mark.parametrize("name", BATCHES)
def test_the_last_program_ends_soon_after_the_average(name):
    heads, q_lens, lens = BATCHES[name]
    problem = problem_of(heads, q_lens, lens)
    sizes = sizes_for("sm_90", problem)
    bounds = np.concatenate([[0], np.cumsum(q_lens)]).astype(np.int32)
    operands = RaggedPageAttentionOperands(
        *[None] * 3, jnp.array(lens, jnp.int32), None, jnp.array(bounds), *[None] * 6
    )
    call = functools.partial(_launch.call, compute_capability=90, interpret=True)
    work = np.asarray(list_work(problem, operands, sizes, call))
    items = work[1 : 1 + work[0, 0]]
    busy = np.zeros(SLOTS)
    for granules, pieces in zip(np.ceil(items[:, 7] / sizes.plan.granule), items[:, 5]):
        busy[busy.argmin()] += np.ceil(granules / pieces)  # to whoever is free
    assert busy.max() <= 1.2 * busy.mean()


def test_few_tokens_have_one_launch_and_single_ones_decodes_blocks():
    for heads in (16, 32, 128):
        q_len = max(2, 64 // heads + 1)
        for most, launches in ((q_len, 1), (FEW_TOKENS, 1), (FEW_TOKENS + 1, 2)):
            sizes = sizes_for("sm_90", problem_of(heads, [most] * 4, [4096] * 4))
            assert len(sizes.blocks) == launches
            assert (sizes.blocks[0].rows == 64 and sizes.blocks[0].peel) or launches == 2
    assert not sizes_for("sm_90", problem_of(64, [1] * 4, [4096] * 4)).blocks[0].peel
    problem = problem_of(128, [4] * 4, [4096] * 4)
    for target in ("sm_80", "sm_100", "gfx942"):  # not measured
        sizes = sizes_for(target, problem)
        assert len(sizes.blocks) == 2
        assert not sizes.constants(problem, 1, gpu_of(target))["COPY_FIRST"]


@pytest.mark.parametrize("page_size", PAGES)
@pytest.mark.parametrize(
    "features",
    [(), ("sinks", "sliding_window"), ("positions", "tree_mask", "alibi_slopes")],
    ids=str,
)
def test_few_tokens_agree_with_the_oracle(features, page_size):
    max_blocks, num_pages = PAGES[page_size]
    shape = dataclasses.replace(
        SHAPE, page_size=page_size, max_blocks=max_blocks, num_pages=num_pages
    )
    extras = tuple(x for x in features if x in ("positions", "tree_mask"))
    config = Configuration(shape, BF16, "NHD", frozenset(features) - {*extras})
    for invalid in (0.0, 0.1):
        case = build_ragged(
            config, np.array([383, 40, 3]), np.array([1, 2, 9, 12]), window=300, invalid=invalid,
            extras=extras,
        )  # fmt: skip
        out, lse = ejk.ragged_page_attention(
            *case.operands(), **case.semantics(), max_q_len=FEW_TOKENS, return_lse=True,
            backend=ejk.TritonRaggedPageAttention(num_sms=6, interpret=True),
        )  # fmt: skip
        assert_close(case, np.asarray(out), np.asarray(lse))


CACHES = {"bfloat16": (), "int8": (INT8, "token"), "e4m3": (E4M3, "head")}
FEATURES = {"plain": (), "cap": ("attn_logits_soft_cap", "sinks"), "window": ("sliding_window",)}


@pytest.mark.parametrize(
    ("features", "cache"),
    [*((x, "bfloat16") for x in FEATURES), ("plain", "int8"), ("plain", "e4m3")],
)
def test_drafts_on_long_contexts_agree_with_the_oracle(features, cache):
    """Some blocks need no mask: only the last tokens, a window's first and what is invalid do."""
    named = dict(zip(("cache_dtype", "scales"), CACHES[cache]))
    config = Configuration(DRAFTS, BF16, "HND", frozenset(FEATURES[features]), **named)
    for invalid in (0.0, 0.05):
        case = build_ragged(
            config, np.array([1280, 700, 3]), np.array([1, 5, 6, 12]), window=900, invalid=invalid
        )
        out, lse = ejk.ragged_page_attention(
            *case.operands(), **case.semantics(), max_q_len=6, return_lse=True,
            backend=ejk.TritonRaggedPageAttention(num_sms=4, interpret=True),
        )  # fmt: skip
        assert_close(case, np.asarray(out), np.asarray(lse))


def test_blocks_of_drafts_are_peeled_on_hopper():
    drafts = {"total_tokens": 64 * 8, "q_len_bound": 8, "visible_bound": 8192, "max_blocks": 512}
    others = {
        "single tokens": {"total_tokens": 64, "q_len_bound": 1},
        "short contexts": {"visible_bound": UNPEELED_TOKENS},
        "slopes": {"has_alibi": True},
        "a tree": {"tree_width": 8},
        "int4": {"cache_dtype": jnp.dtype("uint8"), "scales": "token"},
        "in a mixed batch": {"q_len_bound": 512},
    }
    problem = dataclasses.replace(MIXED, **drafts)
    assert sizes_for("sm_90", problem).blocks[0].peel
    for target in ("sm_89", "gfx942"):
        assert not sizes_for(target, problem).blocks[0].peel
    for name, fields in others.items():
        other = dataclasses.replace(problem, **fields)
        assert not sizes_for("sm_90", other).blocks[0].peel, name
    assert not sizes_for("sm_90", problem).plan.resident
    few = dataclasses.replace(problem, num_seqs=33, total_tokens=33 * 8)
    assert sizes_for("sm_90", few).plan.resident == SLOTS


@pytest.mark.parametrize("page_size, spilled", [(64, 64), (16, 96)])
def test_latent_blocks_are_copied_before_the_softmax_of_those_before_them(page_size, spilled):
    """Their spills were measured to be worth it."""
    few = {"page_size": page_size, "total_tokens": 256, "q_len_bound": 4}
    _, blocks, program = compile_for("sm_90", LATENT | few, 0)
    assert program.spill_store_bytes <= spilled
    assert program.shared_bytes <= blocks.shared_memory <= offline.SHARED_MEMORY_BYTES["sm_90"]
    loop = program.ptx[program.ptx.index("m64n32k16") :]  # logits of 64 tokens on two warpgroups
    assert "m64n16k16" not in loop, "the loop of masked blocks comes before"
    assert loop.index("cp.async.cg") < loop.index("m64n256k16")


@pytest.mark.parametrize("q_len", [8, 16])
def test_blocks_of_drafts_do_not_spill(q_len):
    drafts = {"total_tokens": 64 * q_len, "q_len_bound": q_len, "visible_bound": 8192}
    _, blocks, program = compile_for("sm_90", drafts | {"max_blocks": 512}, 0)
    assert blocks.peel and program.spill_store_bytes == 0
    assert program.shared_bytes <= blocks.shared_memory <= offline.SHARED_MEMORY_BYTES["sm_90"]
