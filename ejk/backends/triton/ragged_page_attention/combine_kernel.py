"""Merges the parts of what blocks of query rows see.

Work, fastest first: KV head, rows of a block, block with several parts; a program of the grid takes
one, or one in `GRID`. Does what `combine_parts_kernel` does, for `BLOCK_ROWS` rows at a time.

Source: splits after Flash-Decoding (Dao et al., 2023).
"""

import typing

import triton
import triton.language as tl

from ejk.backends.triton._softmax import LN2, add_sink, write_rows


@triton.jit
@typing.no_type_check
def ragged_combine_kernel(
    # inputs
    part_out_ptr,  # float32 [parts * part_rows, num_kv_heads, value_head_dim]
    part_lse_ptr,  # float32, log2 [parts * part_rows, num_kv_heads]
    sinks_ptr,  # float32 [num_heads]
    work_ptr,  # int32 [rows, ITEM]: the plan
    # inputs and outputs: rows in one piece are there already
    out_ptr,  # [total_tokens, num_heads, value_head_dim]
    lse_ptr,  # float32 [total_tokens, num_heads]
    # sizes
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    VALUE_HEAD_DIM: tl.constexpr,
    ITEM: tl.constexpr,  # integers of an item of the plan
    COUNT: tl.constexpr,  # which integer of the plan counts this launch's blocks
    FIRST_SPLIT: tl.constexpr,  # the row of the first of them
    PART_ROWS: tl.constexpr,  # rows of a part
    # features
    HAS_SINKS: tl.constexpr,
    # blocks
    BLOCK_PARTS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    GRID: tl.constexpr,  # programs, which take the rows in turn
):
    GROUP: tl.constexpr = NUM_HEADS // NUM_KV_HEADS

    PROGRAMS: tl.constexpr = PART_ROWS // BLOCK_ROWS * NUM_KV_HEADS  # of a block, if all do one
    for place in range(tl.program_id(0), tl.load(work_ptr + COUNT) * PROGRAMS, GRID):
        # Which work is mine.
        kv_head = place % NUM_KV_HEADS
        first_row = place // NUM_KV_HEADS % (PART_ROWS // BLOCK_ROWS) * BLOCK_ROWS
        split_ptr = work_ptr + (FIRST_SPLIT + place // PROGRAMS) * ITEM
        first_token = tl.load(split_ptr)
        q_len = tl.load(split_ptr + 1)
        block = tl.load(split_ptr + 2)
        first_part = tl.load(split_ptr + 3)
        num_parts = tl.load(split_ptr + 4)
        offs_row = first_row + tl.arange(0, BLOCK_ROWS)  # of the block
        rows = block * PART_ROWS + offs_row  # of the sequence and this KV head
        mask_rows = rows < q_len * GROUP
        if block * PART_ROWS + first_row >= q_len * GROUP:
            num_parts = 0

        # Load once: nothing, every part is read once.
        offs_dv = tl.arange(0, BLOCK_DV)
        m = tl.full([BLOCK_ROWS], float("-inf"), tl.float32)
        l = tl.zeros([BLOCK_ROWS], tl.float32)
        acc = tl.zeros([BLOCK_ROWS, BLOCK_DV], tl.float32)

        # Loop over the parts: all loads of `BLOCK_PARTS` are under way before the first is used.
        for start in range(0, num_parts, BLOCK_PARTS):
            lses = ()
            outs = ()
            for i in tl.static_range(BLOCK_PARTS):
                mask = mask_rows & (start + i < num_parts)
                at = (first_part + start + i).to(tl.int64) * PART_ROWS + offs_row
                at = at * NUM_KV_HEADS + kv_head
                lses += (tl.load(part_lse_ptr + at, mask=mask, other=float("-inf")),)
                out_ptrs = part_out_ptr + at[:, None] * VALUE_HEAD_DIM + offs_dv
                out_mask = mask[:, None] & (offs_dv < VALUE_HEAD_DIM)
                outs += (tl.load(out_ptrs, mask=out_mask, other=0.0),)
            for i in tl.static_range(BLOCK_PARTS):
                m_new = tl.maximum(m, lses[i])
                m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)
                weight = tl.exp2(lses[i] - m_safe)
                alpha = tl.exp2(m - m_safe)
                m = m_new
                l = l * alpha + weight
                acc = tl.fma(outs[i], weight[:, None], acc * alpha[:, None])

        # Write.
        heads = kv_head * GROUP + rows % GROUP
        row = (first_token + rows // GROUP).to(tl.int64) * NUM_HEADS + heads
        saw_nothing = l == 0
        inverse = 1 / tl.where(saw_nothing, 1.0, l)
        sinks = tl.full([BLOCK_ROWS], float("-inf"), tl.float32)
        if HAS_SINKS:
            sinks = tl.load(sinks_ptr + heads, mask=mask_rows, other=float("-inf"))
            m, l, alpha, saw_nothing = add_sink(m, l, sinks)
            inverse = alpha / tl.where(l == 0, 1.0, l)
        lse = tl.where(saw_nothing, sinks, (m + tl.log2(l)) * LN2)
        tl.store(lse_ptr + row, lse, mask=mask_rows)
        write_rows(out_ptr, row, acc * inverse[:, None], mask_rows, 0, VALUE_HEAD_DIM)
