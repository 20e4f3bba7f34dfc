"""Cuts the contexts of a batch in pieces, and says which start first.

The granules of all contexts make up one row, sequence by sequence, which is cut in even shares. A
piece is what one share has of one sequence. With `c_s` the granules that sequence `s` sees:

    share = max(1, ceil(sum(c) / SHARES));  before_s = sum(c_t for t < s)
    first_s = min(c_s, share - before_s % share)
    cuts_s = ceil((c_s - first_s) / share)

Sequence `s` is `first_s` granules, then, if it is cut, `cuts_s - 1` times `share`, then the rest; a
sequence that sees nothing is a piece of nothing. So a batch is cut less often than it has shares,
and each share is work for one slot, in one piece or several.

The longest pieces start first, equal ones in the order of the row: what starts last is short, and
no multiprocessor is left with much to do when the others are done.

Grid: blocks of `BLOCK_SEQS` sequences. Every program reads all lengths and finds where its own
sequences' pieces go, so that no program waits for another: the place of a piece is the number of
those ahead of it. Sequences are compared with `BLOCK_OTHERS` others at a time.

Source: even shares of all work after Stream-K (Osama et al., 2023, arXiv:2301.03598); longest first
after list scheduling (Graham, 1969); work lists made once a step after FlashInfer (Ye et al., 2025,
arXiv:2501.01005).
"""

import typing

import triton
import triton.language as tl

from ejk.backends.triton._planning import context_length


