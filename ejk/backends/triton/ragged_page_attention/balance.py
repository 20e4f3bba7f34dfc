"""Deals out narrow and wide items to the programs of one launch.

Every program takes the same number of items, of both kinds. `share` is a program's fair part of the
batch. Sizes of pieces from whole contexts down to a third of a share are tried, and the one with
which the batch ends first is taken:

    ends = share + late + what parts cost
    late = max(idle * largest, largest - mean)

`idle` is the part of the last round of programs that has nothing to do. `largest` and `mean` are
sizes of items.
"""

import typing

import triton
import triton.language as tl

from ejk.backends.triton.ragged_page_attention.work import (
    MOST_GRANULES,
    bounds_of,
    cut_blocks,
    work_of,
)

# What a granule of a narrow block costs, in granules of a wide one. On an H100 a program takes 1.7
# us for a granule of a full wide block. For one of a narrow block, which waits for memory, it takes
# 2.9, or 2.2 between wide ones. On an H200 one of 64 latent rows, which waits for its products,
# takes 6.5.
NARROW_COST, PRODUCT_COST = tl.constexpr(1.6), tl.constexpr(3.8)
# A program that waits for memory is at most 1 / LEAST_BUSY times as fast while others are idle:
# alone on the card 1.8 times. One that waits for its products is no faster.
LEAST_BUSY = tl.constexpr(4 / 7)
# Each part is written and read, and a launch combines them. Not measured.
PART_COST, ROWS_OF_PART, COMBINE_COST = tl.constexpr(0.025), tl.constexpr(16), tl.constexpr(2.0)
TRIED = tl.constexpr(16)  # sizes of pieces
SMALL = tl.constexpr(4)  # a piece of up to a SMALL-th of the longest is small


@triton.jit
@typing.no_type_check
def balanced_chunks(
    cu_q_lens_ptr,
    context_lens_ptr,
    window,
    total_narrow,
    total_wide,
    longest_narrow,
    longest_wide,
    NUM_SEQS: tl.constexpr,
    TOTAL_TOKENS: tl.constexpr,
    GROUP: tl.constexpr,
    CAPACITY: tl.constexpr,
    CUTS: tl.constexpr,
    RESIDENT: tl.constexpr,
    PROGRAMS: tl.constexpr,
    MEMORY_BOUND: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    NARROW_ROWS: tl.constexpr,
    WIDE_ROWS: tl.constexpr,
    GRANULE: tl.constexpr,
    BLOCK_OTHERS: tl.constexpr,
):
    """Return the most granules of a piece of each kind."""
    COST: tl.constexpr = NARROW_COST if MEMORY_BOUND else PRODUCT_COST
    share = COST * total_narrow.to(tl.float32) + total_wide.to(tl.float32)  # [1]
    share = share * PROGRAMS / RESIDENT
    tried = tl.arange(0, TRIED)
    most = tl.where(tried == 0, MOST_GRANULES, share * 6 / (3 + tried))
    narrow = tl.minimum(tl.ceil(most / COST), MOST_GRANULES).to(tl.int32)
    wide = tl.minimum(tl.ceil(most), MOST_GRANULES).to(tl.int32)
    # A piece is at least as long as the plan's rows demand, and no longer than the longest context.
    narrow = tl.maximum(
        tl.minimum(narrow, longest_narrow), tl.cdiv(total_narrow, CUTS).to(tl.int32)
    )
    wide = tl.maximum(tl.minimum(wide, longest_wide), tl.cdiv(total_wide, CUTS).to(tl.int32))
    narrow, wide = tl.maximum(narrow, 1), tl.maximum(wide, 1)
    longest = tl.where(total_narrow > 0, narrow * COST, 0)
    longest = tl.maximum(longest, tl.where(total_wide > 0, wide, 0).to(tl.float32))

    items = tl.zeros([TRIED], tl.float32)
    large = tl.zeros([TRIED], tl.float32)  # small ones fill the gaps
    parts = tl.zeros([TRIED], tl.float32)  # what they cost
    largest = tl.zeros([TRIED], tl.float32)
    carry = 0
    for start in range(0, NUM_SEQS, BLOCK_OTHERS):
        others = start + tl.arange(0, BLOCK_OTHERS)
        first, last, carry = bounds_of(cu_q_lens_ptr, others, carry, NUM_SEQS, TOTAL_TOKENS)
        is_wide, blocks, granules = work_of(
            context_lens_ptr, others, last - first, window, NUM_SEQS, CAPACITY, GROUP, HAS_WINDOW,
            NARROW_ROWS, WIDE_ROWS, GRANULE,
        )  # fmt: skip
        is_wide, blocks = is_wide[:, None], blocks[:, None]
        chunk = tl.where(is_wide, wide[None, :], narrow[None, :])  # [BLOCK_OTHERS, TRIED]
        pieces, size = cut_blocks(blocks, granules[:, None], chunk, 1)
        number = (blocks * pieces).to(tl.float32)
        cost = size.to(tl.float32) * tl.where(is_wide, 1.0, COST)
        items += tl.sum(number, 0)
        large += tl.sum(tl.where(cost * SMALL > longest, number, 0), 0)
        rows = tl.where(is_wide, WIDE_ROWS, NARROW_ROWS)
        part = PART_COST * (ROWS_OF_PART + rows.to(tl.float32))
        parts += tl.sum(tl.where(pieces > 1, number * part, 0), 0)
        largest = tl.maximum(largest, tl.max(cost, 0))
    rounds = large * PROGRAMS / RESIDENT
    rest = rounds - tl.floor(rounds)
    least = tl.where(total_wide > 0, 1.0, LEAST_BUSY if MEMORY_BOUND else 1.0)
    busy = tl.where(rest > 0, tl.maximum(rest, least), 0)
    # A program with the largest item has as many others as one without.
    mean = share * RESIDENT / (tl.maximum(items, 1) * PROGRAMS)
    late = tl.maximum((busy - rest) * largest, largest - mean)
    ends = tl.maximum(share + late, least * largest)
    ends += parts * PROGRAMS / RESIDENT + tl.where(parts > 0, COMBINE_COST, 0.0)
    is_first = ends == tl.min(ends, 0)
    narrow = tl.max(tl.where(is_first, narrow, 0), 0)
    return narrow, tl.max(tl.where(is_first, wide, 0), 0)
