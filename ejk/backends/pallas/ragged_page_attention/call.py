"""The launches of the ragged kernel: items dealt out, rows put in blocks and back.

A sequence's first row lies anywhere in `query`, and a copy moves whole tiles. So XLA gathers the
rows of each item into a padded block of its own, and the results back: little next to the pools.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ejk import _jax
from ejk.backends.pallas._call import Blocked, call, cost_of_attention, pools_in_hbm, scale_pairs
from ejk.backends.pallas._paging import paging_scratch
from ejk.backends.pallas._products import state_scratch
from ejk.backends.pallas._tiles import LANES, SUBLANES, round_up
from ejk.backends.pallas.ragged_page_attention.kernel import ragged_page_attention_kernel
from ejk.backends.pallas.ragged_page_attention.sizes import RaggedSizes
from ejk.backends.ragged_page_attention import (
    Items,
    RaggedPageAttentionOperands,
    RaggedPageAttentionProblem,
    number_items,
    sane_bounds,
    sequences_of_rows,
)

Results = tuple[jax.Array, ...]


def attend(
    launches: tuple[RaggedSizes, ...],
    operands: RaggedPageAttentionOperands,
    results: Results,
    vmem_limit_bytes: int,
    interpret: Any,
) -> Results:
    """Launch the kernel once for each of `launches`; results of nobody's rows stay as they are."""
    problem = launches[0].problem
    bounds = sane_bounds(problem, operands.cu_q_lens)
    is_new, seq = sequences_of_rows(problem.num_seqs, problem.total_tokens, bounds)
    rows = jnp.arange(problem.total_tokens, dtype=jnp.int32)
    for sizes in launches:
        counts = item_counts(bounds, sizes)
        found = attend_items(sizes, operands, bounds, counts, vmem_limit_bytes, interpret)
        begins = jnp.cumsum(counts, dtype=jnp.int32) - counts
        at = begins[seq] * sizes.block_q + rows - bounds[seq]
        mine = is_new & (counts[seq] > 0)
        at = jnp.where(mine, at, 0)
        results = tuple(
            jnp.where(mine.reshape(-1, *(1 for _ in old.shape[1:])), new[at], old)
            for old, new in zip(results, found)
        )
    return results


def nothing_seen(problem: RaggedPageAttentionProblem, query: jax.Array) -> Results:
    """Return the results of rows that are no sequence's: zeros, and LSEs of -inf."""
    out, *lse = problem.results
    results = (jnp.zeros(out.shape, out.dtype), *(jnp.full(x.shape, -jnp.inf) for x in lse))
    # They vary over the axes of a `shard_map` that the query does: a loop's types must not change.
    axes = tuple(_jax.varying(query))
    return tuple(lax.pcast(x, axes, to="varying") if axes else x for x in results)


def item_counts(bounds: jax.Array, sizes: RaggedSizes) -> jax.Array:
    """Return how many items each sequence has in a launch."""
    q_lens = bounds[1:] - bounds[:-1]
    mine = (q_lens >= sizes.q_lens[0]) & (q_lens <= sizes.q_lens[1])
    return jnp.where(mine, lax.div(q_lens + sizes.block_q - 1, sizes.block_q), 0)


def attend_items(
    sizes: RaggedSizes,
    operands: RaggedPageAttentionOperands,
    bounds: jax.Array,
    counts: jax.Array,
    vmem_limit_bytes: int,
    interpret: Any,
) -> Results:
    """Return output and LSE of all items' tokens, `[items * block_q, num_heads, ...]`."""
    problem = sizes.problem
    which = jnp.arange(sizes.num_items, dtype=jnp.int32)
    items = number_items(problem, operands.context_lens, bounds, counts, sizes.block_q, which)
    first = items.context + items.begin
    local = jnp.arange(sizes.block_q, dtype=jnp.int32)[None]
    # Rows past the last are copies of its token: they see nothing that others do not.
    last = jnp.maximum(items.num_tokens - 1, 0)[:, None]
    token = jnp.minimum(items.row[:, None] + jnp.clip(local, 0, last), problem.total_tokens - 1)
    position = first[:, None] + token - token[:, :1]  # [items, block_q]
    if problem.has_positions:
        position = jnp.maximum(operands.positions, 0)[token]
    keys_have = problem.has_positions and problem.causal
    has_new = keys_have or problem.tree_width
    window = operands.sliding_window

    def result(width: int, dtype: Any) -> Blocked:
        shape = (sizes.num_items, sizes.kv_heads, sizes.head_rows, width)
        return per_item(sizes, jax.ShapeDtypeStruct(shape, dtype))

    found = call(
        ragged_page_attention_kernel,
        scalars=dict(
            seqs_ref=items.seq,
            firsts_ref=first,
            **ranges(problem, window, items, first, position),
            contexts_ref=items.context if has_new else None,
            packed_ref=bounds[items.seq] if keys_have else None,
            block_tables_ref=operands.block_tables.reshape(-1),
            attn_scale_ref=operands.attn_scale.reshape(1),
            sliding_window_ref=None if window is None else window.reshape(1),
        ),
        inputs=inputs(sizes, operands, token, position),
        outputs=dict(
            out_ref=result(problem.value_head_dim, problem.out_dtype),
            lse_ref=result(LANES, jnp.float32) if problem.return_lse else None,
        ),
        scratch=paging_scratch(sizes) | state_scratch(sizes.state_shape, problem.value_head_dim),
        sizes=sizes,
        grid=(sizes.cores, sizes.core_steps),
        dimension_semantics=("parallel", "arbitrary"),
        cost=cost_of_attention(problem, sizes.num_items, sizes.rows),
        vmem_limit_bytes=vmem_limit_bytes,
        interpret=interpret,
    )

    def by_token(x: jax.Array) -> jax.Array:
        x = x.reshape(-1, *sizes.heads, x.shape[-1]).swapaxes(1, 2)
        return x.reshape(-1, problem.num_heads, x.shape[-1])

    out, *lse = (by_token(x) for x in found)
    return (out, *(x[..., 0] for x in lse))


