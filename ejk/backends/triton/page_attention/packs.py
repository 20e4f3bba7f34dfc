"""Packs: sequences whose tables begin with the same pages, which one program reads for all of them.

A plan with packs is three lists, one after the other, each row four of int32: the pieces of
sequences and of packs, both as `PlanProblem` says, and the members of each pack, -1 where it has
fewer. What a pack's members share ends where the plan says, or with the shortest of them now.
"""

import typing

import triton
import triton.language as tl


@triton.jit
@typing.no_type_check
def shared_by(
    pack, offs_member, work_ptr, context_lens_ptr, NUM_SEQS: tl.constexpr, CAPACITY: tl.constexpr,
    MEMBERS: tl.constexpr, FIRST_PACK: tl.constexpr, MAX_PACKS: tl.constexpr,
    MAX_PACK_PIECES: tl.constexpr,
):  # fmt: skip
    """Return a pack's members by place, their lengths, whether they exist, what they share."""
    ROWS: tl.constexpr = FIRST_PACK + 1 + MAX_PACK_PIECES
    exists = offs_member < MEMBERS
    members_ptr = work_ptr + (ROWS + MAX_PACKS) * 4 + pack * MEMBERS
    seqs = tl.load(members_ptr + offs_member, mask=exists, other=-1)
    exists = (seqs >= 0) & (seqs < NUM_SEQS)
    lengths = tl.load(context_lens_ptr + seqs, mask=exists, other=CAPACITY)
    lengths = tl.minimum(tl.maximum(lengths, 0), CAPACITY)
    shared = tl.maximum(tl.load(work_ptr + (ROWS + pack) * 4), 0)
    return seqs.to(tl.int64), lengths, exists, tl.minimum(shared, tl.min(lengths, 0))


@triton.jit
@typing.no_type_check
def pack_parts_of(
    place, work_ptr, FIRST_SPLIT: tl.constexpr, NUM_SEQS: tl.constexpr, NUM_PARTS: tl.constexpr,
    MEMBERS: tl.constexpr, MAX_PACKS: tl.constexpr, MAX_PACK_PIECES: tl.constexpr,
):  # fmt: skip
    """Return the first part that a pack left the member in this place, and how many there are."""
    ROWS: tl.constexpr = FIRST_SPLIT + NUM_SEQS + 1 + MAX_PACK_PIECES
    pack = tl.where((place >= 0) & (place < MAX_PACKS * MEMBERS), place // MEMBERS, -1)
    row_ptr = work_ptr + (ROWS + tl.maximum(pack, 0)) * 4
    piece = tl.load(row_ptr + 1).to(tl.int64)
    pieces = tl.load(row_ptr + 2)
    is_pack = (pack >= 0) & (piece >= 0) & (piece + pieces <= MAX_PACK_PIECES)
    part = NUM_PARTS - MAX_PACK_PIECES * MEMBERS + piece * MEMBERS + place % MEMBERS
    return part, tl.where(is_pack, pieces, 0)
