"""`ejk.page_attention` as a Triton kernel: its tuning, what it refuses, how it is launched."""

import dataclasses
from typing import Any

import jax

from ejk.backends.gpu import H100, MAX_GRID, Target
from ejk.backends.page_attention import (
    AXIS,
    POOLS,
    PageAttentionBackend,
    PageAttentionOperands,
    PageAttentionProblem,
    PagedProblem,
)
from ejk.backends.page_attention_plan import PlanOperands
from ejk.backends.triton._backend import Call, TritonBackend
from ejk.backends.triton.page_attention_launch import Launch, Tuning
from ejk.backends.triton.page_attention_plan import TritonPlan, run_plan

MAX_CAPACITY = 2**31 - 2**20


@dataclasses.dataclass(frozen=True)
class TritonPageAttention(Tuning, TritonBackend, PageAttentionBackend):
    """Run `ejk.page_attention` as a Triton kernel, through jax-triton.

    Attributes:
        block_kv: tokens that a step of the kernel's loop takes; a power of two, at least 16.
        num_warps: warps a program runs on.
        num_stages: depth of the kernel's software pipeline: one less is the number of blocks of
            keys and values in flight.
        split_tokens: with `num_splits=0`, cut every context into pieces of so many tokens,
            rounded up to whole blocks. Then a sequence's result has the same bits in every batch.
        compute_capability: compile for it, 90 for sm_90; the device's own if None.
        num_sms: streaming multiprocessors to keep busy; the device's own if None.
        interpret: run the kernel on the CPU with Triton's interpreter.
    """

    compute_capability: int | None = None
    num_sms: int | None = None
    interpret: bool = False

    features = POOLS | AXIS | {
        "attn_logits_soft_cap", "sliding_window", "sinks", "alibi_slopes", "value_head_dim",
        "return_lse",
    }  # fmt: skip
    launches = 3  # plan, attention, combination

    def limits_on(self, target: Target, problem: PageAttentionProblem) -> list[str]:
        reasons = []
        launch = Launch.of(problem, self, target)
        if launch.grid(problem) > MAX_GRID:
            reasons.append(f"its grid of {launch.grid(problem)} programs exceeds {MAX_GRID}")
        if launch.shared_memory(problem, target) > target.shared_memory:
            reasons.append(
                f"block_kv={launch.block_kv} with head_dim={problem.head_dim} takes "
                f"{launch.shared_memory(problem, target)} bytes of shared memory; the target has "
                f"{target.shared_memory}"
            )
        if launch.combine_grid(problem) > MAX_GRID:
            reasons.append(f"{launch.combine_grid(problem)} programs to combine exceed {MAX_GRID}")
        return [*reasons, *size_refusals(problem)]

    def run_on(
        self,
        target: Target,
        problem: PageAttentionProblem,
        operands: PageAttentionOperands,
        call: Call,
    ) -> tuple[jax.Array, ...]:
        from ejk.backends.triton.page_attention_combine_kernel import combine_parts_kernel
        from ejk.backends.triton.page_attention_kernel import page_attention_kernel

        launch = Launch.of(problem, self, target)
        work = operands.plan
        if launch.plan and work is None:
            [work] = run_plan(
                launch.plan, PlanOperands(operands.context_lens, operands.sliding_window), call
            )
        out_type, lse_type = dataclasses.replace(problem, return_lse=True).results
        part_out, part_lse, out, lse = call(
            page_attention_kernel,
            _inputs(operands, work),
            {**launch.part_types(problem), "out_ptr": out_type, "lse_ptr": lse_type},
            launch.constants(problem),
            grid=launch.grid(problem),
            num_warps=launch.num_warps,
            num_stages=launch.num_stages,
        )
        if part_out is not None:
            # With a plan, contexts in one piece are written already: the rest goes between them.
            in_place = {"out_ptr": out, "lse_ptr": lse} if launch.plan else {}
            out, lse = call(
                combine_parts_kernel,
                {
                    "part_out_ptr": part_out,
                    "part_lse_ptr": part_lse,
                    "sinks_ptr": operands.sinks,
                    "work_ptr": work,
                },
                {} if launch.plan else {"out_ptr": out_type, "lse_ptr": lse_type},
                launch.combine_constants(problem),
                in_place=in_place,
                grid=launch.combine_grid(problem),
                num_warps=4,
                num_stages=2,
            )
        return (out, lse) if problem.return_lse else (out,)

    @property
    def planner(self) -> TritonPlan:
        target = self.target(self.platforms[0])
        num_sms = H100["num_sms"] if target is None else target.num_sms
        return TritonPlan(self.compute_capability, num_sms, self.interpret)


def size_refusals(problem: PagedProblem) -> list[str]:
    """Say which of the sizes no kernel on pages can count in 32 bits."""
    reasons = []
    if problem.capacity > MAX_CAPACITY:
        reasons.append(
            f"max_blocks * page_size={problem.capacity} must be at most {MAX_CAPACITY}: "
            "positions past the last token are 32-bit, too"
        )
    head_dim = max(problem.head_dim, problem.value_head_dim)
    if problem.page_size * problem.num_kv_heads * head_dim >= 2**31:
        reasons.append(f"a page of page_size={problem.page_size} has 2**31 elements or more")
    return reasons


def _inputs(operands: PageAttentionOperands, work: Any) -> dict[str, Any]:
    """Return the attention kernel's inputs, in its order."""
    values = operands.key_cache if operands.value_cache is None else operands.value_cache
    return {
        "query_ptr": operands.query,
        "key_ptr": operands.key_cache,
        "value_ptr": values,
        "context_lens_ptr": operands.context_lens,
        "block_tables_ptr": operands.block_tables,
        "attn_scale_ptr": operands.attn_scale,
        "sliding_window_ptr": operands.sliding_window,
        "sinks_ptr": operands.sinks,
        "alibi_slopes_ptr": operands.alibi_slopes,
        "page_distances_ptr": operands.page_distances,
        "work_ptr": work,
    }
