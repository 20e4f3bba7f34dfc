"""Reverse mode of `ejk.ragged_page_attention`, the same for every backend.

As `attention` has it, for a few items of new tokens at a time: as the XLA program takes them in the
forward pass.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from ejk.backends.ragged_page_attention import (
    RaggedPageAttentionOperands,
    RaggedPageAttentionProblem,
    sane_bounds,
)
from ejk.backends.reverse_mode.attention import (
    Rows,
    as_given,
    float_zeros,
    pull_back_rows,
    reverse_mode,
)
from ejk.backends.xla.ragged_page_attention import (
    Queries,
    Sizes,
    by_token,
    load_block,
    loop_over_items,
    sinks_of_rows,
)


def _pull_back(
    problem: RaggedPageAttentionProblem,
    sizes: Sizes,
    kept: tuple[RaggedPageAttentionOperands, jax.Array],
    cotangents: tuple[jax.Array, ...],
) -> Any:
    operands, lse = kept
    h = cotangents[1] if problem.return_lse else jnp.zeros_like(lse)
    bounds = sane_bounds(problem, operands.cu_q_lens)

    def step(queries: Queries, grads: Any) -> Any:
        given = (operands.query, cotangents[0], h, lse)
        sinks = sinks_of_rows(problem, operands, queries)
        rows = Rows(*(queries.rows(problem, x) for x in given), sinks=sinks)
        load = functools.partial(load_block, problem, operands, sizes, bounds, queries)
        grads, d_rows, d_sinks = pull_back_rows(
            problem, operands, rows, queries.span(problem, sizes), load, grads
        )
        if d_sinks is not None:
            inside = queries.inside[..., None]
            d_sinks = jnp.where(inside, by_token(problem, d_sinks), 0.0)
            grads = grads._replace(sinks=grads.sinks + d_sinks.sum((0, 1)))
        d_query = by_token(problem, d_rows)
        return grads._replace(query=grads.query.at[queries.token].set(d_query, mode="drop"))

    grads = loop_over_items(problem, operands, sizes, bounds, step, float_zeros(operands))
    return as_given(grads, operands)


differentiable = reverse_mode(Sizes.of, _pull_back)
