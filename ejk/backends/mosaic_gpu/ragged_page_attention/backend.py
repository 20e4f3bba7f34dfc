"""`ejk.ragged_page_attention` on Hopper: what is taken, and how it is launched."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from ejk._cache_types import QUANTISED, SCALES
from ejk._indices import exceeds
from ejk.backends.gpu import Target
from ejk.backends.layouts import POOLS
from ejk.backends.mosaic_gpu._backend import (
    MosaicGpuBackend,
    left_to_triton,
    unfit_cache,
    unfit_target,
)
from ejk.backends.mosaic_gpu._tensor_cores import ROWS
from ejk.backends.mosaic_gpu.page_attention.backend import MosaicGpuPageAttention
from ejk.backends.mosaic_gpu.ragged_page_attention.sizes import (
    BLOCK_KV,
    PrefillSizes,
)
from ejk.backends.mosaic_gpu.ragged_page_attention.tokens import (
    MOST_PART_BYTES,
    MOST_PLANNED,
    SHARED_HEADS,
    AsDecode,
)
from ejk.backends.page_attention import PageAttentionProblem
from ejk.backends.ragged_page_attention import (
    RaggedPageAttentionBackend,
    RaggedPageAttentionOperands,
    RaggedPageAttentionProblem,
)
from ejk.backends.triton._backend import Call
from ejk.backends.triton.ragged_page_attention.blocks import UNPEELED_TOKENS
from ejk.backends.triton.ragged_page_attention.sizes import ragged_size_refusals
from ejk.backends.triton.ragged_page_attention.steps import combine, list_work
from ejk.backends.triton.ragged_page_attention.widening import (
    FEW_ROWS_OF_COPIES,
    MOST_COPIED,
    copied_bytes,
    pays_for_copies,
    widened,
)

# With at most this many query rows of a sequence and KV head, Triton's kernels are as fast and
# compiled sooner. Time of theirs over this one's on an H200, 8 KV heads of 128, pages of 16:
#     rows                       8              16      32      64              128
#     32 x 8,192 tokens          0.997, 0.997   0.999   1.028   1.011, 1.011    2.27
#     4 x 32,768, 128 x 1,024                           0.999, 1.210
FEW_ROWS = 16
# With heads of 64 and pages of up to 16 tokens, which this kernel copies in pieces of 2 KB, and
# contexts longer than `UNPEELED_TOKENS`, Triton's are faster up to this many rows. Their time over
# this one's: on 32 x 8,192 tokens 32 rows 0.749, 64 0.756, 128 1.78; on 4 x 32,768 32 rows 0.737;
# on 128 x 1,024 1.093. Larger pages, slopes and soft caps were not measured.
FEW_ROWS_OF_64 = 64
# In latent attention a token that has a program for itself fills more than half of its rows.
FEWEST_HEADS_ALONE = ROWS // 2 + 1
# Where tokens share one, launches count on contexts of up to so many tokens, if sequences have at
# most a program's rows on average: Triton has fewer. Its time over this one's on an H200, pages of
# 64, by new tokens:
#     heads   64 x 1,024   128 x 2,048   64 x 4,096                            8 x 8,192   8 x 4,096
#     8                                  2: 1.307, 4: 1.680, 8: 1.056
#     16      2: 0.925     2: 1.164      1: 1.322, 2: 1.671, 3: 1.072, 4: 1.077 2: 1.104   4: 1.144
#     32      2: 0.799                   1: 1.683                              1: 1.342
SHORT_TOKENS = 1024
# And where new tokens, heads and the tokens that they may see multiply to at most so many logits:
# 64 prompts of 16 tokens, 16 heads (2**20) 0.855, 8 of 64, 32 heads (2**20) 1.018; 64 of 32, 16
# heads (2**21) 1.057.
FEW_LOGITS = 2**20
# Where sequences have at most this many rows on average, memory bounds a call, and it pays to read
# a shared prefix once, as only Triton's kernels do. Computed from an H100's bytes and products a
# second, not measured.
MEMORY_BOUND_ROWS = 256


@dataclasses.dataclass(frozen=True)
class MosaicGpuRaggedPageAttention(MosaicGpuBackend, RaggedPageAttentionBackend):
    """Run `ejk.ragged_page_attention` as a Pallas Mosaic GPU kernel, on Hopper.

    One launch takes long and short sequences alike. Triton's kernels deal out the work and merge
    the parts of contexts. In latent attention blocks of new tokens are sequences of the kernel for
    decode.

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

    features = POOLS | QUANTISED | SCALES | {
        "attn_logits_soft_cap", "sliding_window", "sinks", "alibi_slopes", "value_head_dim",
        "return_lse", "causal=False",
    }  # fmt: skip

    def unfit(self, problem: RaggedPageAttentionProblem) -> list[str]:
        if problem.latent:
            return self._unfit_decode(problem)
        head_dim, value_head_dim = problem.head_dim, problem.value_head_dim
        reasons: list[str] = []
        if head_dim not in BLOCK_KV:
            reasons.append(f"head_dim={head_dim} must be 64, 128 or 256")
        if value_head_dim != head_dim:
            reasons.append(f"value_head_dim={value_head_dim} must be head_dim={head_dim}")
        if problem.group > ROWS:
            reasons.append(f"num_heads // num_kv_heads={problem.group} must be at most {ROWS}")
        if problem.scales == "token" and problem.query_dtype == jnp.float16:
            reasons.append("query.dtype=float16 has no room for weights times scales per token")
        return reasons + unfit_cache(problem, BLOCK_KV.get(head_dim, max(BLOCK_KV.values())))

    def _unfit_decode(self, problem: RaggedPageAttentionProblem) -> list[str]:
        backend, as_decode = self._decode_backend, AsDecode.of(problem)
        missing = sorted(as_decode.decode_problem.features - backend.features)
        missing += ["causal=False"] * (not problem.causal)
        reasons = [f"does not support {feature} with value_head_dim" for feature in missing]
        if as_decode.tokens == 1 and problem.num_heads < FEWEST_HEADS_ALONE:
            reasons.append(
                f"num_heads={problem.num_heads} must be at least {FEWEST_HEADS_ALONE}, or one of "
                f"{SHARED_HEADS} without a sliding_window"
            )
        return reasons + backend.unfit(as_decode.decode_problem)

    @property
    def _decode_backend(self) -> MosaicGpuPageAttention:
        return MosaicGpuPageAttention(self.compute_capability, self.num_sms, self.interpret)

    def _decode_problem(self, target: Target, as_decode: AsDecode) -> PageAttentionProblem:
        """Return the problem of decode: of very many blocks none is cut."""
        problem = as_decode.decode_problem
        held = self._decode_backend.part_bytes(target, problem)
        is_large = as_decode.num_blocks > MOST_PLANNED or held > MOST_PART_BYTES
        return dataclasses.replace(problem, num_splits=1) if is_large else problem

    def passed_over(
        self, problem: RaggedPageAttentionProblem, platform: str
    ) -> tuple[str, str] | None:
        rows, each = problem.q_len_bound * problem.group, problem.total_tokens * problem.group
        if self.interpret:
            return None
        is_shared = problem.latent and AsDecode.of(problem).tokens > 1
        is_few = min(rows * problem.num_seqs, each) <= ROWS * problem.num_seqs
        if is_shared and is_few and problem.visible_bound <= SHORT_TOKENS:
            return left_to_triton(
                f"total_tokens={problem.total_tokens} of num_seqs={problem.num_seqs}, "
                f"max_q_len={problem.q_len_bound}, {problem.group} query heads and "
                f"max_context_len={problem.visible_bound}, up to {ROWS} rows each that see "
                f"{SHORT_TOKENS} tokens"
            )
        if is_shared and each * problem.visible_bound <= FEW_LOGITS:
            return left_to_triton(
                f"total_tokens={problem.total_tokens}, max_context_len={problem.visible_bound} "
                f"and {problem.group} query heads, up to {FEW_LOGITS} logits"
            )
        if not problem.latent and rows <= (few := _few_rows(problem)):
            return left_to_triton(
                f"max_q_len={problem.q_len_bound} and {problem.group} query heads a KV head, "
                f"up to {few} rows"
            )
        if problem.num_prefix_groups and each <= MEMORY_BOUND_ROWS * problem.num_seqs:
            return "triton", (
                f"for total_tokens={problem.total_tokens} of num_seqs={problem.num_seqs} and "
                f"{problem.group} query heads a KV head, up to {MEMORY_BOUND_ROWS} rows each, "
                "triton reads what prefix_groups share once, and this backend for each sequence"
            )
        if problem.cache_type.is_quantised and not pays_for_copies(problem):
            return "triton", (
                f"for total_tokens={problem.total_tokens} of num_seqs={problem.num_seqs} and "
                f"{problem.group} query heads a KV head, up to {FEW_ROWS_OF_COPIES} rows each, "
                f"new tokens do not pay for copies of {problem.cache_type.name} pages"
            )
        return None

    def limits_on(self, target: Target, problem: RaggedPageAttentionProblem) -> list[str]:
        if problem.latent:
            decode_problem = self._decode_problem(target, AsDecode.of(problem))
            return self._decode_backend.limits_on(target, decode_problem)
        reasons = unfit_target(target) + ragged_size_refusals(problem)
        if problem.cache_type.is_quantised and exceeds(copied_bytes(problem), MOST_COPIED):
            reasons.append(
                f"key_cache.dtype={problem.cache_type.name}: copies of num_seqs x max_blocks="
                f"{problem.num_seqs} x {problem.max_blocks} pages in {problem.query_dtype} take "
                f"{copied_bytes(problem)} bytes, and may take {MOST_COPIED}"
            )
        return reasons

    def run_on(
        self,
        target: Target,
        problem: RaggedPageAttentionProblem,
        operands: RaggedPageAttentionOperands,
        call: Call,
    ) -> tuple[Any, ...]:
        from ejk.backends.mosaic_gpu.ragged_page_attention.call import attend
        from ejk.backends.mosaic_gpu.ragged_page_attention.scaling import ordered_scales

        if problem.latent:
            as_decode = AsDecode.of(problem)
            backend, decode_problem = self._decode_backend, self._decode_problem(target, as_decode)
            return as_decode.run(
                operands,
                lambda given, tokens: backend.run_on(target, decode_problem, given, call, tokens),
            )
        if problem.scales == "token":
            operands = ordered_scales(problem, operands, BLOCK_KV[problem.head_dim])
        if problem.cache_type.is_quantised:
            problem, operands = widened(problem, operands, target, call)
        sizes = PrefillSizes.of(problem, target, interpret=self.interpret, plain=self.plain)
        work = list_work(problem, operands, sizes, call)
        with jax.enable_x64(False):  # a kernel's integers have 32 bits, whatever the caller's have
            written = attend(sizes, operands, work)
        memory = {f"{name}_ptr": x for name, x in written._asdict().items()}
        for kind in range(len(sizes.plan.kinds)):
            memory = combine(
                memory, kind, problem=problem, operands=operands, sizes=sizes, work=work, call=call
            )
        results = memory["out_ptr"], memory["lse_ptr"]
        return results if problem.return_lse else results[:1]


def _few_rows(problem: RaggedPageAttentionProblem) -> int:
    """Return up to how many rows of a sequence and KV head Triton's kernels are to be preferred."""
    is_narrow = problem.head_dim == 64 and problem.page_size <= 16
    is_plain = not (problem.has_alibi or problem.soft_cap)
    is_long = problem.visible_bound > UNPEELED_TOKENS
    return FEW_ROWS_OF_64 if is_narrow and is_plain and is_long else FEW_ROWS
