"""`ejk.page_attention` as a Triton kernel: its tuning, what it refuses, how it is launched."""

import dataclasses
from typing import Any, ClassVar

import jax

from ejk._backend import Tunable
from ejk.backends.gpu import MAX_GRID, Target
from ejk.backends.layouts import POOLS
from ejk.backends.page_attention import (
    PageAttentionBackend,
    PageAttentionOperands,
    PageAttentionProblem,
)
from ejk.backends.paged_problem import AXIS, CACHES
from ejk.backends.triton._backend import Call, TritonBackend, kernel_inputs
from ejk.backends.triton._sizes import size_refusals
from ejk.backends.triton.page_attention.blocks import Tuning
from ejk.backends.triton.page_attention.plan import work_of
from ejk.backends.triton.page_attention.planner import TritonPlan
from ejk.backends.triton.page_attention.sizes import Sizes

INPUTS = (
    "query", "key", "value", "context_lens", "block_tables", "attn_scale", "sliding_window",
    "sinks", "alibi_slopes", "key_scale", "value_scale", "page_distances", "work",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class TritonPageAttention(Tuning, TritonBackend, PageAttentionBackend):
    """Run `ejk.page_attention` as a Triton kernel, through jax-triton.

    `block_kv`, `num_warps` and `num_stages` are for sequences that are read by themselves: packs of
    `prefix_groups` have sizes of their own.

    Attributes:
        block_kv: tokens that a step of the kernel's loop takes; a power of two, at least 16.
        num_warps: warps a program runs on.
        num_stages: depth of the kernel's software pipeline: one less is the number of blocks of
            keys and values in flight.
        split_tokens: with `num_splits=0`, cut every context into pieces of so many tokens,
            rounded up to whole blocks. Then a sequence's result has the same bits in every batch.
        least_saved_bytes: of `prefix_groups`, read a prefix once for those of its sequences that
            then read so many bytes less; 0 for all. None: if it pays.
        compute_capability: compile for it, 90 for sm_90; the device's own if None.
        num_sms: streaming multiprocessors to keep busy; the device's own if None.
        interpret: run the kernel on the CPU with Triton's interpreter.
    """

    compute_capability: int | None = None
    num_sms: int | None = None
    interpret: bool = False

    features = POOLS | AXIS | CACHES | {
        "attn_logits_soft_cap", "sliding_window", "sinks", "alibi_slopes", "value_head_dim",
        "return_lse",
    }  # fmt: skip
    tunable: ClassVar[Tunable] = {
        "block_kv": (16, 32, 64, 128, 256),
        "num_warps": (2, 4, 8),
        "num_stages": (2, 3, 4),
    }

    def limits_on(self, target: Target, problem: PageAttentionProblem) -> list[str]:
        reasons: list[str] = []
        sizes = Sizes.of(problem, self, target)
        grid = max(sizes.grid(problem), sizes.pack_grid(problem))
        combine_grid = sizes.combine_grid(problem)
        blocks = max(sizes.pack_blocks or sizes.blocks, sizes.blocks, key=lambda x: x.shared_memory)
        if grid > MAX_GRID:
            reasons.append(f"its grid of {grid} programs exceeds {MAX_GRID}")
        if blocks.shared_memory > target.shared_memory:
            reasons.append(
                f"block_kv={blocks.block_kv} with head_dim={problem.head_dim} takes "
                f"{blocks.shared_memory} bytes of shared memory; the target has "
                f"{target.shared_memory}"
            )
        if combine_grid > MAX_GRID:
            reasons.append(f"{combine_grid} programs to combine exceed {MAX_GRID}")
        return [*reasons, *size_refusals(problem)]

    def run_on(
        self,
        target: Target,
        problem: PageAttentionProblem,
        operands: PageAttentionOperands,
        call: Call,
    ) -> tuple[Any, ...]:
        from ejk.backends.triton.page_attention.kernel import page_attention_kernel

        sizes = Sizes.of(problem, self, target)
        work = work_of(sizes.plan, problem.plan, operands, call)
        out_type, lse_type = dataclasses.replace(problem, return_lse=True).results
        inputs, part_types = kernel_inputs(operands, INPUTS, work), sizes.part_types(problem)
        types = {"out_ptr": out_type, "lse_ptr": lse_type}
        in_place = {}
        if blocks := sizes.pack_blocks:
            written = call(
                page_attention_kernel, inputs, {**part_types, **dict.fromkeys(types)},
                sizes.constants(problem, target, packed=True), grid=sizes.pack_grid(problem),
                num_warps=blocks.num_warps, num_stages=blocks.num_stages,
            )  # fmt: skip
            in_place = dict(zip(part_types, written))
        blocks = sizes.blocks
        found = call(
            page_attention_kernel, inputs, types if in_place else {**part_types, **types},
            sizes.constants(problem, target), in_place=in_place, grid=sizes.grid(problem),
            num_warps=blocks.num_warps, num_stages=blocks.num_stages,
        )  # fmt: skip
        parts, results = (found[2:], found[:2]) if in_place else (found[:2], found[2:])
        if parts[0] is not None:
            sinks = operands.sinks
            results = combine(
                parts, results, problem=problem, sizes=sizes, sinks=sinks, work=work, call=call
            )
        return results if problem.return_lse else results[:1]

    @property
    def planner(self) -> TritonPlan:
        return TritonPlan.of(self)


def combine(
    parts: tuple[Any, ...],
    results: tuple[Any, ...],
    *,
    problem: PageAttentionProblem,
    sizes: Sizes,
    sinks: Any,
    work: Any,
    call: Call,
    spans: Any = None,
) -> tuple[Any, ...]:
    """Launch the kernel that merges the parts of contexts into the results; returns these.

    Parts and results are an output and an LSE each. `spans` say which rows of the output are a
    sequence's own, where it has several tokens.
    """
    from ejk.backends.triton.page_attention.combine_kernel import combine_parts_kernel

    (part_out, part_lse), (out, lse) = parts, results
    written = {"out_ptr": out, "lse_ptr": lse}
    types = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in written.items()}
    # With a plan, contexts in one piece are written already: the rest goes between them.
    return call(
        combine_parts_kernel,
        {
            "part_out_ptr": part_out,
            "part_lse_ptr": part_lse,
            "sinks_ptr": sinks,
            "work_ptr": work,
            "spans_ptr": spans,
        },
        {} if sizes.plan else types,
        sizes.combine_constants(problem, problem.num_heads // out.shape[1]),
        in_place=written if sizes.plan else {},
        grid=sizes.combine_grid(problem),
        num_warps=sizes.combine_warps,
        num_stages=1,
    )
