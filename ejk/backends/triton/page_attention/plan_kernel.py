"""Writes how a batch is dealt out, as `dealing.py` says.

Grid: blocks of `BLOCK_SEQS` sequences. Every program reads all lengths and finds where its own
sequences' pieces go, so that no program waits for another: `place_s` is the sum of the pieces over
the sequences with larger pieces, or with the same and a lower index.

Up to 64 sequences are compared with each other, up to `BLOCK_OTHERS` are sorted. Of more, which do
not fit in one tile, only those are cut that outlast the cap:

    pieces_s = ceil(c_s / most);  size_s = ceil(c_s / pieces_s)

Longest pieces first: what starts last is then short, and no processor is left with much to do
when the others are done.

Source: work lists made once a step after FlashInfer (Ye et al., 2025, arXiv:2501.01005).
"""

import typing

import triton
import triton.language as tl

from ejk.backends.triton._planning import context_length
from ejk.backends.triton.page_attention.dealing import (
    PIECE_COST,
    capped,
    in_pieces,
    is_ahead,
    most_granules,
    parts,
)

FEW = tl.constexpr(64)


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
    MAX_CUTS: tl.constexpr,
    SLOTS: tl.constexpr,
    PROGRAMS: tl.constexpr,
    GRANULE_COST: tl.constexpr,
    MEMORY_BOUND: tl.constexpr,
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

    # Load once: how much there is in all, and so how long a piece may be.
    IS_TILE: tl.constexpr = MAX_CUTS > 0 and NUM_SEQS <= BLOCK_OTHERS
    most = CAPACITY
    if MAX_CUTS > 0 and not IS_TILE:
        total = 0
        for start in range(0, NUM_SEQS, BLOCK_OTHERS):
            others = start + tl.arange(0, BLOCK_OTHERS)
            first, length = _visible(
                context_lens_ptr, sliding_window_ptr, floors_ptr, others, window, NUM_SEQS,
                CAPACITY, stride_window_seq, MEMBERS,
            )  # fmt: skip
            total += tl.sum(tl.cdiv(length - first, GRANULE), 0) * GRANULE_COST
        total += NUM_SEQS * PIECE_COST
        most = most_granules(capped(total, SLOTS, PROGRAMS, GRANULE_COST), GRANULE_COST)
        most = tl.maximum(most, tl.cdiv(total, MAX_CUTS * GRANULE_COST))
    first, length = _visible(
        context_lens_ptr, sliding_window_ptr, floors_ptr, seqs, window, NUM_SEQS, CAPACITY,
        stride_window_seq, MEMBERS,
    )  # fmt: skip
    granules = tl.cdiv(length - first, GRANULE)

    # Loop over all sequences: in how many pieces are they, and whose come before mine?
    size = tl.cdiv(granules, parts(granules, most))
    place = tl.zeros([BLOCK_SEQS], tl.int32)
    split = tl.zeros([BLOCK_SEQS], tl.int32)
    num_pieces = 0
    num_splits = 0
    for start in range(0, NUM_SEQS, BLOCK_OTHERS):
        others = start + tl.arange(0, BLOCK_OTHERS)
        other_first, other_length = _visible(
            context_lens_ptr, sliding_window_ptr, floors_ptr, others, window, NUM_SEQS, CAPACITY,
            stride_window_seq, MEMBERS,
        )  # fmt: skip
        other_granules = tl.cdiv(other_length - other_first, GRANULE)
        if IS_TILE:
            if NUM_SEQS > FEW:
                keys = other_granules * BLOCK_OTHERS + BLOCK_OTHERS - 1 - others
                keys = tl.sort(keys, descending=True)
                other_granules = keys // BLOCK_OTHERS
                others = BLOCK_OTHERS - 1 - keys % BLOCK_OTHERS
            other_pieces, other_size = in_pieces(
                other_granules, others, NUM_SEQS, MAX_CUTS, SLOTS, PROGRAMS, GRANULE_COST,
                MEMORY_BOUND, NUM_SEQS > FEW,
            )  # fmt: skip
            is_own = others[None, :] == seqs[:, None]  # [BLOCK_SEQS, BLOCK_OTHERS]
            size = tl.sum(tl.where(is_own, other_size[None, :], 0), 1)
        else:
            other_pieces = tl.where(others < NUM_SEQS, parts(other_granules, most), 0)
            other_size = tl.cdiv(other_granules, tl.maximum(other_pieces, 1))
        other_split = (other_pieces > 1).to(tl.int32)
        ahead = is_ahead(size, seqs, other_size, others)
        place += tl.sum(tl.where(ahead, other_pieces[None, :], 0), 1)
        split += tl.sum(tl.where(ahead, other_split[None, :], 0), 1)
        num_pieces += tl.sum(other_pieces, 0)
        num_splits += tl.sum(other_split, 0)

    # Write: the counts, my sequences' pieces, and which of them have parts to combine.
    if tl.program_id(0) == 0:
        tl.store(work_ptr, num_pieces)
        tl.store(work_ptr + 1, num_splits)
    pieces = tl.where(seqs < NUM_SEQS, parts(granules, tl.maximum(size, 1)), 0)
    is_split = pieces > 1
    last_end = CAPACITY
    if IS_PACKS:
        is_split = pieces > 0
        last_end = length
    if MEMBERS > 0:
        place_of = tl.load(places_ptr + seqs, mask=seqs < NUM_SEQS, other=-1)
        is_split = is_split | (place_of >= 0)
    for piece in range(0, tl.max(pieces, 0)):
        row_ptrs = work_ptr + (1 + place + piece) * 4
        mask = piece < pieces
        begin = first + piece * size * GRANULE
        tl.store(row_ptrs, seqs, mask=mask)
        end = tl.where(piece + 1 < pieces, begin + size * GRANULE, last_end)
        if HAS_WINDOW:
            begin = tl.where(piece == 0, -1 - begin, begin)
        if MEMBERS > 0:
            is_first = (piece == 0) & (place_of >= 0)
            begin = tl.where(is_first, -1 - place_of // MEMBERS, begin)
        tl.store(row_ptrs + 1, begin, mask=mask)
        tl.store(row_ptrs + 2, end, mask=mask)
        tl.store(row_ptrs + 3, tl.where(is_split, place + piece, -1), mask=mask)
    named = seqs
    if IS_PACKS or MEMBERS > 0:  # a row each
        split = seqs
        named = length if IS_PACKS else place_of
        pieces = tl.where(is_split, pieces, 0)
        is_split = seqs < NUM_SEQS
    row_ptrs = work_ptr + (1 + NUM_SEQS + MAX_CUTS + split) * 4
    tl.store(row_ptrs, named, mask=is_split)
    tl.store(row_ptrs + 1, place, mask=is_split)
    tl.store(row_ptrs + 2, pieces, mask=is_split)


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