def per_item(sizes: RaggedSizes, x: Any) -> Blocked:
    """Give each step its item of `x [items, ...]`."""
    zeros = (0,) * (len(x.shape) - 1)
    index = lambda core, step, *_: (core * sizes.core_steps + step, *zeros)  # noqa: E731
    return x, pl.BlockSpec((1, *x.shape[1:]), index)


def inputs(
    sizes: RaggedSizes,
    operands: RaggedPageAttentionOperands,
    token: jax.Array,
    position: jax.Array,
) -> dict[str, Blocked | None]:
    """Return what items read, of whose tokens `token` and `position` are `[items, block_q]`."""
    problem, heads = sizes.problem, sizes.heads
    of_heads, of_tokens = scale_pairs(problem, operands)
    query = operands.query[token].reshape(-1, heads[1], heads[0], heads[2], problem.head_dim)
    query = query.swapaxes(1, 2).reshape(-1, heads[0], sizes.head_rows, problem.head_dim)

    def per_row(x: Any) -> Blocked | None:
        """Spread what heads have over the rows of their tokens."""
        if x is None:
            return None
        x = jnp.broadcast_to(x.reshape(heads[0], 1, heads[2]), heads)
        spec = pl.BlockSpec((*sizes.state_shape, 1), lambda *_: (0, 0, 0))
        return x.reshape(*sizes.state_shape, 1), spec

    def in_lanes(x: jax.Array, sublanes: int = 1) -> jax.Array:
        """Pad the last two axes: to whole tiles of lanes, and no fewer than a block has tokens."""
        width = round_up(max(x.shape[-1], sizes.block_kv), LANES) - x.shape[-1]
        return jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, -x.shape[-2] % sublanes), (0, width)])

    positions = new_positions = tree_mask = None
    if problem.has_positions:
        of_rows = (len(position), sizes.heads_at_once, *heads[1:])
        of_rows = jnp.broadcast_to(position[:, None, :, None], of_rows)
        positions = per_item(sizes, of_rows.reshape(len(position), -1, 1))
    if problem.has_positions and problem.causal:
        whole = pl.BlockSpec(memory_space=pltpu.VMEM)
        new_positions = (in_lanes(jnp.maximum(operands.positions, 0)[None]), whole)
    if problem.tree_width:
        mask = operands.tree_mask[token].astype(jnp.float32)
        tree_mask = per_item(sizes, in_lanes(mask, SUBLANES))
    return dict(
        query_ref=per_item(sizes, query),
        sinks_ref=per_row(operands.sinks),
        alibi_slopes_ref=per_row(operands.alibi_slopes),
        positions_ref=positions,
        new_positions_ref=new_positions,
        tree_mask_ref=tree_mask,
        key_scale_ref=per_row(of_heads.key),
        value_scale_ref=per_row(of_heads.value),
        **pools_in_hbm(operands, of_tokens),
    )


def ranges(
    problem: RaggedPageAttentionProblem,
    window: jax.Array | None,
    items: Items,
    first: jax.Array,
    position: jax.Array,
) -> dict[str, jax.Array | None]:
    """Return what some token of an item sees, and what every token does: see the kernel."""
    last = first + items.num_tokens - 1
    end = jnp.maximum(last + 1, 0)
    all_end = first + 1
    if problem.tree_width:
        end = jnp.where(last >= 0, items.length, 0)
        all_end = items.context
    if not problem.causal:
        end = all_end = items.length
    elif problem.has_positions:
        all_end = jnp.minimum(all_end, items.context)
    end = jnp.where(items.num_tokens > 0, end, 0)
    begin = all_begin = None
    if window is not None:
        before = jnp.maximum(window, 0) - 1
        # Positions may be as large as integers get, and places as low as minus the new tokens.
        begin = jnp.maximum(jnp.maximum(position.min(axis=1), 0) - before, 0)
        all_begin = jnp.maximum(jnp.maximum(position.max(axis=1), 0) - before, 0)
        if problem.has_positions and problem.causal:  # those of new tokens may be anything
            begin = jnp.minimum(begin, jnp.maximum(items.context, 0))
        begin = jnp.minimum(begin, end)
        end = jnp.where(window > 0, end, begin)
    return dict(begins_ref=begin, ends_ref=end, all_begins_ref=all_begin, all_ends_ref=all_end)
