"""Pages of a quantised cache in the type of the queries, copied before the kernel attends to them.

A conversion on the way to shared memory would be bound by its rate, by what 128 bytes a cycle allow
(modelled, not measured): for a block of 128 tokens the products, 2,048 cycles, read 160 KB, and
copies of 16 bits write 64. Codes would be written and read once more, which is another 64.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from ejk.backends.gpu import Target
from ejk.backends.mosaic_gpu.ragged_page_attention.call import first_seen
from ejk.backends.ragged_page_attention import (
    RaggedPageAttentionOperands,
    RaggedPageAttentionProblem,
)
from ejk.backends.triton._backend import Call
from ejk.backends.triton._sizes import type_constants

BLOCK = 4096  # values that a program copies


def widened(
    problem: RaggedPageAttentionProblem,
    operands: RaggedPageAttentionOperands,
    target: Target,
    call: Call,
) -> tuple[RaggedPageAttentionProblem, RaggedPageAttentionOperands]:
    """Return the same call on copies of the pages that new tokens see."""
    is_seen = seen_pages(problem, operands)
    pages = jnp.where(is_seen, operands.block_tables, -1).reshape(-1)
    copies = jnp.arange(pages.size, dtype=jnp.int32).reshape(is_seen.shape)
    wide = dataclasses.replace(problem, num_pages=pages.size, cache_dtype=problem.query_dtype)
    pools = (
        None if pool is None else _copy(pool, pages, problem, target, call)
        for pool in (operands.key_cache, operands.value_cache)
    )
    key_cache, value_cache = pools
    return wide, operands._replace(
        key_cache=key_cache, value_cache=value_cache,
        block_tables=jnp.where(is_seen, copies, -1),
    )  # fmt: skip


def seen_pages(
    problem: RaggedPageAttentionProblem, operands: RaggedPageAttentionOperands
) -> jax.Array:
    """Say which entries of the tables name pages that new tokens see."""
    tables, page_size = operands.block_tables, problem.page_size
    first = (jnp.arange(problem.max_blocks, dtype=jnp.int32) * page_size)[None]
    ends, begins = operands.context_lens[:, None], first_seen(problem, operands)[:, None]
    is_seen = (first < ends) & (first + page_size > begins)
    return is_seen & (tables >= 0) & (tables < problem.num_pages)


def ordered_scales(
    problem: RaggedPageAttentionProblem, operands: RaggedPageAttentionOperands, block_kv: int
) -> RaggedPageAttentionOperands:
    """Return the call with scales by KV head and, in whole blocks, the tokens of each sequence.

    Of tokens that nobody sees it is 1: what their slots hold must not be met.
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
        return own.reshape(problem.num_kv_heads, -1)

    value_scale = operands.key_scale if problem.fused else operands.value_scale
    return operands._replace(
        key_scale=ordered(operands.key_scale, 0), value_scale=ordered(value_scale, 1)
    )


def _copy(
    pool: Any, pages: Any, problem: RaggedPageAttentionProblem, target: Target, call: Call
) -> Any:
    """Return a pool of copies of `pages`; -1 is none, whose copy is anything."""
    from ejk.backends.triton.ragged_page_attention.widen_kernel import widen_pages_kernel

    axis = problem.layout.pages
    outer, page = pool.shape[:axis], pool.shape[axis + 1 :]
    per_element = problem.cache_type.per_element
    width, page = math.prod(page) * per_element, (*page[:-1], page[-1] * per_element)
    types = type_constants(problem, target)
    [copies] = call(
        widen_pages_kernel,
        {"cache_ptr": pool, "pages_ptr": pages},
        {"copies_ptr": jax.ShapeDtypeStruct((*outer, pages.size, *page), problem.query_dtype)},
        {
            "NUM_PAGES": problem.num_pages,
            "NUM_COPIES": pages.size,
            "PAGE_WIDTH": width,
            "BLOCK": BLOCK,
            **{name: types[name] for name in ("CACHE", "PARTS", "PTX")},
        },
        grid=math.prod(outer) * pages.size * -(-width // BLOCK),
        num_warps=4,
        num_stages=1,
    )
    return copies
