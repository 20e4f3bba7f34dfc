"""How one `ejk.page_attention` problem is cut for a GPU: pure functions of problem and target."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from ejk.backends.gpu import Target
from ejk.backends.page_attention import PageAttentionProblem
from ejk.backends.page_attention_plan import PlanProblem
from ejk.backends.triton._sizes import (
    GRANULE,
    MATRIX_ROWS,
    feature_constants,
    next_power_of_2,
    pages_of_block,
    shape_constants,
    stride_constants,
    value_bytes,
    width_constants,
)
from ejk.backends.triton.page_attention.blocks import (
    DecodeBlocks,
    Tuning,
    choose_blocks,
    choose_pack_blocks,
    rows_of,
)
from ejk.backends.triton.page_attention.numbers import sums_of, types_of
from ejk.backends.triton.page_attention.occupancy import Load
from ejk.backends.triton.page_attention.plan import (
    loaded_entries,
    plan_of_call,
    programs_of_piece,
    without_unfit_plan,
)
from ejk.backends.triton.page_attention.sharing import (
    member_constants,
    pack_constants,
    pack_rows,
)
from ejk.backends.triton.page_attention.tuned import TUNED, Cell, Pipeline

STRIDED = -1  # part `p` of `n` equal ones takes blocks p, p + n, p + 2n, ...
MAX_STRIDE = 1024  # blocks: positions past the last token are 32-bit, too

# On an H100, in us: 128 tokens of 512 bytes of a program with memory to itself, and of one where
# all read; and the launch of a combination: 1.4 of the device, but 3.2 of the host.
ALONE_US, SHARED_US, COMBINATION_US = 1.75, 2.8, 3.2
# Where no part has more, contexts are cut evenly whatever their lengths: a plan would cost more.
SHORT_TOKENS = 512
# A program of a combination takes at least COMBINE_DV entries of the values, and loads
# COMBINE_PARTS parts at a time. It takes more entries where there are more than COMBINE_PER_SM
# programs a multiprocessor. On an H100 with 32 entries and with all: 3 unequal contexts with 256
# entries 3.1 and 6.7 us, 256 contexts of which few are cut 3.6 and 1.7.
COMBINE_DV, COMBINE_PARTS, COMBINE_PER_SM = 64, 8, 4


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How one problem is cut and run.

    With `problem.num_splits` of 1 or more, whatever enters rounding (the blocks, the two parts of
    the head dimensions) follows from head dimensions, group, dtype and the target alone.
    """

    blocks: DecodeBlocks
    pack_blocks: DecodeBlocks | None = None  # None without packs
    num_splits: int = 1  # equal parts of each context; 0: as planned
    split_blocks: int = 0  # the least in one of them, or `STRIDED`
    plan: PlanProblem | None = None
    combine_dv: int = COMBINE_DV  # entries of the values that one program combines

    @classmethod
    def of(
        cls,
        problem: PageAttentionProblem,
        tuning: Tuning,
        target: Target,
        tuned: dict[Cell, Pipeline] = TUNED,
        blocks: DecodeBlocks | None = None,
    ) -> "Sizes":
        """Cut a problem for blocks that are given, or those that are best for the kernel."""
        problem = without_unfit_plan(problem, tuning, target)
        blocks = blocks or blocks_of_call(problem, tuning, target, tuned)
        sizes = cls(blocks, **_cuts(problem, blocks, tuning, target))
        if sizes.plan and sizes.plan.packs:
            sizes = sizes._with_packs(problem, target, tuned)
        # Few entries a program while programs are few: they find a processor each.
        most = next_power_of_2(problem.value_head_dim)
        while sizes.combine_dv < most and sizes.combine_grid(problem) > (
            COMBINE_PER_SM * target.num_sms
        ):
            sizes = dataclasses.replace(sizes, combine_dv=2 * sizes.combine_dv)
        return sizes

    def _with_packs(
        self, problem: PageAttentionProblem, target: Target, tuned: dict[Cell, Pipeline]
    ) -> "Sizes":
        """Choose the blocks of packs."""
        assert self.plan is not None
        rows = pack_rows(self.plan.members, problem.group)
        packed = choose_pack_blocks(problem, rows, target, tuned)
        return dataclasses.replace(self, pack_blocks=packed)

    def grid(self, problem: PageAttentionProblem) -> int:
        pieces = self.plan.max_pieces if self.plan else problem.num_seqs * self.num_splits
        return pieces * programs_of_piece(problem, self.blocks.block_group)

    def pack_grid(self, problem: PageAttentionProblem) -> int:
        packs = self.plan.packs if self.plan else None
        return packs.max_pieces * problem.num_kv_heads if packs else 0

    def combine_grid(self, problem: PageAttentionProblem) -> int:
        seqs = self.plan.max_splits if self.plan else problem.num_seqs
        return seqs * problem.num_heads * -(-problem.value_head_dim // self.combine_dv)

    @property
    def combine_warps(self) -> int:
        return max(1, min(8, self.combine_dv // 128))

    def num_parts(self, problem: PageAttentionProblem) -> int:
        if self.plan:
            return self.plan.max_parts
        return problem.num_seqs * self.num_splits if self.num_splits > 1 else 0

    def part_types(self, problem: PageAttentionProblem) -> dict[str, jax.ShapeDtypeStruct | None]:
        """Return the memory for parts of contexts, None where every context is one piece."""
        rows = (self.num_parts(problem), problem.num_heads)
        if not rows[0]:
            return {"part_out_ptr": None, "part_lse_ptr": None}
        packs = self.plan.packs if self.plan else None
        stops = packs.num_seqs * pack_constants(self.plan)["BLOCK_STOPS"] if packs else 0
        stops = -(-stops // problem.num_heads)
        return {
            "part_out_ptr": jax.ShapeDtypeStruct((*rows, problem.value_head_dim), jnp.float32),
            "part_lse_ptr": jax.ShapeDtypeStruct((rows[0] + stops, rows[1]), jnp.float32),
        }

    def constants(
        self, problem: PageAttentionProblem, target: Target, packed: bool = False
    ) -> dict[str, Any]:
        """Return the constants of the launch for sequences, or of the one for packs."""
        blocks = self.pack_blocks if packed else self.blocks
        assert blocks is not None
        return {
            "NUM_SEQS": problem.num_seqs,
            **shape_constants(problem),
            "NUM_SPLITS": self.num_splits,
            "SPLIT_BLOCKS": self.split_blocks,
            "NUM_PARTS": self.num_parts(problem),
            **pack_constants(self.plan),
            **member_constants(self.plan),
            "PACKED": packed,
            **stride_constants(problem),
            "stride_window_seq": int(problem.own_windows),
            **feature_constants(problem),
            "HAS_DISTANCES": problem.own_distances,
            **types_of(problem, target),
            "BLOCK_GROUP": blocks.block_group,
            "BLOCK_KV": blocks.block_kv,
            **width_constants(problem, blocks.block_group),
            "PAGES": pages_of_block(
                problem, blocks.block_kv, self.plan.granule if self.plan else GRANULE
            ),
            # Packs have no registers to spare for more than one.
            "SUMS": 0 if packed else sums_of(problem, blocks),
        }

    def combine_constants(self, problem: PageAttentionProblem, tokens: int = 1) -> dict[str, Any]:
        return {
            "NUM_SEQS": problem.num_seqs,
            "NUM_HEADS": problem.num_heads,
            "TOKENS": tokens,
            "NUM_SPLITS": self.num_splits,
            "NUM_PARTS": self.num_parts(problem),
            "FIRST_SPLIT": 1 + self.plan.max_pieces if self.plan else 0,
            **pack_constants(self.plan),
            "VALUE_HEAD_DIM": problem.value_head_dim,
            "HAS_SINKS": problem.has_sinks,
            "BLOCK_PARTS": min(self.num_splits or COMBINE_PARTS, 2 * COMBINE_PARTS),
            "BLOCK_DV": self.combine_dv,
        }


def blocks_of_call(
    problem: PageAttentionProblem,
    tuning: Tuning,
    target: Target,
    tuned: dict[Cell, Pipeline] = TUNED,
) -> DecodeBlocks:
    """Choose the blocks of sequences that are read by themselves."""
    is_invariant = bool(problem.num_splits or tuning.split_tokens)
    each = programs_of_piece(problem, rows_of(problem, problem.group, target))
    programs = problem.num_seqs * each
    # Programs that have a multiprocessor and a whole context each take a large call's blocks.
    is_whole = programs <= target.num_sms
    is_whole = is_whole and not _is_worth_cutting(problem, programs, target)
    longest = None if is_invariant or is_whole else problem.visible_bound
    shown = 0 if is_invariant else problem.visible_bound
    load = Load(problem.num_seqs, each, shown, target.num_sms)
    return choose_blocks(problem, problem.group, longest, tuning, target, tuned, load)


def _cuts(
    problem: PageAttentionProblem, blocks: DecodeBlocks, tuning: Tuning, target: Target
) -> dict[str, Any]:
    """Return how contexts are cut: some of the fields of `Sizes`."""
    most = max(2, -(-problem.capacity // blocks.block_kv))  # parts of a block or more
    if problem.num_splits:
        return {"num_splits": min(problem.num_splits, most)}
    if tuning.split_tokens:
        split_blocks = -(-min(tuning.split_tokens, problem.capacity) // blocks.block_kv)
        # Two or more, whatever the table's width: one is not rounded as parts are.
        splits = max(2, -(-problem.capacity // (split_blocks * blocks.block_kv)))
        return {"num_splits": splits, "split_blocks": split_blocks}
    if splits := _strided_parts(problem, blocks, target):
        return {"num_splits": splits, "split_blocks": STRIDED}
    own = plan_of_call(problem, blocks, tuning, target)
    return {"num_splits": 0, "plan": problem.plan or own}


def _strided_parts(problem: PageAttentionProblem, blocks: DecodeBlocks, target: Target) -> int:
    """Return in how many equal parts every context is cut without a plan; 0: by a plan."""
    programs = problem.num_seqs * programs_of_piece(problem, blocks.block_group)
    parts = 1
    if _is_worth_cutting(problem, programs, target):
        # One program a multiprocessor, or two where there is room. One context of 131,072 tokens on
        # an H100 (8 KV heads, 132 multiprocessors) was done first in 16 parts, of 16, 24, 33 and
        # 49: in 182.8 us; 24, a wave and a half, took 194.1.
        resident = 2 if 2 * blocks.shared_memory <= target.shared_memory else 1
        resident = max(resident, blocks.per_sm)
        in_all = -(-problem.visible_bound // blocks.block_kv)
        parts = max(1, min(resident * target.num_sms // programs, in_all, MAX_STRIDE))
        parts = -(-in_all // -(-in_all // parts))  # no more than make the longest one shorter
    alone = parts if blocks.block_group >= MATRIX_ROWS else max(1, parts // blocks.per_sm)
    is_short = problem.visible_bound <= alone * SHORT_TOKENS
    return parts if problem.num_seqs == 1 or is_short else 0


def _is_worth_cutting(problem: PageAttentionProblem, programs: int, target: Target) -> bool:
    """Whether parts of its contexts would save a call more than their combination takes."""
    if problem.visible_bound <= GRANULE:
        return False
    # A program that has memory to itself takes codes no faster than 16 bits.
    values = problem.visible_bound / 128 * loaded_entries(problem) / 256
    alone = ALONE_US * values * max(1.0, value_bytes(problem) / 2)
    together = SHARED_US * values * value_bytes(problem) / 2 * programs / target.num_sms
    most = max(1, target.num_sms // programs)
    whole, cut = (max(alone / n, together) for n in (1, most))
    return whole - cut > COMBINATION_US
