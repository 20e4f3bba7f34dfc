"""`ejk.ragged_page_attention` as Triton kernels: their tuning, what they refuse, their launches."""

import dataclasses
from typing import Any

import jax

from ejk.backends.gpu import MAX_GRID, Target
from ejk.backends.page_attention import POOLS
from ejk.backends.ragged_page_attention import (
    RaggedPageAttentionBackend,
    RaggedPageAttentionOperands,
    RaggedPageAttentionProblem,
)
from ejk.backends.triton._backend import Call, TritonBackend
from ejk.backends.triton.page_attention import size_refusals
from ejk.backends.triton.ragged_page_attention_blocks import RaggedTuning
from ejk.backends.triton.ragged_page_attention_launch import RaggedLaunch


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
        compute_capability: compile for it, 90 for sm_90; the device's own if None.
        num_sms: streaming multiprocessors to keep busy; the device's own if None.
        interpret: run the kernels on the CPU with Triton's interpreter.
    """

    compute_capability: int | None = None
    num_sms: int | None = None
    interpret: bool = False

    features = POOLS | {
        "attn_logits_soft_cap", "sliding_window", "sinks", "alibi_slopes", "value_head_dim",
        "return_lse", "positions", "tree_mask",
    }  # fmt: skip
    launches = 5  # the plan, then attention and combination, twice

    def limits_on(self, target: Target, problem: RaggedPageAttentionProblem) -> list[str]:
        launch = RaggedLaunch.of(problem, self, target)
        reasons = size_refusals(problem)
        grids = [launch.plan_grid(problem)]
        for which, rows in enumerate(launch.launches):
            grids += [launch.grid(problem, which), launch.combine_grid(problem, which)]
            if rows.shared_memory > target.shared_memory:
                reasons.append(
                    f"blocks of {rows.rows} query rows and {rows.block_kv} tokens with "
                    f"head_dim={problem.head_dim} take {rows.shared_memory} bytes of shared "
                    f"memory; the target has {target.shared_memory}"
                )
        if max(grids) > MAX_GRID:
            reasons.append(f"its grid of {max(grids)} programs exceeds {MAX_GRID}")
        if problem.total_tokens * problem.group >= 2**31 - 2**20:
            reasons.append(f"total_tokens={problem.total_tokens} query rows are counted in 32 bits")
        return reasons

    def run_on(
        self,
        target: Target,
        problem: RaggedPageAttentionProblem,
        operands: RaggedPageAttentionOperands,
        call: Call,
    ) -> tuple[jax.Array, ...]:
        from ejk.backends.triton.ragged_combine_kernel import ragged_combine_kernel
        from ejk.backends.triton.ragged_page_attention_kernel import ragged_page_attention_kernel
        from ejk.backends.triton.ragged_plan_kernel import ragged_plan_kernel

        launch = RaggedLaunch.of(problem, self, target)
        # The plan alone: XLA makes one of the equal ones of all layers, and what they share cannot
        # be written in place.
        (work,) = call(
            ragged_plan_kernel,
            {
                "cu_q_lens_ptr": operands.cu_q_lens,
                "context_lens_ptr": operands.context_lens,
                "sliding_window_ptr": operands.sliding_window,
            },
            launch.plan_types(),
            launch.plan_constants(problem),
            grid=launch.plan_grid(problem),
            num_warps=4,
            num_stages=1,
        )
        made: dict[str, Any] = {}  # what the first launch makes, and the next ones add to
        for which, rows in enumerate(launch.launches):
            inputs, outputs = _inputs(operands, work), {} if made else launch.types(problem)
            in_place = {name: x for name, x in made.items() if x is not None}
            absent = {name: None for name, x in made.items() if x is None}
            written = call(
                ragged_page_attention_kernel,
                inputs | absent,
                outputs,
                launch.constants(problem, which),
                in_place=in_place,
                grid=launch.grid(problem, which),
                num_warps=rows.num_warps,
                num_stages=rows.num_stages,
                max_registers=rows.max_registers,
            )
            made |= dict(zip(outputs or in_place, written))
            if not launch.combine_grid(problem, which):
                continue
            results = {name: made[name] for name in ("out_ptr", "lse_ptr")}
            written = call(
                ragged_combine_kernel,
                {
                    "part_out_ptr": made["part_out_ptr"],
                    "part_lse_ptr": made["part_lse_ptr"],
                    "sinks_ptr": operands.sinks,
                    "work_ptr": work,
                },
                {},
                launch.combine_constants(problem, which),
                in_place=results,
                grid=launch.combine_grid(problem, which),
                num_warps=4,
                num_stages=2,
            )
            made |= dict(zip(results, written))
        out, lse = made["out_ptr"], made["lse_ptr"]
        return (out, lse) if problem.return_lse else (out,)


def _inputs(operands: RaggedPageAttentionOperands, work: Any) -> dict[str, Any]:
    """Return the attention kernel's inputs, in its order."""
    values = operands.key_cache if operands.value_cache is None else operands.value_cache
    return {
        "query_ptr": operands.query,
        "cu_q_lens_ptr": operands.cu_q_lens,
        "key_ptr": operands.key_cache,
        "value_ptr": values,
        "block_tables_ptr": operands.block_tables,
        "attn_scale_ptr": operands.attn_scale,
        "sliding_window_ptr": operands.sliding_window,
        "sinks_ptr": operands.sinks,
        "alibi_slopes_ptr": operands.alibi_slopes,
        "positions_ptr": operands.positions,
        "tree_mask_ptr": operands.tree_mask,
        "work_ptr": work,
    }
