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
from ejk.backends.triton.ragged_page_attention.sizes import (
    RaggedCut,
    RaggedSizes,
    ragged_size_refusals,
)
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

Memory = dict[str, Any]
"""Results and parts by the parameters of the kernels."""


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
        for kind, rows in enumerate(sizes.kinds):
            grids += [sizes.grid(problem, kind), sizes.combine_grid(problem, kind)]
            if rows.shared_memory > target.shared_memory:
                reasons.append(
                    f"blocks of {rows.rows} query rows and {rows.block_kv} tokens with "
                    f"head_dim={problem.head_dim} take {rows.shared_memory} bytes of shared "
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
            steps = TritonSteps(problem, operands, sizes, call, target)
            work, memory = steps.list_work(), {}
            for kind in range(len(sizes.kinds)):
                memory = steps.attend(kind, work, memory)
                memory = steps.combine(kind, work, memory)
            return steps.results(memory)

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


@dataclasses.dataclass(frozen=True)
class RaggedSteps:
    """The steps of a run before and after its items are attended to, by whatever kernel.

    `work` says what the items are, see `RaggedPlan`, and `memory` is what they are written to, None
    where there is none.
    """

    problem: RaggedPageAttentionProblem
    operands: RaggedPageAttentionOperands
    sizes: RaggedCut
    call: Call

    def list_work(self) -> Any:
        """Return the list of all items."""
        from ejk.backends.triton.ragged_page_attention.plan_kernel import ragged_plan_kernel

        # The list alone: XLA makes one of the equal ones of all layers, and what they share cannot
        # be written in place.
        [work] = self.call(
            ragged_plan_kernel,
            {
                "cu_q_lens_ptr": self.operands.cu_q_lens,
                "context_lens_ptr": self.operands.context_lens,
                "sliding_window_ptr": self.operands.sliding_window,
            },
            {"work_ptr": self.sizes.plan.type},
            self.sizes.plan_constants(self.problem),
            grid=self.sizes.plan_grid(self.problem),
            num_warps=4,
            num_stages=1,
        )
        return work

    def combine(self, kind: int, work: Any, memory: Memory) -> Memory:
        """Combine those items of a kind that are pieces of one block."""
        from ejk.backends.triton.ragged_page_attention.combine_kernel import ragged_combine_kernel

        if not (grid := self.sizes.combine_grid(self.problem, kind)):
            return memory
        results = {name: memory[name] for name in ("out_ptr", "lse_ptr")}
        written = self.call(
            ragged_combine_kernel,
            {
                "part_out_ptr": memory["part_out_ptr"],
                "part_lse_ptr": memory["part_lse_ptr"],
                "sinks_ptr": self.operands.sinks,
                "work_ptr": work,
            },
            {},
            self.sizes.combine_constants(self.problem, kind),
            in_place=results,
            grid=grid,
            num_warps=4,
            num_stages=2,
        )
        return memory | dict(zip(results, written))

    def results(self, memory: Memory) -> tuple[Any, ...]:
        out, lse = memory["out_ptr"], memory["lse_ptr"]
        return (out, lse) if self.problem.return_lse else (out,)


@dataclasses.dataclass(frozen=True)
class TritonSteps(RaggedSteps):
    """All steps of a run: each kind of block attends to its items and combines its pieces."""

    sizes: RaggedSizes
    target: Target

    def attend(self, kind: int, work: Any, memory: Memory) -> Memory:
        """Attend to the items of a kind; return the memory, which the first kind makes."""
        from ejk.backends.triton.ragged_page_attention.kernel import ragged_page_attention_kernel

        rows = self.sizes.kinds[kind]
        absent = {name: None for name, x in memory.items() if x is None}
        outputs = {} if memory else self.sizes.types(self.problem)
        in_place = {name: x for name, x in memory.items() if x is not None}
        written = self.call(
            ragged_page_attention_kernel,
            kernel_inputs(self.operands, INPUTS, work) | absent,
            outputs,
            self.sizes.constants(self.problem, kind, self.target),
            in_place=in_place,
            grid=self.sizes.grid(self.problem, kind),
            num_warps=rows.num_warps,
            num_stages=rows.num_stages,
            max_registers=rows.max_registers,
        )
        return absent | dict(zip(outputs or in_place, written))
