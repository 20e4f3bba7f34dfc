"""Reverse mode of `ejk.page_attention`, the same for every backend.

The forward pass keeps the LSE; the backward pass recomputes the weights from it, a block of tokens
at a time, as an XLA program. With `p_j = exp(l_j - lse)`, the output's cotangent `g` and the LSE's
`h`:

    D      = sum over j of p_j * (g . v_j)
    d l_j  = p_j * (g . v_j - D + h)
    d sink = exp(sink - lse) * (h - D)
    d v_j  = p_j * g

A first pass over the context sums `D` and the weights, which the second divides by their sum: the
LSE's rounding would otherwise be an error of every weight, and that of a 16-bit output one of `D`.
What no visible token owns gets exactly 0, whatever it holds.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType, NamedSharding

from ejk import _dispatch
from ejk.backends.page_attention import PageAttentionOperands, PageAttentionProblem
from ejk.backends.xla.page_attention import (
    KEYS,
    VALUES,
    Blocks,
    Context,
    group_heads,
    logits,
    page_index,
    product,
)

# One size for all platforms: the backward pass does not know which it is lowered for.
BLOCK_BYTES = 8 * 2**20


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def differentiable(
    problem: PageAttentionProblem,
    choice: _dispatch.Choice,
    operands: PageAttentionOperands,
) -> tuple[jax.Array, ...]:
    """Run `problem` on one of the backends of `choice`, with a reverse-mode rule."""
    return _dispatch.call(problem, choice, operands)


def _forward(problem, choice, operands):
    with_lse = dataclasses.replace(problem, return_lse=True)
    out, lse = _dispatch.call(with_lse, choice, operands)
    return (out, lse) if problem.return_lse else (out,), (operands, lse)


def _backward(problem, choice, residuals, cotangents):
    pull_back: Any = functools.partial(_pull_back, problem)
    types = jax.tree.map(jax.typeof, residuals[0])
    mesh = types.query.sharding.mesh
    if AxisType.Explicit in mesh.axis_types:

        def sharding(x):
            is_float = jnp.issubdtype(x.dtype, jnp.floating)
            return NamedSharding(mesh, x.sharding.spec) if is_float else None

        # How gathers and scatters in between are split is for XLA to find.
        pull_back = jax.sharding.auto_axes(pull_back, out_sharding=jax.tree.map(sharding, types))
    return (pull_back(residuals, cotangents),)


def _pull_back(problem, residuals, cotangents):
    operands, lse = residuals
    g = group_heads(problem, cotangents[0])
    h = group_heads(problem, cotangents[1] if problem.return_lse else jnp.zeros_like(lse))
    lse = group_heads(problem, lse)
    # A row that sees nothing has no gradient; its LSE of -inf must not make one.
    lse = jnp.where(lse == -jnp.inf, 0.0, lse)
    query = group_heads(problem, operands.query)
    context = Context.of(problem, operands)
    blocks = Blocks.of(problem, BLOCK_BYTES)
    tables = blocks.pad(operands.block_tables)
    begin, end = blocks.span(context)

    def add_up(block, sums):
        total, weighted = sums
        _, positions, visible, keys, values = blocks.load(problem, operands, context, tables, block)
        scores = logits(problem, operands, context, query, keys, positions)
        p = jnp.where(visible[:, None, None], jnp.exp(scores - lse[..., None]), 0.0)
        dp = product("skgd,sktd->skgt", g, values)
        return total + p.sum(-1), weighted + (p * dp).sum(-1)

    total, weighted = lax.fori_loop(begin, end, add_up, (jnp.zeros_like(lse), jnp.zeros_like(lse)))
    sinks = None
    if operands.sinks is not None:
        sinks = group_heads(problem, operands.sinks[None])
        total = total + jnp.exp(sinks - lse)
    total = jnp.where(total == 0, 1.0, total)
    delta = h - weighted / total

    def step(block, grads):
        pages, positions, visible, keys, values = blocks.load(
            problem, operands, context, tables, block
        )
        mask = visible[:, None, None]

        def visible_logits(query, keys, attn_scale, alibi_slopes):
            given = operands._replace(attn_scale=attn_scale, alibi_slopes=alibi_slopes)
            scores = logits(problem, given, context, query, keys, positions)
            return jnp.where(mask, scores, 0.0)

        inputs = (query, keys, operands.attn_scale, operands.alibi_slopes)
        scores, pullback = jax.vjp(visible_logits, *inputs)
        p = jnp.where(mask, jnp.exp(scores - lse[..., None]) / total[..., None], 0.0)
        dp = product("skgd,sktd->skgt", g, values)
        d_query, d_keys, d_scale, d_slopes = pullback(p * (dp + delta[..., None]))
        d_values = product("skgt,skgd->sktd", p.astype(g.dtype), g)
        if problem.latent:
            width = problem.head_dim - problem.value_head_dim
            d_keys = d_keys + jnp.pad(d_values, ((0, 0),) * 3 + ((0, width),)).astype(d_keys.dtype)
        key_cache = _scatter(problem, grads.key_cache, pages, KEYS, d_keys)
        value_cache = grads.value_cache
        if problem.fused:
            key_cache = _scatter(problem, key_cache, pages, VALUES, d_values)
        elif not problem.latent:
            value_cache = _scatter(problem, value_cache, pages, VALUES, d_values)
        return NOTHING._replace(
            query=grads.query + d_query.astype(jnp.float32),
            key_cache=key_cache,
            value_cache=value_cache,
            attn_scale=grads.attn_scale + d_scale,
            alibi_slopes=None if d_slopes is None else grads.alibi_slopes + d_slopes,
        )

    summed = operands._replace(
        query=query,
        context_lens=None,
        block_tables=None,
        sliding_window=None,
        sinks=None,
        plan=None,
    )
    zeros = jax.tree.map(lambda x: jnp.zeros_like(x, jnp.float32), summed)
    grads = lax.fori_loop(begin, end, step, zeros)
    if sinks is not None:
        d_sinks = (jnp.exp(sinks - lse) / total * delta).sum(0)
        grads = grads._replace(sinks=d_sinks.reshape(problem.num_heads))
    grads = grads._replace(query=grads.query.reshape(operands.query.shape))
    as_given = (None if d is None else d.astype(x.dtype) for d, x in zip(grads, operands))
    return PageAttentionOperands(*as_given)


NOTHING = PageAttentionOperands(*(None for _ in PageAttentionOperands._fields))


def _scatter(problem, grad, pages, half, blocks):
    """Add `[num_seqs, num_kv_heads, tokens, head_dim]` to the pool; pages may occur twice."""
    num_seqs, num_kv_heads, _, head_dim = blocks.shape
    blocks = blocks.astype(jnp.float32)
    blocks = blocks.reshape(num_seqs, num_kv_heads, -1, problem.page_size, head_dim)
    blocks = jnp.moveaxis(blocks, (0, 1, 2, 3), problem.layout.gathered)
    return grad.at[page_index(problem, pages, half)].add(blocks, mode="promise_in_bounds")


differentiable.defvjp(_forward, _backward)
