"""Tells of few copies how each goes, by comparisons: the first of two launches, see `kernel`.

Grid, one axis: block of `BLOCK_COPIES` copies. In registers: which of them are overwritten, and
which are staged.

    overwritten_i = any over valid j > i of target_j = target_i
    staged_i      = any over valid j of target_j = source_i

A program compares its own copies with all others, `BLOCK_OTHERS` at a time, and takes the sources
in conflict to memory of their own; where there are none, that is all it does. The comparisons grow
with the square of the copies: many go by a table, see `mark_kernel`, and where the pool is too
large for one, the launch is given the routes (`IS_COMPARED`).
"""

import typing

import triton
import triton.language as tl

from ejk.backends.triton.copy_kv_cache.staging import stage
from ejk.backends.triton.copy_kv_cache.units import is_unit


@triton.jit
@typing.no_type_check
def stage_kernel(
    # inputs
    source_ptr,  # int32 [num_copies]
    target_ptr,  # int32 [num_copies]
    given_route_ptr,  # int32 [num_copies], absent if copies are compared
    value_scale_ptr,  # float32, the axes of a cache without the last; absent if there are none
    key_scale_ptr,
    key_cache_ptr,  # four axes, or five of fused pools
    value_cache_ptr,  # absent if there are no values, or in fused pools
    # outputs
    wins_ptr,  # int32 [num_copies]: 1 where a copy writes
    staged_ptr,  # int32 [num_copies]: 1 where what it writes is staged
    key_stage_ptr,  # [num_copies, OUTER, INNER, K_WIDTH], written where a copy is staged
    value_stage_ptr,
    key_scale_stage_ptr,
    value_scale_stage_ptr,
    # sizes
    NUM_COPIES: tl.constexpr,
    NUM_PAGES: tl.constexpr,
    OUTER: tl.constexpr,
    INNER: tl.constexpr,
    SLOTS: tl.constexpr,
    K_WIDTH: tl.constexpr,
    V_WIDTH: tl.constexpr,  # 0: there is no pool of values
    SCALE_WIDTH: tl.constexpr,  # 0: there are no pools of scales
    # features
    IS_COMPARED: tl.constexpr,
    # blocks
    BLOCK_COPIES: tl.constexpr,
    BLOCK_OTHERS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # Which work is mine.
    copies = tl.program_id(0) * BLOCK_COPIES + tl.arange(0, BLOCK_COPIES)
    is_copy = copies < NUM_COPIES

    # Load once: where from and where to.
    sources = tl.load(source_ptr + copies, mask=is_copy, other=-1)
    targets = tl.load(target_ptr + copies, mask=is_copy, other=-1)

    # Loop over the copies: which of mine are overwritten, and the sources of which?
    if IS_COMPARED:
        overwritten = tl.zeros([BLOCK_COPIES, BLOCK_OTHERS], tl.int32)
        staged = tl.zeros([BLOCK_COPIES, BLOCK_OTHERS], tl.int32)
        for start in range(0, NUM_COPIES, BLOCK_OTHERS):
            others = start + tl.arange(0, BLOCK_OTHERS)
            other_sources = tl.load(source_ptr + others, mask=others < NUM_COPIES, other=-1)
            other_targets = tl.load(target_ptr + others, mask=others < NUM_COPIES, other=-1)
            # A copy from outside the pool overwrites nothing.
            other_targets = tl.where(is_unit(other_sources, NUM_PAGES, SLOTS), other_targets, -1)
            is_later = others[None, :] > copies[:, None]
            overwritten |= ((other_targets[None, :] == targets[:, None]) & is_later).to(tl.int32)
            staged |= (other_targets[None, :] == sources[:, None]).to(tl.int32)
        is_valid = is_unit(sources, NUM_PAGES, SLOTS) & is_unit(targets, NUM_PAGES, SLOTS)
        wins = (is_valid & (tl.max(overwritten, 1) == 0) & (sources != targets)).to(tl.int32)
        staged = tl.max(staged, 1) * wins
    else:
        routes = tl.load(given_route_ptr + copies, mask=is_copy, other=-1)
        wins, staged = (routes >= 0).to(tl.int32), (routes == 1).to(tl.int32)
    tl.store(wins_ptr + copies, wins, mask=is_copy)
    tl.store(staged_ptr + copies, staged, mask=is_copy)

    # Write: the sources in conflict, elsewhere.
    if tl.max(staged, 0) == 1:
        stage(
            key_cache_ptr, value_cache_ptr, key_scale_ptr, value_scale_ptr,
            key_stage_ptr, value_stage_ptr, key_scale_stage_ptr, value_scale_stage_ptr,
            sources, copies, staged == 1,
            NUM_PAGES, OUTER, INNER, SLOTS, K_WIDTH, V_WIDTH, SCALE_WIDTH, BLOCK,
        )  # fmt: skip
