"""`ejk.ragged_page_attention` on TPUs: which calls the kernel takes, and how they are cut."""

import dataclasses
from collections.abc import Hashable
from typing import ClassVar

import jax
import jax.numpy as jnp

from ejk._backend import Tunable
from ejk.backends._fields import at_least, check_interpret
from ejk.backends.layouts import POOLS
from ejk.backends.paged_problem import CACHES
from ejk.backends.pallas._backend import INT4, PallasBackend
from ejk.backends.pallas._chip import SMEM_LIMIT_BYTES, chip
from ejk.backends.pallas._sizes import seen_pages
from ejk.backends.pallas._tiles import LANES, in_parts, round_up
from ejk.backends.pallas.ragged_page_attention.sizes import ROWS_AT_ONCE, RaggedSizes, item_words
from ejk.backends.ragged_page_attention import (
    RaggedPageAttentionBackend,
    RaggedPageAttentionOperands,
    RaggedPageAttentionProblem,
    sane_bounds,
)
from ejk.backends.ragged_prefixes import attend_in_groups

# Tokens of the context, at most: 256 are priced 1.7 times as dear on v5e, 2.3 times on v6e.
BLOCK_KV = 512
FEW_TOKENS = 8  # new tokens of a sequence that one block of queries takes: drafts to verify

Results = tuple[jax.Array, ...]


