"""How one `ejk.ragged_page_attention` problem is cut for a GPU: pure functions of both."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from ejk.backends.gpu import Target
from ejk.backends.ragged_page_attention import RaggedPageAttentionProblem
from ejk.backends.ragged_page_attention_plan import ITEM, RaggedPlan
from ejk.backends.triton._sizes import (
    GRANULE,
    feature_constants,
    next_power_of_2,
    pages_of_block,
    same_tile,
    shape_constants,
    size_refusals,
    stride_constants,
    type_constants,
    width_constants,
)
from ejk.backends.triton.ragged_page_attention.blocks import (
    MOST_NARROW_ROWS,
    RaggedBlocks,
    RaggedTuning,
    blocks_of_few_tokens,
    narrow_blocks,
    wide_blocks,
)

# The next three say how ragged batches are cut. They were measured for decode on an H100.
# Pieces a multiprocessor, enough that the last pieces to start are short. Time is flat from 1 to 4
# for 256 unequal contexts.
PIECES_PER_SM = 2.5
# Contexts stay whole where none is longer than 1.1 of a multiprocessor's fair share of the batch.
# The numbers are 1.1 * `PIECES_PER_SM` as a fraction, for a share is counted in pieces.
EVEN_SHARE = (11, 4)
# A batch that fills the machine twice is not cut if no context exceeds this many tokens: the
# longest ends long before the rest, and there is nothing to combine, which saves 1.7 us.
WHOLE_TOKENS = 4096
# A planning program has BLOCK_SEQS sequences, compares them with MOST_OTHERS at a time, and writes
# BLOCK_ITEMS items at a time. A program that clears has BLOCK_TOKENS rows. Not measured.
BLOCK_SEQS, MOST_OTHERS, BLOCK_ITEMS, BLOCK_TOKENS = 4, 1024, 64, 16
BALANCED_OTHERS = 256  # in place of MOST_OTHERS where 16 sizes of pieces are tried
# Programs a multiprocessor of a combination that mostly finds nothing to do. On an H100 8,192
# programs that end at once took 7.8 us, 1,024 took 2.3.
COMBINING = 4
# Such a program combines the rows of blocks of up to this many one at a time, and eight at a time
# in larger blocks: with 32 rows, 6,144 rows in two or three parts took 32.8 us one at a time.
MOST_ONE_BY_ONE = 8
# Entries of parts that a program of a combination has under way, and the most parts. On an H200,
# with 2,048, 4,096 and 8,192 entries: 256 new tokens on 8,448, 32/8/128, in two pieces 5.9, 6.1 and
# 7.6 us; 512 on 32,768 with one KV head, on Triton 10.6, 9.5 and 8.8.
COMBINE_BLOCK, COMBINE_PARTS = 4096, 32


@dataclasses.dataclass(frozen=True)
class RaggedCut:
    """How one problem is cut, whatever kernel attends to the items of the plan."""

    plan: RaggedPlan

    def types(self, problem: RaggedPageAttentionProblem) -> dict[str, jax.ShapeDtypeStruct | None]:
        """Return the memory for parts, and the results."""
        out, lse = dataclasses.replace(problem, return_lse=True).results
        rows = (self.plan.part_rows, problem.num_kv_heads)
        parts = jax.ShapeDtypeStruct((*rows, problem.value_head_dim), jnp.float32)
        return {
            "part_out_ptr": parts if rows[0] else None,
            "part_lse_ptr": jax.ShapeDtypeStruct(rows, jnp.float32) if rows[0] else None,
            "out_ptr": out,
            "lse_ptr": lse,
        }

    def plan_grid(self, problem: RaggedPageAttentionProblem) -> int:
        return -(-problem.num_seqs // BLOCK_SEQS)

    def plan_constants(self, problem: RaggedPageAttentionProblem) -> dict[str, Any]:
        _, first_wide, first_narrow_split, first_wide_split, _ = self.plan.first_rows
        narrow, wide = self.plan.narrow, self.plan.wide
        return {
            "ITEM": ITEM,
            "NUM_SEQS": problem.num_seqs,
            "TOTAL_TOKENS": problem.total_tokens,
            "GROUP": problem.group,
            "CAPACITY": problem.capacity,
            "NARROW_CUTS": narrow.cuts,
            "WIDE_CUTS": wide.cuts if wide else 0,
            "FIRST_WIDE": first_wide,
            "FIRST_WIDE_PART": self.plan.first_wide_part,
            "FIRST_NARROW_SPLIT": first_narrow_split,
            "FIRST_WIDE_SPLIT": first_wide_split,
            "EVEN_NUMERATOR": EVEN_SHARE[0],
            "EVEN_DENOMINATOR": EVEN_SHARE[1],
            "RESIDENT": self.plan.resident,
            "PROGRAMS": problem.num_kv_heads,
            "MEMORY_BOUND": not same_tile(problem),
            "HAS_WINDOW": problem.has_window,
            "NARROW_ROWS": narrow.rows,
            "WIDE_ROWS": wide.rows if wide else 0,
            "GRANULE": self.plan.granule,
            "BLOCK_SEQS": BLOCK_SEQS,
            "BLOCK_OTHERS": min(
                _block_others(problem), BALANCED_OTHERS if self.plan.resident else 2**30
            ),
            "BLOCK_ITEMS": BLOCK_ITEMS,
        }

    def combine_rows(self, kind: int) -> int:
        """Rows that a program combines: all parts of one, or a few parts of several."""
        rows = self.plan.kinds[kind].rows
        is_one = kind == 0 and (not self.plan.resident or rows <= MOST_ONE_BY_ONE)
        return 1 if is_one else math.gcd(rows, 8)

    def combine_grid(self, problem: RaggedPageAttentionProblem, kind: int) -> int:
        items = self.plan.kinds[kind]
        most = items.max_splits * items.rows // self.combine_rows(kind) * problem.num_kv_heads
        return min(most, COMBINING * self.plan.resident) if self.plan.resident else most

    def combine_constants(self, problem: RaggedPageAttentionProblem, kind: int) -> dict[str, Any]:
        block_dv, rows = next_power_of_2(problem.value_head_dim), self.combine_rows(kind)
        return {
            "ITEM": ITEM,
            "NUM_HEADS": problem.num_heads,
            "NUM_KV_HEADS": problem.num_kv_heads,
            "VALUE_HEAD_DIM": problem.value_head_dim,
            "COUNT": 2 * kind + 1,
            "FIRST_SPLIT": self.plan.first_rows[2 + kind],
            "PART_ROWS": self.plan.kinds[kind].rows,
            "HAS_SINKS": problem.has_sinks,
            "BLOCK_PARTS": max(1, min(COMBINE_PARTS, COMBINE_BLOCK // (block_dv * rows))),
            "BLOCK_ROWS": rows,
            "BLOCK_DV": block_dv,
            "GRID": self.combine_grid(problem, kind),
        }


@dataclasses.dataclass(frozen=True)
class RaggedSizes(RaggedCut):
    """How one problem is cut and run: with blocks of each kind of the plan."""

    blocks: tuple[RaggedBlocks, ...]

    @classmethod
    def of(
        cls, problem: RaggedPageAttentionProblem, tuning: RaggedTuning, target: Target
    ) -> "RaggedSizes":
        wanted = min(problem.q_len_bound * problem.group, 2**30)
        most_narrow = min(MOST_NARROW_ROWS, tuning.block_rows or MOST_NARROW_ROWS)
        cuts = cuts_of(problem, target)
        if few := blocks_of_few_tokens(problem, tuning, target):
            plan = RaggedPlan.of(problem, few.rows, None, cuts, GRANULE, target.num_sms)
            return cls(plan, (few,))
        has_wide = wanted > most_narrow
        at_once = min(problem.group if has_wide else wanted, most_narrow)
        narrow = narrow_blocks(problem, tuning, target, at_once)
        wide = wide_blocks(problem, tuning, target) if has_wide else None
        # Drafts of up to two programs a multiprocessor are dealt out to all multiprocessors. On an
        # H200, without and with that, 8 new tokens on 4 contexts of 32,768 took 163.0 and 137.2 us,
        # on 32 of 8,192 265.3 and 262.5, but on 64 of 200 to 32,000 326.1 and 329.8. The plan, once
        # a step, takes 2.5 us longer.
        are_few = problem.num_seqs * problem.num_kv_heads <= 2 * target.num_sms
        resident = target.num_sms if narrow.peel and are_few else 0
        plan = RaggedPlan.of(problem, narrow.rows, wide and wide.rows, cuts, GRANULE, resident)
        return cls(plan, (narrow, wide) if wide else (narrow,))

    def grid(self, problem: RaggedPageAttentionProblem, kind: int) -> int:
        clearing = -(-problem.total_tokens // BLOCK_TOKENS) if kind == 0 else 0
        return self.plan.kinds[kind].max_items * problem.num_kv_heads + clearing

    def constants(
        self, problem: RaggedPageAttentionProblem, kind: int, target: Target
    ) -> dict[str, Any]:
        blocks, items = self.blocks[kind], self.plan.kinds[kind]
        return {
            "ITEM": ITEM,
            "NUM_SEQS": problem.num_seqs,
            "TOTAL_TOKENS": problem.total_tokens,
            **shape_constants(problem),
            "COUNT": 2 * kind,
            "FIRST_ITEM": self.plan.first_rows[kind],
            "MAX_ITEMS": items.max_items,
            "CLEARS": kind == 0,
            "HAS_PARTS": items.max_parts > 0,
            **stride_constants(problem),
            **feature_constants(problem),
            "HAS_POSITIONS": problem.has_positions,
            "TREE_WIDTH": problem.tree_width,
            "CAUSAL": problem.causal,
            **type_constants(problem, target),
            "PEEL": blocks.peel,
            "GRANULE": self.plan.granule,
            "BLOCK_ROWS": blocks.rows,
            "BLOCK_KV": blocks.block_kv,
            "EDGE_KV": blocks.edge_kv,
            **width_constants(problem, blocks.rows),
            "COPY_FIRST": _copies_first(problem, blocks.rows, target),
            "PAGES": pages_of_block(problem, blocks.block_kv),
            "EDGE_PAGES": pages_of_block(problem, blocks.edge_kv),
            "BLOCK_BOUNDS": _block_others(problem),
            "BLOCK_TOKENS": BLOCK_TOKENS,
        }


def cuts_of(problem: RaggedPageAttentionProblem, target: Target) -> int:
    """Return in about how many pieces the contexts of each kind are cut: enough for the machine.

    0 leaves every context whole; the plan is then only an order.
    """
    longest, programs = problem.visible_bound, problem.num_kv_heads  # of a piece
    if longest <= GRANULE:
        return 0
    most = min(problem.num_seqs, problem.total_tokens)
    if most * programs >= 2 * target.num_sms and longest <= WHOLE_TOKENS:
        return 0
    return max(1, int(PIECES_PER_SM * target.num_sms / programs))


def ragged_size_refusals(problem: RaggedPageAttentionProblem) -> list[str]:
    """Say why a problem is too large to be dealt out, whatever kernel attends to its items."""
    reasons = size_refusals(problem)
    if problem.total_tokens * problem.group >= 2**31 - 2**20:
        reasons.append(f"total_tokens={problem.total_tokens} query rows are counted in 32 bits")
    return reasons


def _copies_first(problem: RaggedPageAttentionProblem, rows: int, target: Target) -> bool:
    """Say whether a block is copied before the softmax of the one before it, not after.

    Copied after, only the second product covers the copies. On an H200, 64 latent contexts of 4,096
    with 4 new tokens, copied after and before: 16 heads 139.3 and 121.8 us, 32 heads 243.0 and
    217.1, 64 heads 458.7 and 414.3, 128 heads 890.7 and 805.7. With blocks of 32 tokens and 3
    stages, where the copies have two blocks' time, 151.7 and 156.5. A prefetch of the block to the
    L2 cache took 125.3 us with 16 heads and 232.9 with 32.
    """
    return same_tile(problem) and rows == 64 and target.is_like_hopper


def _block_others(problem: RaggedPageAttentionProblem) -> int:
    return min(MOST_OTHERS, next_power_of_2(problem.num_seqs + 1))