@triton.jit
@typing.no_type_check
def page_attention_plan_kernel(
    # inputs
    context_lens_ptr,  # int32 [num_seqs]
    sliding_window_ptr,  # int32 [], or [num_seqs]
    floors_ptr,  # int32 [num_seqs]: tokens that a pack reads for each
    places_ptr,  # int32 [num_seqs]: among the members of packs, -1 for none
    # outputs
    work_ptr,  # int32 [1 + num_seqs + max_cuts + max_splits, 4], see `PlanProblem`
    # sizes
    NUM_SEQS: tl.constexpr,
    CAPACITY: tl.constexpr,
    MAX_CUTS: tl.constexpr,  # 0: nothing is cut
    SHARES: tl.constexpr,
    MEMBERS: tl.constexpr,  # sequences of a pack, at most; 0 for a plan without packs
    IS_PACKS: tl.constexpr,  # they are packs, not sequences
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

    # Load once: what my sequences see, how much there is before them, and in all.
    begin, length = _visible(
        context_lens_ptr, sliding_window_ptr, floors_ptr, seqs, window, NUM_SEQS, CAPACITY,
        stride_window_seq, MEMBERS,
    )  # fmt: skip
    granules = tl.cdiv(length - begin, GRANULE)
    before = tl.zeros([BLOCK_SEQS], tl.int32)
    share = 1
    if MAX_CUTS > 0:
        total = 0
        for start in range(0, NUM_SEQS, BLOCK_OTHERS):
            others = start + tl.arange(0, BLOCK_OTHERS)
            other_begin, other_length = _visible(
                context_lens_ptr, sliding_window_ptr, floors_ptr, others, window, NUM_SEQS,
                CAPACITY, stride_window_seq, MEMBERS,
            )  # fmt: skip
            other_granules = tl.cdiv(other_length - other_begin, GRANULE)
            is_before = others[None, :] < seqs[:, None]  # [BLOCK_SEQS, BLOCK_OTHERS]
            before += tl.sum(tl.where(is_before, other_granules[None, :], 0), 1)
            total += tl.sum(other_granules, 0)
        share = tl.maximum(tl.cdiv(total, SHARES), 1)
    first, cuts, last = _in_pieces(granules, before, share, MAX_CUTS)

    # Loop over all sequences: how many pieces start before mine, and how many have lower numbers?
    first_place = tl.zeros([BLOCK_SEQS], tl.int32)
    share_place = (first == share).to(tl.int32)  # my equal pieces follow each other
    last_place = (first == last).to(tl.int32) + tl.where(last == share, cuts - 1, 0)
    number = tl.zeros([BLOCK_SEQS], tl.int32)
    split = tl.zeros([BLOCK_SEQS], tl.int32)
    num_pieces = 0
    num_splits = 0
    carry = 0
    for start in range(0, NUM_SEQS, BLOCK_OTHERS):
        others = start + tl.arange(0, BLOCK_OTHERS)
        other_begin, other_length = _visible(
            context_lens_ptr, sliding_window_ptr, floors_ptr, others, window, NUM_SEQS, CAPACITY,
            stride_window_seq, MEMBERS,
        )  # fmt: skip
        other_granules = tl.cdiv(other_length - other_begin, GRANULE)
        other_before = carry + tl.cumsum(other_granules, 0) - other_granules
        carry += tl.sum(other_granules, 0)
        other_first, other_cuts, other_last = _in_pieces(
            other_granules, other_before, share, MAX_CUTS
        )
        exists = others < NUM_SEQS
        other_first = tl.where(exists, other_first, -1)  # what is not there is never ahead
        other_last = tl.where(other_cuts > 0, other_last, -1)
        other_pieces = tl.where(exists, other_cuts + 1, 0)
        other_split = (other_cuts > 0).to(tl.int32)
        first_place += _ahead(first, seqs, other_first, other_cuts, other_last, share, others)
        if MAX_CUTS > 0:
            sizes = tl.zeros([BLOCK_SEQS], tl.int32) + share
            share_place += _ahead(sizes, seqs, other_first, other_cuts, other_last, share, others)
            last_place += _ahead(last, seqs, other_first, other_cuts, other_last, share, others)
        is_before = others[None, :] < seqs[:, None]
        number += tl.sum(tl.where(is_before, other_pieces[None, :], 0), 1)
        split += tl.sum(tl.where(is_before, other_split[None, :], 0), 1)
        num_pieces += tl.sum(other_pieces, 0)
        num_splits += tl.sum(other_split, 0)

    # Write: the counts, my sequences' pieces, and which of them have parts to combine.
    if tl.program_id(0) == 0:
        tl.store(work_ptr, num_pieces)
        tl.store(work_ptr + 1, num_splits)
    pieces = tl.where(seqs < NUM_SEQS, cuts + 1, 0)
    is_split = pieces > 1
    last_end = CAPACITY
    if IS_PACKS:
        is_split = pieces > 0
        last_end = length
    if MEMBERS > 0:
        place_of = tl.load(places_ptr + seqs, mask=seqs < NUM_SEQS, other=-1)
        is_split = is_split | (place_of >= 0)
    for piece in range(0, tl.max(pieces, 0)):
        place = tl.where(piece == cuts, last_place, share_place + piece - 1)
        place = tl.where(piece == 0, first_place, place)
        row_ptrs = work_ptr + (1 + place) * 4
        mask = piece < pieces
        tl.store(row_ptrs, seqs, mask=mask)
        end = begin + (first + piece * share) * GRANULE
        row_begin = tl.where(piece == 0, begin, end - share * GRANULE)
        if HAS_WINDOW:
            row_begin = tl.where(piece == 0, -1 - begin, row_begin)
        if MEMBERS > 0:
            is_first = (piece == 0) & (place_of >= 0)
            row_begin = tl.where(is_first, -1 - place_of // MEMBERS, row_begin)
        tl.store(row_ptrs + 1, row_begin, mask=mask)
        tl.store(row_ptrs + 2, tl.where(piece < cuts, end, last_end), mask=mask)
        tl.store(row_ptrs + 3, tl.where(is_split, number + piece, -1), mask=mask)
    named = seqs
    if IS_PACKS or MEMBERS > 0:  # a row each
        split = seqs
        named = length if IS_PACKS else place_of
        pieces = tl.where(is_split, pieces, 0)
        is_split = seqs < NUM_SEQS
    row_ptrs = work_ptr + (1 + NUM_SEQS + MAX_CUTS + split) * 4
    tl.store(row_ptrs, named, mask=is_split)
    tl.store(row_ptrs + 1, number, mask=is_split)
    tl.store(row_ptrs + 2, pieces, mask=is_split)


@triton.jit
@typing.no_type_check
def _in_pieces(granules, before, share, MAX_CUTS: tl.constexpr):
    """Return each sequence's first piece, how often it is cut, and its last piece, 0 if it is not.

    Pieces are in granules; those between are shares.
    """
    if MAX_CUTS == 0:
        return granules, granules * 0, granules * 0
    first = tl.minimum(granules, share - before % share)
    cuts = tl.cdiv(granules - first, share)
    return first, cuts, granules - first - tl.maximum(cuts - 1, 0) * share


@triton.jit
@typing.no_type_check
def _ahead(sizes, seqs, first, cuts, last, share, others):
    """Count the pieces of others that start before mine of a size: larger ones, or as large.

    Of equal ones those of a lower sequence start first; my own are left to the caller.
    """
    least = sizes[:, None] + (others[None, :] >= seqs[:, None]).to(tl.int32)
    ahead = (first[None, :] >= least).to(tl.int32) + (last[None, :] >= least).to(tl.int32)
    between = tl.maximum(cuts - 1, 0)[None, :]
    return tl.sum(ahead + tl.where(share >= least, between, 0), 1)


@triton.jit
@typing.no_type_check
def _visible(
    context_lens_ptr,
    sliding_window_ptr,
    floors_ptr,
    seqs,
    window,
    NUM_SEQS: tl.constexpr,
    CAPACITY: tl.constexpr,
    stride_window_seq: tl.constexpr,
    MEMBERS: tl.constexpr,
):
    """Return the first position that each sequence sees by itself, and its length."""
    length = context_length(context_lens_ptr, seqs, NUM_SEQS, CAPACITY)
    if stride_window_seq > 0:
        window = tl.load(
            sliding_window_ptr + seqs * stride_window_seq, mask=seqs < NUM_SEQS, other=0
        )
    if MEMBERS > 0:
        return tl.load(floors_ptr + seqs, mask=seqs < NUM_SEQS, other=0), length
    return tl.maximum(length - tl.maximum(window, 0), 0), length
