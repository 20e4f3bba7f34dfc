"""How a call is cut for a GPU: pure functions of the problem and the target."""

import dataclasses
import itertools
import subprocess
import sys
from pathlib import Path

import hypothesis
import jax.numpy as jnp
import pytest
from hypothesis import strategies as st
from test_ragged_triton_compile import MIXED
from test_triton_compile import LLAMA, gpu_of

from ejk.backends.gpu import SHARED_MEMORY, SHARED_MEMORY_ROCM, Target
from ejk.backends.page_attention_plan import PlanFacts
from ejk.backends.triton._sizes import GRANULE, block_group, value_bytes, widths
from ejk.backends.triton.page_attention.blocks import ONE_CONTEXT, Tuning
from ejk.backends.triton.page_attention.planner import TritonPlan
from ejk.backends.triton.page_attention.sizes import COMBINE_PER_SM, Sizes
from ejk.backends.triton.page_attention.tuned import TUNED, Cell
from ejk.backends.triton.ragged_page_attention.blocks import RaggedTuning
from ejk.backends.triton.ragged_page_attention.sizes import RaggedSizes

pytestmark = pytest.mark.fast

H100 = gpu_of("sm_90")
TARGETS = [Target(c, 100, SHARED_MEMORY[c]) for c in SHARED_MEMORY]
TARGETS.append(Target(None, 304, SHARED_MEMORY_ROCM, is_amd=True))


def problem(head_dim=128, group=4, dtype="bfloat16", **facts):
    return dataclasses.replace(
        LLAMA,
        head_dim=head_dim,
        value_head_dim=facts.pop("value_head_dim", head_dim),
        num_heads=group * LLAMA.num_kv_heads,
        query_dtype=jnp.dtype(dtype),
        cache_dtype=jnp.dtype(facts.pop("cache_dtype", dtype)),
        **facts,
    )


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: str(target.compute_capability))
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("num_seqs", [1, 64])
def test_every_head_dimension_and_group_fits_by_rule(target, dtype, num_seqs):
    for head_dim in (1, 16, 40, 64, 80, 96, 112, 128, 192, 256, 320, 512):
        for group in (1, 3, 8, 16, 17, 71, 128):
            asked = problem(head_dim, group, dtype, num_seqs=num_seqs)
            blocks = Sizes.of(asked, Tuning(), target, tuned={}).blocks
            assert blocks.shared_memory <= target.shared_memory
            assert widths(asked)[0] >= head_dim and blocks.block_kv >= 16


@pytest.mark.parametrize("cache", ["int8", "uint8", "float8_e4m3fn", "bfloat16", "float32"])
@pytest.mark.parametrize("query", ["bfloat16", "float32"])
def test_blocks_and_warps_are_powers_of_two_whatever_is_converted(cache, query):
    """Triton takes no others; head dimensions above 128 may be in two parts, 192 as 128 and 64."""
    types = {"query_dtype": jnp.dtype(query), "cache_dtype": jnp.dtype(cache), "scales": "token"}
    for target, head_dim in itertools.product((H100, TARGETS[0]), (34, 144, 192, 320, 512)):
        facts = {"num_heads": 32, "head_dim": head_dim, "value_head_dim": head_dim}
        decode = dataclasses.replace(LLAMA, **facts, **types)
        ragged = dataclasses.replace(MIXED, **facts, **types)
        blocks = [Sizes.of(decode, Tuning(), target).blocks]
        for taken in (*blocks, *RaggedSizes.of(ragged, RaggedTuning(), target).blocks):
            for number in (taken.block_kv, taken.num_warps):
                assert number & (number - 1) == 0, (head_dim, taken)


# Multiprocessors as their makers count them (NVIDIA's architecture papers).
OTHER_GPUS = {
    name: Target(capability, num_sms, SHARED_MEMORY[capability])
    for name, capability, num_sms in (("A100", 80, 108), ("L40S", 89, 142), ("B200", 100, 148))
}


