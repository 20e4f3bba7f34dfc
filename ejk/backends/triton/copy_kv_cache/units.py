"""Units of pools, slots or pages: which there are, and where their elements lie."""

import typing

import triton
import triton.language as tl


@triton.jit
@typing.no_type_check
def is_unit(ids, NUM_PAGES: tl.constexpr, SLOTS: tl.constexpr):
    """Say which slots, or pages, are those of the pool."""
    return (ids >= 0) & (ids < NUM_PAGES * SLOTS)


@triton.jit
@typing.no_type_check
def in_pool(
    ids, offs,
    NUM_PAGES: tl.constexpr, INNER: tl.constexpr, SLOTS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Return where elements `offs` of units lie, `[copies, BLOCK]`, from the pool's start."""
    PAGE: tl.constexpr = INNER * SLOTS * WIDTH
    begin = (ids // SLOTS).to(tl.int64) * PAGE + (ids % SLOTS).to(tl.int64) * WIDTH
    row = offs // WIDTH
    inner = (row % INNER).to(tl.int64) * (SLOTS * WIDTH)
    outer = (row // INNER).to(tl.int64) * (NUM_PAGES * PAGE)
    return begin[:, None] + (outer + inner + offs % WIDTH)[None, :]
