"""`ejk.page_attention` on TPUs: which calls the Pallas kernel takes, and how it is launched."""

import dataclasses
from collections.abc import Hashable
from typing import ClassVar, Literal

import jax

from ejk._backend import Tunable
from ejk.backends._fields import at_least, check_interpret
from ejk.backends.layouts import POOLS
from ejk.backends.page_attention import (
    PageAttentionBackend,
    PageAttentionOperands,
    PageAttentionProblem,
)
from ejk.backends.paged_problem import CACHES
from ejk.backends.pallas._backend import INT4, PallasBackend
from ejk.backends.pallas._chip import SMEM_LIMIT_BYTES, chip
from ejk.backends.pallas._sizes import seen_pages
from ejk.backends.pallas._tiles import LANES, in_parts, round_up
from ejk.backends.pallas.page_attention.sizes import Sizes, seqs_per_launch
from ejk.backends.pallas.page_attention.tuned import BLOCK_KV, LONG_BLOCK_KV, ROUND_KEY_BYTES


@dataclasses.dataclass(frozen=True)
class PallasPageAttention(PallasBackend, PageAttentionBackend):
    """Run `ejk.page_attention` as a Pallas kernel on a TPU.

    A core computes a sequence in one pass whatever `num_splits` says: it has no other cores of
    its own to give parts to. What `num_splits >= 1` promises holds: block sizes follow from the
    model and the chip alone, so a sequence's result has the same bits in any batch.

    Attributes:
        pages_per_compute_block: pages of a block, over which one softmax is taken. None: by sizes
            and chip.
        blocks_per_round: blocks that are computed together, of one sequence or of several. None: by
            sizes and chip; several where KV heads are few, or are wide on v5e and v5p.
        megacore_mode: what the two cores of a megacore chip (v4, v5p) share: `"batch"`, the
            sequences, or `"kv_head"`, the KV heads. None: the sequences on such a chip, or the KV
            heads of a single one.
        vmem_limit_bytes: memory next to the cores that the kernel may use. None: by chip.
        interpret: run the kernel on the CPU instead, in Pallas' interpreter of TPU kernels, in
            which memory that was not written reads as NaN and a read out of bounds raises. May
            be `pltpu.InterpretParams`, to detect races or choose when copies happen.
    """

    pages_per_compute_block: int | None = None
    blocks_per_round: int | None = None
    megacore_mode: Literal["batch", "kv_head"] | None = None
    vmem_limit_bytes: int | None = None
    interpret: bool | Hashable = False

    features = (
        frozenset({"attn_logits_soft_cap", "sliding_window", "sinks", "alibi_slopes"})
        | {"value_head_dim", "return_lse", "axis_name"}  # but not with slopes
        | POOLS
        | CACHES - INT4
    )
    tunable: ClassVar[Tunable] = {
        "pages_per_compute_block": (4, 8, 16, 32, 64, 128),
        "blocks_per_round": (1, 2, 4),
        "megacore_mode": ("batch", "kv_head"),
    }

    def __post_init__(self):
        check_interpret(self, of_pallas=True)
        if self.megacore_mode not in (None, "batch", "kv_head"):
            raise ValueError(
                f"megacore_mode={self.megacore_mode!r} must be 'batch', 'kv_head' or None"
            )
        at_least(self, pages_per_compute_block=1, blocks_per_round=1, vmem_limit_bytes=1)

    def limits(self, problem: PageAttentionProblem, platform: str) -> tuple[str, ...]:
        reasons = self.first_refusals("the matrix unit", problem.query_dtype, problem.cache_dtype)
        if self.megacore_mode == "kv_head":
            if problem.num_kv_heads % 2:
                reasons.append(
                    f'megacore_mode="kv_head": num_kv_heads={problem.num_kv_heads} must be even'
                )
            if _shares_tiles(problem):
                scales = "scales per token keep" if problem.scales == "token" else "keeps"
                reasons.append(
                    f'megacore_mode="kv_head": cache_layout="{problem.cache_layout}" {scales} a '
                    "token's heads in one tile, and copies take whole tiles"
                )
        if seqs_per_launch(problem, SMEM_LIMIT_BYTES) < 1:
            reasons.append(
                f"max_blocks={problem.max_blocks}: the table of one sequence must fit in "
                f"{SMEM_LIMIT_BYTES} bytes of scalar memory; larger pages make it shorter"
            )
        sizes = self._sizes(problem)
        reasons += self.vmem_refusals(
            f"a block of {sizes.block_pages} page{'s' * (sizes.block_pages > 1)} of "
            f"page_size={problem.page_size} needs",
            sizes.vmem(),
        )
        return tuple(reasons)

    def launch(
        self, problem: PageAttentionProblem, operands: PageAttentionOperands
    ) -> tuple[jax.Array, ...]:
        most = seqs_per_launch(problem, SMEM_LIMIT_BYTES)
        if problem.num_seqs <= most:
            return self._attend(problem, operands)
        # Parts of one size are one kernel: the last is filled up with sequences of length 0.
        parts = -(-problem.num_seqs // most)
        size = -(-problem.num_seqs // parts)

        def launch_part(rows: dict[str, jax.Array]) -> tuple[jax.Array, ...]:
            part = dataclasses.replace(problem, num_seqs=size)
            return self._attend(part, operands._replace(**rows))

        rows = {name: in_parts(getattr(operands, name), parts, size) for name in problem.per_seq}
        results = jax.lax.map(launch_part, rows)
        return tuple(x.reshape(-1, *x.shape[2:])[: problem.num_seqs] for x in results)

    def _attend(
        self, problem: PageAttentionProblem, operands: PageAttentionOperands
    ) -> tuple[jax.Array, ...]:
        from ejk.backends.pallas.page_attention.call import attend

        return attend(self._sizes(problem), operands, self.vmem_limit, self.interpreter)

    def _sizes(self, problem: PageAttentionProblem) -> Sizes:
        """Cut a launch in steps, rounds and blocks, and share it between cores."""
        target = chip()
        mode, cores = self.megacore_mode, target.cores if self.megacore_mode is None else 2
        if mode is None:
            two_shares = problem.num_kv_heads % 2 == 0 and not _shares_tiles(problem)
            mode = "kv_head" if problem.num_seqs == 1 and two_shares else "batch"
        sharing = cores if mode == "batch" else 1
        core_seqs = -(-problem.num_seqs // sharing)
        sizes = Sizes(
            problem=problem, num_items=core_seqs, block_pages=self._block_pages(problem),
            cores=cores, shared=mode, **target.of_sizes,
        )  # fmt: skip
        # How many blocks a round has changes no bit of them: it may follow from the batch.
        blocks = core_seqs * -(-seen_pages(problem) // sizes.block_pages)
        round_blocks = min(self.blocks_per_round or self._round_blocks(sizes), blocks)
        step_seqs = min(round_blocks, core_seqs)
        num_items = round_up(problem.num_seqs, step_seqs * sharing)
        return dataclasses.replace(
            sizes, num_items=num_items, round_blocks=round_blocks, step_items=step_seqs
        )

    def _block_pages(self, problem: PageAttentionProblem) -> int:
        """Choose how many pages a block has: by the model and the chip alone if that is asked."""
        if self.pages_per_compute_block is not None:
            return self.pages_per_compute_block
        target = chip()
        one_page = Sizes(problem=problem, num_items=1, block_pages=1, **target.of_sizes)
        of_round = ROUND_KEY_BYTES * problem.page_size // one_page.key_bytes
        if problem.head_dim > LANES and of_round < BLOCK_KV:
            of_round //= target.wide_round_blocks
        longest = LONG_BLOCK_KV if of_round > 4 * BLOCK_KV else BLOCK_KV
        tokens = min(of_round, longest)
        pages = max(1, tokens // problem.page_size)
        while pages > 1 and not self._fits(one_page, block_pages=pages):
            pages //= 2
        return pages if problem.num_splits > 0 else min(pages, seen_pages(problem))

    def _round_blocks(self, sizes: Sizes) -> int:
        blocks = min(max(ROUND_KEY_BYTES // sizes.key_bytes, 1), chip().round_blocks)
        while blocks > 1 and not self._fits(sizes, round_blocks=blocks, step_items=blocks):
            blocks //= 2
        return blocks

    def _fits(self, sizes: Sizes, **changed: int) -> bool:
        return dataclasses.replace(sizes, **changed).fits(self.vmem_limit)


def _shares_tiles(problem: PageAttentionProblem) -> bool:
    """Say whether KV heads lie in one tile, of the pools or of the scales of tokens."""
    of_scales = problem.scales == "token" and problem.cache_layout == "HND"
    return problem.layout.heads_inside or of_scales
