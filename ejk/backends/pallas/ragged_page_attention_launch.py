"""The launches of the ragged kernel: items dealt out, rows put in blocks and back, `pallas_call`.

A sequence's first row lies anywhere in `query`, and a copy moves whole tiles. So XLA gathers the
rows of each item into a padded block of its own, and the results back: little next to the pools.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ejk._indices import count_up_to
from ejk.backends.pallas.page_attention_launch import OPTIONAL, _given, _scratch
from ejk.backends.pallas.page_attention_work import LANES, round_up
from ejk.backends.pallas.ragged_page_attention_kernel import ragged_page_attention_kernel
from ejk.backends.pallas.ragged_page_attention_work import RaggedWork
from ejk.backends.ragged_page_attention import (
    RaggedPageAttentionOperands,
    RaggedPageAttentionProblem,
    sane_bounds,
    sequences_of_rows,
)

RAGGED_OPTIONAL = {
    "begins_ref", "all_begins_ref", "contexts_ref", "packed_ref", "positions_ref",
    "new_positions_ref", "tree_ref",
}  # fmt: skip


def launch(
    works: tuple[RaggedWork, ...],
    operands: RaggedPageAttentionOperands,
    results: tuple[jax.Array, ...],
    vmem_limit_bytes: int,
    interpret: Any,
) -> tuple[jax.Array, ...]:
    """Launch the kernel once for each of `works`; what is no sequence's stays in the results."""
    problem = works[0].problem
    bounds = sane_bounds(problem, operands.cu_q_lens)
    is_new, seq = sequences_of_rows(problem, bounds)
    rows = jnp.arange(problem.total_tokens, dtype=jnp.int32)
    for work in works:
        blocks = _blocks(bounds, work)
        begins = jnp.cumsum(blocks, dtype=jnp.int32) - blocks
        found = _launch_items(work, operands, bounds, begins, blocks, vmem_limit_bytes, interpret)
        at = begins[seq] * work.block_q + rows - bounds[seq]
        mine = is_new & (blocks[seq] > 0)
        at = jnp.where(mine, at, 0)
        results = tuple(
            jnp.where(mine.reshape(-1, *(1 for _ in old.shape[1:])), new[at], old)
            for old, new in zip(results, found)
        )
    return results


def nothing_seen(
    problem: RaggedPageAttentionProblem, query: jax.Array
) -> tuple[jax.Array, ...]:  # fmt: skip
    """Return the results of rows that are no sequence's: zeros, and LSEs of -inf."""
    out, *lse = problem.results
    results = (jnp.zeros(out.shape, out.dtype), *(jnp.full(x.shape, -jnp.inf) for x in lse))
    # They vary over the axes of a `shard_map` that the query does: a loop's types must not change.
    axes = tuple(jax.typeof(query).mat.varying)
    return tuple(lax.pcast(x, axes, to="varying") if axes else x for x in results)


def _blocks(bounds: jax.Array, work: RaggedWork) -> jax.Array:
    """Return how many items each sequence has in a launch."""
    q_lens = bounds[1:] - bounds[:-1]
    mine = (q_lens >= work.q_lens[0]) & (q_lens <= work.q_lens[1])
    return jnp.where(mine, lax.div(q_lens + work.block_q - 1, work.block_q), 0)


