"""How one `ejk.ragged_page_attention` problem is cut for a GPU: pure functions of both."""

import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp

from ejk.backends.page_attention import PageAttentionProblem, PagedProblem
from ejk.backends.page_attention_plan import EVEN_SHARE
from ejk.backends.ragged_page_attention import RaggedPageAttentionProblem
from ejk.backends.triton._target import Target
from ejk.backends.triton.page_attention_launch import (
    GRANULE,
    Launch,
    Tuning,
    choose_cuts,
    power_of_two,
    stride_constants,
    two_parts,
)

ITEM = 8  # integers of an item of the plan
# Query rows that one narrow block may have: more are wide, or several narrow ones.
MOST_NARROW_ROWS = 64
# Query rows, tokens and pipeline stages of wide blocks: of each the largest that fits, in this
# order. Not measured; four stages compile to more registers, and to spills on sm_89.
WIDE_ROWS, WIDE_KV, WIDE_STAGES = (128, 64, 32, 16), (128, 64, 32, 16), (3, 2)
WIDE_WARPS = 8
# What a thread may hold of accumulators, logits and weights, in 32-bit registers, where the product
# takes its queries from shared memory, where from registers, and on AMD, where copies pass through
# registers, too. More spills: see `tests/test_ragged_triton_compile.py`.
HELD_WGMMA, HELD_MMA, HELD_AMD = 124, 130, 64
# Sequences of a planning program, those that it compares them with at a time, items and rows to
# clear that it writes at a time. Not measured.
BLOCK_SEQS, MOST_OTHERS, BLOCK_ITEMS, BLOCK_TOKENS = 4, 1024, 64, 16
COMBINED = 8192  # entries of parts that a program of the combination holds


@dataclasses.dataclass(frozen=True)
class RaggedTuning:
    """What a caller may fix; None leaves it to `RaggedLaunch.of`."""

    block_rows: int | None = None
    block_kv: int | None = None
    num_warps: int | None = None
    num_stages: int | None = None
    few_block_kv: int | None = None
    few_num_warps: int | None = None
    few_num_stages: int | None = None


