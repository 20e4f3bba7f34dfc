"""Latent attention of a ragged batch as decode: a sequence of it is a few new tokens of one.

A program of the decode kernel has 64 query rows. More than 32 query heads of a token fill them,
which another token would not share; 8, 16 and 32 leave room for eight, four and two new tokens. The
last of them sees a context in the pages of their sequence, each one before it a token less:
`piece.is_before` says so to the kernel. A program reads 64 rows of the queries where they lie, and
writes those of its own tokens. Programs of a sequence follow one another, and find in the L2 cache
what others have read.

On an H200, pages of 64, Triton's kernel and this one, with the small kernels that cut the blocks
and merge parts: 16 us of 64 x 8 tokens, half of them once for all layers. In us:
    new tokens on contexts         16 heads            64                 128
    64 x 4 on 4,096                120.4 and 115.1     416.7 and 257.0    818.5 and 453.1
    64 x 8 on 4,096                210.1 and 149.6
    8 x 256 on 4,096                                   3,146 and 1,662
    8 x 512 on 4,096               1,492 and 821.8     5,989 and 3,128
    4 x 256, 60 x 1 on 4,096       542.4 and 331.2
    8 x 1,024, prompts             546.4 and 334.8
    4 x 10,000, prompts            18,207 and 9,740
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ejk._indices import Size, least
from ejk.backends.mosaic_gpu._tensor_cores import ROWS
from ejk.backends.mosaic_gpu.page_attention.tokens import Tokens
from ejk.backends.page_attention import PageAttentionOperands, PageAttentionProblem
from ejk.backends.paged_problem import PagedProblem
from ejk.backends.ragged_page_attention import (
    Items,
    RaggedPageAttentionOperands,
    RaggedPageAttentionProblem,
    number_items,
    sane_bounds,
)

# Heads of tokens that share a program: a copy of its rows begins with a multiple of 8.
SHARED_HEADS = (8, 16, 32)
# Where blocks are more than so many, or parts of their contexts would take more memory, no context
# is cut, and there is no plan: it compares all blocks, and each has memory for a part. They fill
# many waves of programs then. 4,102 blocks took the plan 36 of 3,500 us.
MOST_PLANNED, MOST_PART_BYTES = 8192, 2**30


@dataclasses.dataclass(frozen=True)
class AsDecode:
    """A ragged problem as one of decode, whose sequences are blocks of so many new tokens."""

    problem: RaggedPageAttentionProblem
    tokens: int  # of a block

    @classmethod
    def of(cls, problem: RaggedPageAttentionProblem) -> "AsDecode":
        # Tokens before the last one see farther back through a window: then a block has one.
        is_shared = problem.num_heads in SHARED_HEADS and not problem.has_window
        return cls(problem, ROWS // problem.num_heads if is_shared else 1)

    @property
    def num_blocks(self) -> Size:
        """At most: each sequence may have one that is not full; `_blocks` has two more of them."""
        total_tokens = self.problem.total_tokens
        partial = least(self.problem.num_seqs + 2, total_tokens) * (self.tokens - 1)
        return (total_tokens + partial) // self.tokens

    @property
    def decode_problem(self) -> PageAttentionProblem:
        names = (field.name for field in dataclasses.fields(PagedProblem))
        facts: dict[str, Any] = {name: getattr(self.problem, name) for name in names}
        facts["num_seqs"], facts["num_prefix_groups"] = self.num_blocks, 0
        facts["num_heads"] *= self.tokens
        visible_bound = self.problem.visible_bound
        return PageAttentionProblem(**facts, num_splits=0, plan=None, visible_bound=visible_bound)

    def run(
        self,
        operands: RaggedPageAttentionOperands,
        run: Callable[[PageAttentionOperands, Tokens], tuple[jax.Array, ...]],
    ) -> tuple[jax.Array, ...]:
        """Return each row's results of `run`, which runs `decode_problem` on what it is given."""
        blocks, query = self._blocks(operands), operands.query
        if (missing := self.tokens - self.problem.total_tokens) > 0:  # a program reads as many
            query = jnp.pad(query, ((0, missing), (0, 0), (0, 0)))
        exists, end = blocks.num_tokens > 0, blocks.row + blocks.num_tokens
        end = jnp.where(exists, end, 0)
        length = jnp.where(exists, blocks.context + blocks.begin + blocks.num_tokens, 0)
        tables = jnp.clip(blocks.seq - 1, 0, self.problem.num_seqs - 1)
        spans = jnp.stack([blocks.row, end], axis=1) if self.tokens > 1 else None
        given = self._operands(operands._replace(query=query), length)
        out, *lse = run(given, Tokens(tables, spans))
        if spans is not None:
            lse = [self._by_row(spans, x) for x in lse]
        return out[: self.problem.total_tokens], *lse

    def _operands(
        self, operands: RaggedPageAttentionOperands, length: jax.Array
    ) -> PageAttentionOperands:
        return PageAttentionOperands(
            query=operands.query,
            key_cache=operands.key_cache,
            value_cache=None,
            context_lens=length,
            block_tables=operands.block_tables,
            attn_scale=operands.attn_scale,
            sliding_window=operands.sliding_window,
            sinks=None,
            alibi_slopes=None,
            plan=None,
        )

    def _blocks(self, operands: RaggedPageAttentionOperands) -> Items:
        """Return blocks in the order of their rows, of which each is one block's.

        Rows of no sequence are those of two more, one before all others and one after them, whose
        contexts are empty.
        """
        problem, tokens = self.problem, self.tokens
        first, last = (jnp.full(1, row, jnp.int32) for row in (0, problem.total_tokens))
        bounds = jnp.concatenate([first, sane_bounds(problem, operands.cu_q_lens), last])
        problem = dataclasses.replace(problem, num_seqs=problem.num_seqs + 2)
        counts = -(-(bounds[1:] - bounds[:-1]) // tokens)
        number = jnp.arange(self.num_blocks, dtype=jnp.int32)
        lens = jnp.pad(operands.context_lens, 1)
        return number_items(problem, lens, bounds, counts, tokens, number)

    def own_rows(self, spans: jax.Array) -> jax.Array:
        """Return the row of each token of a block; `total_tokens` where it is another block's."""
        begin, end = spans[:, :1], spans[:, 1:]
        row = jnp.maximum(end - self.tokens, 0) + jnp.arange(self.tokens, dtype=jnp.int32)[None]
        return jnp.where((row >= begin) & (row < end), row, self.problem.total_tokens)

    def _by_row(self, spans: jax.Array, lse: jax.Array) -> jax.Array:
        """Return the LSE of each row, of those that blocks have found for all of their tokens."""
        row = self.own_rows(spans)
        lse = lse.reshape(*row.shape, -1)
        by_row = jnp.zeros((self.problem.total_tokens, lse.shape[2]), lse.dtype)
        return by_row.at[row].set(lse, mode="drop")
