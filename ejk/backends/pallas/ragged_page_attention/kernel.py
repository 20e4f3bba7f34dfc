"""Attention of many new tokens over pages on a TPU: the decode kernel's pipeline, of query blocks.

Grid: `(cores, items of a core)`. An item is a block of `block_q` new tokens of one sequence.

In VMEM: two blocks of `block_kv` tokens of the context, keys and values with all KV heads, fetched
page by page from pools that stay in HBM; the queries and outputs of an item; and its state. The
blocks of a core's items, one item after the other, are one chain: while a block is computed the
next one, perhaps of another sequence, is on its way. See `Paging`.

The rows of a KV head are an item's tokens times the heads of its group. With `s` their logits,

    m' = max(m, max s)      p = exp(s - m')         alpha = exp(m - m')
    l  = l * alpha + sum p                          acc = acc * alpha + p v
    out = acc / l           lse = m + log l

from the sink (`sink`, 1, 0) or from nothing (`-inf`, 0, 0). Blocks that no token of an item sees
are not fetched. Masked are those that some token does not see whole, and those with bad entries.
Only in those are there new tokens whose positions are given, or that a tree mask hides: their
columns are turned to where the block has them.

Source: FlashAttention-2 (Dao, 2023, arXiv:2307.08691); one pipeline over a ragged batch as in
Ragged Paged Attention (arXiv:2604.15464).
"""

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ejk.backends.pallas._codes import scaled, token_scales
from ejk.backends.pallas._paging import Paging, divide, other_slot
from ejk.backends.pallas._products import (
    State,
    across,
    heads_of,
    product,
    scale_of_values,
    weight_of_sink,
)
from ejk.backends.pallas._tiles import LANES
from ejk.backends.pallas.ragged_page_attention.sizes import RaggedSizes


