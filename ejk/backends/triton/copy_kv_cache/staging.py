"""Takes sources in conflict to memory of their own, which nothing overwrites."""

import typing

import triton
import triton.language as tl

from ejk.backends.triton.copy_kv_cache.units import in_pool


@triton.jit
@typing.no_type_check
def stage(
    key_cache_ptr, value_cache_ptr, key_scale_ptr, value_scale_ptr,
    key_stage_ptr, value_stage_ptr, key_scale_stage_ptr, value_scale_stage_ptr,
    sources, copies, is_staged,
    NUM_PAGES: tl.constexpr, OUTER: tl.constexpr, INNER: tl.constexpr, SLOTS: tl.constexpr,
    K_WIDTH: tl.constexpr, V_WIDTH: tl.constexpr, SCALE_WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Take the units of some copies, in every pool that there is, to where these copies lie."""
    _stage(
        key_cache_ptr, key_stage_ptr, sources, copies, is_staged,
        NUM_PAGES, OUTER, INNER, SLOTS, K_WIDTH, BLOCK,
    )  # fmt: skip
    if V_WIDTH > 0:
        _stage(
            value_cache_ptr, value_stage_ptr, sources, copies, is_staged,
            NUM_PAGES, OUTER, INNER, SLOTS, V_WIDTH, BLOCK,
        )  # fmt: skip
    if SCALE_WIDTH > 0:
        _stage(
            key_scale_ptr, key_scale_stage_ptr, sources, copies, is_staged,
            NUM_PAGES, OUTER, INNER, SLOTS, SCALE_WIDTH, BLOCK,
        )  # fmt: skip
        if V_WIDTH > 0:
            _stage(
                value_scale_ptr, value_scale_stage_ptr, sources, copies, is_staged,
                NUM_PAGES, OUTER, INNER, SLOTS, SCALE_WIDTH, BLOCK,
            )  # fmt: skip


@triton.jit
@typing.no_type_check
def _stage(
    pool_ptr, stage_ptr, sources, copies, is_staged,
    NUM_PAGES: tl.constexpr, OUTER: tl.constexpr, INNER: tl.constexpr, SLOTS: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    UNIT: tl.constexpr = OUTER * INNER * WIDTH
    for start in range(0, UNIT, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        mask = is_staged[:, None] & (offs < UNIT)[None, :]
        source = in_pool(sources, offs, NUM_PAGES, INNER, SLOTS, WIDTH)
        units = tl.load(pool_ptr + source, mask=mask)  # other lanes are not stored
        tl.store(stage_ptr + copies.to(tl.int64)[:, None] * UNIT + offs[None, :], units, mask=mask)
