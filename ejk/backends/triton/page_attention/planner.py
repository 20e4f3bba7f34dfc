"""`ejk.plan_page_attention` as a Triton kernel."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np

from ejk._indices import Size, is_static, least
from ejk.backends.gpu import H100, Target
from ejk.backends.page_attention import PageAttentionProblem
from ejk.backends.page_attention_plan import (
    PlanBackend,
    PlanFacts,
    PlanOperands,
    PlanProblem,
)
from ejk.backends.triton._backend import Call, TritonBackend
from ejk.backends.triton._sizes import MAX_CAPACITY
from ejk.backends.triton.page_attention.blocks import Tuning
from ejk.backends.triton.page_attention.plan import plan_of_call, run_plan
from ejk.backends.triton.page_attention.sizes import blocks_of_call


@dataclasses.dataclass(frozen=True)
class TritonPlan(Tuning, TritonBackend, PlanBackend):
    """Deal out the pieces with one small kernel, as a call with this tuning would itself.

    Attributes:
        compute_capability: compile for it; the device's own if None.
        num_sms: multiprocessors to deal out the work to; the device's own if None, an H100's where
            no device is known.
        interpret: run the kernel on the CPU with Triton's interpreter.
    """

    compute_capability: int | None = None
    num_sms: int | None = None
    interpret: bool = False

    features = frozenset({"sliding_window"})

    @classmethod
    def of(cls, backend: Any) -> "TritonPlan":
        """Return the planner of a backend's calls: what they have in common is the backend's."""
        names = {field.name for field in dataclasses.fields(cls)}
        return cls(**{name: x for name, x in vars(backend).items() if name in names})

    @property
    def has_target(self) -> bool:
        return False  # XLA's plan will do

    def limits_on(self, target: Target, problem: PlanProblem) -> tuple[str, ...]:
        if not is_static(problem.capacity) or problem.capacity <= MAX_CAPACITY:
            return ()
        return (
            f"max_blocks * page_size={problem.capacity} must be at most {MAX_CAPACITY}: ends of "
            "contexts are rounded up in 32 bits",
        )

    def plan_problem(
        self,
        facts: PlanFacts,
        value_head_dim: int,
        cache_dtype: np.dtype,
        num_prefix_groups: Size = 0,
    ) -> PlanProblem:
        sizes = (facts.num_seqs, facts.capacity)
        if not all(map(is_static, sizes)) or 0 in sizes:
            return PlanProblem.order_of(facts)  # no kernel reads it
        target = self.target(self.platforms[0]) or Target.of("cuda", **H100)
        assert target is not None
        problem = _problem_of_call(facts, value_head_dim, cache_dtype, num_prefix_groups)
        return plan_of_call(problem, blocks_of_call(problem, self, target), self, target)

    def run_on(
        self, target: Target, problem: PlanProblem, operands: PlanOperands, call: Call
    ) -> tuple[Any, ...]:
        return run_plan(problem, operands, call)


def _problem_of_call(
    facts: PlanFacts, value_head_dim: int, cache_dtype: np.dtype, num_prefix_groups: Size
) -> PageAttentionProblem:
    """Return a call of these facts: what they leave open costs it a little speed if it is wrong.

    Values of another width than the keys' are mostly those of latent attention.
    """
    window, is_float32 = facts.sliding_window, cache_dtype == jnp.float32
    return PageAttentionProblem(
        num_seqs=facts.num_seqs,
        num_heads=facts.num_heads,
        num_kv_heads=facts.num_kv_heads,
        head_dim=facts.head_dim,
        value_head_dim=value_head_dim,
        num_pages=facts.num_seqs * facts.max_blocks,
        page_size=facts.page_size,
        max_blocks=facts.max_blocks,
        query_dtype=np.dtype(jnp.float32 if is_float32 else jnp.bfloat16),
        cache_dtype=cache_dtype,
        cache_layout="HND",
        fused=False,
        latent=value_head_dim < facts.head_dim,
        has_window=window is not None,
        soft_cap=None,
        has_sinks=False,
        has_alibi=False,
        return_lse=False,
        num_splits=0,
        plan=None,
        visible_bound=least(facts.capacity, window) if isinstance(window, int) else facts.capacity,
        num_prefix_groups=num_prefix_groups,
    )
