"""Reverse mode of `ejk.page_attention`, the same for every backend.

The forward pass keeps the output and the LSE; the backward pass recomputes the logits from the
LSE, a block of tokens at a time, as an XLA program. With `p_j = exp(l_j - lse)`, the output's
cotangent `g` and the LSE's `h`:

    d l_j  = p_j * (g . v_j - g . out + h)
    d sink = exp(sink - lse) * (h - g . out)
    d v_j  = p_j * g

What no visible token owns gets exactly 0, whatever it holds.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax

from ejk import _dispatch
from ejk.backends.page_attention import PageAttentionOperands, PageAttentionProblem
from ejk.backends.xla.page_attention import Blocks, Context, group_heads, logits, product


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
    return (out, lse) if problem.return_lse else (out,), (operands, out, lse)


def _backward(problem, choice, residuals, cotangents):
    operands, out, lse = residuals
    g = group_heads(problem, cotangents[0])
    h = cotangents[1] if problem.return_lse else jnp.zeros_like(lse)
    delta = group_heads(problem, h) - product("skgd,skgd->skg", g, group_heads(problem, out))
    lse = group_heads(problem, lse)
    # A row that sees nothing has no gradient; its LSE of -inf must not make one.
    lse = jnp.where(lse == -jnp.inf, 0.0, lse)
    query = group_heads(problem, operands.query)
    context = Context.of(problem, operands)
    blocks = Blocks.of(problem, None)
    tables = blocks.pad(operands.block_tables)

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
        p = jnp.where(mask, jnp.exp(scores - lse[..., None]), 0.0)
        dp = product("skgd,sktd->skgt", g, values)
        d_query, d_keys, d_scale, d_slopes = pullback(p * (dp + delta[..., None]))
        d_values = product("skgt,skgd->sktd", p.astype(g.dtype), g)
        if operands.value_cache is None:
            width = problem.head_dim - problem.value_head_dim
            d_keys = d_keys + jnp.pad(d_values, ((0, 0),) * 3 + ((0, width),)).astype(d_keys.dtype)
        return PageAttentionOperands(
            query=grads.query + d_query.astype(jnp.float32),
            key_cache=_scatter(problem, grads.key_cache, pages, d_keys),
            value_cache=_scatter(problem, grads.value_cache, pages, d_values),
            context_lens=None,
            block_tables=None,
            attn_scale=grads.attn_scale + d_scale,
            sliding_window=None,
            sinks=None,
            alibi_slopes=None if d_slopes is None else grads.alibi_slopes + d_slopes,
        )

    differentiable_operands = operands._replace(
        query=query, context_lens=None, block_tables=None, sliding_window=None, sinks=None
    )
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), differentiable_operands)
    grads = lax.fori_loop(*blocks.span(context), step, zeros)
    if problem.has_sinks:
        sinks = group_heads(problem, operands.sinks[None])
        d_sinks = (jnp.exp(sinks - lse) * delta).sum(0)
        grads = grads._replace(sinks=d_sinks.reshape(problem.num_heads))
    grads = grads._replace(query=grads.query.reshape(operands.query.shape))
    return (jax.tree.map(lambda d, x: d.astype(x.dtype), grads, _only(grads, operands)),)


def _scatter(problem, grad, pages, blocks):
    """Add `[num_seqs, num_kv_heads, tokens, head_dim]` to the pool; pages may occur twice."""
    if grad is None:
        return None
    layout = problem.layout
    num_seqs, num_kv_heads, _, head_dim = blocks.shape
    blocks = blocks.astype(jnp.float32)
    blocks = blocks.reshape(num_seqs, num_kv_heads, -1, problem.page_size, head_dim)
    batch, page = layout.pages, layout.pages + 1
    kv_heads, slots = (a + (a > layout.pages) for a in (layout.kv_heads, layout.slots))
    order = {batch: 0, page: 2, kv_heads: 1, slots: 3, 4: 4}
    blocks = blocks.transpose(*(order[axis] for axis in range(5)))
    return grad.at[(slice(None),) * layout.pages + (pages,)].add(blocks, mode="promise_in_bounds")


def _only(grads, operands):
    """The operands that have a gradient, None for the others."""
    return jax.tree.map(
        lambda d, x: None if d is None else x, grads, operands, is_leaf=lambda x: x is None
    )


differentiable.defvjp(_forward, _backward)
