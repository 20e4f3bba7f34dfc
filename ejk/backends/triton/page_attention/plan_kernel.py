"""Deals out a batch of contexts in pieces of about equal length.

Grid: blocks of `BLOCK_SEQS` sequences. Every program reads all lengths and finds where its own
sequences' pieces go, so that no program waits for another. With `c_s` the granules (`GRANULE`
tokens) that sequence `s` sees:

    chunk = max(c) if that is about a fair share, else ceil(sum(c) / MAX_CUTS)
    pieces_s = ceil(c_s / chunk) if c_s > 2 * chunk else 1;  size_s = ceil(c_s / pieces_s)
    place_s = sum of pieces over the sequences with larger pieces, or the same and a lower index

Longest pieces first: what starts last is then short, and no processor is left with much to do
when the others are done.

Source: Graham (1969), longest processing time first; work lists made once a step after FlashInfer
(Ye et al., 2025, arXiv:2501.01005).
"""

import typing

import triton
import triton.language as tl

from ejk.backends.triton._planning import context_length, cut, longest_piece


@triton.jit
@typing.no_type_check
def page_attention_plan_kernel(
    # inputs
    context_lens_ptr,  # int32 [num_seqs]
    sliding_window_ptr,  # int32 [], or [num_seqs]
    # outputs
    work_ptr,  # int32 [1 + num_seqs + max_cuts + max_splits, 4], see `PlanProblem`
    # sizes
    NUM_SEQS: tl.constexpr,
    CAPACITY: tl.constexpr,
    MAX_CUTS: tl.constexpr,
    EVEN_NUMERATOR: tl.constexpr,
    EVEN_DENOMINATOR: tl.constexpr,
    # strides
    stride_window_seq: tl.constexpr,  # 0 for one window
    # features
    HAS_WINDOW: tl.constexpr,
    # blocks
    GRANULE: tl.constexpr,
    BLOCK_SEQS: tl.constexpr,
    BLOCK_OTHERS: tl.constexpr,
):
    # Which work is mine.
    seqs = tl.program_id(0) * BLOCK_SEQS + tl.arange(0, BLOCK_SEQS)
    window = CAPACITY
    if HAS_WINDOW and stride_window_seq == 0:
        window = tl.load(sliding_window_ptr)

    # Load once: how much there is in all, and so how long a piece may be.
    total = tl.zeros([1], tl.int64)
    longest = 0
    for start in range(0, NUM_SEQS, BLOCK_OTHERS):
        others = start + tl.arange(0, BLOCK_OTHERS)
        first, length = _visible(
            context_lens_ptr, sliding_window_ptr, others, window, NUM_SEQS, CAPACITY,
            stride_window_seq,
        )  # fmt: skip
        granules = tl.cdiv(length - first, GRANULE)
        total += tl.sum(granules.to(tl.int64), 0)
        longest = tl.maximum(longest, tl.max(granules, 0))
    chunk = longest_piece(total, longest, MAX_CUTS, EVEN_NUMERATOR, EVEN_DENOMINATOR, CAPACITY)
    first, length = _visible(
        context_lens_ptr, sliding_window_ptr, seqs, window, NUM_SEQS, CAPACITY, stride_window_seq
    )
    pieces, size = cut(tl.cdiv(length - first, GRANULE), chunk)
    pieces = tl.where(seqs < NUM_SEQS, pieces, 0)

    # Loop over all sequences: whose pieces come before mine?
    place = tl.zeros([BLOCK_SEQS], tl.int32)
    split = tl.zeros([BLOCK_SEQS], tl.int32)
    num_pieces = 0
    num_splits = 0
    for start in range(0, NUM_SEQS, BLOCK_OTHERS):
        others = start + tl.arange(0, BLOCK_OTHERS)
        other_first, other_length = _visible(
            context_lens_ptr, sliding_window_ptr, others, window, NUM_SEQS, CAPACITY,
            stride_window_seq,
        )  # fmt: skip
        other_granules = tl.cdiv(other_length - other_first, GRANULE)
        other_pieces, other_size = cut(other_granules, chunk)
        other_pieces = tl.where(others < NUM_SEQS, other_pieces, 0)
        other_split = (other_pieces > 1).to(tl.int32)
        before = (other_size[None, :] > size[:, None]) | (
            (other_size[None, :] == size[:, None]) & (others[None, :] < seqs[:, None])
        )  # [BLOCK_SEQS, BLOCK_OTHERS]
        place += tl.sum(tl.where(before, other_pieces[None, :], 0), 1)
        split += tl.sum(tl.where(before, other_split[None, :], 0), 1)
        num_pieces += tl.sum(other_pieces, 0)
        num_splits += tl.sum(other_split, 0)

    # Write: the counts, my sequences' pieces, and which of them have parts to combine.
    if tl.program_id(0) == 0:
        tl.store(work_ptr, num_pieces)
        tl.store(work_ptr + 1, num_splits)
    is_split = pieces > 1
    for piece in range(0, tl.max(pieces, 0)):
        row_ptrs = work_ptr + (1 + place + piece) * 4
        mask = piece < pieces
        begin = first + piece * size * GRANULE
        tl.store(row_ptrs, seqs, mask=mask)
        end = tl.where(piece + 1 < pieces, begin + size * GRANULE, CAPACITY)
        if HAS_WINDOW:
            begin = tl.where(piece == 0, -1 - begin, begin)
        tl.store(row_ptrs + 1, begin, mask=mask)
        tl.store(row_ptrs + 2, end, mask=mask)
        tl.store(row_ptrs + 3, tl.where(is_split, place + piece, -1), mask=mask)
    row_ptrs = work_ptr + (1 + NUM_SEQS + MAX_CUTS + split) * 4
    tl.store(row_ptrs, seqs, mask=is_split)
    tl.store(row_ptrs + 1, place, mask=is_split)
    tl.store(row_ptrs + 2, pieces, mask=is_split)


@triton.jit
@typing.no_type_check
def _visible(
    context_lens_ptr,
    sliding_window_ptr,
    seqs,
    window,
    NUM_SEQS: tl.constexpr,
    CAPACITY: tl.constexpr,
    stride_window_seq: tl.constexpr,
):
    """Return the first position that each sequence sees, and its length."""
    length = context_length(context_lens_ptr, seqs, NUM_SEQS, CAPACITY)
    if stride_window_seq > 0:
        window = tl.load(
            sliding_window_ptr + seqs * stride_window_seq, mask=seqs < NUM_SEQS, other=0
        )
    return tl.maximum(length - tl.maximum(window, 0), 0), length
