"""Reverse mode of `ejk.page_attention`, the same for every backend: see `attention`."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from ejk.backends.page_attention import PageAttentionOperands, PageAttentionProblem
from ejk.backends.reverse_mode.attention import (
    Rows,
    as_given,
    float_zeros,
    pull_back_rows,
    reverse_mode,
)
from ejk.backends.xla.page_attention import (
    Context,
    Sizes,
    group_heads,
    load_block,
    sinks_of_rows,
)


def _pull_back(
    problem: PageAttentionProblem,
    sizes: Sizes,
    kept: tuple[PageAttentionOperands, jax.Array],
    cotangents: tuple[jax.Array, ...],
) -> Any:
    operands, lse = kept
    context = Context.of(problem, operands)
    h = cotangents[1] if problem.return_lse else jnp.zeros_like(lse)
    given = (operands.query, cotangents[0], h, lse)
    rows = Rows(*(group_heads(problem, x) for x in given), sinks=sinks_of_rows(problem, operands))
    load = functools.partial(load_block, problem, operands, sizes, context)
    grads, d_rows, d_sinks = pull_back_rows(
        problem, operands, rows, context.span(sizes), load, float_zeros(operands)
    )
    if d_sinks is not None:
        grads = grads._replace(sinks=d_sinks.sum(0).reshape(problem.num_heads))
    return as_given(grads._replace(query=d_rows.reshape(operands.query.shape)), operands)


differentiable = reverse_mode(Sizes.of, _pull_back)
