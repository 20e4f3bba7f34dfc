"""Which tokens the rows of a block see, and from where on a block of tokens needs a mask."""

import typing

import triton
import triton.language as tl

SCANNED = tl.constexpr(512)  # table entries that are looked at together


@triton.jit
@typing.no_type_check
def ranges(
    first_row, q_len, context, length, position, sliding_window_ptr, GROUP: tl.constexpr,
    HAS_WINDOW: tl.constexpr, HAS_POSITIONS: tl.constexpr, TREE_WIDTH: tl.constexpr,
    CAUSAL: tl.constexpr, BLOCK_ROWS: tl.constexpr,
):  # fmt: skip
    """Return `begin`, `end`, `all_begin`, `all_end` and the window.

    Some row sees the tokens `[begin, end)`, every row those `[all_begin, all_end)`.
    """
    first_place = context + first_row // GROUP
    last_place = context + (tl.minimum(first_row + BLOCK_ROWS, q_len * GROUP) - 1) // GROUP
    begin = 0
    all_begin = 0
    end = tl.maximum(last_place + 1, 0)
    all_end = first_place + 1
    if TREE_WIDTH > 0:
        end = tl.where(last_place >= 0, length, 0)
        all_end = context
    if not CAUSAL:
        end = length
        all_end = length
    window = 0
    if HAS_WINDOW:
        window = tl.maximum(tl.load(sliding_window_ptr), 0)
        nearest = tl.min(position, 0) if HAS_POSITIONS else first_place
        farthest = tl.max(position, 0) if HAS_POSITIONS else last_place
        begin = tl.maximum(tl.maximum(nearest, 0) - (window - 1), 0)
        all_begin = tl.maximum(tl.maximum(farthest, 0) - (window - 1), 0)
        if HAS_POSITIONS and CAUSAL:  # new tokens may have any
            begin = tl.minimum(begin, tl.maximum(context, 0))
        begin = tl.minimum(begin, end)
        end = tl.where(window > 0, end, begin)
    if HAS_POSITIONS and CAUSAL:
        all_end = tl.minimum(all_end, context)
    return begin, end, all_begin, all_end, window


@triton.jit
@typing.no_type_check
def first_bad(table_ptr, begin, end, NUM_PAGES: tl.constexpr, PAGE_SIZE: tl.constexpr):
    """Return a token of `[begin, end)` before which every page is valid, `end` if all are."""
    bad = end
    last = tl.cdiv(end, PAGE_SIZE)
    for entry in tl.range(begin // PAGE_SIZE, last, SCANNED, num_stages=1):
        entries = entry + tl.arange(0, SCANNED)
        pages = tl.load(table_ptr + entries, mask=entries < last, other=0)
        is_bad = (pages < 0) | (pages >= NUM_PAGES)
        bad = tl.minimum(bad, tl.min(tl.where(is_bad, entries * PAGE_SIZE, end), 0))
    return bad


@triton.jit
@typing.no_type_check
def visible_tokens(
    exists,  # [EDGE_KV]
    key,  # [EDGE_KV]
    key_position,  # [EDGE_KV]
    tokens,  # [BLOCK_ROWS]
    place,  # [BLOCK_ROWS]
    position,  # [BLOCK_ROWS]
    context,
    window,
    tree_mask_ptr,
    HAS_WINDOW: tl.constexpr,
    TREE_WIDTH: tl.constexpr,
    CAUSAL: tl.constexpr,
):
    """Say which tokens of a block each row sees, `[BLOCK_ROWS, EDGE_KV]`."""
    visible = exists[None, :]
    if TREE_WIDTH > 0:
        visible = visible & (place >= 0)[:, None]
        column = (key - context)[None, :]
        tree_ptrs = tree_mask_ptr + tokens[:, None] * TREE_WIDTH + column
        is_column = visible & (column >= 0) & (column < TREE_WIDTH)
        sees = tl.load(tree_ptrs, mask=is_column, other=0)
        visible = visible & ((column < 0) | (sees != 0))
    elif CAUSAL:
        visible = visible & (key[None, :] <= place[:, None])
    if HAS_WINDOW:
        visible = visible & (position[:, None] - key_position[None, :] < window)
    return visible
