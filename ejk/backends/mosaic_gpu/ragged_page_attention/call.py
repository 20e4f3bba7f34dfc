"""The launch of the prefill kernel."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from ejk.backends.mosaic_gpu._call import Memory, launch
from ejk.backends.mosaic_gpu.ragged_page_attention.kernel import ragged_attention_kernel
from ejk.backends.mosaic_gpu.ragged_page_attention.memory import (
    Inputs,
    Outputs,
    heads_by_row,
    shared_types,
    slabs,
)
from ejk.backends.mosaic_gpu.ragged_page_attention.sizes import PrefillSizes
from ejk.backends.ragged_page_attention import (
    RaggedPageAttentionOperands,
    RaggedPageAttentionProblem,
)
from ejk.backends.triton.ragged_page_attention.widening import first_seen


def attend(sizes: PrefillSizes, operands: RaggedPageAttentionOperands, work: Any) -> Outputs:
    """Launch the kernel once; returns what it wrote."""
    problem = sizes.problem
    by_group = (problem.num_kv_heads, problem.group)
    window, sinks, slopes = operands.sliding_window, operands.sinks, operands.alibi_slopes
    value = operands.value_cache
    inputs = Inputs(
        query=operands.query.reshape(-1, *by_group, problem.head_dim),
        key=slabs(operands.key_cache, problem),
        value=None if value is None else slabs(value, problem),
        block_tables=operands.block_tables,
        attn_scale=scales_of_logits(problem, operands),
        value_scale=operands.value_scale,
        token_scales=operands.key_scale if problem.scales == "token" else None,
        sliding_window=None if window is None else window.reshape(1),
        sinks=None if sinks is None else heads_by_row(sinks, problem),
        alibi_slopes=None if slopes is None else heads_by_row(slopes, problem),
        whole=whole_tokens(problem, operands),
        work=work,
    )
    types = Outputs(*(sizes.types(problem)[f"{name}_ptr"] for name in Outputs._fields))
    out, lse = (
        jax.ShapeDtypeStruct((problem.total_tokens, *by_group, *x.shape[2:]), x.dtype)
        for x in (types.out, types.lse)
    )
    written = launch(
        functools.partial(ragged_attention_kernel, sizes=sizes),
        Memory(inputs, types._replace(out=out, lse=lse), shared_types(sizes)),
        name="ejk_ragged_attention",
        grid=sizes.num_programs,
        warpgroups=sizes.warpgroups + 1,
        by_lanes=True,
        interpret=sizes.interpret,
    )
    out, lse = written.out.reshape(types.out.shape), written.lse.reshape(types.lse.shape)
    return written._replace(out=out, lse=lse)


def scales_of_logits(
    problem: RaggedPageAttentionProblem, operands: RaggedPageAttentionOperands
) -> jax.Array:
    """Return what scales products of queries and keys: one number, or one of each KV head."""
    scale = operands.attn_scale.reshape(1)
    return scale * operands.key_scale if problem.scales == "head" else scale


def whole_tokens(
    problem: RaggedPageAttentionProblem, operands: RaggedPageAttentionOperands
) -> jax.Array:
    """Say up to which position all pages exist that a sequence's new tokens see, `[num_seqs]`."""
    tables = operands.block_tables
    is_bad = (tables < 0) | (tables >= problem.num_pages)
    first = jnp.arange(problem.max_blocks, dtype=jnp.int32) * problem.page_size
    if problem.has_window:  # pages behind it may have been given up
        is_bad &= (first + problem.page_size)[None] > first_seen(problem, operands)[:, None]
    return jnp.where(is_bad, first[None], problem.capacity).min(axis=1)
