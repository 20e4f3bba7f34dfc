"""Decode attention over pages on a TPU: a flash-attention loop fed by double-buffered copies.

Grid: `(cores, steps of a core)`. A step is one sequence, or a few where KV heads are few; cores
share sequences or KV heads.

In VMEM: two rounds of blocks of `block_kv` tokens, keys and values with all KV heads of the core,
fetched page by page from pools that stay in HBM; the queries and outputs of a step; and the state
of one sequence. A round is one block, or a few where KV heads are few: of one sequence or of
several. While a round is computed the next one is on its way: see `Paging`.

With `s` the logits of a block, a block's part of the result is

    m_b = max s             p = exp(s - m_b)        l_b = sum p             acc_b = p v

and a sequence's state, which starts from the sink (`sink`, 1, 0) or from nothing (`-inf`, 0, 0),
takes one block after the other:

    m' = max(m, m_b)        alpha = exp(m - m')     beta = exp(m_b - m')
    l  = l * alpha + l_b * beta                     acc = acc * alpha + acc_b * beta
    out = acc / l           lse = m + log l

The logits of a round come first, all heads of all its blocks, then one softmax, then all values: a
chain of product, maximum, exponential and product for each head would wait for itself. A block's
part does not depend on the others of its round, and so its bits do not.

Scales of keys multiply logits, scales of values weights, or the output where a head has one. Codes
of 8 bits are converted when they have arrived, or multiplied as they are: see `operand_dtype`.

Source: FlashAttention-2 (Dao, 2023, arXiv:2307.08691); copies across the border of sequences as
in Ragged Paged Attention (arXiv:2604.15464).
"""

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from ejk.backends.pallas._codes import any_nan, nan_bits, scaled, token_scales
from ejk.backends.pallas._paging import Paging, divide_up, other_slot
from ejk.backends.pallas._products import (
    State,
    across,
    heads_of,
    merge,
    product,
    scale_of_values,
    weight_of_sink,
)
from ejk.backends.pallas._tiles import LANES
from ejk.backends.pallas.page_attention.sizes import Sizes