@pytest.mark.parametrize("gpu", OTHER_GPUS.values(), ids=OTHER_GPUS)
@hypothesis.seed(0)
@hypothesis.settings(max_examples=200, deadline=None)
@hypothesis.given(
    head_dim=st.sampled_from((64, 80, 96, 128, 192, 256, 512)),
    group=st.sampled_from((1, 3, 4, 8, 16, 71, 128)),
    num_kv_heads=st.sampled_from((1, 2, 4, 8, 32)),
    dtype=st.sampled_from(("bfloat16", "float16", "float32")),
    num_seqs=st.integers(1, 512),
    max_blocks=st.integers(1, 8192),
)
def test_a_gpu_that_nobody_tuned_for_is_filled_and_not_flooded(
    gpu, head_dim, group, num_kv_heads, dtype, num_seqs, max_blocks
):
    asked = problem(
        head_dim, group, dtype, num_seqs=num_seqs, max_blocks=max_blocks,
        visible_bound=16 * max_blocks,
    )  # fmt: skip
    asked = dataclasses.replace(asked, num_kv_heads=num_kv_heads, num_heads=group * num_kv_heads)
    sizes = Sizes.of(asked, Tuning(), gpu)
    assert sizes.blocks.shared_memory <= gpu.shared_memory and sizes.blocks.block_kv >= 16
    each = num_kv_heads * -(-group // block_group(group, head_dim, None))
    assert sizes.grid(asked) >= num_seqs * each
    # No more parts than make the longest shorter: if that is four blocks or more, 4 in 5.
    if asked.visible_bound * num_seqs * each >= 8 * GRANULE * gpu.num_sms:
        assert sizes.grid(asked) > 0.8 * (gpu.num_sms - each), "processors have nothing to do"
    slots = gpu.num_sms * sizes.blocks.per_sm
    assert sizes.num_parts(asked) * each <= num_seqs * each + 4 * slots
    if sizes.num_parts(asked) and sizes.combine_grid(asked) > COMBINE_PER_SM * gpu.num_sms:
        assert sizes.combine_dv >= head_dim, "a program could take more of a row"


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: str(target.compute_capability))
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("num_seqs", [1, 64])
def test_latent_attention_fits_by_rule(target, dtype, num_seqs):
    for head_dim, width in ((576, 512), (576, 400), (576, 320), (288, 256), (192, 128), (24, 20)):
        for group in (1, 16, 17, 32, 33, 128):
            asked = problem(
                head_dim, group, dtype, value_head_dim=width, latent=True, num_seqs=num_seqs
            )
            blocks = Sizes.of(asked, Tuning(), target, tuned={}).blocks
            assert blocks.shared_memory <= target.shared_memory and blocks.block_kv >= 16
            if head_dim == 576 and width > 320 and dtype == "bfloat16":
                most = 16 if target.is_amd else 64 if target.compute_capability == 90 else 32
                assert blocks.block_group == min(most, max(16, 1 << (group - 1).bit_length()))


@pytest.mark.parametrize("head_dim", [64, 80, 96, 112, 128, 192, 256, 512])
def test_a_large_call_leaves_no_room_for_more_programs_than_it_counts_on(head_dim):
    asked = problem(head_dim)
    blocks = Sizes.of(asked, Tuning(), H100, tuned={}).blocks
    assert blocks.per_sm == (3 if head_dim <= 256 else 1)
    assert (blocks.per_sm + 1) * blocks.shared_memory > H100.shared_memory


