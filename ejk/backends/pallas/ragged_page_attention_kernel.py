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

Source: FlashAttention-2 (Dao, 2023, arXiv:2307.08691); one pipeline over a ragged batch as in
Ragged Paged Attention (arXiv:2604.15464).
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from ejk.backends.pallas.page_attention_kernel import (
    State,
    across,
    heads_of,
    hide_values,
    other_slot,
    product,
)
from ejk.backends.pallas.page_attention_paging import Block, Cursor, Paging, divide
from ejk.backends.pallas.page_attention_work import LANES
from ejk.backends.pallas.ragged_page_attention_work import RaggedWork


def ragged_page_attention_kernel(
    # Prefetched scalars
    seqs_ref,  # int32 [items]: whose tokens they are
    firsts_ref,  # int32 [items]: the position of the first one, perhaps negative
    ends_ref,  # int32 [items]: the position after the last one; 0 where nothing is seen
    tables_ref,  # int32 [num_seqs * max_blocks]
    scale_ref,  # float32 [1]
    window_ref,  # int32 [1], or None
    # Inputs
    q_ref,  # [1, kv_heads, head_rows, head_dim]
    sinks_ref,  # float32 [parts, rows, 1], or None
    slopes_ref,  # float32 [parts, rows, 1], or None
    k_hbm_ref,  # the pool of keys in its own layout, or of keys and values
    v_hbm_ref,  # the pool of values, or None: they are in that of the keys
    # Outputs
    out_ref,  # [1, kv_heads, head_rows, value_head_dim]
    lse_ref,  # float32 [1, kv_heads, head_rows, 128], all lanes the same, or None
    # Scratch
    k_buf,  # [2, 1, block_pages, *page]
    v_buf,  # [2, 1, block_pages, *page], or None
    sem,  # [2]
    chain_ref,  # int32 [4] in SMEM: the next block's slot, and a `Cursor` to the one after
    blocks_ref,  # int32 [2 * 4] in SMEM: a `Block` each
    m_ref,  # float32 [parts, rows, 128], all lanes the same
    l_ref,  # float32 [parts, rows, 128], all lanes the same
    acc_ref,  # float32 [parts, rows, value_head_dim]
    *,
    work: RaggedWork,
):
    """Attend for the new tokens of an item, and start the copies of the next one."""
    problem, (parts, rows) = work.problem, work.state_shape
    pools = [(k_hbm_ref, k_buf), (v_hbm_ref, v_buf)][: 1 + work.has_two_pools]

    # Which work is mine: the blocks of some items.
    core, step = pl.program_id(0), pl.program_id(1)
    begin_item = core * work.core_seqs
    paging = RaggedPaging(
        ends_ref,
        tables_ref,
        window_ref,
        chain_ref,
        blocks_ref,
        pools,
        sem,
        core,
        begin_item,
        work,
        seqs_ref,
        firsts_ref,
    )
    item = begin_item + step
    pl.when(step == 0)(paging.start_chain)

    # Load once: the state starts from the sink, or from nothing.
    for part in range(parts):
        m = jnp.full((rows, LANES), -jnp.inf)
        if sinks_ref is not None:
            m = across(sinks_ref[part], LANES)
        m_ref[part], l_ref[part] = m, jnp.where(m == -jnp.inf, 0.0, 1.0)
        acc_ref[part] = jnp.zeros(acc_ref.shape[1:])
    # [rows, 1]: the position of each row's token.
    row = lax.broadcasted_iota(jnp.int32, (rows, 1), 0)
    position = paging.first(item) + divide(lax.rem(row, work.head_rows), problem.group)

    # Loop over the context: start the copies of the next block, wait for this one, compute it.
    def logits(part, heads, block):
        """Return the logits of some heads' rows, `[rows, block_kv]`."""
        first = part * work.heads_at_once
        s = [product(q_ref[0, first + i], keys, contract=1) for i, keys in enumerate(heads)]
        s = (jnp.concatenate(s) if len(s) > 1 else s[0]) * scale_ref[0]
        if problem.soft_cap is not None:
            s = problem.soft_cap * jnp.tanh(s / problem.soft_cap)
        if slopes_ref is not None:
            offsets = lax.broadcasted_iota(jnp.int32, s.shape, 1)
            s += slopes_ref[part] * (offsets + (block.base - position)).astype(jnp.float32)
        return s

    def take(part, s, heads):
        """Let a part's state take a block's logits and values."""
        m = jnp.maximum(m_ref[part], across(s.max(axis=1, keepdims=True), LANES))
        m_safe = jnp.where(m == -jnp.inf, 0.0, m)
        p, alpha = jnp.exp(s - m_safe[:, :1]), jnp.exp(m_ref[part] - m_safe)
        l_ref[part] = l_ref[part] * alpha + across(p.sum(axis=1, keepdims=True), LANES)
        m_ref[part] = m
        size = work.head_rows
        pv = [
            product(p[i * size : (i + 1) * size].astype(values.dtype), values, contract=0)
            for i, values in enumerate(heads)
        ]
        pv = jnp.concatenate(pv) if len(pv) > 1 else pv[0]
        acc_ref[part] = acc_ref[part] * across(alpha, pv.shape[1]) + pv

    def attend(slot, masked):
        paging.wait(slot, whole=not masked)
        block = paging.noted(slot, 0)
        visible, (begin, end) = None, paging.visible(block)
        if masked:
            hidden = paging.hide_bad_pages(block, slot, 0)
            visible = paging.seen(block, position, hidden)
        keys = heads_of(k_buf, slot, 0, 0, work)
        values = heads_of(pools[-1][1], slot, 0, 1, work)
        for part in range(parts):
            of_part = range(work.heads_at_once)
            s = logits(part, [next(keys) for _ in of_part], block)
            v = [next(values)[:, : problem.value_head_dim] for _ in of_part]
            if masked:
                s = hide_logits(s, visible)
                v = [hide_values(x, begin, end) for x in v]
            take(part, s, v)

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
        saw_any = state.l > 0
        l = jnp.where(saw_any, state.l, 1.0)
        out = (state.acc / across(l, problem.value_head_dim)).astype(problem.dtype)
        lse = jnp.where(saw_any, state.m + jnp.log(l), -jnp.inf)
        for i in range(work.heads_at_once):
            of_head = slice(i * work.head_rows, (i + 1) * work.head_rows)
            out_ref[0, part * work.heads_at_once + i] = out[of_head]
            if lse_ref is not None:
                lse_ref[0, part * work.heads_at_once + i] = lse[of_head]


