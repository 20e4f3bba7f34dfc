"""`ejk.ragged_page_attention` as Triton kernels: their tuning, what they refuse, their launches."""

import dataclasses
from typing import Any, ClassVar

from ejk._backend import Tunable
from ejk._indices import exceeds
from ejk.backends.gpu import MAX_GRID, Target
from ejk.backends.layouts import POOLS
from ejk.backends.paged_problem import CACHES
from ejk.backends.ragged_page_attention import (
    RaggedPageAttentionBackend,
    RaggedPageAttentionOperands,
    RaggedPageAttentionProblem,
)
from ejk.backends.ragged_prefixes import attend_in_groups
from ejk.backends.triton._backend import Call, TritonBackend, kernel_inputs
from ejk.backends.triton.ragged_page_attention.blocks import RaggedTuning
from ejk.backends.triton.ragged_page_attention.sizes import RaggedSizes, ragged_size_refusals
from ejk.backends.triton.ragged_page_attention.steps import combine, list_work
from ejk.backends.triton.ragged_page_attention.widening import (
    MOST_COPIED,
    copied_bytes,
    pays_for_copies,
    wide_problem,
    widened,
    with_scales,
)

INPUTS = (
    "query", "cu_q_lens", "key", "value", "block_tables", "attn_scale", "sliding_window", "sinks",
    "alibi_slopes", "key_scale", "value_scale", "positions", "tree_mask", "work",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class TritonRaggedPageAttention(RaggedTuning, TritonBackend, RaggedPageAttentionBackend):
    """Run `ejk.ragged_page_attention` as Triton kernels, through jax-triton.

    Sequences of few query rows, new tokens times the heads of a group, are taken in blocks of as
    few, as in decode; the others, in a launch of their own, in blocks of many.

    Attributes:
        block_rows: query rows of a block of many; a power of two, at least 16.
        block_kv: tokens of the context that a step takes for these, half as many where it has to
            mask some; a power of two, at least 16.
        num_warps: warps that their programs run on.
        num_stages: depth of their software pipeline.
        few_block_kv: as `block_kv`, for blocks of few query rows.
        few_num_warps: as `num_warps`, for these.
        few_num_stages: as `num_stages`, for these.
        least_saved_bytes: of keys and values that a group of `prefix_groups` has to save for its
            prefix to be read once. None: what that costs. 0: every group is read so.
        compute_capability: compile for it, 90 for sm_90; the device's own if None.
        num_sms: streaming multiprocessors to keep busy; the device's own if None.
        interpret: run the kernels on the CPU with Triton's interpreter.
    """

    least_saved_bytes: int | None = None
    compute_capability: int | None = None
    num_sms: int | None = None
    interpret: bool = False

    features = POOLS | CACHES | {
        "attn_logits_soft_cap", "sliding_window", "sinks", "alibi_slopes", "value_head_dim",
        "return_lse", "positions", "tree_mask", "causal=False",
    }  # fmt: skip
    tunable: ClassVar[Tunable] = {
        "block_rows": (64, 128, 256),
        "block_kv": (32, 64, 128),
        "num_warps": (4, 8, 16),
        "num_stages": (2, 3, 4),
        "few_block_kv": (64, 128, 256),
        "few_num_warps": (2, 4, 8),
        "few_num_stages": (2, 3, 4),
    }

    def limits_on(self, target: Target, problem: RaggedPageAttentionProblem) -> list[str]:
        sizes = RaggedSizes.of(problem, self, target)
        reasons = ragged_size_refusals(problem)
        grids = [sizes.plan_grid(problem)]
        for kind, blocks in enumerate(sizes.blocks):
            grids += [sizes.grid(problem, kind), sizes.combine_grid(problem, kind)]
            if blocks.shared_memory > target.shared_memory:
                reasons.append(
                    f"blocks of {blocks.rows} query rows and {blocks.block_kv} tokens with "
                    f"head_dim={problem.head_dim} take {blocks.shared_memory} bytes of shared "
                    f"memory; the target has {target.shared_memory}"
                )
        if max(grids) > MAX_GRID:
            reasons.append(f"its grid of {max(grids)} programs exceeds {MAX_GRID}")
        return reasons

    def run_on(
        self,
        target: Target,
        problem: RaggedPageAttentionProblem,
        operands: RaggedPageAttentionOperands,
        call: Call,
    ) -> tuple[Any, ...]:
        def attend(problem: Any, operands: Any) -> tuple[Any, ...]:
            if _is_copied(problem) and fits(wide_problem(problem)):
                if problem.scales == "token":
                    operands = with_scales(problem, operands)
                problem, operands = widened(problem, operands, target, call)
            sizes = RaggedSizes.of(problem, self, target)
            return _attend(problem, operands, sizes, target, call)

        def fits(problem: Any) -> bool:
            return not self.limits_on(target, problem)

        return attend_in_groups(problem, operands, attend, self.least_saved_bytes, fits)


def _is_copied(problem: RaggedPageAttentionProblem) -> bool:
    """Say whether pages of a quantised cache are copied in the queries' type first.

    What is copied is what positions and windows show that follow from lengths.
    """
    return (
        problem.cache_type.is_quantised
        and problem.query_dtype.itemsize == 2
        and pays_for_copies(problem)
        and problem.causal
        and not (problem.has_window and problem.has_positions)
        and not problem.latent
        and not exceeds(copied_bytes(problem), MOST_COPIED)
    )


def _attend(
    problem: RaggedPageAttentionProblem,
    operands: RaggedPageAttentionOperands,
    sizes: RaggedSizes,
    target: Target,
    call: Call,
) -> tuple[Any, ...]:
    """Have each kind of block attend to its items, and combine its pieces."""
    from ejk.backends.triton.ragged_page_attention.kernel import ragged_page_attention_kernel

    work, memory = list_work(problem, operands, sizes, call), {}
    inputs = kernel_inputs(operands, INPUTS, work)
    for kind, blocks in enumerate(sizes.blocks):  # the first one makes the memory
        absent = {name: None for name, x in memory.items() if x is None}
        outputs = {} if memory else sizes.types(problem)
        in_place = {name: x for name, x in memory.items() if x is not None}
        written = call(
            ragged_page_attention_kernel,
            inputs | absent,
            outputs,
            sizes.constants(problem, kind, target),
            in_place=in_place,
            grid=sizes.grid(problem, kind),
            num_warps=blocks.num_warps,
            num_stages=blocks.num_stages,
            max_registers=blocks.max_registers,
        )
        memory = absent | dict(zip(outputs or in_place, written))
        memory = combine(
            memory, kind, problem=problem, operands=operands, sizes=sizes, work=work, call=call
        )
    results = memory["out_ptr"], memory["lse_ptr"]
    return results if problem.return_lse else results[:1]
