"""Latent attention of a ragged batch as decode: a sequence of it is a few new tokens of one.

A program of the decode kernel has 64 query rows. More than 32 query heads of a token fill them,
which another token would not share; 8, 16 and 32 leave room for eight, four and two new tokens. The
last of them sees a context in the pages of their sequence, each one before it a token less:
`piece.is_before` says so to the kernel. Programs of a sequence follow one another, and find in the
L2 cache what others have read.

On an H200, pages of 64, Triton's kernel and this one, with the small kernels that cut the blocks
and put results in their places: 19 us of 64 x 5 tokens, half of them once for all layers. In us:
    new tokens on contexts         16 heads           64                 128
    64 x 4 on 4,096                                   405.1 and 296.7    799.8 and 544.1
    64 x 5 on 4,096                205.7 and 173.5
    40 x 8 on 200 to 16,000        281.5 and 225.5
    8 x 256 on 4,096                                  3,055 and 1,980
    8 x 512 on 4,096               1,473 and 1,080    5,837 and 3,722
    8 x 2,048 on 4,096             4,650 and 3,477
    4 x 256, 60 x 1 on 4,096       517.4 and 389.4
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ejk._indices import Size, least
from ejk.backends.mosaic_gpu.page_attention.sizes import ROWS
from ejk.backends.mosaic_gpu.page_attention.tokens import Tokens
from ejk.backends.page_attention import (
    PageAttentionOperands,
    PageAttentionProblem,
    PagedProblem,
)
from ejk.backends.ragged_page_attention import (
    Items,
    RaggedPageAttentionOperands,
    RaggedPageAttentionProblem,
    number_items,
    sane_bounds,
    sequences_of_rows,
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
        """At most: each sequence may have one that is not full."""
        total_tokens = self.problem.total_tokens
        if self.tokens == 1:
            return total_tokens  # rows of no sequence have a block, too
        partial = least(self.problem.num_seqs, total_tokens) * (self.tokens - 1)
        return (total_tokens + partial) // self.tokens

    @property
    def decode(self) -> PageAttentionProblem:
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
        """Return each row's results of `run`, which runs `decode` on what it is given."""
        bounds = sane_bounds(self.problem, operands.cu_q_lens)
        if self.tokens == 1:
            seq, length = self._rows(operands, bounds)
            return run(self._operands(operands, length), Tokens(seq))
        blocks, query = self._blocks(operands, bounds), operands.query
        if (missing := self.tokens - self.problem.total_tokens) > 0:  # a program reads as many
            query = jnp.pad(query, ((0, missing), (0, 0), (0, 0)))
        exists, end = blocks.num_tokens > 0, blocks.row + blocks.num_tokens
        end = jnp.where(exists, end, 0)
        length = jnp.where(exists, blocks.context + blocks.begin + blocks.num_tokens, 0)
        given = self._operands(operands._replace(query=query), length)
        return self._by_row(blocks.row, end, run(given, Tokens(blocks.seq, end)))

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

    def _rows(
        self, operands: RaggedPageAttentionOperands, bounds: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Return the sequence of each row and what it sees: nothing where it is of none."""
        problem = self.problem
        row = jnp.arange(problem.total_tokens, dtype=jnp.int32)
        is_new, seq = sequences_of_rows(problem.num_seqs, problem.total_tokens, bounds)
        length = jnp.clip(operands.context_lens, 0, problem.capacity)[seq]
        return seq, jnp.where(is_new, length - (bounds[seq + 1] - 1 - row), 0)

    def _blocks(self, operands: RaggedPageAttentionOperands, bounds: jax.Array) -> Items:
        counts = -(-(bounds[1:] - bounds[:-1]) // self.tokens)
        number = jnp.arange(self.num_blocks, dtype=jnp.int32)
        lens = operands.context_lens
        return number_items(self.problem, lens, bounds, counts, self.tokens, number)

    def _by_row(
        self, begin: jax.Array, end: jax.Array, found: tuple[jax.Array, ...]
    ) -> tuple[jax.Array, ...]:
        """Return each row's of the results of blocks; nothing of a row of no sequence.

        Rows `[begin, end)` are a block's own. A program takes the last ones up to the end, or the
        batch's first where there are fewer.
        """
        total_tokens = self.problem.total_tokens
        row = jnp.maximum(end - self.tokens, 0)[:, None]
        row = row + jnp.arange(self.tokens, dtype=jnp.int32)[None]
        is_own = (row >= begin[:, None]) & (row < end[:, None])
        row = jnp.where(is_own, row, total_tokens)
        places = jnp.arange(row.size, dtype=jnp.int32).reshape(row.shape)
        place = jnp.full(total_tokens, -1, jnp.int32).at[row].set(places, mode="drop")

        def by_row(x: jax.Array, nothing: float) -> jax.Array:
            x = x.reshape(-1, self.problem.num_heads, *x.shape[2:])
            is_new = (place >= 0).reshape(-1, *[1] * (x.ndim - 1))
            return jnp.where(is_new, x.at[place].get(mode="clip"), nothing)

        return tuple(by_row(x, nothing) for x, nothing in zip(found, (0.0, -jnp.inf)))
