"""`ejk.plan_page_attention` as a Triton kernel."""

import dataclasses
from typing import Any

from ejk._indices import is_static, least
from ejk.backends.gpu import H100, Target
from ejk.backends.page_attention_plan import (
    PlanBackend,
    PlanFacts,
    PlanOperands,
    PlanProblem,
)
from ejk.backends.triton._backend import Call, TritonBackend
from ejk.backends.triton._sizes import EVEN_SHARE, GRANULE, choose_cuts, programs_per_piece

# Sequences of a program, sequences that it compares them with at a time, warps. All at a time is
# best, and few to a program: its code has to be fetched from memory once a step. On an H100, of
# seven shapes, 3.4 us for 256 sequences (6.0 with 16, 64, 4) and 5.9 for 1,024 (21.0).
FEW_SEQS = 256
BLOCKS_OF_FEW = (2, 256, 4)
BLOCKS_OF_MANY = (4, 1024, 8)


@dataclasses.dataclass(frozen=True)
class TritonPlan(TritonBackend, PlanBackend):
    """Deal out the pieces with one small kernel.

    Attributes:
        compute_capability: compile for it; the device's own if None.
        num_sms: multiprocessors to deal out the work to; those of an H100 if None.
        interpret: run the kernel on the CPU with Triton's interpreter.
    """

    compute_capability: int | None = None
    num_sms: int | None = None
    interpret: bool = False

    features = frozenset({"sliding_window"})

    @property
    def has_target(self) -> bool:
        return False  # XLA's plan will do

    def limits_on(self, target: Target, problem: PlanProblem) -> tuple[str, ...]:
        return ()

    def plan_problem(self, facts: PlanFacts, value_head_dim: int) -> PlanProblem:
        group = facts.num_heads // facts.num_kv_heads
        programs = programs_per_piece(facts.num_kv_heads, group, value_head_dim)
        window, capacity = facts.sliding_window, facts.capacity
        longest = least(capacity, window) if isinstance(window, int) else capacity
        max_cuts = 0
        # Kernels, which alone read a plan, want sizes that are static.
        if is_static(facts.num_seqs) and is_static(capacity):
            # More or fewer pieces than its processors want cost a little speed, nothing else.
            num_sms = self.num_sms or H100["num_sms"]
            max_cuts = choose_cuts(num_sms, facts.num_seqs, programs, longest)
        return PlanProblem(
            num_seqs=facts.num_seqs,
            capacity=capacity,
            has_window=window is not None,
            max_cuts=max_cuts,
            granule=GRANULE,
            even_share=EVEN_SHARE,
        )

    def run_on(
        self, target: Target, problem: PlanProblem, operands: PlanOperands, call: Call
    ) -> tuple[Any, ...]:
        return run_plan(problem, operands, call)


def run_plan(problem: PlanProblem, operands: PlanOperands, call: Call) -> tuple[Any, ...]:
    """Launch the kernel."""
    from ejk.backends.triton.page_attention.plan_kernel import page_attention_plan_kernel

    few = problem.num_seqs <= FEW_SEQS
    block_seqs, block_others, num_warps = BLOCKS_OF_FEW if few else BLOCKS_OF_MANY
    return call(
        page_attention_plan_kernel,
        {
            "context_lens_ptr": operands.context_lens,
            "sliding_window_ptr": operands.sliding_window,
        },
        {"work_ptr": problem.results[0]},
        plan_constants(problem, block_seqs, block_others),
        grid=-(-problem.num_seqs // block_seqs),
        num_warps=num_warps,
        num_stages=1,
    )


def plan_constants(problem: PlanProblem, block_seqs: int, block_others: int) -> dict[str, Any]:
    return {
        "NUM_SEQS": problem.num_seqs,
        "CAPACITY": problem.capacity,
        "MAX_CUTS": problem.max_cuts,
        "EVEN_NUMERATOR": problem.even_share[0],
        "EVEN_DENOMINATOR": problem.even_share[1],
        "stride_window_seq": int(problem.own_windows),
        "HAS_WINDOW": problem.has_window,
        "GRANULE": problem.granule,
        "BLOCK_SEQS": block_seqs,
        "BLOCK_OTHERS": block_others,
    }
