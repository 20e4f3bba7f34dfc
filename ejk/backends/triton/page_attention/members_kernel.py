"""Finds what a group shares, and who is in a pack with whom: the second launch of `packing`.

Grid: sequences. A group shares nothing if one of its tables differs from its leader's.
"""

import typing

import triton
import triton.language as tl


@triton.jit
@typing.no_type_check
def members_kernel(
    # inputs
    leader_ptr,  # int32 [num_seqs]: see `groups_kernel.py`
    pages_ptr,
    differs_ptr,
    # outputs
    tokens_ptr,  # int32 [num_seqs]: that my group shares
    place_ptr,  # int32 [num_seqs]: mine in the group
    size_ptr,  # int32 [num_seqs]: members of my pack
    # sizes
    NUM_SEQS: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    MEMBERS: tl.constexpr,  # of a pack, at most
    # blocks
    BLOCK_SEQS: tl.constexpr,
):
    # Which work is mine: a sequence.
    seq = tl.program_id(0)
    leader = tl.load(leader_ptr + seq)
    pages = tl.load(pages_ptr + seq)

    # Load once: who else is in my group, and whose table differs.
    others = tl.arange(0, BLOCK_SEQS)
    is_mate = tl.load(leader_ptr + others, mask=others < NUM_SEQS, other=-1) == leader
    differs = tl.load(differs_ptr + others, mask=is_mate, other=0)
    place = tl.sum((is_mate & (others < seq)).to(tl.int32), 0)
    left = tl.sum(is_mate.to(tl.int32), 0) - place // MEMBERS * MEMBERS

    # Write.
    tl.store(tokens_ptr + seq, tl.where(tl.max(differs, 0) > 0, 0, pages * PAGE_SIZE))
    tl.store(place_ptr + seq, place)
    tl.store(size_ptr + seq, tl.minimum(left, MEMBERS))
