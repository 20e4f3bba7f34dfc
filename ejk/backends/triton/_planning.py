"""The lengths that plans read."""

import typing

import triton
import triton.language as tl


@triton.jit
@typing.no_type_check
def context_length(context_lens_ptr, seqs, NUM_SEQS: tl.constexpr, CAPACITY: tl.constexpr):
    """Load the lengths of sequences, clipped to what a block table holds; 0 past the last."""
    length = tl.load(context_lens_ptr + seqs, mask=seqs < NUM_SEQS, other=0)
    return tl.minimum(tl.maximum(length, 0), CAPACITY)
