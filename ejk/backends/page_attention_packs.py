"""Which sequences of a batch make up packs, whose shared first tokens are read once: for plans.

A pack is up to `members` sequences of one group of `prefix_groups`. A cost is a time on a machine
whose multiprocessors are all busy, in units of 0.35 us on an H100: of an eighth of what 128 tokens
of head dimension 128 in 16 bits take. That of a sequence is `cost` a granule and `PIECE_COST` to
start. With `c` the granules that a pack of `k` members shares, it saves `k` readings of them, and
makes one that costs more, as its products have the rows of all members; and each member has parts
to write and to combine. A pack pays if

    k * c * cost > c * pack_cost + PIECE_COST * (k + 1)

where `PIECE_COST` also stands for what it takes to write and combine a member's parts. Packs are
made if the batch, dealt out to all programs that run at a time, then ends earlier by more than
`MARGIN`, which is what their launch takes.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ejk.backends.page_attention_plan import PlanOperands, PlanProblem
from ejk.backends.prefix_groups import SharedPrefixes

PIECE_COST = 3
# What the packs' launch takes beyond its blocks, and the combination of their parts. On an H200 it
# was 60 to 85 of 0.25 us: 4 sequences on 8,192 tokens took 26.0 us for 32.4 and 16 on 2,048 28.0
# for 33.0, but 4 on 2,048 19.0 for 15.0 and 16 on 512 25.6 for 14.9.
MARGIN = 70


class Packs(NamedTuple):
    """The packs of a batch. What no pack has is 0 long and without members."""

    lengths: jax.Array  # int32 [max_packs]: tokens that the members share
    members: jax.Array  # int32 [max_packs * members]: sequences, -1 for none
    places: jax.Array  # int32 [num_seqs]: of each sequence in `members`, -1 for none
    floors: jax.Array  # int32 [num_seqs]: the tokens that its pack reads for it

    @classmethod
    def of(cls, problem: PlanProblem, operands: PlanOperands) -> "Packs":
        """Make the packs that pay."""
        assert problem.packs is not None
        max_packs, most = problem.packs.num_seqs, problem.members
        lens = jnp.clip(operands.context_lens, 0, problem.capacity)
        prefixes = SharedPrefixes.of(
            operands.prefix_groups,
            operands.prefix_pages,
            operands.block_tables,
            lens,
            problem.page_size,
        )
        order = prefixes.order
        tokens, leader, index = prefixes.tokens[order], prefixes.leader[order], _count(order)
        is_first = jnp.pad(leader[1:] != leader[:-1], (1, 0), constant_values=True)
        place = index - jax.lax.cummax(jnp.where(is_first, index, 0))  # in its group
        begins = (tokens > 0) & (place % most == 0)
        chunk = jnp.cumsum(begins, dtype=jnp.int32) - 1
        size = jnp.zeros_like(chunk).at[chunk].add((tokens > 0).astype(jnp.int32))[chunk]
        kept = (tokens > 0) & (size > 1) & _pays(problem, lens[order], tokens, size, begins)

        pack = jnp.cumsum(begins & kept, dtype=jnp.int32) - 1
        where = jnp.where(kept, pack * most + place % most, max_packs * most)
        tokens = jnp.where(kept, tokens, 0)
        return cls(
            jnp.zeros(max_packs, jnp.int32).at[where // most].set(tokens, mode="drop"),
            jnp.full(max_packs * most, -1, jnp.int32).at[where].set(order, mode="drop"),
            jnp.zeros_like(order).at[order].set(jnp.where(kept, where, -1)),
            jnp.zeros_like(order).at[order].set(tokens),
        )

    def listed(self, of_sequences: Any, of_packs: Any) -> jax.Array:
        """Return the whole plan, of the two lists and the members."""
        rest = -self.members.shape[0] % 4
        members = jnp.pad(self.members, (0, rest), constant_values=-1).reshape(-1, 4)
        return jnp.concatenate([of_sequences, of_packs, members])


def may_pay(problem: PlanProblem, longest: int) -> bool:
    """Say whether packs could pay in a batch whose contexts have up to so many granules."""
    packs, num_seqs = problem.packs, problem.num_seqs
    assert packs is not None
    plain = num_seqs * (longest * problem.granule_cost + PIECE_COST)
    num_packs = -(-num_seqs // problem.members)
    packed = num_packs * (longest * packs.granule_cost + PIECE_COST) + 2 * num_seqs * PIECE_COST
    plain, packed = (
        -(-total * problem.programs_per_piece // packs.resident) for total in (plain, packed)
    )
    return _is_worth(plain, packed)


def _is_worth(plain: Any, packed: Any) -> Any:
    return packed + packed // 16 + MARGIN <= plain


def _pays(
    problem: PlanProblem, lens: jax.Array, tokens: jax.Array, size: jax.Array, begins: jax.Array
) -> jax.Array:
    """Say of which sequences the packs pay. All are in order of their packs."""
    shared = _ceil_div(tokens, problem.granule)
    if problem.least_saved is not None:
        return (size - 1) * shared >= problem.least_saved
    assert problem.packs is not None
    own_cost, cost = shared * problem.granule_cost, shared * problem.packs.granule_cost
    pays = size * own_cost - cost > PIECE_COST * (size + 1)
    pays = pays & (tokens > 0) & (size > 1)
    own = jnp.where(pays, lens - tokens, lens)
    packed = _cost(problem, own) + jnp.sum(
        jnp.where(pays & begins, cost + PIECE_COST * (size + 1), 0), dtype=jnp.int32
    )
    plain, packed = (
        _ceil_div(total * problem.programs_per_piece, problem.packs.resident)
        for total in (_cost(problem, lens), packed)
    )
    return pays & _is_worth(plain, packed)


def _cost(problem: PlanProblem, tokens: jax.Array) -> jax.Array:
    granules = _ceil_div(tokens, problem.granule)
    return jnp.sum(granules * problem.granule_cost + PIECE_COST, dtype=jnp.int32)


def _count(x: jax.Array) -> jax.Array:
    return jnp.arange(x.shape[0], dtype=jnp.int32)


def _ceil_div(a: jax.Array, b: int) -> jax.Array:
    return -(-a // b)
