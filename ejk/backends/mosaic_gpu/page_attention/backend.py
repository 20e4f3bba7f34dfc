"""`ejk.page_attention` of latent caches on Hopper: what is taken, and how it is launched."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from ejk import _jax
from ejk.backends.gpu import MAX_GRID, Target
from ejk.backends.mosaic_gpu._installed import missing
from ejk.backends.mosaic_gpu.page_attention.sizes import (
    BLOCK_KV,
    HEAD_DIM,
    ROWS,
    VALUE_HEAD_DIM,
    LatentSizes,
)
from ejk.backends.page_attention import (
    POOLS,
    PageAttentionBackend,
    PageAttentionOperands,
    PageAttentionProblem,
)
from ejk.backends.triton._backend import Call, TritonBackend
from ejk.backends.triton._sizes import size_refusals
from ejk.backends.triton.page_attention.backend import TritonPageAttention, combine
from ejk.backends.triton.page_attention.plan import TritonPlan, work_of

FEWEST_HEADS = ROWS // 2 + 1  # fewer are faster on Triton's kernel
COMPUTE_CAPABILITY = 90


@dataclasses.dataclass(frozen=True)
class MosaicGpuPageAttention(TritonBackend, PageAttentionBackend):
    """Run `ejk.page_attention` of latent caches as a Pallas Mosaic GPU kernel, on Hopper.

    For many query heads, keys of 576 entries and values that are their first 512. Triton's kernels
    deal out the work and merge the parts of contexts.

    Attributes:
        compute_capability: compile for it, 90 for sm_90; the device's own if None.
        num_sms: streaming multiprocessors to keep busy; the device's own if None.
        interpret: run the kernel on the CPU with Pallas' interpreter of GPU kernels, which detects
            races. Needs JAX 0.12.
    """

    compute_capability: int | None = None
    num_sms: int | None = None
    interpret: bool = False

    name = "mosaic_gpu"
    features = POOLS - {"fused_pools"} | {
        "sliding_window", "value_head_dim", "return_lse", "axis_name",
    }  # fmt: skip

    @property
    def platforms(self) -> tuple[str, ...]:
        return ("cpu",) if self.interpret else ("cuda",)

    @property
    def effects(self) -> frozenset[Any]:
        """The interpreter's callbacks run in order."""
        return _jax.callback_effects() if self.interpret else frozenset()

    def limits(self, problem: PageAttentionProblem, platform: str) -> Sequence[str]:
        # What Triton's kernel is for is said first, not that something is not installed.
        if reasons := unfit(problem):
            return reasons
        if reason := missing(self.interpret):
            return (reason,)
        return super().limits(problem, platform)

    def limits_on(self, target: Target, problem: PageAttentionProblem) -> list[str]:
        capability = target.compute_capability
        if capability not in (None, COMPUTE_CAPABILITY):
            return [f"compute_capability={capability} must be {COMPUTE_CAPABILITY}, Hopper's"]
        grid = LatentSizes.of(problem, target, self.interpret).grid
        reasons = [f"its grid of {grid} programs exceeds {MAX_GRID}"] * (grid > MAX_GRID)
        return [*reasons, *size_refusals(problem)]

    def run_on(
        self,
        target: Target,
        problem: PageAttentionProblem,
        operands: PageAttentionOperands,
        call: Call,
    ) -> tuple[Any, ...]:
        from ejk.backends.mosaic_gpu.page_attention.call import attend

        sizes = LatentSizes.of(problem, target, self.interpret)
        work = work_of(sizes.cut.plan, operands, call)
        with jax.enable_x64(False):  # a kernel's integers have 32 bits, whatever the caller's have
            written = attend(sizes, operands, work)
        out, lse = written.out, written.lse
        if written.part_out is not None:
            out, lse = combine(
                sizes.cut,
                sizes.problem,
                written.part_out,
                written.part_lse,
                None,
                work,
                out,
                lse,
                call,
            )
        results = (out, lse) if problem.return_lse else (out,)
        return tuple(x[:, : problem.num_heads] for x in results)

    @property
    def planner(self) -> TritonPlan:
        return TritonPageAttention(**vars(self)).planner


def unfit(problem: PageAttentionProblem) -> list[str]:
    """Say why a problem is none of this kernel's."""
    page_size, dtype = problem.page_size, problem.query_dtype
    reasons: list[str] = []
    if not problem.latent:
        return ["it takes latent caches: value_cache=None with value_head_dim"]
    if problem.num_kv_heads != 1:
        reasons.append(f"num_kv_heads={problem.num_kv_heads} must be 1")
    if (problem.head_dim, problem.value_head_dim) != (HEAD_DIM, VALUE_HEAD_DIM):
        reasons.append(
            f"head_dim={problem.head_dim} and value_head_dim={problem.value_head_dim} must be "
            f"{HEAD_DIM} and {VALUE_HEAD_DIM}"
        )
    if problem.num_heads < FEWEST_HEADS:
        reasons.append(f"num_heads={problem.num_heads} must be at least {FEWEST_HEADS}")
    if dtype not in (jnp.bfloat16, jnp.float16) or problem.cache_dtype != dtype:
        reasons.append(f"dtype={dtype}: it takes bfloat16 and float16")
    if page_size % 8 or (BLOCK_KV % page_size and page_size % BLOCK_KV):
        reasons.append(
            f"page_size={page_size} must be 8, 16, 32 or a multiple of {BLOCK_KV}: a copy takes "
            "8 tokens or more, and a block ends with a page"
        )
    return reasons
