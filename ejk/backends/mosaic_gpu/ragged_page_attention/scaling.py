"""Scales of tokens in the order in which the prefill kernel meets them."""

from typing import Any

import jax.numpy as jnp

from ejk.backends.ragged_page_attention import (
    RaggedPageAttentionOperands,
    RaggedPageAttentionProblem,
)
from ejk.backends.triton.ragged_page_attention.widening import first_seen, seen_pages


def ordered_scales(
    problem: RaggedPageAttentionProblem, operands: RaggedPageAttentionOperands, block_kv: int
) -> RaggedPageAttentionOperands:
    """Return the call with scales by KV head and, in whole blocks, the tokens of each sequence.

    They are the scales of keys then, `[num_kv_heads, num_seqs * blocks, 2, block_kv]`, those of
    values beside them. Of tokens that nobody sees it is 1: what their slots hold must not be met.
    """
    layout, is_seen = problem.layout, seen_pages(problem, operands)
    pages = jnp.where(is_seen, operands.block_tables, 0).reshape(-1)
    token = jnp.arange(problem.capacity, dtype=jnp.int32)[None]
    ends, begins = operands.context_lens[:, None], first_seen(problem, operands)[:, None]
    is_there = jnp.repeat(is_seen, problem.page_size, axis=1) & (begins <= token) & (token < ends)
    rest = -problem.capacity % block_kv  # of the last block

    def ordered(pool: Any, half: int) -> Any:
        axes = [layout.kv_heads, layout.pages, layout.slots]
        if layout.interleaved:
            pool = pool[..., half::2]
        elif layout.halves is not None:
            pool = pool.take(half, axis=layout.halves)
            axes = [axis - (axis > layout.halves) for axis in axes]
        own = pool.take(pages, axis=axes[1]).transpose(axes)
        own = own.reshape(problem.num_kv_heads, *is_there.shape)
        own = jnp.where(is_there[None], own, 1.0)
        own = jnp.pad(own, ((0, 0), (0, 0), (0, rest)), constant_values=1.0)
        return own.reshape(problem.num_kv_heads, -1, block_kv)

    value_scale = operands.key_scale if problem.fused else operands.value_scale
    both = ordered(operands.key_scale, 0), ordered(value_scale, 1)
    return operands._replace(key_scale=jnp.stack(both, axis=2), value_scale=None)
