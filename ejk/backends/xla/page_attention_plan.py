"""`ejk.plan_page_attention` as an XLA program: the same plan, for platforms without Triton."""

import dataclasses

import jax
import jax.numpy as jnp

from ejk._indices import count_up_to
from ejk.backends.page_attention_plan import PlanBackend, PlanFacts, PlanOperands, PlanProblem
from ejk.backends.xla._backend import XlaBackend

VAST = 2**26


@dataclasses.dataclass(frozen=True)
class XlaPlan(XlaBackend, PlanBackend):
    """Deal out the pieces with sorts and prefix sums."""

    features = frozenset({"sliding_window"})

    def plan_problem(self, facts: PlanFacts, value_head_dim: int) -> PlanProblem:
        """Plan an order, longest first: nobody is known who takes contexts in pieces."""
        has_window = facts.sliding_window is not None
        return PlanProblem(facts.num_seqs, facts.capacity, has_window, max_cuts=0, granule=1)

    def run(
        self, problem: PlanProblem, operands: PlanOperands, platform: str
    ) -> tuple[jax.Array, ...]:
        length = jnp.clip(operands.context_lens, 0, problem.capacity)
        first = jnp.zeros_like(length)
        if operands.sliding_window is not None:
            first = jnp.maximum(length - jnp.maximum(operands.sliding_window, 0), 0)
        granules = _ceil_div(length - first, problem.granule)
        # In two digits: the sum of all lengths may exceed 32 bits.
        cuts = max(problem.max_cuts, 1)
        low, high = _sum(granules % cuts), _sum(granules // cuts)
        high, low = high + low // cuts, low % cuts
        # Near 32 bits or past them: more than any one context has, which is all that counts.
        is_vast = jnp.sum(granules.astype(jnp.float32)) / cuts > VAST
        high = jnp.where(is_vast, VAST, high)
        chunk = high + _ceil_div(low, cuts)
        # longest * denominator <= numerator * total / max_cuts, in whole numbers of 32 bits
        numerator, denominator = problem.even_share
        share = numerator * high + numerator * low // cuts
        is_even = (granules.max() * denominator <= share) | (problem.max_cuts == 0)
        chunk = jnp.maximum(jnp.where(is_even, granules.max(), chunk), 1)
        pieces = jnp.where(granules > 2 * chunk, _ceil_div(granules, chunk), 1)
        size = _ceil_div(granules, pieces)
        pieces = jnp.maximum(_ceil_div(granules, jnp.maximum(size, 1)), 1)

        seqs = jnp.argsort(-size, stable=True).astype(jnp.int32)
        pieces, size, first = (x[seqs] for x in (pieces, size, first))
        place = jnp.cumsum(pieces, dtype=jnp.int32) - pieces

        slot = jnp.arange(problem.max_pieces, dtype=jnp.int32)
        owner = count_up_to(place, slot) - 1
        piece = slot - place[owner]
        begin = first[owner] + piece * size[owner] * problem.granule
        is_last = piece + 1 == pieces[owner]
        end = jnp.where(is_last, problem.capacity, begin + size[owner] * problem.granule)
        if problem.has_window:
            begin = jnp.where(piece == 0, -1 - begin, begin)
        which = jnp.where(pieces[owner] > 1, slot, -1)
        rows = jnp.stack([seqs[owner], begin, end, which], axis=1)
        split = jnp.flatnonzero(pieces > 1, size=problem.max_splits, fill_value=0)
        unused = jnp.zeros_like(seqs[split])
        splits = jnp.stack([seqs[split], place[split], pieces[split], unused], axis=1)
        counts = jnp.stack([_sum(pieces), _sum(pieces > 1), jnp.int32(0), jnp.int32(0)])
        return (jnp.concatenate([counts[None], rows, splits]),)


def _sum(x: jax.Array) -> jax.Array:
    return jnp.sum(x, dtype=jnp.int32)


def _ceil_div(a: jax.Array, b: jax.Array | int) -> jax.Array:
    return -(-a // b)