def page_attention_kernel(
    # Prefetched scalars
    context_lens_ref,  # int32 [num_seqs]
    block_tables_ref,  # int32 [num_seqs * max_blocks]
    attn_scale_ref,  # float32 [1]
    sliding_window_ref,  # int32 [1] or [num_seqs], or None
    # Inputs
    query_ref,  # [step_items, 1, kv_heads, group, head_dim]
    sinks_ref,  # float32 [1, rows, 1], or None
    alibi_slopes_ref,  # float32 [1, rows, 1], or None
    key_scale_ref,  # float32 [1, rows, 1], or None: of each row's KV head
    value_scale_ref,  # float32 [1, rows, 1], or None
    key_cache_hbm_ref,  # the pool of keys in its own layout, or of keys and values
    value_cache_hbm_ref,  # the pool of values, or None: they are in that of the keys
    key_scale_hbm_ref,  # float32: a scale for each token and head, as the pools lie; or None
    value_scale_hbm_ref,  # the same of the values, or None: they are those of the keys
    # Outputs
    out_ref,  # [step_items, 1, kv_heads, group, value_head_dim]
    lse_ref,  # float32 [step_items, 1, 1, rows], or None
    # Scratch
    k_buf,  # [2, round_blocks, block_pages, *page]
    v_buf,  # [2, round_blocks, block_pages, *page], or None
    key_scale_buf,  # float32 [2, round_blocks, block_pages, *page but the last axis], or None
    value_scale_buf,  # the same, or None
    sem,  # [2]
    chain_ref,  # int32 [4] in SMEM: the next round's slot, and a `Cursor` to the one after
    blocks_ref,  # int32 [2 * round_blocks * 4] in SMEM: a `Block` each
    m_ref,  # float32 [rows, 128], all lanes the same
    l_ref,  # float32 [rows, 128], all lanes the same
    acc_ref,  # float32 [rows, value_head_dim]
    *,
    sizes: Sizes,
):
    """Attend for the sequences of a step, and start the copies of the next one."""
    problem, group = sizes.problem, sizes.problem.group
    pools = [(key_cache_hbm_ref, k_buf), (value_cache_hbm_ref, v_buf)][: 1 + sizes.has_two_pools]
    scale_bufs = key_scale_buf, value_scale_buf
    scale_pools = [(key_scale_hbm_ref, key_scale_buf), (value_scale_hbm_ref, value_scale_buf)]

    # Which work is mine: the blocks of some sequences, in rounds.
    core, step = pl.program_id(0), pl.program_id(1)
    begin_seq = core * sizes.core_items if sizes.shared == "batch" else 0

    def begin_of(seq, end):
        window = sliding_window_ref[seq if problem.own_windows else 0]
        return jnp.maximum(end - jnp.maximum(window, 0), 0)

    paging = Paging(
        end=lambda seq: jnp.clip(context_lens_ref[seq], 0, problem.capacity),
        begin=None if sliding_window_ref is None else begin_of,
        begin_item=begin_seq,
        core=core,
        block_tables_ref=block_tables_ref,
        pools=pools + scale_pools[: sizes.scale_pools],
        value_buf=pools[-1][1],
        sem=sem,
        chain_ref=chain_ref,
        blocks_ref=blocks_ref,
        sizes=sizes,
    )
    first_seq = begin_seq + step * sizes.step_items
    num_blocks = sum(paging.num_blocks(first_seq + i) for i in range(sizes.step_items))
    pl.when(step == 0)(paging.start_chain)

    # Load once: a sequence's state starts from the sink, or from nothing.
    m = jnp.full(m_ref.shape, -jnp.inf) if sinks_ref is None else across(sinks_ref[0], LANES)
    initial = State(m, weight_of_sink(m), jnp.zeros(acc_ref.shape))

    # Loop over the context: start the copies of the next round, wait for this one, compute it.
    looked_at = []  # what is known of the NaN codes of a round

    def look(codes, masked):
        if sizes.looks_for_nan and not masked:
            looked_at.append(nan_bits(codes))

    def logits(slot, k, block, masked):
        seq = block.item - first_seq
        scales, heads = token_scales(scale_bufs, slot, k, 0, sizes), []
        for head, keys in enumerate(heads_of(k_buf, slot, k, 0, sizes, masked)):
            look(keys, masked)
            of_head = product(query_ref[seq, 0, head], keys, contract=1)  # [group, block_kv]
            heads.append(scaled(of_head, scales, head))
        s, scale = jnp.concatenate(heads), attn_scale_ref[0]
        if key_scale_ref is not None:
            scale = scale * key_scale_ref[0]  # [rows, 1]
        s = s * scale  # [rows, block_kv]
        if problem.soft_cap is not None:
            s = problem.soft_cap * jnp.tanh(s / problem.soft_cap)
        if alibi_slopes_ref is not None:  # positions, counted from the query's
            ages = lax.broadcasted_iota(jnp.int32, (1, sizes.block_kv), 1) - (block.left - 1)
            s += alibi_slopes_ref[0] * ages.astype(jnp.float32)
        return s

    def part(slot, k, block, s, masked):
        """Return a block's `m_b`, `l_b` and `acc_b`."""
        begin, end = paging.visible(block)
        scales = token_scales(scale_bufs, slot, k, 1, sizes)
        if masked:
            hidden = paging.hide_bad_pages(block, slot, k)
            s = hide_logits(s, begin, end, hidden)
            if scales is not None:
                scales = hide(scales, begin, end, hidden, 0.0)
        m = s.max(axis=1, keepdims=True)  # [rows, 1]
        p = jnp.exp(s - jnp.where(m == -jnp.inf, 0.0, m))  # [rows, block_kv]
        heads = []
        for head, values in enumerate(heads_of(pools[-1][1], slot, k, 1, sizes, masked)):
            look(values, masked)
            values = values[:, : problem.value_head_dim]
            if masked:
                values = hide_values(values, begin, end)
            of_head = scaled(p[head * group : (head + 1) * group], scales, head)
            of_head = of_head.astype(sizes.weight_dtype)
            heads.append(product(of_head, values, contract=0))  # [group, value_head_dim]
        l = p.sum(axis=1, keepdims=True)
        return State(across(m, LANES), across(l, LANES), jnp.concatenate(heads))

    def finish(state):
        """Return the output and the LSE: of a row that saw nothing, 0 and the sink or -inf."""
        saw_any = state.l != 0
        l = jnp.where(saw_any, state.l, 1.0)
        out = state.acc / across(l, problem.value_head_dim)
        if value_scale_ref is not None:
            out = out * scale_of_values(value_scale_ref[0], state, initial)
        out = out.astype(problem.out_dtype)
        lse = None
        if lse_ref is not None:
            lse = column_to_row(jnp.where(saw_any, state.m + jnp.log(l), -jnp.inf)[:, :1])
        return out, lse

    def write(i, result):
        out, lse = result
        for head in range(sizes.kv_heads):
            out_ref[i, 0, head] = out[head * group : (head + 1) * group]
        if lse_ref is not None:
            lse_ref[i, 0] = lse

    def attend(slot, masked, waits=True):
        if waits:
            paging.wait(slot, whole=not masked)
        blocks = [paging.noted(slot, k) for k in range(sizes.round_blocks)]
        # Masking has loops, across which no block's logits would stay in registers.
        s = {} if masked else {k: logits(slot, k, block, False) for k, block in enumerate(blocks)}
        state, results = State(m_ref[...], l_ref[...], acc_ref[...]), []
        for k, block in enumerate(blocks):
            is_first = paging.is_first(block)
            state = State(*(jnp.where(is_first, new, old) for new, old in zip(initial, state)))
            s_block = logits(slot, k, block, True) if masked else s[k]
            state = merge(state, part(slot, k, block, s_block, masked))
            results.append(finish(state))

        def keep():
            m_ref[...], l_ref[...], acc_ref[...] = state
            for block, result in zip(blocks, results):
                is_last = pl.when(paging.is_last(block))
                is_last(lambda b=block, r=result: write(b.item - first_seq, r))

        if not looked_at:
            return keep()
        missed = any_nan(looked_at)
        looked_at.clear()
        pl.when(missed == 0)(keep)
        return missed

    # Rows of sequences that see nothing stay as they are written here.
    nothing = finish(initial)
    for i in range(sizes.step_items):
        write(i, nothing)

    def round_of_step(_, slot):
        paging.start_round(other_slot(slot))
        # Only where a position or an entry may be invalid is there something to mask.
        masked = paging.is_partial(slot)
        if not sizes.looks_for_nan:
            lax.cond(
                masked,
                lambda: attend(slot, masked=True),
                lambda: attend(slot, masked=False),
            )
            return other_slot(slot)
        # What is masked is converted first, and so keeps its NaN.
        pl.when(masked)(lambda: paging.wait(slot, whole=False))
        missed = lax.cond(masked, lambda: jnp.int32(1), lambda: attend(slot, masked=False))

        @pl.when(missed > 0)
        def _attend_masked():
            attend(slot, masked=True, waits=False)

        return other_slot(slot)

    rounds = divide_up(num_blocks, sizes.round_blocks)
    chain_ref[0] = lax.fori_loop(0, rounds, round_of_step, chain_ref[0])


def hide_logits(s, begin, end, hidden):
    """Select away the logits of what is not visible."""
    return hide(s, begin, end, hidden, -jnp.inf)


def hide(x, begin, end, hidden, other):
    """Put `other` in the columns of what is not visible."""
    offsets = lax.broadcasted_iota(jnp.int32, hidden.shape, 1)
    return jnp.where((offsets >= begin) & (offsets < end) & (hidden == 0), x, other)


def hide_values(values, begin, end):
    """Select away the values of positions that are not visible: 0 * NaN is not 0."""
    offsets = lax.broadcasted_iota(jnp.int32, values.shape, 0)
    return jnp.where((offsets >= begin) & (offsets < end), values, jnp.zeros_like(values))


def column_to_row(x):
    """Return `x [n, 1]` as `[1, n]`, by a sum in which each column has one entry."""
    rows, columns = (lax.broadcasted_iota(jnp.int32, (x.shape[0],) * 2, axis) for axis in (0, 1))
    return jnp.where(rows == columns, x, 0.0).sum(axis=0, keepdims=True)
