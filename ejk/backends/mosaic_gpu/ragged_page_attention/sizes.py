"""How one problem is cut for the prefill kernel: pure functions of problem and target."""

import dataclasses

from ejk.backends.gpu import Target
from ejk.backends.mosaic_gpu._tensor_cores import ROWS, SWIZZLED
from ejk.backends.ragged_page_attention import RaggedPageAttentionProblem
from ejk.backends.ragged_page_attention_plan import RaggedPlan
from ejk.backends.triton._sizes import GRANULE
from ejk.backends.triton.ragged_page_attention.sizes import RaggedCut, cuts_of

# By head dimension: warpgroups that compute, which take turns; tokens of a block of keys; blocks
# and tiles' queries in shared memory.
WARPGROUPS = {64: 3, 128: 2, 256: 2}
BLOCK_KV = {64: 128, 128: 128, 256: 64}
STAGES = {64: 4, 128: 2, 256: 2}
Q_SLOTS = {64: 2, 128: 2, 256: 1}


@dataclasses.dataclass(frozen=True)
class PrefillSizes(RaggedCut):
    """How one problem is cut and run.

    A tile is a block of query rows and what it sees, or a piece of that. Its rows are new tokens
    times the heads of a group, `own_tokens` for each warpgroup. Row `r` of a warpgroup is head
    `r % group` of its token `r // group`; the rows after its last token have none.
    """

    problem: RaggedPageAttentionProblem
    block_kv: int
    warpgroups: int  # that compute; one more copies
    stages: int
    q_slots: int
    num_programs: int
    interpret: bool
    plain: bool  # public operations alone

    @classmethod
    def of(
        cls, problem: RaggedPageAttentionProblem, target: Target, *, interpret: bool, plain: bool
    ) -> "PrefillSizes":
        plan = plan_of(problem, target)
        most = sum(kind.max_items for kind in plan.kinds) * problem.num_kv_heads
        return cls(
            plan=plan,
            problem=problem,
            block_kv=BLOCK_KV[problem.head_dim],
            warpgroups=WARPGROUPS[problem.head_dim],
            stages=STAGES[problem.head_dim],
            q_slots=Q_SLOTS[problem.head_dim],
            num_programs=min(target.num_sms, most),
            interpret=interpret,
            plain=plain or interpret,
        )

    @property
    def group(self) -> int:
        return self.problem.group

    @property
    def own_tokens(self) -> int:
        """New tokens of a warpgroup's rows."""
        return ROWS // self.group

    @property
    def own_rows(self) -> int:
        """Rows of a warpgroup that have a token."""
        return self.own_tokens * self.group

    @property
    def chunks(self) -> int:
        """Rows of swizzled shared memory that a head takes."""
        return self.problem.head_dim // SWIZZLED

    @property
    def in_one_box(self) -> bool:
        """One copy takes the rows of all tokens of a warpgroup: they fill it."""
        return self.own_rows == ROWS and not self.interpret  # which cannot unfold an axis

    @property
    def query_copies(self) -> int:
        """Copies of a tile's queries."""
        each = 1 if self.in_one_box else self.own_tokens
        return self.warpgroups * self.chunks * each

    @property
    def copied_rows(self) -> int:
        """Tokens that one copy takes: a page, or a block of a longer one."""
        return min(self.problem.page_size, self.block_kv)

    @property
    def copies(self) -> int:
        """Copies of a block of keys."""
        return self.block_kv // self.copied_rows

    @property
    def alternates(self) -> bool:
        """A program takes narrow tiles between its wide ones: their products are 32-bit."""
        tiles = (kind.max_items * self.problem.num_kv_heads for kind in self.plan.kinds)
        narrow, *wide = (-(-x // self.num_programs) for x in tiles)
        return narrow * (self.num_programs + narrow + sum(wide)) < 2**31

    @property
    def scaled_blocks(self) -> int:
        """Blocks of a sequence whose tokens have scales."""
        return -(-self.problem.capacity // self.block_kv)

    @property
    def scale_slots(self) -> int:
        """Blocks of tokens' scales in shared memory.

        They come with the keys, and are read until the softmax ends. The keys are free by then, so
        there is one slot more than for keys. With 8 x 4,096 tokens on an H200 such a kernel takes
        1,875 us, of which scales are 218; when they came from global memory it took 2,047.
        """
        return self.stages + 1

    @property
    def has_parts(self) -> bool:
        return any(kind.max_parts > 0 for kind in self.plan.kinds)


def plan_of(problem: RaggedPageAttentionProblem, target: Target) -> RaggedPlan:
    """Return the work list: sequences whose rows fit one warpgroup are narrow, others wide.

    Where no sequence is expected to have more, narrow blocks take all.
    """
    own_tokens = ROWS // problem.group
    bound = min(problem.q_len_bound, 2**30)
    wide = WARPGROUPS[problem.head_dim] * own_tokens * problem.group if bound > own_tokens else None
    narrow = min(own_tokens, bound) * problem.group
    cuts = cuts_of(problem, target)
    return RaggedPlan.of(problem, narrow, wide, cuts, GRANULE, resident=target.num_sms)