@dataclasses.dataclass(frozen=True)
class PallasRaggedPageAttention(PallasBackend, RaggedPageAttentionBackend):
    """Run `ejk.ragged_page_attention` as a Pallas kernel on a TPU.

    New tokens are taken in blocks, each of one sequence. With a `max_q_len` of at most 8, and no
    `block_q`, a block takes them all; else sequences of one new token have blocks of one, in a
    launch of their own.

    Attributes:
        block_q: new tokens of a block of a sequence that has several. None: by sizes and chip.
        pages_per_block: pages of the context that are fetched and computed together. None: by
            sizes and chip.
        vmem_limit_bytes: memory next to the cores that the kernel may use. None: by chip.
        least_saved_bytes: as of `ejk.TritonRaggedPageAttention`.
        interpret: as of `ejk.PallasPageAttention`.
    """

    block_q: int | None = None
    pages_per_block: int | None = None
    vmem_limit_bytes: int | None = None
    least_saved_bytes: int | None = None
    interpret: bool | Hashable = False

    features = (
        frozenset({"attn_logits_soft_cap", "sliding_window", "sinks", "alibi_slopes"})
        | {"value_head_dim", "return_lse", "positions", "tree_mask", "causal=False"}
        | POOLS
        | CACHES - INT4
    )
    tunable: ClassVar[Tunable] = {
        "block_q": (8, 16, 32, 64, 128),
        "pages_per_block": (4, 8, 16, 32, 64, 128),
    }

    def __post_init__(self):
        check_interpret(self, of_pallas=True)
        at_least(self, block_q=1, pages_per_block=1, vmem_limit_bytes=1, least_saved_bytes=0)

    def limits(self, problem: RaggedPageAttentionProblem, platform: str) -> tuple[str, ...]:
        reasons = self.first_refusals("the matrix unit", problem.query_dtype, problem.cache_dtype)
        if not self._seqs_per_launch(problem):
            reasons.append(
                f"max_blocks={problem.max_blocks}, total_tokens={problem.total_tokens}: the table "
                f"of a sequence and the blocks of queries must fit in {SMEM_LIMIT_BYTES} bytes of "
                "scalar memory; larger pages make the table shorter"
            )
        for sizes in self._sizes(problem):
            reasons += self.vmem_refusals(
                f"blocks of {sizes.block_q} new tokens and {sizes.block_pages} pages of "
                f"page_size={problem.page_size} need",
                sizes.vmem(),
            )
        return tuple(reasons)

    def launch(
        self, problem: RaggedPageAttentionProblem, operands: RaggedPageAttentionOperands
    ) -> Results:
        def fits(problem: RaggedPageAttentionProblem) -> bool:
            return not self.limits(problem, "tpu")

        return attend_in_groups(problem, operands, self._launch, self.least_saved_bytes, fits)

    def _launch(
        self, problem: RaggedPageAttentionProblem, operands: RaggedPageAttentionOperands
    ) -> Results:
        from ejk.backends.pallas.ragged_page_attention.call import nothing_seen

        most = self._seqs_per_launch(problem)
        results = nothing_seen(problem, operands.query)
        if problem.num_seqs <= most:
            return self._attend(problem, operands, results)
        return self._attend_parts(problem, operands, results, -(-problem.num_seqs // most))

    def _attend(
        self,
        problem: RaggedPageAttentionProblem,
        operands: RaggedPageAttentionOperands,
        results: Results,
    ) -> Results:
        """Fill in the results of the new tokens of some sequences."""
        from ejk.backends.pallas.ragged_page_attention.call import attend

        return attend(self._sizes(problem), operands, results, self.vmem_limit, self.interpreter)

    def _attend_parts(
        self,
        problem: RaggedPageAttentionProblem,
        operands: RaggedPageAttentionOperands,
        results: Results,
        parts: int,
    ) -> Results:
        """Let parts of the batch, all of one size and so by the same kernels, follow each other."""
        size = -(-problem.num_seqs // parts)
        part, more = dataclasses.replace(problem, num_seqs=size), parts * size - problem.num_seqs
        bounds = jnp.pad(sane_bounds(problem, operands.cu_q_lens), (0, more), mode="edge")
        of_part = size * jnp.arange(parts)[:, None] + jnp.arange(size + 1)[None]
        given = dict(
            cu_q_lens=bounds[of_part],
            context_lens=in_parts(operands.context_lens, parts, size),
            block_tables=in_parts(operands.block_tables, parts, size),
        )

        def launch_part(results: Results, given: dict[str, jax.Array]) -> tuple[Results, None]:
            return self._attend(part, operands._replace(**given), results), None

        return jax.lax.scan(launch_part, results, given)[0]

    def _seqs_per_launch(self, problem: RaggedPageAttentionProblem) -> int:
        """Return how many sequences' tables fit in scalar memory; 0 if not even one's does."""
        seqs, of_item = problem.num_seqs, item_words(problem)
        fixed = (of_item + 3) * LANES  # each array begins at a whole tile
        while seqs:
            launches = self._sizes(dataclasses.replace(problem, num_seqs=seqs))
            items = max(sizes.num_items for sizes in launches)
            words = seqs * problem.max_blocks + items * of_item + fixed
            if 4 * words <= SMEM_LIMIT_BYTES:
                return seqs
            seqs //= 2
        return 0

    def _sizes(self, problem: RaggedPageAttentionProblem) -> tuple[RaggedSizes, ...]:
        """Cut the call in one launch, or in two: one new token a sequence, and more."""
        total, q_len = problem.total_tokens, problem.q_len_bound
        most = min(problem.num_seqs, total)
        # Tokens of a block, or what is known of so many blocks is half of the scalar memory. Only
        # where `max_q_len` says less than is true, or most rows are nobody's, do they matter.
        least = -(-8 * item_words(problem) * total // SMEM_LIMIT_BYTES)
        if q_len <= FEW_TOKENS and self.block_q is None:
            sizes = self._fitting(problem, max(q_len, least), (1, total))
            return (_with_items(sizes, min(total // sizes.block_q + most, total)),)
        rows = max(FEW_TOKENS, ROWS_AT_ONCE // problem.group)
        block_q = min(self.block_q or rows, max(q_len, least))
        many = self._fitting(problem, block_q, (2, total))
        # At most half as many sequences as there are tokens have two new tokens or more.
        items = total // many.block_q + max(min(most, total // 2), 1)
        return _with_items(self._fitting(problem, 1, (1, 1)), most), _with_items(many, items)

    def _fitting(
        self, problem: RaggedPageAttentionProblem, block_q: int, q_lens: tuple[int, int]
    ) -> RaggedSizes:
        """Return blocks that fit in VMEM: those of the context are made shorter, then the others.

        Fields of the object stay as they are.
        """
        target, pages = chip(), self.pages_per_block
        if pages is None:
            pages = min(max(BLOCK_KV // problem.page_size, 1), seen_pages(problem))
        sizes = RaggedSizes(
            problem=problem, num_items=0, block_pages=pages, block_q=block_q, q_lens=q_lens,
            cores=target.cores, **target.of_sizes,
        )  # fmt: skip
        for field, given in (("block_pages", self.pages_per_block), ("block_q", self.block_q)):
            while given is None and getattr(sizes, field) > 1 and not sizes.fits(self.vmem_limit):
                sizes = dataclasses.replace(sizes, **{field: -(-getattr(sizes, field) // 2)})
        return sizes


def _with_items(sizes: RaggedSizes, items: int) -> RaggedSizes:
    return dataclasses.replace(sizes, num_items=round_up(items, sizes.cores))