@dataclasses.dataclass(frozen=True)
class RaggedPaging(Paging):
    """The chain of one core's items: what the decode kernel calls a sequence is an item here.

    `lengths_ref` holds where items end, of which each sees what its last token does.
    """

    seqs_ref: Any
    firsts_ref: Any
    work: RaggedWork

    def first(self, item):
        """Return the position of an item's first token."""
        return self.firsts_ref[item]

    def first_of_item(self, item):
        """Return the first position that a token of an item sees."""
        if self.window_ref is None:
            return jnp.int32(0)
        first = jnp.maximum(self.first(item), 0)
        return jnp.maximum(first - (jnp.maximum(self.window_ref[0], 0) - 1), 0)

    def first_block(self, seq) -> Cursor:
        item = jnp.minimum(seq, self.begin_seq + self.work.core_seqs - 1)
        end, first = self.lengths_ref[item], self.first_of_item(item)
        page_size = self.work.problem.page_size
        base = first if self.window_ref is None else divide(first, page_size) * page_size
        return Cursor(seq, base, jnp.where(first < end, end - base, 0))

    def entries(self, seq, base, left):
        row, count = super().entries(0, base, left)
        return row + self.seqs_ref[seq] * self.work.problem.max_blocks, count

    def has_ends(self, cursor: Cursor):
        seq, base, left = cursor
        ends = (left < self.work.block_kv) | (base + self.work.block_kv > self.first(seq) + 1)
        if self.window_ref is not None:  # of the last token
            ends |= base < base + left - jnp.maximum(self.window_ref[0], 0)
        return ends

    def visible(self, block: Block):
        return self.first_of_item(block.seq) - block.base, block.left

    def seen(self, block: Block, position, hidden):
        """Say which tokens of a block each row sees, `[rows, block_kv]`."""
        last = position - block.base  # [rows, 1]
        shape = (position.shape[0], hidden.shape[1])
        offsets = lax.broadcasted_iota(jnp.int32, shape, 1)
        seen = (offsets <= last) & (offsets < block.left) & (hidden == 0)
        if self.window_ref is not None:
            seen &= offsets > last - jnp.maximum(self.window_ref[0], 0)
        return seen


def hide_logits(s, visible):
    """Select away the logits of what a row does not see."""
    return jnp.where(visible, s, -jnp.inf)