@pytest.mark.parametrize(
    "head_dim, num_seqs, tokens, programs",
    [
        (128, 64, 4096, 3),
        (128, 64, 1024, 3),
        (128, 32, 1024, 1),  # little to do
        (128, 64, 512, 1),  # none is cut
        (128, 16, 8192, 1),  # a part each, all of one size
        (128, 2, 32768, 1),
        (128, 17, 8192, 3),
        (128, 1, 131072, 1),  # in a part for each
        (80, 16, 8192, 3),  # padded, whose products take as long as memory
        (80, 1, 131072, 1),
        (256, 64, 4096, 3),
        (512, 64, 4096, 1),
    ],
)
def test_how_many_programs_a_multiprocessor_runs(head_dim, num_seqs, tokens, programs):
    """Those that the plan counts on, made apart from the call, too."""
    facts = {"num_seqs": num_seqs, "max_blocks": tokens // 16, "visible_bound": tokens}
    asked = problem(head_dim, **facts)
    blocks = Sizes.of(asked, Tuning(), H100, tuned={}).blocks
    assert blocks.per_sm == programs
    facts = PlanFacts(
        num_seqs, asked.num_heads, asked.num_kv_heads, head_dim, 16, asked.max_blocks, None
    )
    planner = TritonPlan(compute_capability=90, num_sms=132)
    planned = planner.plan_problem(facts, head_dim, asked.cache_dtype)
    assert planned.resident == programs * 132
    assert planned == (Sizes.of(asked, Tuning(), H100).plan or planned)
    invariant = dataclasses.replace(asked, num_splits=2)
    assert Sizes.of(invariant, Tuning(), H100, tuned={}).blocks.per_sm == 1


def test_several_programs_a_multiprocessor_are_for_hopper_and_fit():
    large = problem(num_seqs=64, visible_bound=4096)
    amd = Target(None, 304, SHARED_MEMORY_ROCM, is_amd=True)
    assert Sizes.of(large, Tuning(), amd, tuned={}).blocks.per_sm == 1
    for asked in ({"block_kv": 128}, {"num_stages": 5}):
        assert Sizes.of(large, Tuning(**asked), H100).blocks.per_sm == 1
    codes = problem(num_seqs=16, cache_dtype="int8", scales="head")
    assert Sizes.of(codes, Tuning(), H100).blocks.per_sm == 4
    for num_seqs, count in ((16, 2), (32, 4)):  # of large blocks and of small ones
        wide = problem(256, num_seqs=num_seqs, cache_dtype="int8", scales="token")
        blocks = Sizes.of(wide, Tuning(), H100).blocks
        assert blocks.per_sm == count and count * blocks.shared_memory <= H100.shared_memory
    for group, count in ((2, 2), (32, 1)):  # of 16 rows and of 32
        exact = problem(256, group, "float32", cache_dtype="bfloat16", num_seqs=16)
        assert Sizes.of(exact, Tuning(), H100).blocks.per_sm == count
    fixed = Sizes.of(codes, Tuning(block_kv=256, num_stages=4), H100)
    assert fixed.blocks.per_sm == 1 and fixed.plan is not None
    assert fixed.plan.resident == H100.num_sms


@pytest.mark.parametrize("cache", ["uint8", "int8", "bfloat16", "float32"])
def test_bytes_that_a_prefix_has_to_save_are_those_of_the_cache(cache):
    asked = problem(num_seqs=16, cache_dtype=cache, num_prefix_groups=1)
    granule = 128 * asked.num_kv_heads * 2 * 128 * value_bytes(asked)
    plan = Sizes.of(asked, Tuning(least_saved_bytes=int(5 * granule)), H100).plan
    assert plan is not None and plan.least_saved == 5


@pytest.mark.parametrize("head_dim, programs", [(64, 2), (80, 1), (128, 1)])
def test_how_many_programs_of_64_rows_a_multiprocessor_runs(head_dim, programs):
    sizes = Sizes.of(problem(head_dim, 64), Tuning(), H100)
    assert sizes.blocks.block_group == 64
    assert sizes.plan is not None and sizes.plan.resident == programs * H100.num_sms


def test_a_small_call_takes_smaller_blocks_than_a_large_one():
    small = Sizes.of(problem(64, num_seqs=1, visible_bound=1024), Tuning(), H100)
    large = Sizes.of(problem(64), Tuning(), H100)
    assert small.blocks.block_kv < large.blocks.block_kv
    assert small.num_splits == 16  # a piece for every multiprocessor, of at least a block


@pytest.mark.parametrize("cell", TUNED, ids=str)
def test_measured_blocks_fit_and_are_taken(cell):
    """And where bits must not follow from the batch, those of a large call."""
    target = Target(cell.compute_capability, 132, SHARED_MEMORY[cell.compute_capability])
    size = {} if cell.large else {"num_seqs": 1, "num_kv_heads": 1, "visible_bound": 1024}
    asked = problem(cell.head_dim, cell.rows, {2: "bfloat16", 4: "float32"}[cell.itemsize])
    asked = dataclasses.replace(asked, **size)
    asked = dataclasses.replace(asked, num_heads=cell.rows * asked.num_kv_heads)
    blocks = Sizes.of(asked, Tuning(), target).blocks
    assert blocks.block_group == cell.rows
    assert (blocks.block_kv, blocks.num_warps, blocks.num_stages) == TUNED[cell]
    assert blocks.shared_memory <= target.shared_memory
    pinned = Sizes.of(dataclasses.replace(asked, num_splits=3), Tuning(), target).blocks
    if cell.large:
        assert (pinned.block_kv, pinned.num_warps, pinned.num_stages) == TUNED[cell]


@pytest.mark.parametrize("tuning", [Tuning(), Tuning(split_tokens=512)])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize(
    "facts",
    [
        {},
        {"dtype": "float32"},
        {"dtype": "float32", "cache_dtype": "bfloat16"},
        {"cache_dtype": "int8", "scales": "head"},
        {"cache_dtype": "int8", "scales": "token"},
        {"cache_dtype": "uint8", "scales": "token"},
    ],
    ids=str,
)
def test_blocks_do_not_follow_from_the_batch_where_bits_must_not(facts, head_dim, tuning):
    """How many of their programs run at a time changes no bit."""
    splits = 0 if tuning.split_tokens else 4
    taken = set()
    for num_seqs in (1, 7, 512):
        for max_blocks, bound in ((4, 64), (64, 1024), (4096, 65536)):
            asked = problem(
                head_dim, num_seqs=num_seqs, max_blocks=max_blocks, visible_bound=bound,
                num_splits=splits, **facts,
            )  # fmt: skip
            taken.add(Sizes.of(asked, tuning, H100).blocks._replace(per_sm=1))
    assert len(taken) == 1


def test_one_long_context_of_codes_takes_blocks_of_its_own():
    """Where its bits may follow from the batch. Two do not, nor one with scales of tokens."""
    asked = dataclasses.replace(
        problem(), cache_dtype=jnp.dtype("int8"), scales="head", num_seqs=1, max_blocks=2048,
        visible_bound=32768,
    )  # fmt: skip

    def blocks_of(**facts):
        return Sizes.of(dataclasses.replace(asked, **facts), Tuning(), H100).blocks

    assert blocks_of()[1:4] == ONE_CONTEXT and blocks_of().per_sm == 2
    others = ({"num_splits": 3}, {"num_seqs": 2}, {"scales": "token"}, {"visible_bound": 1000})
    for facts in others:
        assert blocks_of(**facts)[1:4] != ONE_CONTEXT


def test_blocks_of_converted_elements_are_not_those_of_their_size():
    cell = Cell(90, 2, 512, 16, True)
    narrow = problem(512)
    assert Sizes.of(narrow, Tuning(), H100).blocks[1:4] == TUNED[cell]
    mixed = dataclasses.replace(narrow, query_dtype=jnp.dtype("float32"))
    assert Sizes.of(mixed, Tuning(), H100).blocks[1:4] != TUNED[cell]


def test_many_short_contexts_share_a_multiprocessor():
    def stages(num_seqs, tokens, num_splits=0):
        facts = {"max_blocks": tokens // 16, "visible_bound": tokens, "num_splits": num_splits}
        return Sizes.of(problem(num_seqs=num_seqs, **facts), Tuning(), H100).blocks.num_stages

    assert (stages(1024, 128), stages(256, 1024), stages(1024, 4096)) == (2, 2, 3)
    assert stages(16, 1024) == 3, "few"
    assert stages(1024, 128, num_splits=1) == 3, "what may not follow from the batch"


def test_what_is_asked_for_is_taken():
    tuning = Tuning(block_kv=32, num_warps=2, num_stages=4)
    blocks = Sizes.of(problem(), tuning, H100).blocks
    assert (blocks.block_kv, blocks.num_warps, blocks.num_stages) == (32, 2, 4)


def test_the_table_is_what_the_measurements_say():
    root = Path(__file__).parents[2]
    command = [sys.executable, "benchmarks/tune.py", "--check"]
    subprocess.run(command, cwd=root, check=True, timeout=120)
