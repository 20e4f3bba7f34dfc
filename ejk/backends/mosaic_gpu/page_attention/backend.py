"""`ejk.page_attention` of latent caches on Hopper: what is taken, and how it is launched."""

import dataclasses
from typing import Any

import jax

from ejk.backends.gpu import MAX_GRID, Target
from ejk.backends.layouts import POOLS
from ejk.backends.mosaic_gpu._backend import (
    MosaicGpuBackend,
    left_to_triton,
    unfit_cache,
    unfit_target,
)
from ejk.backends.mosaic_gpu._tensor_cores import ROWS
from ejk.backends.mosaic_gpu.page_attention.sizes import (
    BLOCK_KV,
    HEAD_DIM,
    VALUE_HEAD_DIM,
    LatentSizes,
)
from ejk.backends.mosaic_gpu.page_attention.tokens import OWN, Tokens
from ejk.backends.page_attention import (
    PageAttentionBackend,
    PageAttentionOperands,
    PageAttentionProblem,
)
from ejk.backends.triton._backend import Call
from ejk.backends.triton._sizes import size_refusals
from ejk.backends.triton.page_attention.backend import combine
from ejk.backends.triton.page_attention.plan import work_of
from ejk.backends.triton.page_attention.planner import TritonPlan

# With up to so many heads, for which Triton's programs have 16 rows, launches count in batches of
# up to so many tokens. Triton's time over this one's on an H200, pages of 64:
#     heads   1 x 1,024   4 x 1,024   1 x 8,192   64 x 128   16 x 1,024   4 x 4,096   64 x 4,096
#     8       0.839       0.858       0.841       0.983      1.025        1.058       1.211
#     16      0.888       0.904       0.927       1.033      1.085        1.136       1.194
#     32      1.106       1.208       1.636       1.412      1.985        1.759       1.227
FEW_HEADS, SMALL_BATCH = ROWS // 4, 2**13


@dataclasses.dataclass(frozen=True)
class MosaicGpuPageAttention(MosaicGpuBackend, PageAttentionBackend):
    """Run `ejk.page_attention` of latent caches as a Pallas Mosaic GPU kernel, on Hopper.

    For keys of 576 entries and values that are their first 512. Triton's kernels deal out the work
    and merge the parts of contexts.

    Attributes:
        compute_capability: compile for it, 90 for sm_90; the device's own if None.
        num_sms: streaming multiprocessors to keep busy; the device's own if None.
        interpret: run the kernel on the CPU with Pallas' interpreter of GPU kernels, which detects
            races. Needs JAX 0.12.
    """

    compute_capability: int | None = None
    num_sms: int | None = None
    interpret: bool = False

    features = POOLS - {"fused_pools", 'cache_layout="INTERLEAVED"'} | {
        "sliding_window", "value_head_dim", "return_lse", "axis_name",
    }  # fmt: skip

    def unfit(self, problem: PageAttentionProblem) -> list[str]:
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
        return reasons + unfit_cache(problem, BLOCK_KV)

    def passed_over(self, problem: PageAttentionProblem, platform: str) -> tuple[str, str] | None:
        is_small = problem.num_seqs * problem.visible_bound <= SMALL_BATCH
        if self.interpret or problem.num_heads > FEW_HEADS or not is_small:
            return None
        return left_to_triton(
            f"num_seqs={problem.num_seqs}, max_context_len={problem.visible_bound} and "
            f"{problem.num_heads} query heads, up to {SMALL_BATCH} tokens"
        )

    def limits_on(self, target: Target, problem: PageAttentionProblem) -> list[str]:
        if reasons := unfit_target(target):
            return reasons
        grid = LatentSizes.of(problem, target, self.interpret).grid
        reasons = [f"its grid of {grid} programs exceeds {MAX_GRID}"] * (grid > MAX_GRID)
        return [*reasons, *size_refusals(problem)]

    def part_bytes(self, target: Target, problem: PageAttentionProblem) -> int:
        """Return how much memory parts of contexts take until they are merged."""
        sizes = LatentSizes.of(problem, target, self.interpret)
        return 4 * sizes.num_parts * sizes.problem.num_heads * problem.value_head_dim

    def run_on(
        self,
        target: Target,
        problem: PageAttentionProblem,
        operands: PageAttentionOperands,
        call: Call,
        tokens: Tokens = OWN,
    ) -> tuple[Any, ...]:
        from ejk.backends.mosaic_gpu.page_attention.call import attend

        count = problem.num_heads // operands.query.shape[1]  # of tokens
        sizes = LatentSizes.of(problem, target, self.interpret, count)
        work = work_of(sizes.cut.plan, problem.plan, operands, call)
        with jax.enable_x64(False):  # a kernel's integers have 32 bits, whatever the caller's have
            written = attend(sizes, operands, tokens, work)
        results = written.out, written.lse
        if written.part_out is not None:
            results = combine(
                (written.part_out, written.part_lse),
                results,
                problem=sizes.problem,
                sizes=sizes.cut,
                sinks=None,
                work=work,
                call=call,
                spans=tokens.spans,
            )
        results = results if problem.return_lse else results[:1]
        return tuple(x[:, : problem.num_heads] for x in results)

    @property
    def planner(self) -> TritonPlan:
        return TritonPlan.of(self)