@dataclasses.dataclass(frozen=True)
class Rows:
    """One launch of the attention kernel: blocks of so many query rows, and their items.

    With `peel`, blocks of keys that need no mask are taken apart.
    """

    rows: int
    block_kv: int
    num_warps: int
    num_stages: int
    shared_memory: int  # bytes of a program, at most
    peel: bool
    cuts: int  # pieces to cut contexts in, about; 0: none is cut
    max_blocks: int  # of rows

    @property
    def max_parts(self) -> int:
        """Pieces of blocks that are cut: they have more than two chunks, and pieces of one."""
        return self.cuts * 3 // 2

    @property
    def max_items(self) -> int:
        return self.max_blocks + self.max_parts

    @property
    def max_splits(self) -> int:
        """Blocks in several pieces: only what is above two cuts' share is."""
        return min(self.max_blocks, self.cuts // 2)


@dataclasses.dataclass(frozen=True)
class RaggedLaunch:
    """How one problem is cut and run.

    The plan is one array, `[plan_rows, ITEM]` of int32:

    - row 0: items and splits of narrow blocks, then of wide ones;
    - the narrow items, then the wide ones: sequence, its first token and how many it has, block of
      rows, piece, pieces, part or -1;
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
        narrow = _narrow_rows(problem, tuning, target, at_once)
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
        wide = _wide_rows(problem, tuning, target)
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

    def types(self, problem: RaggedPageAttentionProblem) -> dict[str, jax.ShapeDtypeStruct | None]:
        """Return the plan's array, the memory for parts, and the results."""
        out, lse = dataclasses.replace(problem, return_lse=True).results
        rows = (max(x.max_parts * x.rows for x in self.launches), problem.num_kv_heads)
        parts = jax.ShapeDtypeStruct((*rows, problem.value_head_dim), jnp.float32)
        return {
            "work_ptr": jax.ShapeDtypeStruct((self.first_rows[-1], ITEM), jnp.int32),
            "part_out_ptr": parts if rows[0] else None,
            "part_lse_ptr": jax.ShapeDtypeStruct(rows, jnp.float32) if rows[0] else None,
            "out_ptr": out,
            "lse_ptr": lse,
        }

    def planners(self, problem: RaggedPageAttentionProblem) -> int:
        return -(-problem.num_seqs // BLOCK_SEQS)

    def plan_grid(self, problem: RaggedPageAttentionProblem) -> int:
        return self.planners(problem) + -(-problem.total_tokens // BLOCK_TOKENS)

    def plan_constants(self, problem: RaggedPageAttentionProblem) -> dict[str, Any]:
        _, first_wide, first_narrow_split, first_wide_split, _ = self.first_rows
        return {
            "ITEM": ITEM,
            "NUM_SEQS": problem.num_seqs,
            "TOTAL_TOKENS": problem.total_tokens,
            "NUM_HEADS": problem.num_heads,
            "GROUP": problem.group,
            "VALUE_HEAD_DIM": problem.value_head_dim,
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
            "NUM_PLANNERS": self.planners(problem),
            "BLOCK_SEQS": BLOCK_SEQS,
            "BLOCK_OTHERS": min(MOST_OTHERS, power_of_two(problem.num_seqs + 1)),
            "BLOCK_ITEMS": BLOCK_ITEMS,
            "BLOCK_TOKENS": BLOCK_TOKENS,
        }

    def grid(self, problem: RaggedPageAttentionProblem, which: int) -> int:
        return self.launches[which].max_items * problem.num_kv_heads

    def constants(self, problem: RaggedPageAttentionProblem, which: int) -> dict[str, Any]:
        rows = self.launches[which]
        block_d, block_dv = two_parts(problem.head_dim), two_parts(problem.value_head_dim)
        return {
            "ITEM": ITEM,
            "NUM_HEADS": problem.num_heads,
            "NUM_KV_HEADS": problem.num_kv_heads,
            "HEAD_DIM": problem.head_dim,
            "VALUE_HEAD_DIM": problem.value_head_dim,
            "NUM_PAGES": problem.num_pages,
            "PAGE_SIZE": problem.page_size,
            "MAX_BLOCKS": problem.max_blocks,
            "COUNT": 2 * which,
            "FIRST_ITEM": self.first_rows[which],
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
            "BLOCK_D": block_d[0],
            "BLOCK_D_REST": block_d[1],
            "BLOCK_DV": block_dv[0],
            "BLOCK_DV_REST": block_dv[1],
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


def _narrow_rows(problem, tuning: RaggedTuning, target: Target, rows: int) -> Rows:
    """Take the blocks of decode with as many heads a group as there are rows."""
    facts = {f.name: getattr(problem, f.name) for f in dataclasses.fields(PagedProblem)}
    facts["num_heads"] = rows * problem.num_kv_heads
    decode = PageAttentionProblem(**facts, num_splits=1, plan=None, visible_bound=1)
    own = Tuning(tuning.few_block_kv, tuning.few_num_warps, tuning.few_num_stages)
    launch = Launch.of(decode, own, target)
    shared = launch.shared_memory(decode, target)
    blocks = (launch.block_group, launch.block_kv, launch.num_warps, launch.num_stages)
    return Rows(*blocks, shared, peel=False, cuts=0, max_blocks=0)


def _wide_rows(problem, tuning: RaggedTuning, target: Target) -> Rows:
    """Choose the largest blocks that fit the target's shared memory and registers."""
    fixed = (tuning.block_rows, tuning.block_kv, tuning.num_stages)
    choices = [
        (value,) if value else most for value, most in zip(fixed, (WIDE_ROWS, WIDE_KV, WIDE_STAGES))
    ]
    num_warps = tuning.num_warps or WIDE_WARPS
    found = None
    one_stage = (*choices[:2], choices[2] if tuning.num_stages else (1,))
    candidates = itertools.chain(itertools.product(*choices), itertools.product(*one_stage))
    for rows, block_kv, num_stages in candidates:
        shared = _wide_shared_memory(problem, target, rows, block_kv, num_warps, num_stages)
        found = Rows(rows, block_kv, num_warps, num_stages, shared, peel=True, cuts=0, max_blocks=0)
        if shared <= target.shared_memory and _fits_registers(problem, target, found):
            break  # or the smallest does not fit either: `limits` says so
    assert found is not None
    return found


def _is_hopper(target: Target) -> bool:
    """Say whether products take their operands from shared memory, and are waited for."""
    capability = target.compute_capability
    return capability is not None and 90 <= capability < 120


def _widths(problem) -> tuple[int, int]:
    return sum(two_parts(problem.head_dim)), sum(two_parts(problem.value_head_dim))


def _fits_registers(problem, target: Target, rows: Rows) -> bool:
    d, dv = _widths(problem)
    if problem.dtype == jnp.float32:  # taken on the ordinary cores, operands from registers
        return rows.rows <= 32 and rows.block_kv <= 32
    lanes, limit = (32, HELD_MMA) if target.stages_queries else (64, HELD_AMD)
    logits = rows.block_kv * 3 // 2  # and the weights, in 16 bits
    if problem.tree_width:
        logits += 2 * rows.block_kv  # pointers to the mask
    if _is_hopper(target):
        limit = HELD_WGMMA
    else:
        logits += d // 2
    return rows.rows * (dv + logits) <= limit * lanes * rows.num_warps


def _wide_shared_memory(
    problem, target: Target, rows: int, block_kv: int, num_warps: int, num_stages: int
) -> int:
    """Bound the shared memory of a program, in bytes."""
    d, dv = _widths(problem)
    size = problem.dtype.itemsize
    # A product that is waited for later keeps its block of values, and so a buffer.
    buffers = num_stages if _is_hopper(target) else num_stages - 1
    streamed = size * block_kv * ((d + dv) * buffers if buffers else max(d, dv))
    queries = size * rows * d
    weights = rows * block_kv * (4 if problem.tree_width else size) + 1024
    if target.compute_capability == 90 and size == 2 and not problem.tree_width:
        if rows >= 16 * num_warps:  # each warp multiplies weights of its own, from registers
            weights = 1024
    if not target.stages_queries:  # they pass through before anything streams
        return max(queries, streamed + weights)
    return streamed + queries + weights
