"""Deals out a batch so that the last multiprocessor ends soon after the average one.

A cost is a time on a machine whose slots are all busy, in eighths of what 128 tokens of head
dimension 128 in 16 bits take (0.35 us on an H100). With `c_s` the granules that sequence `s` sees,
and the longest first:

    cost_s = GRANULE_COST * c_s + PIECE_COST
    ideal = PROGRAMS * sum(cost) / SLOTS;  cap = ideal + ideal / 20 + max(SLACK, GRANULE_COST)

1. No piece may outlast the cap, which takes `pieces_s = ceil(c_s / most)` of `most` granules or
   less. They start in waves of `SLOTS` programs, each as long as its longest piece.
2. The last wave, or a batch of one wave, is cut anew if it can end by the cap so: in pieces of the
   size of which it ends first, in one wave or two, or whole, which leaves nothing to combine. If
   memory bounds the programs, a wave that is part empty is as fast as a full one: a multiprocessor
   that has memory to itself reads 2.3 times its share.
3. Else no waves fit. Sequence `s` starts when the work before it is done,

       start_s = min(PROGRAMS * sum(cost before s) / SLOTS, waves before s * a wave)

   and stays whole if it ends by the cap; if not, it is cut in equal pieces that would. So what
   starts late is cut finely, down to `LEAST`. Programs that memory does not bound end together only
   if their costs are equal. So waves say nothing but that the first starts at once:

       start_s = 0 in the first wave, else PROGRAMS * sum(cost before s) / SLOTS

   Nor are many small pieces free for them: those of one wave, all of which start at once, may end
   `LATE` granules after the cap. On an H100, 20 latent contexts of 32,000 tokens, 32 heads, took
   331 us in 6 pieces each, and 341 with 18 in 7 and the last two in 42 and 63.

Then the pieces start with the longest. Each division is that of whole numbers, rounded as the code
shows, since every backend of the plan must agree.

Source: Graham (1969), longest processing time first; pieces that shrink with the work that is left
after guided self-scheduling (Polychronopoulos and Kuck, 1987).
"""

import typing

import triton
import triton.language as tl

from ejk.backends import page_attention_plan

PIECE_COST = tl.constexpr(page_attention_plan.PIECE_COST)
COMBINE_COST = tl.constexpr(page_attention_plan.COMBINE_COST)
SLACK = tl.constexpr(page_attention_plan.SLACK)
LATE = tl.constexpr(page_attention_plan.LATE)
LEAST = tl.constexpr(page_attention_plan.LEAST)
SIZES = tl.constexpr(page_attention_plan.SIZES)
SMALL = tl.constexpr(page_attention_plan.SMALL)
FAR = tl.constexpr(2**31 - 1)


@triton.jit
@typing.no_type_check
def is_ahead(size, seqs, other_size, others):
    """Say who starts before whom, `[seqs, others]`: the larger, of equals the first."""
    is_same = other_size[None, :] == size[:, None]
    return (other_size[None, :] > size[:, None]) | (is_same & (others[None, :] < seqs[:, None]))


