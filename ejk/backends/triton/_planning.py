"""The lengths that plans read, and how a ragged one cuts contexts in equal pieces."""

import typing

import triton
import triton.language as tl


@triton.jit
@typing.no_type_check
def context_length(context_lens_ptr, seqs, NUM_SEQS: tl.constexpr, CAPACITY: tl.constexpr):
    """Load the lengths of sequences, clipped to what a block table holds; 0 past the last."""
    length = tl.load(context_lens_ptr + seqs, mask=seqs < NUM_SEQS, other=0)
    return tl.minimum(tl.maximum(length, 0), CAPACITY)


@triton.jit
@typing.no_type_check
def longest_piece(
    total, longest, CUTS: tl.constexpr, NUMERATOR: tl.constexpr, DENOMINATOR: tl.constexpr,
    MOST: tl.constexpr,
):  # fmt: skip
    """Return the most granules of a piece: `longest`, if that is about a fair share of `total`."""
    even = longest.to(tl.int64) * CUTS * DENOMINATOR <= total * NUMERATOR
    chunk = tl.where(even, longest, tl.cdiv(total, tl.maximum(CUTS, 1)))
    return tl.maximum(tl.minimum(chunk, MOST), 1).to(tl.int32)  # [1]


@triton.jit
@typing.no_type_check
def cut(granules, chunk, WHOLE_CHUNKS: tl.constexpr):
    """Cut contexts in the fewest equal pieces of at most `chunk` granules, an empty one in one.

    A context of up to `WHOLE_CHUNKS` chunks stays whole: it starts early, and ends before others.
    """
    pieces = tl.where(granules > WHOLE_CHUNKS * chunk, tl.cdiv(granules, chunk), 1)
    size = tl.cdiv(granules, pieces)
    return tl.maximum(tl.cdiv(granules, tl.maximum(size, 1)), 1), size