def ragged_page_attention_kernel(
    # Prefetched scalars
    seqs_ref,  # int32 [items]: whose tokens they are
    firsts_ref,  # int32 [items]: the place of the first one in its context, perhaps negative
    begins_ref,  # int32 [items], or None: some token sees those of [begin, end), both 0 for none,
    ends_ref,  # int32 [items]
    all_begins_ref,  # int32 [items], or None: and every token those of [all_begin, all_end)
    all_ends_ref,  # int32 [items]
    contexts_ref,  # int32 [items], or None: tokens of the sequence before its new ones
    packed_ref,  # int32 [items], or None: where its new tokens begin in the batch
    block_tables_ref,  # int32 [num_seqs * max_blocks]
    attn_scale_ref,  # float32 [1]
    sliding_window_ref,  # int32 [1], or None
    # Inputs
    query_ref,  # [1, kv_heads, head_rows, head_dim]
    sinks_ref,  # float32 [parts, rows, 1], or None
    alibi_slopes_ref,  # float32 [parts, rows, 1], or None
    positions_ref,  # int32 [1, rows, 1], or None: given positions of an item's rows
    new_positions_ref,  # int32 [1, width], or None: those of all tokens of the batch
    tree_mask_ref,  # float32 [1, tokens, width], or None: 1 where an item's token sees a new token
    key_scale_ref,  # float32 [parts, rows, 1], or None: of each row's KV head
    value_scale_ref,  # float32 [parts, rows, 1], or None
    key_cache_hbm_ref,  # the pool of keys in its own layout, or of keys and values
    value_cache_hbm_ref,  # the pool of values, or None: they are in that of the keys
    key_scale_hbm_ref,  # float32: a scale for each token and head, as the pools lie; or None
    value_scale_hbm_ref,  # the same of the values, or None: they are those of the keys
    # Outputs
    out_ref,  # [1, kv_heads, head_rows, value_head_dim]
    lse_ref,  # float32 [1, kv_heads, head_rows, 128], all lanes the same, or None
    # Scratch
    k_buf,  # [2, 1, block_pages, *page]
    v_buf,  # [2, 1, block_pages, *page], or None
    key_scale_buf,  # float32 [2, 1, block_pages, *page but the last axis], or None
    value_scale_buf,  # the same, or None
    sem,  # [2]
    chain_ref,  # int32 [4] in SMEM: the next block's slot, and a `Cursor` to the one after
    blocks_ref,  # int32 [2 * 4] in SMEM: a `Block` each
    m_ref,  # float32 [parts, rows, 128], all lanes the same
    l_ref,  # float32 [parts, rows, 128], all lanes the same
    acc_ref,  # float32 [parts, rows, value_head_dim]
    *,
    sizes: RaggedSizes,
):
    """Attend for the new tokens of an item, and start the copies of the next one."""
    problem, (parts, rows) = sizes.problem, sizes.state_shape
    # What some token sees is then not all between the first and the last of it.
    has_gaps = tree_mask_ref is not None or positions_ref is not None
    pools = [(key_cache_hbm_ref, k_buf), (value_cache_hbm_ref, v_buf)][: 1 + sizes.has_two_pools]
    scale_bufs = key_scale_buf, value_scale_buf
    scale_pools = [(key_scale_hbm_ref, key_scale_buf), (value_scale_hbm_ref, value_scale_buf)]

    # Which work is mine: the blocks of some items.
    core, step = pl.program_id(0), pl.program_id(1)
    begin_item = core * sizes.core_items
    paging = Paging(
        end=lambda item: ends_ref[item],
        begin=None if begins_ref is None else lambda item, _: begins_ref[item],
        all_end=lambda item: all_ends_ref[item],
        all_begin=None if all_begins_ref is None else lambda item: all_begins_ref[item],
        table_row=lambda item: seqs_ref[item],
        begin_item=begin_item,
        core=core,
        block_tables_ref=block_tables_ref,
        pools=pools + scale_pools[: sizes.scale_pools],
        value_buf=pools[-1][1],
        sem=sem,
        chain_ref=chain_ref,
        blocks_ref=blocks_ref,
        sizes=sizes,
    )
    item = begin_item + step
    pl.when(step == 0)(paging.start_chain)

    # Load once: the state starts from the sink, or from nothing.
    def initial(part):
        m = jnp.full((rows, LANES), -jnp.inf)
        if sinks_ref is not None:
            m = across(sinks_ref[part], LANES)
        return State(m, weight_of_sink(m), jnp.zeros(acc_ref.shape[1:]))

    for part in range(parts):
        m_ref[part], l_ref[part], acc_ref[part] = initial(part)
    # [rows, 1]: which of the item's tokens each row is of, its place in the context, its position.
    token = tokens_of_rows(sizes)
    place = firsts_ref[item] + token
    position = place if positions_ref is None else positions_ref[0]

    # Loop over the context: start the copies of the next block, wait for this one, compute it.
    def key_places(block):
        return block.base + lax.broadcasted_iota(jnp.int32, (1, sizes.block_kv), 1)

    def key_positions(block, masked):
        """Return the position of each token of a block, `[1, block_kv]`; masked are new ones."""
        key = key_places(block)
        if new_positions_ref is None or not masked:
            return key
        first = packed_ref[item] + block.base - contexts_ref[item]
        given = from_lane(new_positions_ref[...], first, sizes.block_kv)
        return jnp.where(key < contexts_ref[item], key, given)

    def seen(block, key_position, hidden):
        """Say which tokens of a block each row sees, `[rows, block_kv]`."""
        key = key_places(block)
        exists = (key < block.base + block.left) & (hidden == 0)
        if tree_mask_ref is None:
            visible = exists & (key <= place) if problem.causal else exists
        else:
            column = key - contexts_ref[item]
            masks = from_lane(tree_mask_ref[0], block.base - contexts_ref[item], sizes.block_kv)
            is_token = token == lax.broadcasted_iota(jnp.int32, (rows, masks.shape[0]), 1)
            of_row = product(is_token.astype(jnp.float32), masks, contract=0)  # [rows, block_kv]
            given = (of_row > 0.5) & (column < problem.tree_width)
            visible = exists & (place >= 0) & ((column < 0) | given)
        if sliding_window_ref is not None:
            visible &= position - key_position < jnp.maximum(sliding_window_ref[0], 0)
        return visible

    def logits(part, heads, scales, key_position):
        """Return the logits of some heads' rows, `[rows, block_kv]`."""
        first = part * sizes.heads_at_once
        s = [product(query_ref[0, first + i], keys, contract=1) for i, keys in enumerate(heads)]
        s = [scaled(x, scales, first + i) for i, x in enumerate(s)]
        s, scale = jnp.concatenate(s) if len(s) > 1 else s[0], attn_scale_ref[0]
        if key_scale_ref is not None:
            scale = scale * key_scale_ref[part]  # [rows, 1]
        s = s * scale
        if problem.soft_cap is not None:
            s = problem.soft_cap * jnp.tanh(s / problem.soft_cap)
        if alibi_slopes_ref is not None:
            s += alibi_slopes_ref[part] * (key_position - position).astype(jnp.float32)
        return s

    def take(part, s, heads, scales):
        """Let a part's state take a block's logits and values."""
        m = jnp.maximum(m_ref[part], across(s.max(axis=1, keepdims=True), LANES))
        m_safe = jnp.where(m == -jnp.inf, 0.0, m)
        p, alpha = jnp.exp(s - m_safe[:, :1]), jnp.exp(m_ref[part] - m_safe)
        l_ref[part] = l_ref[part] * alpha + across(p.sum(axis=1, keepdims=True), LANES)
        m_ref[part] = m
        size, pv = sizes.head_rows, []
        for i, values in enumerate(heads):
            of_head = scaled(p[i * size : (i + 1) * size], scales, part * sizes.heads_at_once + i)
            pv.append(product(of_head.astype(sizes.weight_dtype), values, contract=0))
        pv = jnp.concatenate(pv) if len(pv) > 1 else pv[0]
        acc_ref[part] = acc_ref[part] * across(alpha, pv.shape[1]) + pv

    def attend(slot, masked):
        paging.wait(slot, whole=not masked)
        block = paging.noted(slot, 0)
        key_position = key_positions(block, masked)
        masks = None
        if masked:
            hidden = paging.hide_bad_pages(block, slot, 0)
            visible = seen(block, key_position, hidden)
            masks = visible, seen_by_some(visible, paging.visible(block), has_gaps)
        keys = heads_of(k_buf, slot, 0, 0, sizes, masked)
        values = heads_of(pools[-1][1], slot, 0, 1, sizes, masked)
        key_scales, value_scales = (token_scales(scale_bufs, slot, 0, i, sizes) for i in (0, 1))
        if masks is not None and value_scales is not None:
            by_some = masks[0].astype(jnp.float32).max(axis=0, keepdims=True) > 0
            value_scales = jnp.where(by_some, value_scales, 0.0)
        for part in range(parts):
            of_part = range(sizes.heads_at_once)
            s = logits(part, [next(keys) for _ in of_part], key_scales, key_position)
            v = [next(values)[:, : problem.value_head_dim] for _ in of_part]
            if masks is not None:
                visible, is_seen = masks
                s = hide_logits(s, visible)
                v = [jnp.where(is_seen, x, jnp.zeros_like(x)) for x in v]
            take(part, s, v, value_scales)

    def block_of_item(_, slot):
        paging.start_round(other_slot(slot))
        lax.cond(
            paging.is_partial(slot),
            lambda: attend(slot, masked=True),
            lambda: attend(slot, masked=False),
        )
        return other_slot(slot)

    chain_ref[0] = lax.fori_loop(0, paging.num_blocks(item), block_of_item, chain_ref[0])

    # Write: of a row that saw nothing, 0 and the sink or -inf.
    for part in range(parts):
        state = State(m_ref[part], l_ref[part], acc_ref[part])
        saw_any = state.l != 0
        l = jnp.where(saw_any, state.l, 1.0)
        out = state.acc / across(l, problem.value_head_dim)
        if value_scale_ref is not None:
            out = out * scale_of_values(value_scale_ref[part], state, initial(part))
        out = out.astype(problem.out_dtype)
        lse = jnp.where(saw_any, state.m + jnp.log(l), -jnp.inf)
        for i in range(sizes.heads_at_once):
            of_head = slice(i * sizes.head_rows, (i + 1) * sizes.head_rows)
            out_ref[0, part * sizes.heads_at_once + i] = out[of_head]
            if lse_ref is not None:
                lse_ref[0, part * sizes.heads_at_once + i] = lse[of_head]


