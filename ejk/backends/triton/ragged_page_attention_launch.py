"""How one `ejk.ragged_page_attention` problem is cut for a GPU: pure functions of both."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from ejk.backends.gpu import Target
from ejk.backends.page_attention_plan import EVEN_SHARE
from ejk.backends.ragged_page_attention import RaggedPageAttentionProblem
from ejk.backends.triton.page_attention_launch import (
    GRANULE,
    chain,
    choose_cuts,
    power_of_two,
    stride_constants,
    two_parts,
)
from ejk.backends.triton.ragged_page_attention_blocks import (
    MOST_NARROW_ROWS,
    RaggedTuning,
    Rows,
    narrow_rows,
    wide_rows,
)

ITEM = 8  # integers of an item of the plan
# Sequences of a planning program, those that it compares them with at a time, items that it writes
# at a time; rows of a program that clears. Not measured.
BLOCK_SEQS, MOST_OTHERS, BLOCK_ITEMS, BLOCK_TOKENS = 4, 1024, 64, 16
COMBINED = 8192  # entries of parts that a program of the combination holds


@dataclasses.dataclass(frozen=True)
class RaggedLaunch:
    """How one problem is cut and run.

    The plan is one array, `[plan_rows, ITEM]` of int32:

    - row 0: items and splits of narrow blocks, then of wide ones;
    - the narrow items, then the wide ones: sequence, its first token and how many it has, block of
      rows, piece, pieces, part or -1, and the sequence's length;
    - the narrow splits, then the wide ones: first token, tokens, block, first part, parts.

    What lies beyond the counts is not initialised.
    """

    narrow: Rows
    wide: Rows | None

    @classmethod
    def of(
        cls, problem: RaggedPageAttentionProblem, tuning: RaggedTuning, target: Target
    ) -> "RaggedLaunch":
        wanted = min(problem.q_len_bound * problem.group, 2**30)
        most_narrow = min(MOST_NARROW_ROWS, tuning.block_rows or MOST_NARROW_ROWS)
        has_wide = wanted > most_narrow
        at_once = min(problem.group if has_wide else wanted, most_narrow)
        narrow = narrow_rows(problem, tuning, target, at_once)
        all_rows = problem.total_tokens * problem.group
        most = min(problem.num_seqs, problem.total_tokens)
        rows = narrow.rows
        narrow_blocks = most if has_wide else most + all_rows // rows
        cuts = choose_cuts(target.num_sms, most, problem.num_kv_heads, problem.visible_bound)
        if problem.visible_bound <= GRANULE:
            cuts = 0
        narrow = dataclasses.replace(narrow, cuts=cuts, max_blocks=narrow_blocks)
        if not has_wide:
            return cls(narrow, None)
        wide = wide_rows(problem, tuning, target)
        max_blocks = all_rows // wide.rows + min(most, all_rows // (rows + 1))
        return cls(narrow, dataclasses.replace(wide, cuts=cuts, max_blocks=max(max_blocks, 1)))

    @property
    def launches(self) -> tuple[Rows, ...]:
        return (self.narrow,) if self.wide is None else (self.narrow, self.wide)

    @property
    def first_rows(self) -> tuple[int, int, int, int, int]:
        """Where the plan's narrow and wide items begin, narrow and wide splits, and its end."""
        wide = self.wide or dataclasses.replace(self.narrow, max_blocks=0, cuts=0)
        sizes = (self.narrow.max_items, wide.max_items, self.narrow.max_splits, wide.max_splits)
        ends = [1]
        for size in sizes:
            ends.append(ends[-1] + size)
        return tuple(ends)  # type: ignore[return-value]

    def plan_types(self) -> dict[str, jax.ShapeDtypeStruct | None]:
        return {"work_ptr": jax.ShapeDtypeStruct((self.first_rows[-1], ITEM), jnp.int32)}

    def types(self, problem: RaggedPageAttentionProblem) -> dict[str, jax.ShapeDtypeStruct | None]:
        """Return the memory for parts, and the results."""
        out, lse = dataclasses.replace(problem, return_lse=True).results
        rows = (max(x.max_parts * x.rows for x in self.launches), problem.num_kv_heads)
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
        _, first_wide, first_narrow_split, first_wide_split, _ = self.first_rows
        return {
            "ITEM": ITEM,
            "NUM_SEQS": problem.num_seqs,
            "TOTAL_TOKENS": problem.total_tokens,
            "GROUP": problem.group,
            "CAPACITY": problem.capacity,
            "NARROW_CUTS": self.narrow.cuts,
            "WIDE_CUTS": self.wide.cuts if self.wide else 0,
            "FIRST_WIDE": first_wide,
            "FIRST_NARROW_SPLIT": first_narrow_split,
            "FIRST_WIDE_SPLIT": first_wide_split,
            "EVEN_NUMERATOR": EVEN_SHARE[0],
            "EVEN_DENOMINATOR": EVEN_SHARE[1],
            "HAS_WINDOW": problem.has_window,
            "NARROW_ROWS": self.narrow.rows,
            "WIDE_ROWS": self.wide.rows if self.wide else 0,
            "GRANULE": GRANULE,
            "BLOCK_SEQS": BLOCK_SEQS,
            "BLOCK_OTHERS": _block_others(problem),
            "BLOCK_ITEMS": BLOCK_ITEMS,
        }

    def grid(self, problem: RaggedPageAttentionProblem, which: int) -> int:
        clearing = -(-problem.total_tokens // BLOCK_TOKENS) if which == 0 else 0
        return self.launches[which].max_items * problem.num_kv_heads + clearing

    def constants(self, problem: RaggedPageAttentionProblem, which: int) -> dict[str, Any]:
        rows = self.launches[which]
        block_d, block_dv = two_parts(problem.head_dim), two_parts(problem.value_head_dim)
        return {
            "ITEM": ITEM,
            "NUM_SEQS": problem.num_seqs,
            "TOTAL_TOKENS": problem.total_tokens,
            "NUM_HEADS": problem.num_heads,
            "NUM_KV_HEADS": problem.num_kv_heads,
            "HEAD_DIM": problem.head_dim,
            "VALUE_HEAD_DIM": problem.value_head_dim,
            "NUM_PAGES": problem.num_pages,
            "PAGE_SIZE": problem.page_size,
            "MAX_BLOCKS": problem.max_blocks,
            "COUNT": 2 * which,
            "FIRST_ITEM": self.first_rows[which],
            "MAX_ITEMS": rows.max_items,
            "CLEARS": which == 0,
            "HAS_PARTS": rows.max_parts > 0,
            **stride_constants(problem),
            "SOFT_CAP": problem.soft_cap or 0.0,
            "HAS_WINDOW": problem.has_window,
            "HAS_SINKS": problem.has_sinks,
            "HAS_ALIBI": problem.has_alibi,
            "HAS_POSITIONS": problem.has_positions,
            "TREE_WIDTH": problem.tree_width,
            "PEEL": rows.peel,
            "GRANULE": GRANULE,
            "BLOCK_ROWS": rows.rows,
            "BLOCK_KV": rows.block_kv,
            "EDGE_KV": rows.edge_kv,
            "BLOCK_D": block_d[0],
            "BLOCK_D_REST": block_d[1],
            "CHAIN": chain(problem),
            "BLOCK_DV": block_dv[0],
            "BLOCK_DV_REST": block_dv[1],
            "BLOCK_BOUNDS": _block_others(problem),
            "BLOCK_TOKENS": BLOCK_TOKENS,
        }

    def combine_rows(self, which: int) -> int:
        """Rows that a program combines: all parts of one, or a few parts of several."""
        return 1 if which == 0 else 8

    def combine_grid(self, problem: RaggedPageAttentionProblem, which: int) -> int:
        rows = self.launches[which]
        return rows.max_splits * rows.rows // self.combine_rows(which) * problem.num_kv_heads

    def combine_constants(self, problem: RaggedPageAttentionProblem, which: int) -> dict[str, Any]:
        block_dv, rows = power_of_two(problem.value_head_dim), self.combine_rows(which)
        return {
            "ITEM": ITEM,
            "NUM_HEADS": problem.num_heads,
            "NUM_KV_HEADS": problem.num_kv_heads,
            "VALUE_HEAD_DIM": problem.value_head_dim,
            "COUNT": 2 * which + 1,
            "FIRST_SPLIT": self.first_rows[2 + which],
            "PART_ROWS": self.launches[which].rows,
            "HAS_SINKS": problem.has_sinks,
            "BLOCK_PARTS": max(1, min(64, COMBINED // (block_dv * rows))),
            "BLOCK_ROWS": rows,
            "BLOCK_DV": block_dv,
        }


def _block_others(problem: RaggedPageAttentionProblem) -> int:
    return min(MOST_OTHERS, power_of_two(problem.num_seqs + 1))
