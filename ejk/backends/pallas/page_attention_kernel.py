"""Decode attention over pages on a TPU: a flash-attention loop fed by double-buffered copies.

Grid: `(cores, sequences of a core)`. A step is one sequence; cores share sequences or KV heads.

In VMEM: two slots of `BLOCK_KV` tokens of keys and values with all KV heads of the core, fetched
page by page from pools that stay in HBM; the query and output of one sequence; and the softmax's
state. While a block is computed the next one is on its way: of this sequence, or the first one
of the next sequence that sees anything.

With `s` the logits of a block, and `m`, `l`, `acc` starting from the sink (`sink`, 1, 0) or from
nothing (`-inf`, 0, 0):

    m' = max(m, max s)    p = exp(s - m')           alpha = exp(m - m')
    l  = l * alpha + sum p                          acc = acc * alpha + p v
    out = acc / l                                   lse = m + log l

The logits of all heads come first, then one softmax, then all heads' values: a chain of product,
maximum, exponential and product for each head would wait for itself.

Source: FlashAttention-2 (Dao, 2023, arXiv:2307.08691); copies across the border of sequences as
in Ragged Paged Attention (arXiv:2604.15464).
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ejk.backends.pallas.page_attention_work import Work

COPIES = 8  # started at most between two branches of the loop that starts them


def page_attention_kernel(
    # Prefetched scalars
    lengths_ref,  # int32 [num_seqs]
    tables_ref,  # int32 [num_seqs * max_blocks]
    scale_ref,  # float32 [1]
    window_ref,  # int32 [1], or None
    # Inputs
    q_ref,  # [1, 1, kv_heads, group, head_dim]
    sinks_ref,  # float32 [1, rows, 1], or None
    slopes_ref,  # float32 [1, rows, 1], or None
    k_hbm_ref,  # the pool of keys in its own layout
    v_hbm_ref,  # the pool of values, or None: the values are the keys' first entries
    # Outputs
    out_ref,  # [1, 1, kv_heads, group, value_head_dim]
    lse_ref,  # float32 [1, 1, 1, rows], or None
    # Scratch
    k_buf,  # [2, block_pages, *page]
    v_buf,  # [2, block_pages, *page], or None
    k_sem,  # [2]
    v_sem,  # [2], or None
    state_ref,  # int32 [3] in SMEM: the next block's slot; the bad entries of each slot
    m_ref,  # float32 [rows, 128], all lanes the same
    l_ref,  # float32 [rows, 128], all lanes the same
    acc_ref,  # float32 [rows, value_head_dim]
    *,
    work: Work,
):
    """Attend for one sequence, and start the copies of the next one."""
    problem, block_pages = work.problem, work.block_pages
    pools = [(k_hbm_ref, k_buf, k_sem), (v_hbm_ref, v_buf, v_sem)][: 1 if problem.latent else 2]
    v_buf = k_buf if problem.latent else v_buf

    # Which work is mine: the visible positions [first, length) of one sequence, in blocks.
    core, step = pl.program_id(0), pl.program_id(1)
    begin_seq = core * work.core_seqs if work.shared == "batch" else 0
    paging = Paging(lengths_ref, tables_ref, window_ref, state_ref, pools, core, work)
    seq, end_seq = begin_seq + step, begin_seq + work.core_seqs
    length, first, first_page, num_pages = paging.context(seq)
    num_blocks = lax.div(num_pages + (block_pages - 1), block_pages)
    following = paging.next_seq(seq + 1, end_seq)

    @pl.when(step == 0)
    def _start_of_core():
        state_ref[0] = 0
        paging.start(paging.next_seq(seq, end_seq), end_seq, 0, 0)

    # Load once: the softmax's state starts from the sink, or from nothing.
    sinks = jnp.full((work.rows, 1), -jnp.inf) if sinks_ref is None else sinks_ref[0]
    m_ref[...] = jnp.broadcast_to(sinks, m_ref.shape)
    l_ref[...] = jnp.where(m_ref[...] == -jnp.inf, 0.0, 1.0)
    acc_ref[...] = jnp.zeros_like(acc_ref)

    # Loop over the context: start the copies of the next block, wait for this one, compute it.
    def logits(slot, positions):
        heads = []
        for head, keys in enumerate(heads_of(k_buf, slot, work)):  # [block_kv, head_dim]
            heads.append(product(q_ref[0, 0, head], keys, contract=1))  # [group, block_kv]
        s = jnp.concatenate(heads) * scale_ref[0]  # [rows, block_kv]
        if problem.soft_cap is not None:
            s = problem.soft_cap * jnp.tanh(s / problem.soft_cap)
        if slopes_ref is not None:
            s += slopes_ref[0] * (positions - (length - 1)).astype(jnp.float32)
        return s

    def softmax(s):
        m = m_ref[...]
        m_new = jnp.maximum(m, s.max(axis=1, keepdims=True))  # [rows, 128]
        m_safe = jnp.where(m_new == -jnp.inf, 0.0, m_new)
        p = jnp.exp(s - m_safe[:, :1])  # [rows, block_kv]
        alpha = jnp.exp(m - m_safe)
        m_ref[...] = m_new
        l_ref[...] = l_ref[...] * alpha + p.sum(axis=1, keepdims=True)
        return p, alpha

    def weighted_values(slot, p, base, masked):
        heads = []
        for head, values in enumerate(heads_of(v_buf, slot, work)):
            values = values[:, : problem.value_head_dim]
            if masked:
                values = hide_values(values, base, first, length)
            rows = slice(head * problem.group, (head + 1) * problem.group)
            heads.append(product(p[rows].astype(values.dtype), values, contract=0))
        return jnp.concatenate(heads)  # [rows, value_head_dim]

    def attend(block, slot, base, count, masked):
        positions = base + lax.broadcasted_iota(jnp.int32, (1, work.block_kv), 1)
        wait(k_buf, k_sem, slot, count)
        if masked and not problem.latent:
            wait(v_buf, v_sem, slot, count)
        s = logits(slot, positions)
        if masked:
            hidden = paging.hide_bad_pages(seq, block, slot, v_buf)  # [1, block_kv]
            visible = (positions >= first) & (positions < length) & (hidden == 0)
            s = jnp.where(visible, s, -jnp.inf)
        p, alpha = softmax(s)
        if not masked and not problem.latent:
            wait(v_buf, v_sem, slot, count)
        acc_ref[...] = acc_ref[...] * alpha[:, :1] + weighted_values(slot, p, base, masked)

    def step_of_loop(block, slot):
        is_last = block + 1 == num_blocks
        next_seq, next_block = jnp.where(is_last, following, seq), jnp.where(is_last, 0, block + 1)
        paging.start(next_seq, end_seq, next_block, other_slot(slot))
        base = (first_page + block * block_pages) * problem.page_size
        count = jnp.minimum(num_pages - block * block_pages, block_pages)
        # Only where a position or an entry may be invalid is there something to mask.
        masked = (base < first) | (work.block_kv > length - base) | (state_ref[1 + slot] > 0)
        pl.when(masked)(lambda: attend(block, slot, base, count, masked=True))
        pl.when(~masked)(lambda: attend(block, slot, base, count, masked=False))
        return other_slot(slot)

    state_ref[0] = lax.fori_loop(0, num_blocks, step_of_loop, state_ref[0])

    # Write: a row that saw nothing is 0, its LSE the sink or -inf.
    m, l = m_ref[:, :1], l_ref[:, :1]  # [rows, 1]
    saw_any = l > 0
    l = jnp.where(saw_any, l, 1.0)
    out = (acc_ref[...] / l).astype(out_ref.dtype)
    for head in range(work.kv_heads):
        out_ref[0, 0, head] = out[head * problem.group : (head + 1) * problem.group]
    if lse_ref is not None:
        lse = jnp.where(saw_any, m + jnp.log(l), -jnp.inf)
        lse_ref[0, 0] = column_to_row(lse)


@dataclasses.dataclass(frozen=True)
class Paging:
    """Where a sequence's pages are, and their copies into VMEM."""

    lengths_ref: Any
    tables_ref: Any
    window_ref: Any
    state_ref: Any
    pools: Any  # [(hbm_ref, buf, sem)]
    core: Any
    work: Work

    def context(self, seq):
        """Return a sequence's visible positions `[first, length)`, first page and pages."""
        problem = self.work.problem
        length = jnp.clip(self.lengths_ref[seq], 0, problem.capacity)
        first = jnp.int32(0)
        if self.window_ref is not None:
            first = jnp.maximum(length - jnp.maximum(self.window_ref[0], 0), 0)
        first_page = lax.div(first, problem.page_size)
        end_page = lax.div(length - 1, problem.page_size) + 1
        num_pages = jnp.where(first < length, end_page - first_page, 0)
        return length, first, first_page, num_pages

    def next_seq(self, seq, end_seq):
        """Return the first sequence from `seq` on that sees anything, or `end_seq`."""

        def sees_nothing(seq):
            num_pages = self.context(jnp.minimum(seq, end_seq - 1))[3]
            return (seq < end_seq) & (num_pages == 0)

        return lax.while_loop(sees_nothing, lambda seq: seq + 1, seq)

    def entries(self, seq, block):
        """Return where a block's table entries begin, and how many there are."""
        _, _, first_page, num_pages = self.context(seq)
        page = block * self.work.block_pages
        count = jnp.clip(num_pages - page, 0, self.work.block_pages)
        return seq * self.work.problem.max_blocks + first_page + page, count

    def start(self, seq, end_seq, block, slot):
        """Start the copies of a block of `seq`; of nothing if `seq` is `end_seq`."""
        entry, count = self.entries(jnp.minimum(seq, end_seq - 1), block)
        count = jnp.where(seq < end_seq, count, 0)

        def start_page(j, num_bad):
            page, bad = page_or_harmless(self.tables_ref[entry + j], self.work.problem.num_pages)
            for hbm_ref, buf, sem in self.pools:
                page_ref = page_of(hbm_ref, page, self.core, self.work)
                pltpu.make_async_copy(page_ref, buf.at[slot, j], sem.at[slot]).start()
            return num_bad + bad

        unroll = min(COPIES, self.work.block_pages)

        def start_pages(i, num_bad):
            for j in range(unroll):
                num_bad = start_page(i * unroll + j, num_bad)
            return num_bad

        groups = lax.div(count, unroll)
        num_bad = lax.fori_loop(0, groups, start_pages, jnp.int32(0))
        self.state_ref[1 + slot] = lax.fori_loop(groups * unroll, count, start_page, num_bad)

    def hide_bad_pages(self, seq, block, slot, v_buf):
        """Zero the values behind bad entries, and return 1 for their tokens, `[1, block_kv]`."""
        shape = (1, self.work.block_kv)
        page_of_token = lax.div(
            lax.broadcasted_iota(jnp.int32, shape, 1), self.work.problem.page_size
        )
        entry, count = self.entries(seq, block)

        def hide(j, hidden):
            _, bad = page_or_harmless(self.tables_ref[entry + j], self.work.problem.num_pages)

            @pl.when(bad > 0)
            def _zero_values():
                v_buf[slot, j] = jnp.zeros(v_buf.shape[2:], v_buf.dtype)

            return jnp.where(page_of_token == j, bad, hidden)

        count = jnp.where(self.state_ref[1 + slot] > 0, count, 0)
        return lax.fori_loop(0, count, hide, jnp.zeros(shape, jnp.int32))


