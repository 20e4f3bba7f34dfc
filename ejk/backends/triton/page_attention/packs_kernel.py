"""Decides whether packs pay, and lists them: the third launch of `packing`.

Grid: sequences. Every program adds up the costs of all, by the formula of `page_attention_packs`,
and counts the packs that begin before its own, group by group. It also clears a pack that there is
not.
"""

import typing

import triton
import triton.language as tl

from ejk.backends.triton._planning import context_length


@triton.jit
@typing.no_type_check
def packs_kernel(
    # inputs
    context_lens_ptr,  # int32 [num_seqs]
    leader_ptr,  # int32 [num_seqs]: see `members_kernel.py`
    tokens_ptr,
    place_ptr,
    size_ptr,
    # outputs
    lengths_ptr,  # int32 [max_packs]: see `Packs`
    members_ptr,  # int32 [max_packs * MEMBERS]
    places_ptr,  # int32 [num_seqs]
    floors_ptr,  # int32 [num_seqs]
    # sizes
    NUM_SEQS: tl.constexpr,
    CAPACITY: tl.constexpr,
    MEMBERS: tl.constexpr,
    MAX_PACKS: tl.constexpr,
    RESIDENT: tl.constexpr,
    PROGRAMS: tl.constexpr,
    GRANULE_COST: tl.constexpr,
    PACK_COST: tl.constexpr,  # of a granule
    PIECE_COST: tl.constexpr,
    MARGIN: tl.constexpr,
    LEAST_SAVED: tl.constexpr,  # granules; -1: as the model of costs says
    # blocks
    GRANULE: tl.constexpr,
    BLOCK_SEQS: tl.constexpr,
    BLOCK_MEMBERS: tl.constexpr,
):
    # Which work is mine: a sequence, and a pack that there may be.
    seq = tl.program_id(0)

    # Load once: what all share, and in which packs.
    others = tl.arange(0, BLOCK_SEQS)
    is_seq = others < NUM_SEQS
    leaders = tl.load(leader_ptr + others, mask=is_seq, other=NUM_SEQS)
    tokens = tl.load(tokens_ptr + others, mask=is_seq, other=0)
    places = tl.load(place_ptr + others, mask=is_seq, other=0)
    sizes = tl.load(size_ptr + others, mask=is_seq, other=0)
    lengths = context_length(context_lens_ptr, others, NUM_SEQS, CAPACITY)

    # Which packs are kept?
    is_shared = (tokens > 0) & (sizes > 1)
    is_first = places % MEMBERS == 0
    granules = tl.cdiv(tokens, GRANULE)
    if LEAST_SAVED >= 0:
        is_kept = is_shared & ((sizes - 1) * granules >= LEAST_SAVED)
    else:
        saved, cost = sizes * granules * GRANULE_COST, granules * PACK_COST
        pays = is_shared & (saved - cost > PIECE_COST * (sizes + 1))
        own = tl.where(pays, lengths - tokens, lengths)
        of_packs = tl.where(pays & is_first, cost + PIECE_COST * (sizes + 1), 0)
        plain = tl.sum(tl.cdiv(lengths, GRANULE), 0) * GRANULE_COST + NUM_SEQS * PIECE_COST
        packed = tl.sum(tl.cdiv(own, GRANULE), 0) * GRANULE_COST + NUM_SEQS * PIECE_COST
        plain = tl.cdiv(plain * PROGRAMS, RESIDENT)
        packed = tl.cdiv((packed + tl.sum(of_packs, 0)) * PROGRAMS, RESIDENT)
        is_kept = pays & (packed + packed // 16 + MARGIN <= plain)

    # Which of them is mine: how many begin before it?
    leader = tl.load(leader_ptr + seq)
    place = tl.load(place_ptr + seq)
    size = tl.load(size_ptr + seq)
    shared = tl.load(tokens_ptr + seq)
    mine = tl.max(((others == seq) & is_kept).to(tl.int32), 0) > 0
    is_before = (leaders == leader) & (places < place // MEMBERS * MEMBERS)
    is_before = is_before | (leaders < leader)
    begins = is_kept & is_first
    pack = tl.sum((begins & is_before).to(tl.int32), 0)
    num_packs = tl.sum(begins.to(tl.int32), 0)
    mine = mine & (pack < MAX_PACKS)

    # Write: of me, of my pack if I am its first member, of a pack that there is not.
    where = pack * MEMBERS + place % MEMBERS
    tl.store(places_ptr + seq, tl.where(mine, where, -1))
    tl.store(floors_ptr + seq, tl.where(mine, shared, 0))
    tl.store(members_ptr + where, seq, mask=mine)
    leads = mine & (place % MEMBERS == 0)
    tl.store(lengths_ptr + pack, shared, mask=leads)
    member = tl.arange(0, BLOCK_MEMBERS)
    is_absent = leads & (member >= size) & (member < MEMBERS)
    tl.store(members_ptr + pack * MEMBERS + member, -1, mask=is_absent)
    is_absent = (seq >= num_packs) & (seq < MAX_PACKS)
    tl.store(lengths_ptr + seq, 0, mask=is_absent)
    tl.store(members_ptr + seq * MEMBERS + member, -1, mask=is_absent & (member < MEMBERS))
