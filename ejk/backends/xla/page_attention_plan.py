"""`ejk.plan_page_attention` as an XLA program: the same plan, for platforms without Triton.

`ejk/backends/triton/page_attention/dealing.py` says what is computed here.
"""

import dataclasses

import jax
import jax.numpy as jnp

from ejk._indices import Size, count_up_to
from ejk.backends.page_attention_packs import Packs
from ejk.backends.page_attention_plan import (
    COMBINE_COST,
    LATE,
    LEAST,
    MOST_SEQS,
    PIECE_COST,
    SIZES,
    SLACK,
    SMALL,
    PlanBackend,
    PlanFacts,
    PlanOperands,
    PlanProblem,
)
from ejk.backends.xla._backend import XlaBackend

FAR = 2**31 - 1


@dataclasses.dataclass(frozen=True)
class XlaPlan(XlaBackend, PlanBackend):
    """Deal out the pieces with sorts and prefix sums."""

    features = frozenset({"sliding_window"})

    def plan_problem(
        self,
        facts: PlanFacts,
        value_head_dim: int,
        is_quantised: bool,
        num_prefix_groups: Size = 0,
        is_float32: bool = False,
    ) -> PlanProblem:
        """Plan an order, longest first: nobody is known who takes contexts in pieces."""
        has_window = facts.sliding_window is not None
        return PlanProblem(facts.num_seqs, facts.capacity, has_window, max_cuts=0, granule=1)

    def run(
        self, problem: PlanProblem, operands: PlanOperands, platform: str
    ) -> tuple[jax.Array, ...]:
        if problem.packs is None:
            return (_listed(problem, operands, None),)
        packs = Packs.of(problem, operands)
        own = _listed(problem, operands, packs)
        shared = _listed(problem.packs, PlanOperands(packs.lengths, None), None)
        return (packs.listed(own, shared),)


