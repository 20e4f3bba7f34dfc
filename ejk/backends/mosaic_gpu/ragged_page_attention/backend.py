"""`ejk.ragged_page_attention` on Hopper: what is taken, and how it is launched."""

import dataclasses
from typing import Any

import jax

from ejk.backends.gpu import Target
from ejk.backends.layouts import POOLS
from ejk.backends.mosaic_gpu._backend import MosaicGpuBackend, unfit_cache, unfit_target
from ejk.backends.mosaic_gpu.ragged_page_attention.sizes import BLOCK_KV, ROWS, PrefillSizes
from ejk.backends.ragged_page_attention import (
    RaggedPageAttentionBackend,
    RaggedPageAttentionOperands,
    RaggedPageAttentionProblem,
)
from ejk.backends.triton._backend import Call
from ejk.backends.triton.ragged_page_attention.backend import RaggedSteps
from ejk.backends.triton.ragged_page_attention.sizes import ragged_size_refusals

# Up to so many query rows of a sequence and KV head Triton's kernels are as fast,
# and compiled sooner. Time of a layer over theirs on an H100, 32 sequences of 4,096, pages of 16,
# by new tokens:
#     heads of a group   1       2       4       8       16      64
#                    1                           0.997   1.000   0.898
#                    4   0.997           0.995   0.977
#                    8   0.992   0.994   0.972
# On 8,192 with 8 new tokens and groups of 4: 0.984. 4 chunks of 512 and 60 decodes: 0.754.
FEW_ROWS = 16


@dataclasses.dataclass(frozen=True)
class MosaicGpuRaggedPageAttention(MosaicGpuBackend, RaggedPageAttentionBackend):
    """Run `ejk.ragged_page_attention` as a Pallas Mosaic GPU kernel, on Hopper.

    One launch takes long and short sequences alike. Triton's kernels deal out the work and merge
    the parts of contexts.

    Attributes:
        compute_capability: compile for it, 90 for sm_90; the device's own if None.
        num_sms: streaming multiprocessors to keep busy; the device's own if None.
        plain: use public operations of Pallas alone: slower.
        interpret: run the kernel on the CPU with Pallas' interpreter of GPU kernels, which detects
            races. It is `plain` then. Needs JAX 0.12.
    """

    compute_capability: int | None = None
    num_sms: int | None = None
    plain: bool = False
    interpret: bool = False

    features = POOLS | {
        "attn_logits_soft_cap", "sliding_window", "sinks", "alibi_slopes", "return_lse",
    }  # fmt: skip

    def unfit(self, problem: RaggedPageAttentionProblem) -> list[str]:
        head_dim, value_head_dim = problem.head_dim, problem.value_head_dim
        reasons: list[str] = []
        if head_dim not in BLOCK_KV:
            reasons.append(f"head_dim={head_dim} must be 64, 128 or 256")
        if value_head_dim != head_dim:
            reasons.append(f"value_head_dim={value_head_dim} must be head_dim={head_dim}")
        if problem.group > ROWS:
            reasons.append(f"num_heads // num_kv_heads={problem.group} must be at most {ROWS}")
        return reasons + unfit_cache(problem, BLOCK_KV.get(head_dim, max(BLOCK_KV.values())))

    def passed_over(
        self, problem: RaggedPageAttentionProblem, platform: str
    ) -> tuple[str, str] | None:
        rows = problem.q_len_bound * problem.group
        if self.interpret or rows > FEW_ROWS:
            return None
        return "triton", (
            f"for max_q_len={problem.q_len_bound} and {problem.group} query heads a KV head, up to "
            f"{FEW_ROWS} rows, triton is as fast and compiled sooner"
        )

    def limits_on(self, target: Target, problem: RaggedPageAttentionProblem) -> list[str]:
        return unfit_target(target) + ragged_size_refusals(problem)

    def run_on(
        self,
        target: Target,
        problem: RaggedPageAttentionProblem,
        operands: RaggedPageAttentionOperands,
        call: Call,
    ) -> tuple[Any, ...]:
        from ejk.backends.mosaic_gpu.ragged_page_attention.call import attend

        sizes = PrefillSizes.of(problem, target, interpret=self.interpret, plain=self.plain)
        steps = RaggedSteps(problem, operands, sizes, call)
        work = steps.list_work()
        with jax.enable_x64(False):  # a kernel's integers have 32 bits, whatever the caller's have
            written = attend(sizes, operands, work)
        memory = {f"{name}_ptr": x for name, x in written._asdict().items()}
        for kind in range(len(sizes.plan.kinds)):
            memory = steps.combine(kind, work, memory)
        return steps.results(memory)
