"""Copies pages of a quantised cache in the type of the queries, before a kernel attends to them.

Hopper's kernel could convert codes on their way to shared memory, but the rate of that, 128 bytes a
cycle, would bound it (modelled, not measured): for a block of 128 tokens the products take 2,048
cycles and read 160 KB, and copies of 16 bits write 64 KB. Codes would be written and read once
more, another 64 KB.

Triton's kernels would convert a block anew for each block of query rows. On an H200 8 x 4,096
tokens took them 3,918 us with float8_e4m3fn and 4,777 with int8 and scales of tokens. With copies
they take 2,571 and 3,611, and 2,517 in bfloat16.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from ejk._indices import Size
from ejk.backends.gpu import Target
from ejk.backends.ragged_page_attention import (
    RaggedPageAttentionOperands,
    RaggedPageAttentionProblem,
    sane_bounds,
)
from ejk.backends.triton._backend import Call
from ejk.backends.triton._sizes import type_constants

# Copies do not pay where sequences have at most this many query rows a KV head, on average.
# Modelled by bytes. For 8 x 4,096 new tokens they hardly show: on an H200 the call takes 1,697 us
# with float8_e4m3fn on Hopper's kernel and 1,689 in bfloat16.
FEW_ROWS_OF_COPIES = 512
# The most bytes of copies. Only pages that are seen are copied, but every table entry has room.
MOST_COPIED = 2**30
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
    pools = (
        None if pool is None else _copy(pool, pages, problem, target, call)
        for pool in (operands.key_cache, operands.value_cache)
    )
    key_cache, value_cache = pools
    return wide_problem(problem), operands._replace(
        key_cache=key_cache, value_cache=value_cache,
        block_tables=jnp.where(is_seen, copies, -1),
    )  # fmt: skip


def pays_for_copies(problem: RaggedPageAttentionProblem) -> bool:
    """Say whether sequences have so many new rows, on average, that copies of their pages pay."""
    return problem.total_tokens * problem.group > FEW_ROWS_OF_COPIES * problem.num_seqs


def wide_problem(problem: RaggedPageAttentionProblem) -> RaggedPageAttentionProblem:
    """Return the problem of the copies: a page for each entry of the tables."""
    entries = problem.num_seqs * problem.max_blocks
    return dataclasses.replace(problem, num_pages=entries, cache_dtype=problem.query_dtype)


def copied_bytes(problem: RaggedPageAttentionProblem) -> Size:
    """Return how much memory copies of a quantised cache's pages take."""
    width = problem.head_dim + problem.value_head_dim
    tokens = problem.num_seqs * problem.capacity * problem.num_kv_heads
    return tokens * width * problem.query_dtype.itemsize


def first_seen(
    problem: RaggedPageAttentionProblem, operands: RaggedPageAttentionOperands
) -> jax.Array:
    """Return the first position that new tokens of a sequence see, `[num_seqs]`."""
    window = operands.sliding_window
    if window is None:
        return jnp.zeros(problem.num_seqs, jnp.int32)
    bounds = sane_bounds(problem, operands.cu_q_lens)
    before = jnp.clip(operands.context_lens, 0, problem.capacity) - jnp.diff(bounds)
    return jnp.maximum(before, 0) - (jnp.maximum(window, 0) - 1)


def seen_pages(
    problem: RaggedPageAttentionProblem, operands: RaggedPageAttentionOperands
) -> jax.Array:
    """Say which entries of the tables name pages that new tokens see."""
    tables, page_size = operands.block_tables, problem.page_size
    first = (jnp.arange(problem.max_blocks, dtype=jnp.int32) * page_size)[None]
    ends, begins = operands.context_lens[:, None], first_seen(problem, operands)[:, None]
    is_seen = (first < ends) & (first + page_size > begins)
    return is_seen & (tables >= 0) & (tables < problem.num_pages)


def _copy(
    pool: Any, pages: Any, problem: RaggedPageAttentionProblem, target: Target, call: Call
) -> Any:
    """Return a pool of copies of `pages`. The copy of -1, which is no page, holds anything."""
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
            **{name: types[name] for name in ("CACHE", "TILES", "PTX")},
        },
        grid=math.prod(outer) * pages.size * -(-width // BLOCK),
        num_warps=4,
        num_stages=1,
    )
    return copies


def with_scales(
    problem: RaggedPageAttentionProblem, operands: RaggedPageAttentionOperands
) -> RaggedPageAttentionOperands:
    """Return the call with copies of the tokens' scales, in the order in which `widened` copies."""
    pages = jnp.where(seen_pages(problem, operands), operands.block_tables, 0).reshape(-1)
    own = (
        None if x is None else x.take(pages, axis=problem.layout.pages)
        for x in (operands.key_scale, operands.value_scale)
    )
    key_scale, value_scale = own
    return operands._replace(key_scale=key_scale, value_scale=value_scale)
