"""The steps of a run before and after its items are attended to, by whatever kernel."""

from typing import Any

from ejk.backends.ragged_page_attention import (
    RaggedPageAttentionOperands,
    RaggedPageAttentionProblem,
)
from ejk.backends.triton._backend import Call
from ejk.backends.triton.ragged_page_attention.sizes import RaggedCut

Memory = dict[str, Any]
"""Results and parts by the parameters of the kernels, None where there is none."""


def list_work(
    problem: RaggedPageAttentionProblem,
    operands: RaggedPageAttentionOperands,
    sizes: RaggedCut,
    call: Call,
) -> Any:
    """Return the list of all items: see `RaggedPlan`."""
    from ejk.backends.triton.ragged_page_attention.plan_kernel import ragged_plan_kernel

    # The list alone: XLA makes one of the equal ones of all layers, and what they share cannot be
    # written in place.
    [work] = call(
        ragged_plan_kernel,
        {
            "cu_q_lens_ptr": operands.cu_q_lens,
            "context_lens_ptr": operands.context_lens,
            "sliding_window_ptr": operands.sliding_window,
        },
        {"work_ptr": sizes.plan.type},
        sizes.plan_constants(problem),
        grid=sizes.plan_grid(problem),
        num_warps=4,
        num_stages=1,
    )
    return work


def combine(
    memory: Memory,
    kind: int,
    *,
    problem: RaggedPageAttentionProblem,
    operands: RaggedPageAttentionOperands,
    sizes: RaggedCut,
    work: Any,
    call: Call,
) -> Memory:
    """Combine those items of a kind that are pieces of one block."""
    from ejk.backends.triton.ragged_page_attention.combine_kernel import ragged_combine_kernel

    if not (grid := sizes.combine_grid(problem, kind)):
        return memory
    results = {name: memory[name] for name in ("out_ptr", "lse_ptr")}
    parts = {name: memory[name] for name in ("part_out_ptr", "part_lse_ptr")}
    written = call(
        ragged_combine_kernel,
        {**parts, "sinks_ptr": operands.sinks, "work_ptr": work},
        {},
        sizes.combine_constants(problem, kind),
        in_place=results,
        grid=grid,
        num_warps=4,
        num_stages=2,
    )
    return memory | dict(zip(results, written))