@triton.jit
@typing.no_type_check
def in_pieces(
    granules, seqs, NUM_SEQS: tl.constexpr, MAX_CUTS: tl.constexpr, SLOTS: tl.constexpr,
    PROGRAMS: tl.constexpr, GRANULE_COST: tl.constexpr, MEMORY_BOUND: tl.constexpr,
    SORTED: tl.constexpr,
):  # fmt: skip
    """Return in how many pieces each sequence is cut, and the granules of all but its last."""
    exists = seqs < NUM_SEQS
    pieces = tl.where(exists, 1, 0)
    if MAX_CUTS > 0:
        cost = tl.where(exists, granules * GRANULE_COST + PIECE_COST, 0)
        cap = capped(tl.sum(cost, 0), SLOTS, PROGRAMS, GRANULE_COST)
        most = most_granules(cap, GRANULE_COST)
        pieces = tl.where(exists, parts(granules, most), 0)
        longest = tl.max(tl.cdiv(granules, tl.maximum(pieces, 1)), 0)
        work, begun = cost, pieces
        if SORTED:
            work = tl.cumsum(cost, 0) - cost
            begun = tl.cumsum(pieces, 0)
        else:
            ahead = is_ahead(granules, seqs, granules, seqs)
            work = tl.sum(tl.where(ahead, cost[None, :], 0), 1)
            begun = pieces + tl.sum(tl.where(ahead, pieces[None, :], 0), 1)
        wave = longest * GRANULE_COST + PIECE_COST
        programs = PROGRAMS * tl.sum(pieces, 0)
        full_waves = 0 if NUM_SEQS * PROGRAMS <= SLOTS else (programs - 1) // SLOTS
        is_last = exists & (PROGRAMS * begun > full_waves * SLOTS)

        # The last wave: of which size do its pieces end first?
        last, in_last = tl.where(is_last, granules, 0), is_last
        if SORTED:
            # It is the end of the batch, and what fits in a wave.
            MOST: tl.constexpr = min(NUM_SEQS, SLOTS // PROGRAMS + 2)
            offs = NUM_SEQS - tl.sum(tl.where(is_last, 1, 0), 0)
            offs += tl.arange(0, triton.next_power_of_2(MOST))
            in_last = offs < NUM_SEQS
            last = tl.gather(granules, tl.minimum(offs, NUM_SEQS - 1), 0)
            last = tl.where(in_last, last, 0)
        share = tl.sum(tl.where(in_last, last * GRANULE_COST + PIECE_COST, 0), 0)
        share = tl.cdiv(PROGRAMS * share, SLOTS)
        early = tl.sum(tl.where(in_last, parts(last, most), 0), 0) * PROGRAMS
        early -= programs - full_waves * SLOTS  # they start a wave before
        tried = tl.arange(0, SIZES)
        most = most_granules(share * 6 // (3 + tried), GRANULE_COST)
        most = tl.where(tried == 0, longest, most)
        most = tl.where(tried == SIZES - 1, tl.max(last, 0), most)
        most = tl.maximum(most, 1)
        each = tl.where(in_last[:, None], parts(last[:, None], most[None, :]), 0)
        largest = tl.max(tl.cdiv(last[:, None], tl.maximum(each, 1)), 0)
        # Small pieces fill what gaps there are.
        counted = tl.sum(tl.where(last[:, None] * SMALL > most[None, :], each, 0), 0)
        running = tl.maximum(PROGRAMS * counted - early, 0)
        rest = running % SLOTS
        is_whole = tried == SIZES - 1
        late = tl.where(running > SLOTS, 0, LATE * GRANULE_COST)
        enough = SLOTS
        if MEMORY_BOUND:
            late = 0
            enough = tl.where(is_whole, SLOTS * 5 // 8, SLOTS * 4 // 5)
        busy = running - rest + tl.where(rest > 0, tl.maximum(rest, enough), 0)
        ends = tl.maximum((largest * GRANULE_COST + PIECE_COST) * busy, share * SLOTS)
        in_time = ends <= (cap + late - full_waves * wave) * SLOTS
        ends = tl.where(in_time, ends - tl.where(is_whole, COMBINE_COST * SLOTS, 0), FAR)
        first = tl.min(ends, 0)
        most = tl.max(tl.where(ends == first, most, 0), 0)
        in_waves = tl.where(is_last, parts(granules, most), pieces)

        # No waves: by the time that is left.
        start = tl.cdiv(work * PROGRAMS, SLOTS)
        waves = (PROGRAMS * begun - 1) // SLOTS
        by_wave = tl.minimum(start, waves * wave)
        start = by_wave if MEMORY_BOUND else tl.where(waves > 0, start, 0)
        least = tl.maximum(tl.minimum(cap, LEAST) // GRANULE_COST, 1)
        most = tl.maximum(most_granules(cap - start, GRANULE_COST), least)
        in_time = tl.where(start + cost <= cap, 1, parts(granules, most))
        pieces = tl.where(exists, tl.where(first < FAR, in_waves, in_time), 0)
        cuts = tl.sum(tl.where(exists, pieces - 1, 0), 0)
        fewer = 1 + (pieces - 1) * MAX_CUTS // tl.maximum(cuts, 1)
        pieces = tl.where(exists & (cuts > MAX_CUTS), fewer, pieces)
    size = tl.cdiv(granules, tl.maximum(pieces, 1))
    return tl.where(exists, parts(granules, tl.maximum(size, 1)), 0), size


@triton.jit
@typing.no_type_check
def capped(total, SLOTS: tl.constexpr, PROGRAMS: tl.constexpr, GRANULE_COST: tl.constexpr):
    """Return when all should be done, of work that costs `total`."""
    ideal = tl.cdiv(total * PROGRAMS, SLOTS)
    return ideal + ideal // 20 + max(SLACK, GRANULE_COST)


@triton.jit
@typing.no_type_check
def most_granules(cost, GRANULE_COST: tl.constexpr):
    """Return the most granules of a piece that costs no more; one at least."""
    return tl.maximum((cost - PIECE_COST) // GRANULE_COST, 1)


@triton.jit
@typing.no_type_check
def parts(granules, most):
    """Return the fewest pieces of at most so many granules; of nothing there is one, too."""
    return tl.maximum(tl.cdiv(granules, most), 1)
