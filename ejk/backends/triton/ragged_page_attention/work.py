"""How much there is to do for each sequence of a ragged batch, and how it is cut."""

import typing

import triton
import triton.language as tl

from ejk.backends.triton._planning import context_length
from ejk.backends.triton.ragged_page_attention.rows import clipped_bounds

MOST_GRANULES = tl.constexpr(2**30)  # of a piece, so that twice as many are an int32


@triton.jit
@typing.no_type_check
def _larger(a, b):
    return tl.maximum(a, b)


@triton.jit
@typing.no_type_check
def bounds_of(cu_q_lens_ptr, seqs, carry, NUM_SEQS: tl.constexpr, TOTAL_TOKENS: tl.constexpr):
    """Return where a block of sequences begin and end, and the largest bound so far."""
    first = clipped_bounds(cu_q_lens_ptr, seqs, NUM_SEQS, TOTAL_TOKENS)
    first = tl.maximum(tl.associative_scan(first, 0, _larger), carry)
    last = tl.maximum(first, clipped_bounds(cu_q_lens_ptr, seqs + 1, NUM_SEQS, TOTAL_TOKENS))
    last = tl.where(seqs < NUM_SEQS, last, first)
    return first, last, tl.max(last, 0)


@triton.jit
@typing.no_type_check
def work_of(
    context_lens_ptr,
    seqs,
    q_len,
    window,
    NUM_SEQS: tl.constexpr,
    CAPACITY: tl.constexpr,
    GROUP: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    NARROW_ROWS: tl.constexpr,
    WIDE_ROWS: tl.constexpr,
    GRANULE: tl.constexpr,
):
    """Return whether a sequence is wide, its blocks, and the granules that its last block sees."""
    rows = tl.where(seqs < NUM_SEQS, q_len * GROUP, 0)
    is_wide = (rows > NARROW_ROWS) & (WIDE_ROWS > 0)
    block_rows = tl.where(is_wide, WIDE_ROWS, NARROW_ROWS)
    blocks = tl.cdiv(rows, block_rows)
    length = context_length(context_lens_ptr, seqs, NUM_SEQS, CAPACITY)
    seen = length
    if HAS_WINDOW:
        nearest = length - q_len + (blocks - 1) * block_rows // GROUP
        seen = length - tl.maximum(tl.maximum(nearest, 0) - (window - 1), 0)
    return is_wide, blocks, tl.where(blocks > 0, tl.cdiv(tl.maximum(seen, 0), GRANULE), 0)


@triton.jit
@typing.no_type_check
def longest_piece(
    total, longest, CUTS: tl.constexpr, NUMERATOR: tl.constexpr, DENOMINATOR: tl.constexpr
):
    """Return the most granules of a piece: `longest`, if that is about a fair share of `total`."""
    even = longest.to(tl.int64) * CUTS * DENOMINATOR <= total * NUMERATOR
    chunk = tl.where(even, longest, tl.cdiv(total, tl.maximum(CUTS, 1)))
    return tl.maximum(tl.minimum(chunk, MOST_GRANULES), 1).to(tl.int32)  # [1]


@triton.jit
@typing.no_type_check
def cut_blocks(blocks, granules, chunk, WHOLE_CHUNKS: tl.constexpr):
    """Cut what each block of a sequence sees in the fewest equal pieces of at most a chunk.

    Up to `WHOLE_CHUNKS` chunks stay whole: they start early, and end before others.
    """
    pieces = tl.where(granules > WHOLE_CHUNKS * chunk, tl.cdiv(granules, chunk), 1)
    size = tl.cdiv(granules, pieces)
    pieces = tl.maximum(tl.cdiv(granules, tl.maximum(size, 1)), 1)
    return tl.where(blocks > 0, pieces, 0), size
