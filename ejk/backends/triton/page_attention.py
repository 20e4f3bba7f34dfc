"""`ejk.page_attention` as a Triton kernel: its tuning, what it refuses, how it is launched."""

import dataclasses
import functools
from typing import Any

from ejk.backends._fields import at_least, check_interpret
from ejk.backends.gpu import MAX_GRID, Target, cannot_compile
from ejk.backends.page_attention import (
    PageAttentionBackend,
    PageAttentionOperands,
    PageAttentionProblem,
    PagedProblem,
)
from ejk.backends.page_attention_plan import PlanOperands
from ejk.backends.triton import _launch
from ejk.backends.triton.page_attention_launch import Launch, Tuning
from ejk.backends.triton.page_attention_plan import TritonPlan, run_plan

MAX_CAPACITY = 2**31 - 2**20


@dataclasses.dataclass(frozen=True)
class TritonPageAttention(Tuning, PageAttentionBackend):
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

    name = "triton"
    features = frozenset(
        {
            "attn_logits_soft_cap",
            "sliding_window",
            "sinks",
            "alibi_slopes",
            "value_head_dim",
            "fused_pools",
            "return_lse",
            "axis_name",
            "axis_name with alibi_slopes",
            'cache_layout="HND"',
            'cache_layout="NHD"',
            'cache_layout="KV_HEADS_FIRST"',
        }
    )

    def __post_init__(self):
        check_interpret(self)
        at_least(self, block_kv=16, num_warps=1, num_stages=1, split_tokens=1)
        at_least(self, compute_capability=80, num_sms=1)
        for field in ("block_kv", "num_warps"):
            value = getattr(self, field)
            if value is not None and value & (value - 1):
                raise ValueError(f"{field}={value} must be a power of two")
        if self.num_warps is not None and self.num_warps > 32:
            raise ValueError(f"num_warps={self.num_warps} must be at most 32, 1,024 threads")

    @property
    def platforms(self):
        return ("cpu",) if self.interpret else ("cuda", "rocm")

    @property
    def only_if_asked(self):
        return () if self.interpret else ("rocm",)

    @property
    def has_target(self):
        return self.compute_capability is not None

    @property
    def host_callbacks(self):
        return 3 if self.interpret else 0  # plan, attention, combination

    def limits(self, problem: PageAttentionProblem, platform: str):
        if missing := _launch.available(platform):
            return (missing,)
        target = self.target(platform)
        if target is None or target.is_too_old:
            example = f"{type(self).__name__}(compute_capability=90, num_sms=132)"
            return (cannot_compile(target, platform, example),)
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

    def run(self, problem, operands, platform):
        from ejk.backends.triton.page_attention_combine_kernel import combine_parts_kernel
        from ejk.backends.triton.page_attention_kernel import page_attention_kernel

        target = self.target(platform)
        assert target is not None  # or `limits` would have refused
        launch = Launch.of(problem, self, target)
        call = functools.partial(
            _launch.call,
            compute_capability=target.compute_capability,
            interpret=self.interpret,
        )
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
        return TritonPlan(self.compute_capability, self.num_sms, self.interpret)

    def target(self, platform: str) -> Target | None:
        """Return the GPU to compile for, None where none is known."""
        return Target.of(platform, self.compute_capability, self.num_sms)


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
        "block_distances_ptr": operands.page_distances,
        "work_ptr": work,
    }
