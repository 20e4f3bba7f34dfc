"""The loop of `page_attention_kernel` over a range of positions, of one sequence or of a pack."""

import typing

import triton
import triton.language as tl

from ejk.backends.triton._products import (
    for_products,
    in_order,
    of_tokens,
    query_key_products,
    slot_offsets,
)
from ejk.backends.triton._quantised import (
    for_subnormal,
    is_integer,
    is_subnormal,
    of_subnormal,
    pool_ptr,
)
from ejk.backends.triton._softmax import (
    LEAST_UNIT,
    LOG2E,
    add_block,
    scaled,
    scaled_values,
    where_visible,
    zero_acc,
)


@triton.jit
@typing.no_type_check
def attend(
    q,  # tiles of [rows, entries]
    begin,
    reach,  # no table entry from here on is loaded
    end,
    first,  # the first position that is visible
    is_first,  # of the plan's pieces of a sequence with a window
    length,  # of the context; of each row's, if `OWN_LENGTHS`
    kv_head,
    seq,  # whose table it is
    offs_kv,
    offs_entry,
    offs_head,  # [rows]
    mask_rows,  # [rows]
    key_ptr, value_ptr, block_tables_ptr, attn_scale_ptr, alibi_slopes_ptr, key_scale_ptr,
    value_scale_ptr, page_distances_ptr,
    HEAD_DIM: tl.constexpr, VALUE_HEAD_DIM: tl.constexpr, NUM_PAGES: tl.constexpr,
    PAGE_SIZE: tl.constexpr, MAX_BLOCKS: tl.constexpr, stride_k_page: tl.constexpr,
    stride_k_head: tl.constexpr, stride_k_slot: tl.constexpr, stride_v_page: tl.constexpr,
    stride_v_head: tl.constexpr, stride_v_slot: tl.constexpr, stride_half: tl.constexpr,
    SOFT_CAP: tl.constexpr, HAS_ALIBI: tl.constexpr, HAS_DISTANCES: tl.constexpr,
    CACHE: tl.constexpr, TILES: tl.constexpr, PTX: tl.constexpr, PRODUCTS: tl.constexpr,
    SCALES: tl.constexpr, LATENT: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_KV: tl.constexpr, STEP: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_D_REST: tl.constexpr, CHAIN: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_DV_REST: tl.constexpr, SAME_TILE: tl.constexpr, SPLIT_LOGITS: tl.constexpr,
    PAGES: tl.constexpr, SUMS: tl.constexpr,
    PLANNED_WINDOW: tl.constexpr,  # `begin` is the planned one
    OWN_LENGTHS: tl.constexpr,
):  # fmt: skip
    """Return `m`, `l` and `acc`, its tiles in order, of the tokens from `begin` to `end`."""
    BY_PAGE: tl.constexpr = PAGES > 0
    PER_TOKEN: tl.constexpr = SCALES == "token"
    # Codes of integers are finite whatever slot they lie in: what nobody sees is selected away, and
    # no load waits for a mask.
    INTEGER: tl.constexpr = is_integer(CACHE)
    # The scale and the subtraction of the maximum are one instruction.
    FOLDED: tl.constexpr = PRODUCTS == "float16" and SOFT_CAP == 0 and not HAS_ALIBI
    scale = tl.load(attn_scale_ptr)
    if SCALES == "head":
        scale *= tl.load(key_scale_ptr + kv_head)
    q, scale = for_products(q, scale, PRODUCTS)
    key_pool_ptr = pool_ptr(key_ptr, CACHE, TILES)
    value_pool_ptr = pool_ptr(value_ptr, CACHE, TILES)
    if HAS_ALIBI:
        slopes = tl.load(alibi_slopes_ptr + offs_head, mask=mask_rows, other=0.0)
    m = tl.full([ROWS], float("-inf"), tl.float32)
    l = tl.zeros([ROWS, SUMS] if SUMS > 0 else [ROWS], tl.float32)
    unit = LEAST_UNIT
    acc = zero_acc(ROWS, BLOCK_DV, BLOCK_DV_REST, TILES)
    begun = None
    if is_subnormal(CACHE):
        q, scale, begun = for_subnormal(q, scale, CACHE)
        begun = tl.broadcast_to(begun[:, None], [ROWS, BLOCK_KV])
        # More columns than rows, or every warp would take whole rows of all products.
        acc += (tl.zeros([ROWS, 2 * ROWS], tl.float32),)
    table_ptr = block_tables_ptr + seq * MAX_BLOCKS
    # These loads do not wait for the length: they go up to `reach`, not to `end`, and begin where
    # the plan's window began.
    tokens = begin + offs_entry
    reachable = (tokens < reach) & (tokens < MAX_BLOCKS * PAGE_SIZE)
    pages = tl.load(table_ptr + tokens // PAGE_SIZE, mask=reachable, other=-1)
    pages = tl.where(tokens < end, pages, -1)
    distance_ptr = page_distances_ptr + seq * MAX_BLOCKS
    if HAS_DISTANCES:
        distances = tl.load(distance_ptr + tokens // PAGE_SIZE, mask=reachable, other=0)
    if PLANNED_WINDOW:
        planned = begin
        begin = tl.maximum(tl.where(is_first, 0, planned), first)
        if begin != planned:  # a plan for other lengths, or another window
            tokens = begin + offs_entry
            seen = tokens < end
            pages = tl.load(table_ptr + tokens // PAGE_SIZE, mask=seen, other=-1)
            if HAS_DISTANCES:
                distances = tl.load(distance_ptr + tokens // PAGE_SIZE, mask=seen, other=0)

    # Loop over the context. The next block's page ids are loaded one iteration ahead, so that
    # the loads of keys and values depend on nothing that the pipeliner cannot see coming.
    for start in range(begin, end, STEP):
        positions = start + offs_kv
        page = of_tokens(pages, PAGES, PAGE_SIZE)  # [BLOCK_KV], or [1]
        visible = (page >= 0) & (page < NUM_PAGES)  # [BLOCK_KV]
        if INTEGER:
            page = tl.where(visible, page, 0)
        visible = visible & (positions < end if BY_PAGE else positions >= first)
        offs_page = page.to(tl.int64)
        offs_slot = positions % PAGE_SIZE
        k_ptrs = key_pool_ptr + kv_head * (stride_k_head // TILES)
        k_ptrs += slot_offsets(offs_page, offs_slot, stride_k_page, stride_k_slot, TILES)[:, None]
        v_ptrs = value_pool_ptr + stride_half // TILES + kv_head * (stride_v_head // TILES)
        v_ptrs += slot_offsets(offs_page, offs_slot, stride_v_page, stride_v_slot, TILES)[:, None]
        ahead = start + offs_entry + STEP
        pages = tl.load(table_ptr + ahead // PAGE_SIZE, mask=ahead < end, other=-1)

        # [ROWS, BLOCK_KV]
        s, k = query_key_products(
            q, k_ptrs, visible, HEAD_DIM, not INTEGER, BLOCK_D, BLOCK_D_REST, CHAIN, SPLIT_LOGITS,
            CACHE, TILES, PTX, begun,
        )  # fmt: skip
        value_scale = unit
        if PER_TOKEN:
            scale_ptrs = key_scale_ptr + kv_head * (stride_k_head // HEAD_DIM)
            offs_scale = slot_offsets(offs_page, offs_slot, stride_k_page, stride_k_slot, HEAD_DIM)
            value_scale = tl.load(scale_ptrs + offs_scale, mask=visible, other=0.0)  # [BLOCK_KV]
            s *= value_scale[None, :]
            if not LATENT:
                scale_ptrs = value_scale_ptr + kv_head * (stride_v_head // VALUE_HEAD_DIM)
                offs_scale = stride_half // HEAD_DIM + slot_offsets(
                    offs_page, offs_slot, stride_v_page, stride_v_slot, VALUE_HEAD_DIM
                )
                value_scale = tl.load(scale_ptrs + offs_scale, mask=visible, other=0.0)
        if not FOLDED:
            s = scaled(s, scale, SOFT_CAP)
        if HAS_ALIBI:
            if not OWN_LENGTHS:
                behind = positions - (length - 1)
            if HAS_DISTANCES:
                behind = of_tokens(distances, PAGES, PAGE_SIZE) + offs_slot
                distances = tl.load(distance_ptr + ahead // PAGE_SIZE, mask=ahead < end, other=0)
            behind = positions[None, :] - (length - 1)[:, None] if OWN_LENGTHS else behind[None, :]
            s += (slopes * LOG2E)[:, None] * behind.to(tl.float32)
        s = where_visible(s, visible[None, :], start < end, SPLIT_LOGITS)
        values = k if SAME_TILE else v_ptrs
        m, l, unit, acc = add_block(
            s, scale, m, l, unit, acc, values, value_scale, visible, q[0].dtype, VALUE_HEAD_DIM,
            not INTEGER, FOLDED, PER_TOKEN, BLOCK_DV, BLOCK_DV_REST, SAME_TILE, CACHE, TILES, PTX,
            PRODUCTS == "bf16x3",
        )  # fmt: skip

    if SUMS > 0:
        l = tl.sum(l, 1)
    acc = in_order(of_subnormal(acc, CACHE) if is_subnormal(CACHE) else acc, TILES)
    if FOLDED:
        # A logit that overflows makes a row NaN. As one instruction with the subtraction of `m` it
        # does not overflow, and its weight is 0.
        l = tl.where(m == float("inf"), float("nan"), l)
    acc = scaled_values(acc, l, unit, kv_head, key_scale_ptr, value_scale_ptr, SCALES, LATENT)
    return m, l, acc