def _listed(problem: PlanProblem, operands: PlanOperands, packs: Packs | None) -> jax.Array:
    """Return one list: of the pieces of sequences or of packs, and of who has several."""
    length = jnp.clip(operands.context_lens, 0, problem.capacity)
    first = jnp.zeros_like(length) if packs is None else packs.floors
    if operands.sliding_window is not None:
        first = jnp.maximum(length - jnp.maximum(operands.sliding_window, 0), 0)
    granules = _ceil_div(length - first, problem.granule)
    pieces, size = in_pieces(problem, granules)

    seqs = jnp.argsort(-size, stable=True).astype(jnp.int32)
    pieces, size, first, length = (x[seqs] for x in (pieces, size, first, length))
    place = jnp.cumsum(pieces, dtype=jnp.int32) - pieces
    is_split = (pieces > 1) | problem.is_packs
    if packs is not None:
        is_split = is_split | (packs.places[seqs] >= 0)

    slot = jnp.arange(problem.max_pieces, dtype=jnp.int32)
    owner = count_up_to(place, slot) - 1
    piece = slot - place[owner]
    begin = first[owner] + piece * size[owner] * problem.granule
    is_last = piece + 1 == pieces[owner]
    last_end = length[owner] if problem.is_packs else problem.capacity
    end = jnp.where(is_last, last_end, begin + size[owner] * problem.granule)
    if problem.has_window:
        begin = jnp.where(piece == 0, -1 - begin, begin)
    if packs is not None:
        in_pack = packs.places[seqs[owner]]
        is_member = (piece == 0) & (in_pack >= 0)
        begin = jnp.where(is_member, -1 - in_pack // problem.members, begin)
    which = jnp.where(is_split[owner], slot, -1)
    rows = jnp.stack([seqs[owner], begin, end, which], axis=1)
    named, several = seqs, pieces
    if packs is not None or problem.is_packs:  # a row each
        named = length if packs is None else packs.places[seqs]
        several = jnp.where(is_split, pieces, 0)
        split = jnp.argsort(seqs)
    else:
        split = jnp.flatnonzero(is_split, size=problem.max_splits, fill_value=0)
    unused = jnp.zeros_like(seqs[split])
    splits = jnp.stack([named[split], place[split], several[split], unused], axis=1)
    counts = jnp.stack([_sum(pieces), _sum(is_split), jnp.int32(0), jnp.int32(0)])
    return jnp.concatenate([counts[None], rows, splits])


def in_pieces(problem: PlanProblem, granules: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return in how many pieces each sequence is cut, and the granules of all but its last."""
    pieces = jnp.ones_like(granules)
    if problem.max_cuts:
        cost = granules * problem.granule_cost + PIECE_COST
        ideal = _ceil_div(_sum(cost) * problem.programs_per_piece, problem.slots)
        cap = ideal + ideal // 20 + max(SLACK, problem.granule_cost)
        if problem.num_seqs > MOST_SEQS:
            fewest = _ceil_div(_sum(cost), problem.max_cuts * problem.granule_cost)
            pieces = _parts(granules, jnp.maximum(_most_granules(problem, cap), fewest))
        else:
            pieces = _dealt_out(problem, granules, cost, cap)
            cuts = _sum(pieces - 1)
            fewer = 1 + (pieces - 1) * problem.max_cuts // jnp.maximum(cuts, 1)
            pieces = jnp.where(cuts > problem.max_cuts, fewer, pieces)
    size = _ceil_div(granules, pieces)
    return _parts(granules, jnp.maximum(size, 1)), size


def _dealt_out(
    problem: PlanProblem, granules: jax.Array, cost: jax.Array, cap: jax.Array
) -> jax.Array:
    slots, programs = problem.slots, problem.programs_per_piece
    pieces = _parts(granules, _most_granules(problem, cap))
    longest = _ceil_div(granules, pieces).max()
    order = jnp.argsort(-granules, stable=True)
    work = jnp.zeros_like(cost).at[order].set(jnp.cumsum(cost[order]) - cost[order])
    until = jnp.zeros_like(cost).at[order].set(programs * jnp.cumsum(pieces[order]))
    wave = longest * problem.granule_cost + PIECE_COST
    full_waves = jnp.int32(0)
    if problem.num_seqs * programs > slots:
        full_waves = (programs * _sum(pieces) - 1) // slots

    # The last wave: of which size do its pieces end first?
    is_last = until > full_waves * slots
    early = programs * _sum(jnp.where(is_last, pieces, 0)) - (
        programs * _sum(pieces) - full_waves * slots
    )
    share = _ceil_div(programs * _sum(jnp.where(is_last, cost, 0)), slots)
    tried = jnp.arange(SIZES, dtype=jnp.int32)
    most = _most_granules(problem, share * 6 // (3 + tried))
    most = jnp.where(tried == 0, longest, most)
    most = jnp.where(tried == SIZES - 1, jnp.where(is_last, granules, 0).max(), most)
    most = jnp.maximum(most, 1)
    last = jnp.where(is_last, granules, 0)[:, None]
    each = jnp.where(is_last[:, None], _parts(last, most[None, :]), 0)  # [num_seqs, SIZES]
    largest = _ceil_div(last, jnp.maximum(each, 1)).max(0)
    counted = jnp.where(last * SMALL > most[None, :], each, 0)
    running = jnp.maximum(programs * jnp.sum(counted, 0, dtype=jnp.int32) - early, 0)
    is_whole = tried == SIZES - 1
    enough, late = slots, jnp.where(running > slots, 0, LATE * problem.granule_cost)
    if problem.memory_bound:
        late = 0
        enough = jnp.where(is_whole, slots * 5 // 8, slots * 4 // 5)
    rest = running % slots
    busy = running - rest + jnp.where(rest > 0, jnp.maximum(rest, enough), 0)
    ends = (largest * problem.granule_cost + PIECE_COST) * busy
    ends = jnp.maximum(ends, share * slots)
    in_time = ends <= (cap + late - full_waves * wave) * slots
    ends = jnp.where(in_time, ends - jnp.where(is_whole, COMBINE_COST * slots, 0), FAR)
    first = ends.min()
    most = jnp.where(ends == first, most, 0).max()
    in_waves = jnp.where(is_last, _parts(granules, most), pieces)

    # No waves: by the time that is left.
    start, waves = _ceil_div(work * programs, slots), (until - 1) // slots
    if problem.memory_bound:
        start = jnp.minimum(start, waves * wave)
    else:
        start = jnp.where(waves > 0, start, 0)
    least = jnp.maximum(jnp.minimum(cap, LEAST) // problem.granule_cost, 1)
    most = jnp.maximum(_most_granules(problem, cap - start), least)
    by_time = jnp.where(start + cost <= cap, 1, _parts(granules, most))
    return jnp.where(first < FAR, in_waves, by_time)


def _most_granules(problem: PlanProblem, cost: jax.Array) -> jax.Array:
    return jnp.maximum((cost - PIECE_COST) // problem.granule_cost, 1)


def _parts(granules: jax.Array, most: jax.Array) -> jax.Array:
    return jnp.maximum(_ceil_div(granules, most), 1)


def _sum(x: jax.Array) -> jax.Array:
    return jnp.sum(x, dtype=jnp.int32)


def _ceil_div(a: jax.Array, b: jax.Array | int) -> jax.Array:
    return -(-a // b)
