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
    combined_parts,
    feature_constants,
    power_of_two,
    programs_per_piece,
    shape_constants,
    stride_constants,
    width_constants,
)
from ejk.backends.triton.page_attention.blocks import DecodeBlocks, Tuning, choose_blocks
from ejk.backends.triton.page_attention.plan import own_plan
from ejk.backends.triton.page_attention.tuned import TUNED, Cell, Pipeline


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How one problem is cut and run.

    With `problem.num_splits` of 1 or more, whatever enters rounding (the blocks, the two parts of
    the head dimensions) follows from head dimensions, group, dtype and the target alone.
    """

    blocks: DecodeBlocks
    num_splits: int = 1  # equal parts of each context; 0: as planned
    split_blocks: int = 0
    plan: PlanProblem | None = None

    @classmethod
    def of(
        cls,
        problem: PageAttentionProblem,
        tuning: Tuning,
        target: Target,
        tuned: dict[Cell, Pipeline] = TUNED,
    ) -> "Sizes":
        is_invariant = bool(problem.num_splits or tuning.split_tokens)
        longest = None if is_invariant else problem.visible_bound
        blocks = choose_blocks(problem, problem.group, longest, tuning, target, tuned)
        most = max(2, -(-problem.capacity // blocks.block_kv))  # parts of a block or more
        if problem.num_splits:
            return cls(blocks, min(problem.num_splits, most))
        if tuning.split_tokens:
            split_blocks = -(-min(tuning.split_tokens, problem.capacity) // blocks.block_kv)
            # Two or more, whatever the table's width: one is not rounded as parts are.
            splits = max(2, -(-problem.capacity // (split_blocks * blocks.block_kv)))
            return cls(blocks, splits, split_blocks)
        if problem.visible_bound <= GRANULE:
            return cls(blocks)
        programs = _programs_per_piece(problem)
        if problem.num_seqs > 1:
            own = own_plan(
                num_seqs=problem.num_seqs,
                capacity=problem.capacity,
                longest=problem.visible_bound,
                programs=programs,
                width=problem.head_dim + problem.value_head_dim,
                num_sms=target.num_sms,
                has_window=problem.has_window,
                own_windows=problem.own_windows,
            )
            return cls(blocks, num_splits=0, plan=problem.plan or own)
        # One program a multiprocessor: of 16, 24, 33 and 49 parts of one context of 131,072 tokens
        # on an H100 (8 KV heads, 132 multiprocessors) 16 were done first, in 182.8 us; 24, a wave
        # and a half, took 194.1.
        splits = target.num_sms // programs
        return cls(blocks, max(1, min(splits, -(-problem.visible_bound // blocks.block_kv))))

    def grid(self, problem: PageAttentionProblem) -> int:
        pieces = self.plan.max_pieces if self.plan else problem.num_seqs * self.num_splits
        return pieces * _programs_per_piece(problem)

    def combine_grid(self, problem: PageAttentionProblem) -> int:
        seqs = self.plan.max_splits if self.plan else problem.num_seqs
        return seqs * problem.num_heads * -(-problem.value_head_dim // self._combine_dv(problem))

    def _combine_dv(self, problem: PageAttentionProblem) -> int:
        """Entries of the values that one program combines."""
        # With a plan nearly every program finds nothing to do, and the fewer the better: 5,248 took
        # 4.3 us on an H100, 1,280 took 1.9. Without one there are few rows for many processors.
        return power_of_two(problem.value_head_dim) if self.plan else 32

    def num_parts(self, problem: PageAttentionProblem) -> int:
        if self.plan:
            return self.plan.max_pieces if self.plan.max_cuts else 0
        return problem.num_seqs * self.num_splits if self.num_splits > 1 else 0

    def part_types(self, problem: PageAttentionProblem) -> dict[str, jax.ShapeDtypeStruct | None]:
        """Return the memory for parts of contexts, None where every context is one piece."""
        rows = (self.num_parts(problem), problem.num_heads)
        if not rows[0]:
            return {"part_out_ptr": None, "part_lse_ptr": None}
        return {
            "part_out_ptr": jax.ShapeDtypeStruct((*rows, problem.value_head_dim), jnp.float32),
            "part_lse_ptr": jax.ShapeDtypeStruct(rows, jnp.float32),
        }

    def constants(self, problem: PageAttentionProblem) -> dict[str, Any]:
        return {
            "NUM_SEQS": problem.num_seqs,
            **shape_constants(problem),
            "NUM_SPLITS": self.num_splits,
            "SPLIT_BLOCKS": self.split_blocks,
            "NUM_PARTS": self.num_parts(problem),
            **stride_constants(problem),
            "stride_window_seq": int(problem.own_windows),
            **feature_constants(problem),
            "HAS_DISTANCES": problem.own_distances,
            "BLOCK_GROUP": self.blocks.block_group,
            "BLOCK_KV": self.blocks.block_kv,
            **width_constants(problem),
        }

    def combine_constants(self, problem: PageAttentionProblem) -> dict[str, Any]:
        return {
            "NUM_SEQS": problem.num_seqs,
            "NUM_HEADS": problem.num_heads,
            "NUM_SPLITS": self.num_splits,
            "NUM_PARTS": self.num_parts(problem),
            "FIRST_SPLIT": 1 + self.plan.max_pieces if self.plan else 0,
            "VALUE_HEAD_DIM": problem.value_head_dim,
            "HAS_SINKS": problem.has_sinks,
            "BLOCK_PARTS": combined_parts(self._combine_dv(problem)),
            "BLOCK_DV": self._combine_dv(problem),
        }


def _programs_per_piece(problem: PageAttentionProblem) -> int:
    return programs_per_piece(problem.num_kv_heads, problem.group, problem.value_head_dim)
