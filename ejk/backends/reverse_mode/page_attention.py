"""Reverse mode of `ejk.page_attention`, the same for every backend: see `attention`."""

import jax.numpy as jnp
from jax import lax

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
from ejk.backends.xla.page_attention import Blocks, Context, group_heads, logits


def _pull_back(problem, residuals, cotangents):
    operands, lse = residuals
    context = Context.of(problem, operands)
    blocks = Blocks.of(problem, BLOCK_BYTES)
    tables = blocks.pad(operands.block_tables)
    begin, end = blocks.span(context)
    rows = Rows(
        group_heads(problem, operands.query),
        group_heads(problem, cotangents[0]),
        group_heads(problem, cotangents[1] if problem.return_lse else jnp.zeros_like(lse)),
        group_heads(problem, lse),
        group_heads(problem, operands.sinks[None]) if problem.has_sinks else None,
    ).without_minus_infinity()

    def add_up(block, sums):
        _, distances, visible, keys, values = blocks.load(problem, operands, context, tables, block)
        scores = logits(problem, operands, rows.query, keys, distances)
        return sums.add(rows, scores, visible[:, None, None], values)

    softmax = Softmax.of(rows, lax.fori_loop(begin, end, add_up, Sums.none(rows)))

    def step(block, grads):
        pages, distances, visible, keys, values = blocks.load(
            problem, operands, context, tables, block
        )

        def block_logits(query, keys, attn_scale, alibi_slopes):
            given = operands._replace(attn_scale=attn_scale, alibi_slopes=alibi_slopes)
            return logits(problem, given, query, keys, distances)

        d_query, d_keys, d_values, d_scale, d_slopes = softmax.pull_back(
            problem, block_logits, keys, values, visible[:, None, None],
            operands.attn_scale, operands.alibi_slopes,
        )  # fmt: skip
        grads = add_to_pools(problem, grads, pages, d_keys, d_values)
        return grads._replace(
            query=grads.query + d_query.reshape(grads.query.shape),
            attn_scale=grads.attn_scale + d_scale,
            alibi_slopes=None if d_slopes is None else grads.alibi_slopes + d_slopes,
        )

    grads = lax.fori_loop(begin, end, step, float_zeros(operands))
    if problem.has_sinks:
        d_sinks = softmax.pull_back_sinks().sum(0)
        grads = grads._replace(sinks=d_sinks.reshape(problem.num_heads))
    return as_given(grads, operands)


differentiable = reverse_mode(_pull_back)
