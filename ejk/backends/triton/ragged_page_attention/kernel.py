"""Attention of any number of query tokens a sequence over paged keys and values.

Grid of `ragged_page_attention_kernel`, one axis, fastest first: KV head, item of the plan: a piece
of what a block of query rows sees. In the first launch more programs follow, which clear the rows
of no sequence. (The plan's launch could not do so: all layers of a step share it, and each layer
has a result of its own.) The rows of a sequence and a KV head are its new tokens times the heads of
the group: row `r` is head `r % GROUP` of new token `r // GROUP`. In registers: the queries
`[BLOCK_ROWS, head_dim]`, the running maximum `m`, the sum `l` and the weighted values `acc`; keys
and values stream through shared memory, a block of `BLOCK_KV` tokens at a time. In log2 units, with
`s` a block's logits:

    m' = max(m, max(s));  p = 2^(s - m');  alpha = 2^(m - m')
    l' = alpha * l + sum(p);  acc' = alpha * acc + p . v;  lse = m + log2(l)

With `PEEL`, tokens that need a mask come first, in blocks of `EDGE_KV`: those that some rows do not
see, those from the first bad page on, and the last ones, which fill no block. Then come blocks of
`BLOCK_KV` without a mask: every row sees all of their tokens, and all of their pages are valid. A
head dimension that is no power of two may be taken in two parts, as by `page_attention_kernel`.

Source: FlashAttention-2 (Dao, 2023, arXiv:2307.08691); heads packed with tokens after Ragged Paged
Attention (arXiv:2604.15464).
"""

import typing

import triton
import triton.language as tl

from ejk.backends.triton._products import (
    for_products,
    in_order,
    load_queries,
    of_tokens,
    query_key_products,
    slot_offsets,
    token_ptrs,
)
from ejk.backends.triton._quantised import pool_ptr
from ejk.backends.triton._softmax import (
    LEAST_UNIT,
    LN2,
    LOG2E,
    add_block,
    add_sink,
    scaled,
    scaled_rows,
    scaled_values,
    where_visible,
    write_rows,
    zero_acc,
)
from ejk.backends.triton.ragged_page_attention.mask import first_bad, ranges, visible_tokens
from ejk.backends.triton.ragged_page_attention.rows import clear_rows, rows_of_block


