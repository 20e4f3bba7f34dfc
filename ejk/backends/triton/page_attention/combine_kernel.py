"""Merges the parts of contexts that were cut in pieces.

Grid, one axis, fastest first: block of `BLOCK_DV` entries of the values, query head, sequence. In
registers: the running maximum `m`, sum `l` and weighted values `acc` over the parts, which are
weighed by their LSEs as tokens are by their logits. A part that saw nothing has LSE -inf and weighs
nothing: it leaves every bit as it is. The parts of a sequence's pack come after its own.

Source: splits after Flash-Decoding (Dao et al., 2023).
"""

import typing

import triton
import triton.language as tl

from ejk.backends.triton._softmax import LN2, add_sink, rounded
from ejk.backends.triton.page_attention.packs import pack_parts_of


@triton.jit
@typing.no_type_check
def combine_parts_kernel(
    # inputs
    part_out_ptr,  # float32 [parts, num_heads, value_head_dim]
    part_lse_ptr,  # float32, log2 [parts, num_heads], and where pieces of packs stopped
    sinks_ptr,  # float32 [num_heads]
    work_ptr,  # int32 [1 + pieces + splits, 4]: the plan
    spans_ptr,  # int32 [num_seqs, 2]: where a sequence's tokens begin and end, if TOKENS > 1
    # inputs and outputs: rows of contexts in one piece are there already
    out_ptr,  # [num_seqs, num_heads, value_head_dim]; of tokens, [tokens, heads, value_head_dim]
    lse_ptr,  # float32 [num_seqs, num_heads]
    # sizes
    NUM_SEQS: tl.constexpr,
    NUM_HEADS: tl.constexpr,  # of all tokens of a sequence
    TOKENS: tl.constexpr,  # of a sequence, at most
    VALUE_HEAD_DIM: tl.constexpr,
    NUM_SPLITS: tl.constexpr,  # parts of each sequence; 0: as planned
    NUM_PARTS: tl.constexpr,
    FIRST_SPLIT: tl.constexpr,  # the row of `work` where the sequences with parts begin
    MEMBERS: tl.constexpr,  # sequences of a pack, at most; 0 for a plan without packs
    MAX_PACKS: tl.constexpr,
    MAX_PACK_PIECES: tl.constexpr,
    # features
    HAS_SINKS: tl.constexpr,
    # blocks
    BLOCK_PARTS: tl.constexpr,  # parts whose loads do not wait for each other
    BLOCK_DV: tl.constexpr,
    BLOCK_STOPS: tl.constexpr,  # pieces of one pack, at most
):
    # Which work is mine.
    pid = tl.program_id(0)
    block_dv = pid % tl.cdiv(VALUE_HEAD_DIM, BLOCK_DV)
    pid = pid // tl.cdiv(VALUE_HEAD_DIM, BLOCK_DV)
    head = pid % NUM_HEADS
    index = pid // NUM_HEADS
    if NUM_SPLITS == 0:
        # The row lies there whatever the count says, and is not waited for twice.
        row_ptr = work_ptr + (FIRST_SPLIT + index) * 4
        seq = tl.load(row_ptr).to(tl.int64)
        first_part = tl.load(row_ptr + 1).to(tl.int64)
        num_parts = tl.load(row_ptr + 2)
        if MEMBERS > 0:  # a row for each sequence: its place in a pack, and its own parts
            place = seq
            seq = index.to(tl.int64)
            if num_parts <= 0:
                return
        elif index >= tl.load(work_ptr + 1):
            return
        if (seq < 0) | (seq >= NUM_SEQS) | (first_part < 0) | (first_part + num_parts > NUM_PARTS):
            return
    else:
        seq = index.to(tl.int64)
        first_part = seq * NUM_SPLITS
        num_parts = NUM_SPLITS
    if MEMBERS > 0:
        own_parts = num_parts
        pack_part, pack_parts = pack_parts_of(
            place, work_ptr, part_lse_ptr + NUM_PARTS * NUM_HEADS, FIRST_SPLIT, NUM_SEQS, NUM_PARTS,
            MEMBERS, MAX_PACKS, MAX_PACK_PIECES, BLOCK_STOPS,
        )  # fmt: skip
        num_parts += pack_parts

    # Load once: nothing, every part is read once.
    offs_dv = block_dv * BLOCK_DV + tl.arange(0, BLOCK_DV)
    mask_dv = offs_dv < VALUE_HEAD_DIM
    m = tl.full([], float("-inf"), tl.float32)
    l = tl.full([], 0.0, tl.float32)
    acc = tl.zeros([BLOCK_DV], tl.float32)

    # Loop over the parts. A thread takes all parts of its entries, one after the other, so that no
    # bit follows from the blocks.
    for start in range(0, num_parts, BLOCK_PARTS):
        for i in tl.static_range(BLOCK_PARTS):
            exists = start + i < num_parts
            row = (first_part + start + i) * NUM_HEADS + head
            if MEMBERS > 0:  # each part of its pack is one of every member
                in_pack = start + i - own_parts
                of_pack = (pack_part + in_pack * MEMBERS) * NUM_HEADS + head
                row = tl.where(in_pack < 0, row, of_pack)
            lse = tl.load(part_lse_ptr + row, mask=exists, other=float("-inf"))
            out_ptrs = part_out_ptr + row * VALUE_HEAD_DIM + offs_dv
            out = tl.load(out_ptrs, mask=offs_dv < tl.where(exists, VALUE_HEAD_DIM, 0), other=0.0)
            m_new = tl.maximum(m, lse)
            m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)
            weight = tl.exp2(lse - m_safe)
            alpha = tl.exp2(m - m_safe)
            m = m_new
            l = l * alpha + weight
            acc = tl.fma(out, weight, acc * alpha)

    # Write.
    row = seq * NUM_HEADS + head
    sink = tl.full([], float("-inf"), tl.float32)
    saw_nothing = l == 0
    if HAS_SINKS:
        sink = tl.load(sinks_ptr + head)
        m, l, alpha, saw_nothing = add_sink(m, l, sink)
        acc *= alpha
    if block_dv == 0:
        lse = tl.where(saw_nothing, sink, (m + tl.log2(l)) * LN2)
        tl.store(lse_ptr + row, lse)
    if TOKENS > 1:  # the last ones before the end, of which the first may be others'
        HEADS: tl.constexpr = NUM_HEADS // TOKENS
        begin = tl.load(spans_ptr + seq * 2).to(tl.int64)
        end = tl.load(spans_ptr + seq * 2 + 1).to(tl.int64)
        row = tl.maximum(end - TOKENS, 0) * HEADS + head
        mask_dv &= (row >= begin * HEADS) & (row < end * HEADS)
    out = rounded(acc / tl.where(l == 0, 1.0, l), out_ptr.dtype.element_ty)
    tl.store(out_ptr + row * VALUE_HEAD_DIM + offs_dv, out, mask_dv)
