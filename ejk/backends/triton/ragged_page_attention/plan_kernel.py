"""Deals out what the query rows of a ragged batch see.

Grid: blocks of `BLOCK_SEQS` sequences. As in `page_attention_plan_kernel`, every program reads
all lengths and finds where its own sequences' items go. The rows of a sequence and a KV head, its
new tokens times the heads of the group, are cut in blocks: narrow ones where one holds them all,
wide ones else; each kind is dealt out for itself, to a launch of its own. With `b_s` the blocks of
sequence `s` and `c_s` the granules that its last block sees:

    chunk = max(c) if that is about a fair share, else ceil(sum(b * c) / cuts)
    pieces_s = ceil(c_s / chunk) if c_s > 2 * chunk else 1;  size_s = ceil(c_s / pieces_s)
    place_s = sum of b * pieces over the sequences with larger pieces, or the same and a lower index

Largest pieces first, of a sequence its last blocks, which see most.

With `RESIDENT` both kinds are dealt out to the programs of one launch, see `balanced_chunks`.

Source: FlashInfer (Ye et al., 2025, arXiv:2501.01005), whose lists are made on the host.
"""

import typing

import triton
import triton.language as tl

from ejk.backends.triton._planning import context_length
from ejk.backends.triton.ragged_page_attention.balance import balanced_chunks
from ejk.backends.triton.ragged_page_attention.rows import clipped_bounds
from ejk.backends.triton.ragged_page_attention.work import (
    bounds_of,
    cut_blocks,
    longest_piece,
    work_of,
)