@triton.jit
@typing.no_type_check
def ragged_page_attention_kernel(
    # inputs
    query_ptr,  # [total_tokens, num_heads, head_dim]
    cu_q_lens_ptr,  # int32 [num_seqs + 1]
    key_ptr,  # pool of pages, its axes in any order
    value_ptr,  # the same, or the very pool of the keys
    block_tables_ptr,  # int32 [num_seqs, max_blocks]: page ids
    attn_scale_ptr,  # float32 []
    sliding_window_ptr,  # int32 []
    sinks_ptr,  # float32 [num_heads]
    alibi_slopes_ptr,  # float32 [num_heads]
    key_scale_ptr,  # float32 [num_kv_heads], or of each token: the pool without its last axis
    value_scale_ptr,  # the same
    positions_ptr,  # int32 [total_tokens]
    tree_mask_ptr,  # bool [total_tokens, tree_width]
    work_ptr,  # int32 [rows, ITEM]: the plan
    # outputs of the first launch, which the next one adds to
    part_out_ptr,  # float32 [parts * block_rows, num_kv_heads, value_head_dim]
    part_lse_ptr,  # float32, log2 [parts * block_rows, num_kv_heads]
    out_ptr,  # [total_tokens, num_heads, value_head_dim]
    lse_ptr,  # float32 [total_tokens, num_heads]
    # sizes
    NUM_SEQS: tl.constexpr,
    TOTAL_TOKENS: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    VALUE_HEAD_DIM: tl.constexpr,
    NUM_PAGES: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    MAX_BLOCKS: tl.constexpr,
    ITEM: tl.constexpr,  # integers of an item of the plan
    COUNT: tl.constexpr,  # which integer of the plan counts this launch's items
    FIRST_ITEM: tl.constexpr,  # the row of the first of them
    MAX_ITEMS: tl.constexpr,
    CLEARS: tl.constexpr,  # programs after those of the items clear rows of no sequence
    HAS_PARTS: tl.constexpr,
    # strides: constants, or no load is wider than one element
    stride_k_page: tl.constexpr,
    stride_k_head: tl.constexpr,
    stride_k_slot: tl.constexpr,
    stride_v_page: tl.constexpr,
    stride_v_head: tl.constexpr,
    stride_v_slot: tl.constexpr,
    stride_half: tl.constexpr,  # from the keys to the values of a page of both; 0 for none
    # features
    SOFT_CAP: tl.constexpr,  # 0 for none
    HAS_WINDOW: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    HAS_ALIBI: tl.constexpr,
    HAS_POSITIONS: tl.constexpr,
    TREE_WIDTH: tl.constexpr,  # 0 for none
    CAUSAL: tl.constexpr,  # else every row sees all tokens, and keys have no `positions`
    # types
    CACHE: tl.constexpr,  # "int8", "int4", "e4m3", "e5m2"; "" for floats
    TILES: tl.constexpr,  # values of a pool that are loaded as one element
    PTX: tl.constexpr,  # converts them
    PRODUCTS: tl.constexpr,  # "float16", "float32"; "" for the type of queries and cache
    SCALES: tl.constexpr,  # "head", "token", or "none"
    LATENT: tl.constexpr,  # the values are the keys' first entries
    # blocks
    PEEL: tl.constexpr,
    GRANULE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_KV: tl.constexpr,
    EDGE_KV: tl.constexpr,  # the same for blocks that are masked
    BLOCK_D: tl.constexpr,
    BLOCK_D_REST: tl.constexpr,  # 0 for none
    CHAIN: tl.constexpr,  # products that are added up apart from others, of a logit
    BLOCK_DV: tl.constexpr,
    BLOCK_DV_REST: tl.constexpr,  # 0 for none
    SAME_TILE: tl.constexpr,  # the values are the keys' first entries, loaded once for both
    SPLIT_LOGITS: tl.constexpr,  # over two warpgroups: see `where_visible`
    COPY_FIRST: tl.constexpr,  # the next block, before the softmax of this one
    PAGES: tl.constexpr,  # that a block's tokens are or lie in; 0: not known
    EDGE_PAGES: tl.constexpr,  # the same of blocks that are masked
    BLOCK_BOUNDS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
):
    GROUP: tl.constexpr = NUM_HEADS // NUM_KV_HEADS
    tl.static_assert(NUM_HEADS % NUM_KV_HEADS == 0)
    tl.static_assert(BLOCK_D + BLOCK_D_REST >= HEAD_DIM)
    tl.static_assert(BLOCK_DV + BLOCK_DV_REST >= VALUE_HEAD_DIM)
    tl.static_assert(BLOCK_KV % EDGE_KV == 0)
    tl.static_assert(HEAD_DIM % TILES == 0 and VALUE_HEAD_DIM % TILES == 0)
    # Without a mask the scale and the subtraction of the maximum are one instruction; with one,
    # too, where `page_attention_kernel` does so.
    FOLDED: tl.constexpr = SOFT_CAP == 0 and not HAS_ALIBI
    EDGE_FOLDED: tl.constexpr = FOLDED and PRODUCTS == "float16"
    PER_TOKEN: tl.constexpr = SCALES == "token"

    # Which work is mine: a KV head, a block of rows, a piece of what they see.
    kv_head = (tl.program_id(0) % NUM_KV_HEADS).to(tl.int64)
    item = tl.program_id(0) // NUM_KV_HEADS
    if CLEARS:
        if item >= MAX_ITEMS:
            clear_rows(
                tl.program_id(0) - MAX_ITEMS * NUM_KV_HEADS, cu_q_lens_ptr, out_ptr, lse_ptr,
                NUM_SEQS, TOTAL_TOKENS, NUM_HEADS, VALUE_HEAD_DIM, BLOCK_BOUNDS, BLOCK_TOKENS,
            )  # fmt: skip
            return
    # Loaded before it is known whether there is such an item: one wait instead of two.
    item_ptr = work_ptr + (FIRST_ITEM + item) * ITEM
    seq = tl.load(item_ptr).to(tl.int64)
    first_token = tl.load(item_ptr + 1)
    q_len = tl.load(item_ptr + 2)
    row_block = tl.load(item_ptr + 3)
    piece = tl.load(item_ptr + 4)
    pieces = tl.load(item_ptr + 5)
    part = tl.load(item_ptr + 6)
    length = tl.load(item_ptr + 7)
    if item >= tl.load(work_ptr + COUNT):
        return
    first_row = row_block * BLOCK_ROWS
    context = length - q_len  # tokens before the new ones
    new, tokens, heads, mask_rows = rows_of_block(
        first_token, q_len, row_block, kv_head, GROUP, BLOCK_ROWS
    )
    place = context + new
    position = place
    if HAS_POSITIONS:
        position = tl.maximum(tl.load(positions_ptr + tokens), 0)
    begin, end, all_begin, all_end, window = ranges(
        first_row, q_len, context, length, position, sliding_window_ptr, GROUP, HAS_WINDOW,
        HAS_POSITIONS, TREE_WIDTH, CAUSAL, BLOCK_ROWS,
    )  # fmt: skip
    if HAS_PARTS:
        size = tl.cdiv(tl.cdiv(end - begin, GRANULE), pieces) * GRANULE
        begin = tl.minimum(begin + piece * size, end)
        end = tl.minimum(begin + size, end)

    # Load once: queries, scale, slopes; which blocks of the context need no mask.
    query_row_ptrs = query_ptr + (tokens * NUM_HEADS + heads)[:, None] * HEAD_DIM
    q = load_queries(query_row_ptrs, mask_rows, HEAD_DIM, BLOCK_D, BLOCK_D_REST, CHAIN, TILES)
    scale = tl.load(attn_scale_ptr)
    if SCALES == "head":
        scale *= tl.load(key_scale_ptr + kv_head)
    q, scale = for_products(q, scale, PRODUCTS)
    if HAS_ALIBI:
        slopes = tl.load(alibi_slopes_ptr + heads)
    m = tl.full([BLOCK_ROWS], float("-inf"), tl.float32)
    l = tl.zeros([BLOCK_ROWS], tl.float32)
    unit = LEAST_UNIT
    acc = zero_acc(BLOCK_ROWS, BLOCK_DV, BLOCK_DV_REST, TILES)
    table_ptr = block_tables_ptr + seq * MAX_BLOCKS
    k_head_ptr = pool_ptr(key_ptr, CACHE, TILES) + kv_head * (stride_k_head // TILES)
    v_head_ptr = pool_ptr(value_ptr, CACHE, TILES) + stride_half // TILES
    v_head_ptr += kv_head * (stride_v_head // TILES)
    k_scale_ptr = key_scale_ptr + kv_head * (stride_k_head // HEAD_DIM)
    v_scale_ptr = value_scale_ptr + stride_half // HEAD_DIM
    v_scale_ptr += kv_head * (stride_v_head // VALUE_HEAD_DIM)
    offs_kv = tl.arange(0, BLOCK_KV)
    # Tokens whose table entries are loaded: the first of each page, if so much is known.
    offs_entry = tl.arange(0, PAGES if PAGES > 0 else BLOCK_KV)
    if PAGES > 1:
        offs_entry *= PAGE_SIZE
    bulk_begin = begin
    bulk_end = begin
    if PEEL:
        # Clipped before it is rounded up: a position may be as large as an integer gets.
        masked = tl.minimum(tl.maximum(all_begin, begin), end) - begin
        bulk_begin = begin + tl.cdiv(masked, BLOCK_KV) * BLOCK_KV
        # Loaded while the table is scanned, and not used if it turns out that there is no bulk.
        first = bulk_begin + offs_entry
        pages = tl.load(table_ptr + first // PAGE_SIZE, mask=first < end, other=0)
        # A negative scale would make the largest product the smallest logit: see `FOLDED`.
        if PRODUCTS == "float16":
            bulk_end = tl.minimum(all_end, end)
        else:
            bulk_end = tl.where(scale >= 0, tl.minimum(all_end, end), 0)
        bulk_end = first_bad(table_ptr, bulk_begin, bulk_end, NUM_PAGES, PAGE_SIZE)
        bulk_end = bulk_begin + tl.maximum(bulk_end - bulk_begin, 0) // BLOCK_KV * BLOCK_KV

    # Loop over the context. The next block's page ids are loaded one iteration ahead, so that
    # the loads of keys and values depend on nothing that the pipeliner cannot see coming.
    offs_edge = tl.arange(0, EDGE_KV)
    offs_edge_entry = tl.arange(0, EDGE_PAGES if EDGE_PAGES > 0 else EDGE_KV)
    if EDGE_PAGES > 1:
        offs_edge_entry *= PAGE_SIZE
    before = (bulk_begin - begin) // EDGE_KV
    after = tl.cdiv(tl.maximum(end - bulk_end, 0), EDGE_KV)
    first = tl.where(before > 0, begin, bulk_end) + offs_edge_entry
    edge_pages = tl.load(table_ptr + first // PAGE_SIZE, mask=first < end, other=-1)
    for block in range(0, before + after):
        key = tl.where(block < before, begin, bulk_end - before * EDGE_KV) + block * EDGE_KV
        key += offs_edge
        page = of_tokens(edge_pages, EDGE_PAGES, PAGE_SIZE)  # [EDGE_KV], or [1]
        exists = (page >= 0) & (page < NUM_PAGES)  # [EDGE_KV]
        if EDGE_PAGES > 0:
            exists = exists & (key < end)
        k_ptrs = token_ptrs(k_head_ptr, page, key, PAGE_SIZE, stride_k_page, stride_k_slot, TILES)
        v_ptrs = token_ptrs(v_head_ptr, page, key, PAGE_SIZE, stride_v_page, stride_v_slot, TILES)
        ahead = tl.where(block + 1 < before, begin, bulk_end - before * EDGE_KV)
        ahead += (block + 1) * EDGE_KV + offs_edge_entry
        edge_pages = tl.load(table_ptr + ahead // PAGE_SIZE, mask=ahead < end, other=-1)
        key_position = key
        if HAS_POSITIONS and CAUSAL:
            is_new = exists & (key >= context)
            given = tl.load(positions_ptr + first_token + (key - context), mask=is_new, other=0)
            key_position = tl.where(is_new, tl.maximum(given, 0), key)
        visible = visible_tokens(
            exists, key, key_position, tokens, place, position, context, window, tree_mask_ptr,
            HAS_WINDOW, TREE_WIDTH, CAUSAL,
        )  # fmt: skip
        if TREE_WIDTH > 0 or (HAS_WINDOW and HAS_POSITIONS):
            # Not every token between those that are seen is: it may hold NaN.
            exists = tl.max(visible.to(tl.int32), 0) > 0
        # [BLOCK_ROWS, EDGE_KV]
        s, k = query_key_products(
            q, k_ptrs, exists, HEAD_DIM, True, BLOCK_D, BLOCK_D_REST, CHAIN, SPLIT_LOGITS,
            CACHE, TILES, PTX,
        )  # fmt: skip
        value_scale = unit
        if PER_TOKEN:
            s, value_scale = _with_scales(
                s, k_scale_ptr, v_scale_ptr, page, key, exists, HEAD_DIM, VALUE_HEAD_DIM,
                PAGE_SIZE, stride_k_page, stride_k_slot, stride_v_page, stride_v_slot, LATENT,
                True,
            )  # fmt: skip
        if not EDGE_FOLDED:
            s = scaled(s, scale, SOFT_CAP)
        if HAS_ALIBI:
            s += _biases(slopes, key_position, position)
        s = where_visible(s, visible, block < before + after, SPLIT_LOGITS)
        values = k if SAME_TILE else v_ptrs
        m, l, unit, acc = add_block(
            s, scale, m, l, unit, acc, values, value_scale, exists, q[0].dtype, VALUE_HEAD_DIM,
            True, EDGE_FOLDED, PER_TOKEN, BLOCK_DV, BLOCK_DV_REST, SAME_TILE, CACHE, TILES, PTX,
        )  # fmt: skip
    if PEEL:
        for start in range(bulk_begin, bulk_end, BLOCK_KV):
            key = start + offs_kv
            page = of_tokens(pages, PAGES, PAGE_SIZE)  # [BLOCK_KV], or [1]
            k_ptrs = token_ptrs(
                k_head_ptr, page, key, PAGE_SIZE, stride_k_page, stride_k_slot, TILES
            )
            v_ptrs = token_ptrs(
                v_head_ptr, page, key, PAGE_SIZE, stride_v_page, stride_v_slot, TILES
            )
            ahead = start + offs_entry + BLOCK_KV
            pages = tl.load(table_ptr + ahead // PAGE_SIZE, mask=ahead < bulk_end, other=0)
            # [BLOCK_ROWS, BLOCK_KV]
            s, k = query_key_products(
                q, k_ptrs, key, HEAD_DIM, False, BLOCK_D, BLOCK_D_REST, CHAIN, SPLIT_LOGITS,
                CACHE, TILES, PTX,
            )  # fmt: skip
            value_scale = unit
            if PER_TOKEN:
                s, value_scale = _with_scales(
                    s, k_scale_ptr, v_scale_ptr, page, key, key, HEAD_DIM, VALUE_HEAD_DIM,
                    PAGE_SIZE, stride_k_page, stride_k_slot, stride_v_page, stride_v_slot, LATENT,
                    False,
                )  # fmt: skip
            if SPLIT_LOGITS:  # every token is visible: for the sake of the branch alone
                s = where_visible(s, (key < bulk_end)[None, :], start < bulk_end, True)
            if not FOLDED:
                s = scaled(s, scale, SOFT_CAP)
            if HAS_ALIBI:
                s += _biases(slopes, key, position)
            values = k if SAME_TILE else v_ptrs
            # Always true. The compiler puts a branch that ends the loop behind the copies of the
            # next block. With the condition of `where_visible` the two would become one.
            if not COPY_FIRST or start + BLOCK_KV <= bulk_end:
                m, l, unit, acc = add_block(
                    s, scale, m, l, unit, acc, values, value_scale, key, q[0].dtype,
                    VALUE_HEAD_DIM, False, FOLDED, PER_TOKEN, BLOCK_DV, BLOCK_DV_REST, SAME_TILE,
                    CACHE, TILES, PTX,
                )  # fmt: skip
        # Loaded anew, or they would hold registers in the loop that needs them most; volatile, or
        # the compiler would remember what it has loaded.
        first_token = tl.load(item_ptr + 1, volatile=True)
        q_len = tl.load(item_ptr + 2, volatile=True)
        row_block = tl.load(item_ptr + 3, volatile=True)
        part = tl.load(item_ptr + 6, volatile=True)
        new, tokens, heads, mask_rows = rows_of_block(
            first_token, q_len, row_block, kv_head, GROUP, BLOCK_ROWS
        )

    # Write the result, or this piece's part of it.
    if PEEL or EDGE_FOLDED:
        # A logit that overflows makes a row NaN. Where scale and maximum are one instruction it
        # does not overflow before `m` is subtracted, and its weight is 0.
        l = tl.where(m == float("inf"), float("nan"), l)
    acc = in_order(acc, TILES)
    saw_nothing = l == 0
    acc = scaled_values(acc, l, unit, kv_head, key_scale_ptr, value_scale_ptr, SCALES, LATENT)
    if HAS_PARTS:
        if part >= 0:
            row = (part * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)).to(tl.int64)
            row = row * NUM_KV_HEADS + kv_head
            lse = tl.where(saw_nothing, float("-inf"), m + tl.log2(l))
            tl.store(part_lse_ptr + row, lse, mask=mask_rows)
            inverse = (1 / tl.where(saw_nothing, 1.0, l))[:, None]
            for i in tl.static_range(len(acc)):
                out = acc[i] * inverse
                write_rows(part_out_ptr, row, out, mask_rows, i * BLOCK_DV, VALUE_HEAD_DIM)
            return
    sinks = tl.full([BLOCK_ROWS], float("-inf"), tl.float32)
    if HAS_SINKS:
        sinks = tl.load(sinks_ptr + heads)
        m, l, alpha, saw_nothing = add_sink(m, l, sinks)
        acc = scaled_rows(acc, alpha)
    row = tokens * NUM_HEADS + heads
    # From base 2 and back would cost a sink that stands alone its last bit.
    lse = tl.where(saw_nothing, sinks, (m + tl.log2(l)) * LN2)
    tl.store(lse_ptr + row, lse, mask=mask_rows)
    # Divided, as `page_attention_kernel` does: a single token's bits are the same there.
    l = tl.where(l == 0, 1.0, l)
    for i in tl.static_range(len(acc)):
        out = acc[i] / l[:, None]
        write_rows(out_ptr, row, out, mask_rows, i * BLOCK_DV, VALUE_HEAD_DIM)


@triton.jit
@typing.no_type_check
def _with_scales(
    s, key_ptr, value_ptr, page, key, exists, HEAD_DIM: tl.constexpr,
    VALUE_HEAD_DIM: tl.constexpr, PAGE_SIZE: tl.constexpr, stride_k_page: tl.constexpr,
    stride_k_slot: tl.constexpr, stride_v_page: tl.constexpr, stride_v_slot: tl.constexpr,
    LATENT: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Return products times the scales of the tokens' keys, and the scales of their values."""
    page, slot = page.to(tl.int64), key % PAGE_SIZE
    offs = slot_offsets(page, slot, stride_k_page, stride_k_slot, HEAD_DIM)
    key_scale = _load_scales(key_ptr + offs, exists, MASKED)
    value_scale = key_scale
    if not LATENT:
        offs = slot_offsets(page, slot, stride_v_page, stride_v_slot, VALUE_HEAD_DIM)
        value_scale = _load_scales(value_ptr + offs, exists, MASKED)
    return s * key_scale[None, :], value_scale


@triton.jit
@typing.no_type_check
def _load_scales(ptrs, exists, MASKED: tl.constexpr):
    scales = tl.load(ptrs, mask=exists, other=0.0) if MASKED else tl.load(ptrs)
    # Else every thread would load those of all columns that it has, 16 or 32 at a time.
    return tl.gather(scales, tl.arange(0, ptrs.shape[0]), 0)


@triton.jit
@typing.no_type_check
def _biases(slopes, key_position, position):
    """Return ALiBi's biases, `[BLOCK_ROWS, tokens]`, in log2 units."""
    ahead = (key_position[None, :] - position[:, None]).to(tl.float32)
    return (slopes * LOG2E)[:, None] * ahead
