"""Packs: sequences whose tables begin with the same pages, which one program reads for all of them.

A plan with packs is three lists, one after the other, each row four of int32: the pieces of
sequences and of packs, both as `PlanProblem` says, and the members of each pack, -1 where it has
fewer.

What a pack's members share ends where the plan says, or with the shortest of them now, or before
the first page that their tables name otherwise: a plan serves every layer, and may be for other
lengths and tables. A piece of a pack compares the tables where it reads. It notes where it stopped
early, as the bits of a float behind the parts' LSEs, `BLOCK_STOPS` to a pack: there the own pieces
of its members begin, and no later piece of the pack is combined.
"""

import typing

import triton
import triton.language as tl

TO_THE_END = tl.constexpr(2**31 - 1)  # where a piece stopped that did not stop early


@triton.jit
@typing.no_type_check
def members_of(
    pack, offs_member, work_ptr, NUM_SEQS: tl.constexpr, MEMBERS: tl.constexpr,
    FIRST_PACK: tl.constexpr, MAX_PACKS: tl.constexpr, MAX_PACK_PIECES: tl.constexpr,
):  # fmt: skip
    """Return a pack's members by place, and whether they exist."""
    ROWS: tl.constexpr = FIRST_PACK + 1 + MAX_PACK_PIECES
    members_ptr = work_ptr + (ROWS + MAX_PACKS) * 4 + pack * MEMBERS
    seqs = tl.load(members_ptr + offs_member, mask=offs_member < MEMBERS, other=-1)
    return seqs.to(tl.int64), (seqs >= 0) & (seqs < NUM_SEQS)


@triton.jit
@typing.no_type_check
def piece_of_pack(
    pack, begin, end, part, offs_member, work_ptr, context_lens_ptr, NUM_SEQS: tl.constexpr,
    CAPACITY: tl.constexpr, MEMBERS: tl.constexpr, FIRST_PACK: tl.constexpr,
    MAX_PACKS: tl.constexpr, MAX_PACK_PIECES: tl.constexpr,
):  # fmt: skip
    """Return its pack, begin, planned end and part, and whose table it reads.

    Of members by place: who they are, how long, if they exist.
    """
    # Whatever the plan says, nothing outside is touched.
    is_pack = (pack >= 0) & (pack < MAX_PACKS) & (begin >= 0) & (begin <= CAPACITY)
    is_pack = is_pack & (part >= 0) & (part < MAX_PACK_PIECES)
    pack, begin = tl.where(is_pack, pack, 0), tl.where(is_pack, begin, 0)
    part = tl.where(is_pack, part, 0)
    ROWS: tl.constexpr = FIRST_PACK + 1 + MAX_PACK_PIECES
    leader = tl.load(work_ptr + (ROWS + MAX_PACKS) * 4 + pack * MEMBERS).to(tl.int64)
    is_led = (leader >= 0) & (leader < NUM_SEQS)
    end = tl.where(is_pack & is_led, tl.minimum(tl.maximum(end, 0), CAPACITY), 0)
    seqs, exists = members_of(
        pack, offs_member, work_ptr, NUM_SEQS, MEMBERS, FIRST_PACK, MAX_PACKS, MAX_PACK_PIECES
    )
    exists = exists & (offs_member < tl.where(is_pack, MEMBERS, 0))
    lengths = tl.load(context_lens_ptr + seqs, mask=exists, other=CAPACITY)
    lengths = tl.minimum(tl.maximum(lengths, 0), CAPACITY)
    return pack, begin, end, part, tl.where(is_led, leader, 0), seqs, lengths, exists


