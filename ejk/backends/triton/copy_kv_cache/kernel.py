"""Copies slots or pages inside of pools, in place: the second of two launches.

Grid, one axis, fastest first: block of `BLOCK` elements of a unit, a slot or a page; block of
`BLOCK_COPIES` copies.

Programs run in any order, so none may read what another writes. A copy whose source is some copy's
target is in conflict: shifts, swaps and cycles are. The first launch, `mark_kernel` or for few
copies `stage_kernel`, tells how each copy goes, and takes the sources in conflict to memory of
their own (`stage`). This one writes every target, from the pool or from there. So what is not in
conflict is read once and written once.

Programs that each own some columns of all copies could keep the order in one launch, but there
would be as few as a slot has columns; and chains that are followed, last target first, take as long
as they are.

A pool is seen as `[OUTER, NUM_PAGES, INNER, SLOTS, WIDTH]`, which every layout is; a unit is
`[OUTER, INNER, WIDTH]` of it. To copy pages there is one slot to a page, a wide one.

Source: own. What asks for it: copies on write (vLLM, Kwon et al., 2023, arXiv:2309.06180), accepted
paths of draft trees (EAGLE, Li et al., 2024, arXiv:2401.15077).
"""

import typing

import triton
import triton.language as tl

from ejk.backends.triton.copy_kv_cache.units import in_pool, is_unit


@triton.jit
@typing.no_type_check
def copy_kv_cache_kernel(
    # inputs
    source_ptr,  # int32 [num_copies]
    target_ptr,  # int32 [num_copies]
    wins_ptr,  # int32 [num_copies], read of valid copies alone
    staged_ptr,  # int32 [num_copies], the same
    key_stage_ptr,  # [num_copies, OUTER, INNER, K_WIDTH]
    value_stage_ptr,
    key_scale_stage_ptr,
    value_scale_stage_ptr,
    # inputs and outputs: what is not written stays
    value_scale_ptr,  # float32, the axes of a cache without the last; absent if there are none
    key_scale_ptr,
    key_cache_ptr,  # four axes, or five of fused pools
    value_cache_ptr,  # absent if there are no values, or in fused pools
    # sizes
    NUM_COPIES: tl.constexpr,
    NUM_PAGES: tl.constexpr,
    OUTER: tl.constexpr,
    INNER: tl.constexpr,
    SLOTS: tl.constexpr,
    K_WIDTH: tl.constexpr,
    V_WIDTH: tl.constexpr,  # 0: there is no pool of values
    SCALE_WIDTH: tl.constexpr,  # 0: there are no pools of scales
    # blocks
    BLOCK_COPIES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    WIDTH: tl.constexpr = K_WIDTH if K_WIDTH > V_WIDTH else V_WIDTH
    BLOCKS: tl.constexpr = tl.cdiv(OUTER * INNER * WIDTH, BLOCK)

    # Which work is mine.
    pid = tl.program_id(0)
    start = pid % BLOCKS * BLOCK
    copies = pid // BLOCKS * BLOCK_COPIES + tl.arange(0, BLOCK_COPIES)
    is_copy = copies < NUM_COPIES

    # Load once: where from, where to, and how.
    sources = tl.load(source_ptr + copies, mask=is_copy, other=-1)
    targets = tl.load(target_ptr + copies, mask=is_copy, other=-1)
    is_valid = is_unit(sources, NUM_PAGES, SLOTS) & is_unit(targets, NUM_PAGES, SLOTS)
    is_copy = is_valid & (sources != targets)
    wins = tl.load(wins_ptr + copies, mask=is_copy, other=0) == 1
    is_staged = tl.load(staged_ptr + copies, mask=is_copy, other=0) == 1

    # All that is loaded is on its way before anything is stored: the compiler keeps the order.
    keys = _load(
        key_cache_ptr, key_stage_ptr, sources, wins, is_staged, copies, start,
        NUM_PAGES, OUTER, INNER, SLOTS, K_WIDTH, BLOCK,
    )  # fmt: skip
    if V_WIDTH > 0:
        values = _load(
            value_cache_ptr, value_stage_ptr, sources, wins, is_staged, copies, start,
            NUM_PAGES, OUTER, INNER, SLOTS, V_WIDTH, BLOCK,
        )  # fmt: skip

    # Write. A scale of a row is little.
    if SCALE_WIDTH > 0:
        if start < OUTER * INNER * SCALE_WIDTH:
            scales = _load(
                key_scale_ptr, key_scale_stage_ptr, sources, wins, is_staged, copies, start,
                NUM_PAGES, OUTER, INNER, SLOTS, SCALE_WIDTH, BLOCK,
            )  # fmt: skip
            _store(
                key_scale_ptr, scales, targets, wins, start,
                NUM_PAGES, OUTER, INNER, SLOTS, SCALE_WIDTH, BLOCK,
            )  # fmt: skip
            if V_WIDTH > 0:
                scales = _load(
                    value_scale_ptr, value_scale_stage_ptr, sources, wins, is_staged, copies, start,
                    NUM_PAGES, OUTER, INNER, SLOTS, SCALE_WIDTH, BLOCK,
                )  # fmt: skip
                _store(
                    value_scale_ptr, scales, targets, wins, start,
                    NUM_PAGES, OUTER, INNER, SLOTS, SCALE_WIDTH, BLOCK,
                )  # fmt: skip
    _store(
        key_cache_ptr, keys, targets, wins, start,
        NUM_PAGES, OUTER, INNER, SLOTS, K_WIDTH, BLOCK,
    )  # fmt: skip
    if V_WIDTH > 0:
        _store(
            value_cache_ptr, values, targets, wins, start,
            NUM_PAGES, OUTER, INNER, SLOTS, V_WIDTH, BLOCK,
        )  # fmt: skip


@triton.jit
@typing.no_type_check
def _load(
    pool_ptr, stage_ptr, sources, wins, is_staged, copies, start,
    NUM_PAGES: tl.constexpr, OUTER: tl.constexpr, INNER: tl.constexpr, SLOTS: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Load a block of units, from the pool or from where they are staged."""
    UNIT: tl.constexpr = OUTER * INNER * WIDTH
    offs = start + tl.arange(0, BLOCK)
    source = pool_ptr + in_pool(sources, offs, NUM_PAGES, INNER, SLOTS, WIDTH)
    staged = stage_ptr + copies.to(tl.int64)[:, None] * UNIT + offs[None, :]
    # Lanes that are masked off are not stored, whatever they hold.
    where = tl.where(is_staged[:, None], staged, source)
    return tl.load(where, mask=wins[:, None] & (offs < UNIT)[None, :])


@triton.jit
@typing.no_type_check
def _store(
    pool_ptr, units, targets, wins, start,
    NUM_PAGES: tl.constexpr, OUTER: tl.constexpr, INNER: tl.constexpr, SLOTS: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    UNIT: tl.constexpr = OUTER * INNER * WIDTH
    offs = start + tl.arange(0, BLOCK)
    target = in_pool(targets, offs, NUM_PAGES, INNER, SLOTS, WIDTH)
    tl.store(pool_ptr + target, units, mask=wins[:, None] & (offs < UNIT)[None, :])