def page_or_harmless(entry, num_pages):
    """Return an entry's page, and 1 if it is bad: then the page is one that may be read."""
    good = (entry >= 0) & (entry < num_pages)
    return jnp.where(good, entry, 0), jnp.where(good, 0, 1)


def page_of(hbm_ref, page, core, work):
    """The part of a page that a core reads, for all its heads."""
    heads = pl.ds(core * work.kv_heads, work.kv_heads) if work.shared == "kv_head" else slice(None)
    if work.problem.cache_layout == "KV_HEADS_FIRST":
        return hbm_ref.at[heads, page]
    return hbm_ref.at[page] if work.shared == "batch" else hbm_ref.at[page, heads]


def wait(buf, sem, slot, count):
    """Wait for `count` pages of a block: a copy's semaphore counts bytes, whichever came first."""
    pages = buf.at[slot, pl.ds(0, count)]
    pltpu.make_async_copy(pages, pages, sem.at[slot]).wait()


def other_slot(slot):
    return 1 - slot


def heads_of(buf, slot, work):
    """Yield each head of a block, `[block_kv, head_dim]`."""
    if work.problem.cache_layout == "NHD":
        pages = jnp.transpose(buf[slot], (2, 0, 1, 3))
        blocks = (pages[head] for head in range(work.kv_heads))
    else:
        blocks = (buf[slot, :, head] for head in range(work.kv_heads))
    for block in blocks:  # [block_pages, page_size, head_dim]
        yield block.reshape(work.block_kv, block.shape[-1])


def hide_values(values, base, first, length):
    """Select away the values of positions that are not visible: 0 * NaN is not 0."""
    positions = base + lax.broadcasted_iota(jnp.int32, values.shape, 0)
    visible = (positions >= first) & (positions < length)
    return jnp.where(visible, values, jnp.zeros_like(values))


def product(a, b, *, contract):
    """Multiply `a [m, k]` with `b`, of which axis `contract` is summed over, in float32."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else lax.Precision.DEFAULT
    dims = (((1,), (contract,)), ((), ()))
    return lax.dot_general(a, b, dims, precision=precision, preferred_element_type=jnp.float32)


def column_to_row(x):
    """Return `x [n, 1]` as `[1, n]`, by a sum in which each column has one entry."""
    rows, columns = (lax.broadcasted_iota(jnp.int32, (x.shape[0],) * 2, axis) for axis in (0, 1))
    return jnp.where(rows == columns, x, 0.0).sum(axis=0, keepdims=True)
