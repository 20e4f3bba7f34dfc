"""What packs a batch may have: sequences whose shared first tokens a program reads once."""

import dataclasses

import jax.numpy as jnp

from ejk._indices import is_static
from ejk.backends.gpu import Target
from ejk.backends.page_attention import PageAttentionProblem
from ejk.backends.page_attention_packs import may_pay
from ejk.backends.page_attention_plan import PlanProblem
from ejk.backends.triton._sizes import (
    GRANULE,
    QUANTISED_ROWS,
    next_power_of_2,
    product_dtype,
    value_bytes,
)

# The most query heads of a pack's members. 64 are one product of a warpgroup. With values wider
# than 128, or float32, more than 16 run out of registers. 128 on eight warps, with blocks of 64
# tokens, gain nothing over 64: on an H200, 64 sequences on 16,384 tokens took 110 us, and 114 with
# 64; 128 in 8 groups on 4,096 took 130 and 111.
PACK_ROWS, FEW_ROWS = 64, 16
# What a block costs by rows, in eighths of what it costs one sequence. On an H200, 32,768 tokens
# took 37.4 us for 2 sequences in 16 rows and 46.5 for 16 in 64 rows; 131,072 tokens in 64 rows took
# 76.6 for 64.
ROW_COSTS = {16: 9, 32: 10, 64: 12}
# And in 16 rows by those of one sequence, where these are few: see `least_rows`. 400 MB took an
# H200 630 us in 16 rows, 203, 214, 296 and 341 in 1, 2, 4 and 8 (`python benchmarks/tune.py`).
FEW_ROWS_COSTS = {1: 25, 2: 24, 4: 17, 8: 15}
# With as many bytes of shared memory, PACK_ROWS queries and their weights fit beside the blocks.
LARGE_MEMORY = 200 * 1024
# Entries of the members' tables that are compared at a time: 16 to 32 registers of a thread.
COMPARED = 4096
# A batch whose contexts stay whole is combined for the sake of packs if its longest contexts cost
# this much: about 100 us on an H100, of which a combination that finds nothing to do is 2 %.
WORTH_COMBINING = 300


@dataclasses.dataclass(frozen=True)
class Sharing:
    """The static facts of a batch's packs."""

    max_packs: int
    members: int
    page_size: int
    row_cost: int  # of a block, in eighths of that of a sequence
    resident: int  # programs of packs that the machine runs at a time
    least_saved: int | None  # granules; None: as the model of costs says

    @classmethod
    def of(
        cls,
        problem: PageAttentionProblem,
        *,
        own_rows: int,
        resident: int,
        target: Target,
        least_saved_bytes: int | None,
    ) -> "Sharing | None":
        """Return those of a call; None if there can be no packs.

        There are none where members may see different tokens of what they share, of latent caches,
        and where the heads of one sequence fill a product.
        """
        num_seqs, num_groups = problem.num_seqs, problem.num_prefix_groups
        if problem.has_window or problem.latent or not is_static(num_groups):
            return None
        is_float32 = product_dtype(problem) == jnp.float32
        rows = FEW_ROWS if problem.value_head_dim > 128 or is_float32 else PACK_ROWS
        if problem.cache_type.is_quantised or target.shared_memory < LARGE_MEMORY:
            rows = min(rows, QUANTISED_ROWS)
        members = min(rows // problem.group, num_seqs)
        if members < 2 or num_groups < 1:
            return None
        rows = pack_rows(members, problem.group)
        saved = least_saved_bytes
        if saved is not None:
            entries = problem.num_kv_heads * (problem.head_dim + problem.value_head_dim)
            saved = int(saved / (GRANULE * entries * value_bytes(problem)))
        # Groups have two sequences or more, and so have the packs of each.
        groups = min(num_groups, num_seqs // 2)
        max_packs = min(num_seqs // 2, (num_seqs - 2 * groups) // members + groups)
        cost = FEW_ROWS_COSTS.get(own_rows, ROW_COSTS[rows])
        return cls(max_packs, members, problem.page_size, cost, resident, saved)

    def pays_to_combine(self, cost: int) -> bool:
        """Whether a batch that costs so much may be combined only because it may have packs."""
        return self.least_saved is not None or cost >= WORTH_COMBINING

    def planned(self, problem: PlanProblem, longest: int) -> PlanProblem:
        """Return a plan with packs, which are dealt out as sequences are.

        Contexts show up to `longest` tokens.
        """
        most = -(-problem.capacity // problem.granule)
        packs = dataclasses.replace(
            problem,
            num_seqs=self.max_packs,
            resident=self.resident,
            is_packs=True,
            granule_cost=problem.granule_cost * self.row_cost // 8,
        )
        max_cuts = min(packs.shares - 1, self.max_packs * (most - 1))
        packs = dataclasses.replace(packs, max_cuts=max_cuts)
        packed = dataclasses.replace(
            problem,
            packs=packs,
            members=self.members,
            page_size=self.page_size,
            least_saved=self.least_saved,
        )
        pays = self.least_saved is not None or may_pay(packed, -(-longest // problem.granule))
        return packed if pays else problem


def pack_rows(members: int, group: int) -> int:
    """Return the rows of a product of a pack; 0 for no packs."""
    return max(16, next_power_of_2(members * group)) if members else 0


def pack_constants(plan: PlanProblem | None) -> dict[str, int]:
    """Return what the kernels know of a plan's packs; 0 each if it has none."""
    packs = plan.packs if plan else None
    return {
        "MEMBERS": plan.members if plan and packs else 0,
        "MAX_PACKS": packs.num_seqs if packs else 0,
        "MAX_PACK_PIECES": packs.max_pieces if packs else 0,
        "BLOCK_STOPS": next_power_of_2(packs.max_cuts + 1) if packs else 0,
    }


def member_constants(plan: PlanProblem | None) -> dict[str, int]:
    """Return how the attention kernel takes members and their tables; 0 each without packs."""
    members = next_power_of_2(plan.members) if plan and plan.packs else 0
    return {
        "MAX_PIECES": plan.max_pieces if plan and plan.packs else 0,
        "BLOCK_MEMBERS": members,
        "BLOCK_ENTRIES": COMPARED // members if members else 0,
    }