def _launch_items(work, operands, bounds, begins, blocks, vmem_limit_bytes, interpret):
    """Return output and LSE of all items' tokens, `[items * block_q, num_heads, ...]`."""
    problem: RaggedPageAttentionProblem = work.problem
    ends = begins + blocks
    which = jnp.arange(work.num_seqs, dtype=jnp.int32)
    seq = count_up_to(ends, which)
    exists, seq = seq < problem.num_seqs, jnp.minimum(seq, problem.num_seqs - 1)
    begin = (which - begins[seq]) * work.block_q  # of the sequence's new tokens
    q_lens = bounds[1:] - bounds[:-1]
    count = jnp.where(exists, jnp.minimum(q_lens[seq] - begin, work.block_q), 0)
    length = jnp.clip(operands.context_lens, 0, problem.capacity)[seq]
    context = length - q_lens[seq]
    first = context + begin
    local = jnp.arange(work.block_q, dtype=jnp.int32)[None]
    # Rows past the last are copies of its token: they see nothing that others do not.
    token = (bounds[seq] + begin)[:, None] + jnp.clip(local, 0, jnp.maximum(count - 1, 0)[:, None])
    token = jnp.minimum(token, problem.total_tokens - 1)  # [items, block_q]
    position = first[:, None] + token - token[:, :1]
    if problem.has_positions:
        position = jnp.maximum(operands.positions, 0)[token]
    ranges = _ranges(work, operands.sliding_window, context, first, count, length, position)

    query = operands.query[token]
    heads = (problem.num_kv_heads, work.block_q, problem.group)
    query = query.reshape(-1, heads[1], heads[0], heads[2], problem.head_dim)
    query = query.swapaxes(1, 2).reshape(-1, heads[0], work.head_rows, problem.head_dim)

    def per_row(x):
        """Spread what heads have over the rows of their tokens."""
        if x is None:
            return None
        x = jnp.broadcast_to(x.reshape(heads[0], 1, heads[2]), heads)
        return x.reshape(*work.state_shape, 1)

    def of_rows(x):
        """Spread what an item's tokens have over their rows, `[items, rows, 1]`."""
        x = jnp.broadcast_to(x[:, None, :, None], (len(x), work.heads_at_once, *heads[1:]))
        return x.reshape(len(x), -1, 1)

    def in_lanes(x, sublanes=1):
        """Pad the last two axes: to whole tiles of lanes, and no fewer than a block has tokens."""
        width = round_up(max(x.shape[-1], work.block_kv), LANES) - x.shape[-1]
        return jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, -x.shape[-2] % sublanes), (0, width)])

    has_new = problem.has_positions or problem.tree_width
    window, positions, tree = operands.sliding_window, operands.positions, operands.tree_mask
    scalars = _given(
        seqs_ref=seq,
        firsts_ref=first,
        **ranges,
        contexts_ref=context if has_new else None,
        packed_ref=bounds[seq] if problem.has_positions else None,
        tables_ref=operands.block_tables.reshape(-1),
        scale_ref=operands.attn_scale.reshape(1),
        window_ref=None if window is None else window.reshape(1),
    )
    inputs = _given(
        q_ref=query,
        sinks_ref=per_row(operands.sinks),
        slopes_ref=per_row(operands.alibi_slopes),
        positions_ref=of_rows(position) if problem.has_positions else None,
        new_positions_ref=(
            in_lanes(jnp.maximum(positions, 0)[None]) if problem.has_positions else None
        ),
        tree_ref=in_lanes(tree[token].astype(jnp.float32), 8) if problem.tree_width else None,
        k_hbm_ref=operands.key_cache,
        v_hbm_ref=operands.value_cache,
    )
    found = _call(work, scalars, inputs, vmem_limit_bytes, interpret)

    def by_token(x):
        x = x.reshape(-1, *heads, x.shape[-1]).swapaxes(1, 2)
        return x.reshape(-1, problem.num_heads, x.shape[-1])

    out, *lse = (by_token(x) for x in found)
    return (out, *(x[..., 0] for x in lse))


def _ranges(work, window, context, first, count, length, position):
    """Return what some token of an item sees, and what every token does: see the kernel."""
    problem, last = work.problem, first + count - 1
    end = jnp.maximum(last + 1, 0)
    all_end = first + 1
    if problem.tree_width:
        end = jnp.where(last >= 0, length, 0)
        all_end = context
    if problem.has_positions:
        all_end = jnp.minimum(all_end, context)
    end = jnp.where(count > 0, end, 0)
    if window is None:
        return dict(ends_ref=end, all_ends_ref=all_end)
    before = jnp.maximum(window, 0) - 1
    # Positions may be as large as integers get, and places as low as minus the new tokens.
    begin = jnp.maximum(jnp.maximum(position.min(axis=1), 0) - before, 0)
    all_begin = jnp.maximum(jnp.maximum(position.max(axis=1), 0) - before, 0)
    if problem.has_positions:  # those of new tokens may be anything
        begin = jnp.minimum(begin, jnp.maximum(context, 0))
    begin = jnp.minimum(begin, end)
    end = jnp.where(window > 0, end, begin)
    return dict(begins_ref=begin, ends_ref=end, all_begins_ref=all_begin, all_ends_ref=all_end)