@triton.jit
@typing.no_type_check
def agreed_until(
    pack, begin, end, leader, work_ptr, block_tables_ptr, NUM_SEQS: tl.constexpr,
    PAGE_SIZE: tl.constexpr, MAX_BLOCKS: tl.constexpr, MEMBERS: tl.constexpr,
    FIRST_PACK: tl.constexpr, MAX_PACKS: tl.constexpr, MAX_PACK_PIECES: tl.constexpr,
    BLOCK_MEMBERS: tl.constexpr, BLOCK_ENTRIES: tl.constexpr,
):  # fmt: skip
    """Return the end, or where the first page begins that members' tables name otherwise."""
    seqs, exists = members_of(
        pack, tl.arange(0, BLOCK_MEMBERS), work_ptr, NUM_SEQS, MEMBERS, FIRST_PACK, MAX_PACKS,
        MAX_PACK_PIECES,
    )  # fmt: skip
    table_ptrs = block_tables_ptr + tl.where(exists, seqs, 0) * MAX_BLOCKS
    last = tl.cdiv(end, PAGE_SIZE)
    agreed = last
    for start in range(begin // PAGE_SIZE, last, BLOCK_ENTRIES):
        entries = start + tl.arange(0, BLOCK_ENTRIES)
        is_entry = entries < last
        mask = exists[:, None] & is_entry[None, :]
        pages = tl.load(table_ptrs[:, None] + entries[None, :], mask=mask, other=0)
        leader_ptrs = block_tables_ptr + leader * MAX_BLOCKS + entries
        of_leader = tl.load(leader_ptrs, mask=is_entry, other=0)
        differs = mask & (pages != of_leader[None, :])
        first = tl.min(tl.where(differs, entries[None, :], last), 1)
        agreed = tl.minimum(agreed, tl.min(first, 0))
    return tl.minimum(end, agreed * PAGE_SIZE)


@triton.jit
@typing.no_type_check
def note_stop(
    is_mine, part, pack, end, planned, work_ptr, stops_ptr, FIRST_PACK: tl.constexpr,
    MAX_PACK_PIECES: tl.constexpr, BLOCK_STOPS: tl.constexpr,
):  # fmt: skip
    """Note where a piece ends, if `is_mine`; the first one also fills the places of none."""
    ROWS: tl.constexpr = FIRST_PACK + 1 + MAX_PACK_PIECES
    row_ptr = work_ptr + (ROWS + pack) * 4
    place = part - tl.load(row_ptr + 1)
    pieces = tl.load(row_ptr + 2)
    offs = tl.arange(0, BLOCK_STOPS)
    is_place = (offs == place) | ((place == 0) & (offs >= pieces))
    stop = tl.where((offs == place) & (end < planned), end, TO_THE_END)
    stop_ptrs = stops_ptr + pack * BLOCK_STOPS + offs
    tl.store(stop_ptrs, stop.to(tl.float32, bitcast=True), mask=is_mine & is_place)


@triton.jit
@typing.no_type_check
def _stops_of(
    pack, is_pack, work_ptr, stops_ptr, ROWS: tl.constexpr, MAX_PACK_PIECES: tl.constexpr,
    BLOCK_STOPS: tl.constexpr,
):  # fmt: skip
    """Return what a pack shares, its first part, how many there are, where each stopped.

    All places are loaded, before it is known of how many pieces: one wait instead of two.
    """
    row_ptr = work_ptr + (ROWS + pack) * 4
    shared = tl.load(row_ptr)
    part = tl.load(row_ptr + 1).to(tl.int64)
    pieces = tl.load(row_ptr + 2)
    offs = tl.arange(0, BLOCK_STOPS)
    stop_ptrs = stops_ptr + pack * BLOCK_STOPS + offs
    stops = tl.load(stop_ptrs, mask=is_pack, other=0.0).to(tl.int32, bitcast=True)
    pieces = tl.where((part >= 0) & (part + pieces <= MAX_PACK_PIECES), pieces, 0)
    return shared, part, pieces, tl.where(offs < pieces, stops, TO_THE_END)


@triton.jit
@typing.no_type_check
def shared_end(
    pack, work_ptr, stops_ptr, FIRST_PACK: tl.constexpr, MAX_PACK_PIECES: tl.constexpr,
    BLOCK_STOPS: tl.constexpr,
):  # fmt: skip
    """Return where what a pack's pieces have read ends, from where members go on by themselves."""
    ROWS: tl.constexpr = FIRST_PACK + 1 + MAX_PACK_PIECES
    shared, _, _, stops = _stops_of(
        pack, True, work_ptr, stops_ptr, ROWS, MAX_PACK_PIECES, BLOCK_STOPS
    )
    return tl.minimum(shared, tl.min(stops, 0))


@triton.jit
@typing.no_type_check
def pack_parts_of(
    place, work_ptr, stops_ptr, FIRST_SPLIT: tl.constexpr, NUM_SEQS: tl.constexpr,
    NUM_PARTS: tl.constexpr, MEMBERS: tl.constexpr, MAX_PACKS: tl.constexpr,
    MAX_PACK_PIECES: tl.constexpr, BLOCK_STOPS: tl.constexpr,
):  # fmt: skip
    """Return the first part that a pack left the member in this place, and how many count."""
    ROWS: tl.constexpr = FIRST_SPLIT + NUM_SEQS + 1 + MAX_PACK_PIECES
    is_member = (place >= 0) & (place < MAX_PACKS * MEMBERS)
    pack = tl.where(is_member, place // MEMBERS, 0)
    _, part, pieces, stops = _stops_of(
        pack, is_member, work_ptr, stops_ptr, ROWS, MAX_PACK_PIECES, BLOCK_STOPS
    )
    # None after the first that stopped early.
    offs = tl.arange(0, BLOCK_STOPS)
    until = tl.min(tl.where(stops < TO_THE_END, offs, BLOCK_STOPS), 0) + 1
    part = NUM_PARTS - MAX_PACK_PIECES * MEMBERS + part * MEMBERS + place % MEMBERS
    return part, tl.where(is_member, tl.minimum(pieces, until), 0)
