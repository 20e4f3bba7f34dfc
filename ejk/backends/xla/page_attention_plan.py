"""`ejk.plan_page_attention` as an XLA program: the plan of Triton's kernel where that does not run.

`ejk/backends/triton/page_attention/plan_kernel.py` says what is computed here. Contexts are cut for
Triton's attention on ROCm, which can be asked for by name; the kernel that plans cannot. Elsewhere
nobody reads this plan: it is as the one for CUDA, as one program may be lowered for both.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from ejk._indices import Size, count_up_to
from ejk.backends.page_attention_packs import Packs
from ejk.backends.page_attention_plan import PlanBackend, PlanFacts, PlanOperands, PlanProblem
from ejk.backends.xla._backend import XlaBackend


@dataclasses.dataclass(frozen=True)
class XlaPlan(XlaBackend, PlanBackend):
    """Deal out the pieces with sorts and prefix sums."""

    features = frozenset({"sliding_window"})

    def plan_problem(
        self,
        facts: PlanFacts,
        value_head_dim: int,
        cache_dtype: np.dtype,
        num_prefix_groups: Size = 0,
    ) -> PlanProblem:
        """Plan an order: nobody is known who takes contexts in pieces."""
        return PlanProblem.order_of(facts)

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
    head, cuts, share = _in_pieces(problem, granules)
    pieces = cuts + 1
    number = jnp.cumsum(pieces, dtype=jnp.int32) - pieces
    is_split = (pieces > 1) | problem.is_packs
    if packs is not None:
        is_split = is_split | (packs.places >= 0)

    # All pieces, by sequence and position.
    slot = jnp.arange(problem.max_pieces, dtype=jnp.int32)
    owner = count_up_to(number, slot) - 1
    piece = slot - number[owner]
    is_last = piece == cuts[owner]
    end = head[owner] + piece * share
    start = jnp.where(piece == 0, 0, end - share)
    size = jnp.where(is_last, granules[owner], end) - start
    last_end = length[owner] if problem.is_packs else problem.capacity
    begin = first[owner] + start * problem.granule
    end = jnp.where(is_last, last_end, first[owner] + end * problem.granule)
    if problem.has_window:
        begin = jnp.where(piece == 0, -1 - begin, begin)
    if packs is not None:
        in_pack = packs.places[owner]
        is_member = (piece == 0) & (in_pack >= 0)
        begin = jnp.where(is_member, -1 - in_pack // problem.members, begin)
    which = jnp.where(is_split[owner], slot, -1)
    rows = jnp.stack([owner, begin, end, which], axis=1)
    num_pieces = _sum(pieces)
    order = jnp.argsort(jnp.where(slot < num_pieces, -size, 1), stable=True)

    named = split = jnp.arange(problem.num_seqs, dtype=jnp.int32)
    if packs is not None or problem.is_packs:  # a row each
        named = length if packs is None else packs.places
        pieces = jnp.where(is_split, pieces, 0)
    else:
        split = jnp.flatnonzero(is_split, size=problem.max_splits, fill_value=0)
    unused = jnp.zeros_like(named[split])
    splits = jnp.stack([named[split], number[split], pieces[split], unused], axis=1)
    counts = jnp.stack([num_pieces, _sum(is_split), jnp.int32(0), jnp.int32(0)])
    return jnp.concatenate([counts[None], rows[order], splits])


def _in_pieces(
    problem: PlanProblem, granules: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array | int]:
    """Return the granules before each sequence's first cut, how often it is cut, and a share."""
    if not problem.max_cuts:
        return granules, jnp.zeros_like(granules), 1
    until = jnp.cumsum(granules, dtype=jnp.int32)
    share = jnp.maximum(_ceil_div(until[-1], problem.shares), 1)
    first = jnp.minimum(granules, share - (until - granules) % share)
    return first, _ceil_div(granules - first, share), share


def _sum(x: jax.Array) -> jax.Array:
    return jnp.sum(x, dtype=jnp.int32)


def _ceil_div(a: jax.Array, b: jax.Array | int) -> jax.Array:
    return -(-a // b)
