"""Reverse mode of `ejk.ragged_page_attention`, the same for every backend.

As `attention` has it, for a few blocks of new tokens at a time, each of one sequence: as
the XLA program takes them in the forward pass.
"""

import jax.numpy as jnp
from jax import lax

from ejk.backends.ragged_page_attention import sane_bounds
from ejk.backends.reverse_mode.attention import (
    BLOCK_BYTES,
    Rows,
    Softmax,
    Sums,
    add_to_pools,
    as_given,
    float_zeros,
    reverse_mode,
)
from ejk.backends.xla.ragged_page_attention import (
    Keys,
    QueryBlocks,
    Sizes,
    block_counts,
    by_kv_head,
    by_token,
    query_blocks,
    sinks_of_rows,
    span,
    tokens_of,
)


def _pull_back(problem, residuals, cotangents):
    operands, lse = residuals
    h = cotangents[1] if problem.return_lse else jnp.zeros_like(lse)
    sizes = Sizes.of(problem, BLOCK_BYTES)
    bounds = sane_bounds(problem, operands.cu_q_lens)
    num_blocks = block_counts(bounds, sizes).sum(dtype=jnp.int32)

    def step(number, grads):
        which = number * sizes.together + jnp.arange(sizes.together, dtype=jnp.int32)
        blocks = query_blocks(problem, operands, sizes, bounds, which)
        given = (operands.query, cotangents[0], h, lse)
        query, *rest = (by_kv_head(problem, tokens_of(x, blocks)) for x in given)
        rows = Rows(query, *rest, sinks=sinks_of_rows(problem, operands, blocks))
        rows = rows.without_minus_infinity()
        return _pull_back_blocks(problem, operands, sizes, bounds, blocks, rows, grads)

    steps = -(-num_blocks // sizes.together)
    return as_given(lax.fori_loop(0, steps, step, float_zeros(operands)), operands)


def _pull_back_blocks(problem, operands, sizes, bounds, blocks: QueryBlocks, rows: Rows, grads):
    """Add what a few query blocks make to the cotangents of the operands."""

    def load(block):
        return Keys.load(problem, operands, sizes, bounds, blocks, block)

    def add_up(block, sums):
        seen = load(block)
        scores = seen.logits(problem, operands, rows.query, seen.keys)
        return sums.add(rows, scores, seen.visible_rows(problem), seen.values)

    begin, end = span(problem, sizes, blocks)
    softmax = Softmax.of(rows, lax.fori_loop(begin, end, add_up, Sums.none(rows)))

    def step(block, carry):
        grads, d_rows = carry
        seen = load(block)

        def block_logits(query, keys, attn_scale, alibi_slopes):
            given = operands._replace(attn_scale=attn_scale, alibi_slopes=alibi_slopes)
            return seen.logits(problem, given, query, keys)

        d_query, d_keys, d_values, d_scale, d_slopes = softmax.pull_back(
            problem, block_logits, seen.keys, seen.values, seen.visible_rows(problem),
            operands.attn_scale, operands.alibi_slopes,
        )  # fmt: skip
        grads = add_to_pools(problem, grads, seen.pages, d_keys, d_values)
        grads = grads._replace(
            attn_scale=grads.attn_scale + d_scale,
            alibi_slopes=None if d_slopes is None else grads.alibi_slopes + d_slopes,
        )
        return grads, d_rows + d_query

    nothing = jnp.zeros_like(rows.query, jnp.float32)
    grads, d_rows = lax.fori_loop(begin, end, step, (grads, nothing))
    d_query = grads.query.at[blocks.token].set(by_token(problem, d_rows), mode="drop")
    if problem.has_sinks:
        inside = blocks.inside[..., None]
        d_sinks = jnp.where(inside, by_token(problem, softmax.pull_back_sinks()), 0.0)
        grads = grads._replace(sinks=grads.sinks + d_sinks.sum((0, 1)))
    return grads._replace(query=d_query)


differentiable = reverse_mode(_pull_back)
