"""Latent attention of a ragged batch as decode: each new token is a sequence of its own.

The query heads of a token, more than 32, fill a program of the decode kernel, which another token
would not share. So what each sees is a context, a token shorter than the next one's, in the same
pages. Tokens of a sequence follow one another, and find in the L2 cache what others have read.

On an H200, pages of 64, Triton's kernel and decode called so by a user, with 25 to 30 us of small
kernels that find each token's sequence, of which here are two; us:
    64 contexts of 4,096, 4 new tokens    33 heads 334.7 and 333.9    64: 409.3 and 321.5
                                          128: 801.1 and 567.3
    of 200 to 32,000, 4 new, 64 heads     498.5 and 385.2
    8 of 4,096, 128 new, 64 heads         1,573 and 1,063
"""

import dataclasses
from typing import Any

import jax.numpy as jnp

from ejk.backends.page_attention import (
    PageAttentionOperands,
    PageAttentionProblem,
    PagedProblem,
)
from ejk.backends.ragged_page_attention import (
    RaggedPageAttentionOperands,
    RaggedPageAttentionProblem,
    sane_bounds,
    sequences_of_rows,
)

# Each has a row of a table, and the plan compares them all. More were not measured.
MOST_TOKENS = 1024


def problem_of_tokens(problem: RaggedPageAttentionProblem) -> PageAttentionProblem:
    """Return the decode call whose sequences are the new tokens."""
    names = (field.name for field in dataclasses.fields(PagedProblem))
    facts: dict[str, Any] = {name: getattr(problem, name) for name in names}
    facts["num_seqs"], facts["num_prefix_groups"] = problem.total_tokens, 0
    visible_bound = problem.visible_bound
    return PageAttentionProblem(**facts, num_splits=0, plan=None, visible_bound=visible_bound)


def operands_of_tokens(
    problem: RaggedPageAttentionProblem, operands: RaggedPageAttentionOperands
) -> PageAttentionOperands:
    """Return its operands. A row of no sequence sees nothing."""
    bounds = sane_bounds(problem, operands.cu_q_lens)
    is_new, seq = sequences_of_rows(problem.num_seqs, problem.total_tokens, bounds)
    row = jnp.arange(problem.total_tokens, dtype=jnp.int32)
    lens = jnp.clip(operands.context_lens, 0, problem.capacity)[seq]
    return PageAttentionOperands(
        query=operands.query,
        key_cache=operands.key_cache,
        value_cache=None,
        context_lens=jnp.where(is_new, lens - (bounds[seq + 1] - 1 - row), 0),
        block_tables=operands.block_tables[seq],
        attn_scale=operands.attn_scale,
        sliding_window=operands.sliding_window,
        sinks=None,
        alibi_slopes=None,
        plan=None,
    )