@triton.jit
@typing.no_type_check
def ragged_plan_kernel(
    # inputs
    cu_q_lens_ptr,  # int32 [num_seqs + 1]
    context_lens_ptr,  # int32 [num_seqs]
    sliding_window_ptr,  # int32 []
    # outputs
    work_ptr,  # int32 [rows, ITEM], see `RaggedPlan`
    # sizes
    NUM_SEQS: tl.constexpr,
    TOTAL_TOKENS: tl.constexpr,
    GROUP: tl.constexpr,
    CAPACITY: tl.constexpr,
    ITEM: tl.constexpr,  # integers of an item of the plan
    NARROW_CUTS: tl.constexpr,
    WIDE_CUTS: tl.constexpr,
    FIRST_WIDE: tl.constexpr,  # rows of `work`
    FIRST_WIDE_PART: tl.constexpr,
    FIRST_NARROW_SPLIT: tl.constexpr,
    FIRST_WIDE_SPLIT: tl.constexpr,
    EVEN_NUMERATOR: tl.constexpr,
    EVEN_DENOMINATOR: tl.constexpr,
    RESIDENT: tl.constexpr,  # programs that take items of both kinds; 0: each kind has its own
    PROGRAMS: tl.constexpr,  # of these that an item takes
    MEMORY_BOUND: tl.constexpr,  # programs with narrow items wait for memory
    # features
    HAS_WINDOW: tl.constexpr,
    # blocks
    NARROW_ROWS: tl.constexpr,
    WIDE_ROWS: tl.constexpr,  # 0: all are narrow
    GRANULE: tl.constexpr,
    BLOCK_SEQS: tl.constexpr,
    BLOCK_OTHERS: tl.constexpr,
    BLOCK_ITEMS: tl.constexpr,
):
    # Which work is mine.
    pid = tl.program_id(0)
    seqs = pid * BLOCK_SEQS + tl.arange(0, BLOCK_SEQS)
    window = 0
    if HAS_WINDOW:
        window = tl.maximum(tl.load(sliding_window_ptr), 0)

    # Load once: how much there is of each kind, and so how long a piece may be.
    total_narrow = tl.zeros([1], tl.int64)
    total_wide = tl.zeros([1], tl.int64)
    longest_narrow = 0
    longest_wide = 0
    begin = tl.zeros([BLOCK_SEQS], tl.int32)
    carry = 0
    for start in range(0, NUM_SEQS, BLOCK_OTHERS):
        others = start + tl.arange(0, BLOCK_OTHERS)
        first, last, carry = bounds_of(cu_q_lens_ptr, others, carry, NUM_SEQS, TOTAL_TOKENS)
        own = seqs[:, None] == others[None, :]  # [BLOCK_SEQS, BLOCK_OTHERS]
        begin += tl.sum(tl.where(own, first[None, :], 0), 1)
        is_wide, blocks, granules = work_of(
            context_lens_ptr, others, last - first, window, NUM_SEQS, CAPACITY, GROUP, HAS_WINDOW,
            NARROW_ROWS, WIDE_ROWS, GRANULE,
        )  # fmt: skip
        in_all = blocks.to(tl.int64) * granules
        total_narrow += tl.sum(tl.where(is_wide, 0, in_all), 0)
        total_wide += tl.sum(tl.where(is_wide, in_all, 0), 0)
        longest_narrow = tl.maximum(longest_narrow, tl.max(tl.where(is_wide, 0, granules), 0))
        longest_wide = tl.maximum(longest_wide, tl.max(tl.where(is_wide, granules, 0), 0))
    chunk_narrow = longest_piece(
        total_narrow, longest_narrow, NARROW_CUTS, EVEN_NUMERATOR, EVEN_DENOMINATOR
    )
    chunk_wide = longest_piece(
        total_wide, longest_wide, WIDE_CUTS, EVEN_NUMERATOR, EVEN_DENOMINATOR
    )
    if RESIDENT > 0 and NARROW_CUTS > 0:
        chunk_narrow, chunk_wide = balanced_chunks(
            cu_q_lens_ptr, context_lens_ptr, window, total_narrow, total_wide, longest_narrow,
            longest_wide, NUM_SEQS, TOTAL_TOKENS, GROUP, CAPACITY, NARROW_CUTS, RESIDENT, PROGRAMS,
            MEMORY_BOUND, HAS_WINDOW, NARROW_ROWS, WIDE_ROWS, GRANULE, BLOCK_OTHERS,
        )  # fmt: skip
    ends = clipped_bounds(cu_q_lens_ptr, seqs + 1, NUM_SEQS, TOTAL_TOKENS)
    q_len = tl.maximum(ends - begin, 0)
    is_wide, blocks, granules = work_of(
        context_lens_ptr, seqs, q_len, window, NUM_SEQS, CAPACITY, GROUP, HAS_WINDOW,
        NARROW_ROWS, WIDE_ROWS, GRANULE,
    )  # fmt: skip
    WHOLE_CHUNKS: tl.constexpr = 1 if RESIDENT > 0 else 2
    chunk = tl.where(is_wide, chunk_wide, chunk_narrow)
    pieces, size = cut_blocks(blocks, granules, chunk, WHOLE_CHUNKS)

    # Loop over all sequences: whose items come before mine?
    place = tl.zeros([BLOCK_SEQS], tl.int32)
    split = tl.zeros([BLOCK_SEQS], tl.int32)
    part = tl.where(is_wide, FIRST_WIDE_PART, 0)
    counts = tl.zeros([4], tl.int32)  # narrow items and splits, wide items and splits
    offs_count = tl.arange(0, 4)
    carry = 0
    for start in range(0, NUM_SEQS, BLOCK_OTHERS):
        others = start + tl.arange(0, BLOCK_OTHERS)
        first, last, carry = bounds_of(cu_q_lens_ptr, others, carry, NUM_SEQS, TOTAL_TOKENS)
        wide, other_blocks, other_granules = work_of(
            context_lens_ptr, others, last - first, window, NUM_SEQS, CAPACITY, GROUP, HAS_WINDOW,
            NARROW_ROWS, WIDE_ROWS, GRANULE,
        )  # fmt: skip
        other_chunk = tl.where(wide, chunk_wide, chunk_narrow)
        other_pieces, other_size = cut_blocks(
            other_blocks, other_granules, other_chunk, WHOLE_CHUNKS
        )
        before = (other_size[None, :] > size[:, None]) | (
            (other_size[None, :] == size[:, None]) & (others[None, :] < seqs[:, None])
        )  # [BLOCK_SEQS, BLOCK_OTHERS]
        before = before & (wide[None, :] == is_wide[:, None])
        items = other_blocks * other_pieces
        splits = tl.where(other_pieces > 1, other_blocks, 0)
        parts = splits * other_pieces
        place += tl.sum(tl.where(before, items[None, :], 0), 1)
        split += tl.sum(tl.where(before, splits[None, :], 0), 1)
        part += tl.sum(tl.where(before, parts[None, :], 0), 1)
        counts += tl.where(offs_count == 0, tl.sum(tl.where(wide, 0, items), 0), 0)
        counts += tl.where(offs_count == 1, tl.sum(tl.where(wide, 0, splits), 0), 0)
        counts += tl.where(offs_count == 2, tl.sum(tl.where(wide, items, 0), 0), 0)
        counts += tl.where(offs_count == 3, tl.sum(tl.where(wide, splits, 0), 0), 0)

    # Write: the counts, my sequences' items, and which of their blocks have parts to combine.
    if pid == 0:
        tl.store(work_ptr + offs_count, counts)
        tl.store(work_ptr + 4, clipped_bounds(cu_q_lens_ptr, 0, NUM_SEQS, TOTAL_TOKENS))
        tl.store(work_ptr + 5, carry)
    offs_item = tl.arange(0, BLOCK_ITEMS)[None, :]
    wide_row = tl.where(is_wide, FIRST_WIDE, 1) + place
    split_row = tl.where(is_wide, FIRST_WIDE_SPLIT, FIRST_NARROW_SPLIT) + split
    one = tl.maximum(pieces, 1)[:, None]
    length = context_length(context_lens_ptr, seqs, NUM_SEQS, CAPACITY)
    for start in range(0, tl.max(blocks * pieces, 0), BLOCK_ITEMS):
        item = start + offs_item  # [BLOCK_SEQS, BLOCK_ITEMS]
        mask = item < (blocks * pieces)[:, None]
        nth = item // one
        ptrs = work_ptr + (wide_row[:, None] + item) * ITEM
        tl.store(ptrs, seqs[:, None], mask=mask)
        tl.store(ptrs + 1, begin[:, None], mask=mask)
        tl.store(ptrs + 2, q_len[:, None], mask=mask)
        tl.store(ptrs + 3, (blocks - 1)[:, None] - nth, mask=mask)
        tl.store(ptrs + 4, item % one, mask=mask)
        tl.store(ptrs + 5, one, mask=mask)
        tl.store(ptrs + 6, tl.where(one > 1, part[:, None] + item, -1), mask=mask)
        tl.store(ptrs + 7, length[:, None], mask=mask)
        mask = mask & (item % one == 0) & (one > 1)
        ptrs = work_ptr + (split_row[:, None] + nth) * ITEM
        tl.store(ptrs, begin[:, None], mask=mask)
        tl.store(ptrs + 1, q_len[:, None], mask=mask)
        tl.store(ptrs + 2, (blocks - 1)[:, None] - nth, mask=mask)
        tl.store(ptrs + 3, part[:, None] + item, mask=mask)
        tl.store(ptrs + 4, one, mask=mask)
