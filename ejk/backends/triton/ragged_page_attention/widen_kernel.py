"""Copies pages of a quantised pool in the type of the queries, which holds each code exactly.

Grid of `widen_pages_kernel`, one axis, fastest first: block of a page, page of the copy, KV head
where a pool's heads come first. The copy of no page is not written.
"""

import typing

import triton
import triton.language as tl

from ejk.backends.triton._products import interleaved
from ejk.backends.triton._quantised import pool_ptr, tiles_of


@triton.jit
@typing.no_type_check
def widen_pages_kernel(
    # inputs
    cache_ptr,  # [.., num_pages, page_width], some values an element
    pages_ptr,  # int32 [num_copies]: the page that each is a copy of, -1 for none
    # outputs
    copies_ptr,  # [.., num_copies, page_width]
    # sizes
    NUM_PAGES: tl.constexpr,
    NUM_COPIES: tl.constexpr,
    PAGE_WIDTH: tl.constexpr,  # values of a page that lie one after the other
    # types
    CACHE: tl.constexpr,  # "int8", "int4", "e4m3", "e5m2"
    TILES: tl.constexpr,  # values that are loaded as one element
    PTX: tl.constexpr,  # converts them
    # blocks
    BLOCK: tl.constexpr,  # values
):
    # Which work is mine: a block of a page.
    pid = tl.program_id(0)
    block = pid % tl.cdiv(PAGE_WIDTH, BLOCK)
    copy = pid // tl.cdiv(PAGE_WIDTH, BLOCK)
    page = tl.load(pages_ptr + copy % NUM_COPIES).to(tl.int64)
    if page < 0:
        return
    outer = (copy // NUM_COPIES).to(tl.int64)

    # Load, convert, write.
    offs = block * (BLOCK // TILES) + tl.arange(0, BLOCK // TILES)
    source = (outer * NUM_PAGES + page) * (PAGE_WIDTH // TILES)
    x = tl.load(pool_ptr(cache_ptr, CACHE, TILES) + source + offs, mask=offs < PAGE_WIDTH // TILES)
    tiles = tiles_of(x, copies_ptr.dtype.element_ty, CACHE, TILES, PTX)
    offs = block * BLOCK + tl.arange(0, BLOCK)
    copy_ptrs = copies_ptr + copy.to(tl.int64) * PAGE_WIDTH + offs
    tl.store(copy_ptrs, interleaved(tiles, 0, TILES), mask=offs < PAGE_WIDTH)
