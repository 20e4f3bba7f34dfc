"""What packs a batch may have: sequences whose shared first tokens a program reads once."""

import dataclasses
from typing import Any

from ejk._indices import Size, is_static
from ejk.backends.gpu import Target
from ejk.backends.page_attention_packs import PIECE_COST, may_pay
from ejk.backends.page_attention_plan import PlanProblem
from ejk.backends.triton._sizes import GRANULE, QUANTISED_ROWS, power_of_two

# Query heads of a pack's members. 64 are one product of a warpgroup. With more of them, of wider
# values, or of float32, registers run out.
PACK_ROWS, FEW_ROWS = 64, 16
# Bytes of shared memory where so many queries, and their weights, find room beside the blocks.
LARGE_MEMORY = 200 * 1024
# A batch whose contexts stay whole is combined for the sake of packs if at its longest it costs so
# much: about 100 us on an H100, of which a combination that finds nothing to do is 2 %.
WORTH_COMBINING = 300


@dataclasses.dataclass(frozen=True)
class Sharing:
    """The static facts of a batch's packs."""

    max_packs: int
    members: int
    page_size: int
    least_saved: int | None  # granules; None: as the model of costs says

    @classmethod
    def of(
        cls,
        facts: Any,
        *,
        num_groups: Size,
        value_head_dim: int,
        is_alike: bool,
        is_quantised: bool,
        is_float32: bool = False,
        target: Target | None,
        least_saved_bytes: int | None,
    ) -> "Sharing | None":
        """Return those of a call's or a plan's facts; None if there can be no packs.

        There are none where members may see different tokens of what they share (`is_alike` says
        that they do not), and where the heads of one sequence fill a product.
        """
        num_seqs = facts.num_seqs
        if not (is_alike and is_static(num_seqs) and is_static(num_groups)):
            return None
        rows = FEW_ROWS if value_head_dim > 128 or is_float32 else PACK_ROWS
        if is_quantised or not (target is None or target.shared_memory >= LARGE_MEMORY):
            rows = min(rows, QUANTISED_ROWS)
        members = rows // (facts.num_heads // facts.num_kv_heads)
        if members < 2 or num_seqs < 2 or num_groups < 1:
            return None
        saved = least_saved_bytes
        if saved is not None:
            saved //= GRANULE * facts.num_kv_heads * (facts.head_dim + value_head_dim) * 2
        max_packs = min(num_seqs // 2, num_seqs // members + num_groups)
        return cls(max_packs, members, facts.page_size, saved)

    def pays_to_combine(self, cost: int) -> bool:
        """Whether a batch that costs so much may be combined only because it may have packs."""
        return self.least_saved is not None or cost >= WORTH_COMBINING

    def planned(self, problem: PlanProblem, max_cuts: int) -> PlanProblem:
        """Return a plan with packs, which are dealt out as sequences are, in up to so many cuts."""
        longest = -(-problem.capacity // problem.granule)
        if self.least_saved is None:
            cost = problem.num_seqs * (longest * problem.granule_cost + PIECE_COST)
            cost = -(-cost * problem.programs_per_piece // problem.slots)
            if not (problem.max_cuts and may_pay(cost, min(self.members, problem.num_seqs))):
                return problem
        cuts = min(max(1, max_cuts), self.max_packs * (longest - 1))
        packs = dataclasses.replace(problem, num_seqs=self.max_packs, max_cuts=cuts, is_packs=True)
        return dataclasses.replace(
            problem,
            packs=packs,
            members=self.members,
            page_size=self.page_size,
            least_saved=self.least_saved,
        )


def pack_rows(members: int, group: int) -> int:
    """Return the rows of a product of a pack; 0 for no packs."""
    return max(16, power_of_two(members * group)) if members else 0


def pack_constants(plan: PlanProblem | None) -> dict[str, int]:
    """Return what the kernels know of a plan's packs; 0 each if it has none."""
    packs = plan.packs if plan else None
    return {
        "MEMBERS": plan.members if plan and packs else 0,
        "MAX_PACKS": packs.num_seqs if packs else 0,
        "MAX_PACK_PIECES": packs.max_pieces if packs else 0,
    }