def _call(work: RaggedWork, scalars, inputs, vmem_limit_bytes, interpret):
    problem = work.problem

    def per_item(*shape):
        zeros = (0,) * len(shape)
        index = lambda core, step, *_: (core * work.core_steps + step, *zeros)  # noqa: E731
        return pl.BlockSpec((1, *shape), index)

    in_hbm = pl.BlockSpec(memory_space=pltpu.HBM)
    per_row = pl.BlockSpec((*work.state_shape, 1), lambda *_: (0, 0, 0))
    heads = (work.kv_heads, work.head_rows)
    in_specs = dict(
        q_ref=per_item(*heads, problem.head_dim),
        sinks_ref=per_row,
        slopes_ref=per_row,
        positions_ref=per_item(work.state_shape[1], 1),
        new_positions_ref=pl.BlockSpec(memory_space=pltpu.VMEM),
        tree_ref=None if (tree := inputs.get("tree_ref")) is None else per_item(*tree.shape[1:]),
        k_hbm_ref=in_hbm,
        v_hbm_ref=in_hbm,
    )
    # `shard_map` asks over which mesh axes a result varies: as the operands do, all alike.
    varying = jax.typeof(inputs["q_ref"]).mat

    def result(width, dtype):
        shape = (work.num_seqs, *heads, width)
        return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=varying)

    lse = result(LANES, jnp.float32) if problem.return_lse else None
    outputs = _given(out_ref=result(problem.value_head_dim, problem.out_dtype), lse_ref=lse)
    state = {
        "m_ref": pltpu.VMEM((*work.state_shape, LANES), jnp.float32),
        "l_ref": pltpu.VMEM((*work.state_shape, LANES), jnp.float32),
        "acc_ref": pltpu.VMEM((*work.state_shape, problem.value_head_dim), jnp.float32),
    }
    scratch = _given(**_scratch(work) | state)
    names = [*scalars, *inputs, *outputs, *scratch]
    absent = dict.fromkeys((OPTIONAL | RAGGED_OPTIONAL) - set(names))

    def kernel(*refs):
        ragged_page_attention_kernel(**dict(zip(names, refs)), **absent, work=work)

    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(work.cores, work.core_steps),
            in_specs=[in_specs[name] for name in inputs],
            out_specs=[per_item(*x.shape[1:]) for x in outputs.values()],
            scratch_shapes=list(scratch.values()),
        ),
        out_shape=list(outputs.values()),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"),
            vmem_limit_bytes=vmem_limit_bytes,
            disable_bounds_checks=True,  # table entries are range-checked in the kernel
        ),
        cost_estimate=_cost(work),
        interpret=interpret,
        name="ejk_ragged_page_attention",
    )(*scalars.values(), *inputs.values())


def _cost(work: RaggedWork) -> pl.CostEstimate:
    """What the launch would cost if every item saw all that the call allows for."""
    problem = work.problem
    keys, values = problem.head_dim, problem.value_head_dim
    tokens = work.num_seqs * problem.visible_bound
    token_elements = problem.num_kv_heads * (keys if problem.latent else keys + values)
    item_elements = work.rows * (keys + values)
    return pl.CostEstimate(
        flops=2 * tokens * work.rows * (keys + values),
        bytes_accessed=problem.cache_dtype.itemsize * tokens * token_elements
        + problem.query_dtype.itemsize * work.num_seqs * item_elements,
        transcendentals=tokens * work.rows,
    )