def tokens_of_rows(sizes):
    """Return which of an item's tokens each row of a softmax is of, `[rows, 1]`."""
    row = lax.broadcasted_iota(jnp.int32, (sizes.state_shape[1], 1), 0)
    return divide(lax.rem(row, sizes.head_rows), sizes.problem.group)


def hide_logits(s, visible):
    """Select away the logits of what a row does not see."""
    return jnp.where(visible, s, -jnp.inf)


def from_lane(x, first, width):
    """Return `width` lanes of `x` from `first` on, which may be negative; it wraps around."""
    size = x.shape[1]
    shift = lax.rem(size - lax.rem(first, size), size)
    return pltpu.roll(x, shift, axis=1)[:, :width]


def seen_by_some(visible, bounds, has_gaps):
    """Say which tokens some row sees, `[block_kv, 1]`: the values of others may be NaN."""
    if has_gaps:
        return row_to_column(visible.astype(jnp.float32).max(axis=0, keepdims=True)) > 0
    offsets = lax.broadcasted_iota(jnp.int32, (visible.shape[1], 1), 0)
    return (offsets >= bounds[0]) & (offsets < bounds[1])


def row_to_column(x):
    """Return `x [1, n]` as `[n, 1]`, by sums in which each row has one entry."""
    parts = (x[:, first : first + LANES] for first in range(0, x.shape[1], LANES))
    return jnp.concatenate([_row_to_column(part) for part in parts])


def _row_to_column(x):
    rows, columns = (lax.broadcasted_iota(jnp.int32, (x.shape[1],) * 2, axis) for axis in (0, 1))
    return jnp.where(rows == columns, x, 0.0).sum(axis=1, keepdims=True)
