"""Attention of one query token a sequence over paged keys and values.

Grid of `page_attention_kernel`, one axis, fastest first: KV head, block of the group's query
heads, piece of a context. In registers: the queries of one group `[BLOCK_GROUP, head_dim]`, the
running maximum `m`, the sum `l` and the weighted values `acc`; keys and values stream through
shared memory, a block of `BLOCK_KV` tokens at a time. In log2 units, with `s` a block's logits:

    m' = max(m, max(s));  p = 2^(s - m');  alpha = 2^(m - m')
    l' = alpha * l + sum(p);  acc' = alpha * acc + p . v;  lse = m + log2(l)

`NUM_SPLITS` cuts every context in as many equal pieces, or, with `SPLIT_BLOCKS` of -1, deals its
blocks out to them in turn; if it is 0, the rows of `work` say which pieces there are (see
`PlanProblem`). A context in one piece is written at once; of any other, each piece writes a float32
part, which the kernel that combines parts merges.

With `MEMBERS` the plan has packs, too. They are a launch of their own, `PACKED`, which comes first:
the rows of a product are then the query heads of all members, which share the tokens, and each
member gets a part. In the launch of the sequences a member's first piece begins where that ended.

A head dimension above 128 that is no power of two may be taken in two parts, `BLOCK_D` and
`BLOCK_D_REST` (576 as 512 + 64), so that little of a block is padding: see `two_parts`.

Latent attention (DeepSeek-V2, arXiv:2405.04434) has its values in the keys. Where, padded, they are
`BLOCK_D` wide, one tile serves both products: it is loaded once, and held once in shared memory.

Source: online softmax (Milakov and Gimelshein, 2018, arXiv:1805.02867); FlashAttention (Dao et
al., 2022, arXiv:2205.14135); splits after Flash-Decoding (Dao et al., 2023).
"""

import typing

import triton
import triton.language as tl

from ejk.backends.triton._products import load_queries
from ejk.backends.triton.page_attention.attending import attend
from ejk.backends.triton.page_attention.packs import (
    agreed_until,
    note_stop,
    piece_of_pack,
    shared_end,
)
from ejk.backends.triton.page_attention.writing import write_part, write_result


@triton.jit
@typing.no_type_check
def page_attention_kernel(
    # inputs
    query_ptr,  # [num_seqs, num_heads, head_dim]
    key_ptr,  # pool of pages, its axes in any order
    value_ptr,  # the same, or the very pool of the keys
    context_lens_ptr,  # int32 [num_seqs]
    block_tables_ptr,  # int32 [num_seqs, max_blocks]: page ids
    attn_scale_ptr,  # float32 []
    sliding_window_ptr,  # int32 [], or [num_seqs]
    sinks_ptr,  # float32 [num_heads]
    alibi_slopes_ptr,  # float32 [num_heads]
    key_scale_ptr,  # float32 [num_kv_heads], or of each token: the pool without its last axis
    value_scale_ptr,  # the same
    page_distances_ptr,  # int32 [num_seqs, max_blocks]: to a page's first token
    work_ptr,  # int32 [1 + pieces, 4]: the plan
    # outputs; with packs the parts are both: those of packs are there already
    part_out_ptr,  # float32 [parts, num_heads, value_head_dim]
    part_lse_ptr,  # float32, log2 [parts, num_heads], and where pieces of packs stopped
    out_ptr,  # [num_seqs, num_heads, value_head_dim]
    lse_ptr,  # float32 [num_seqs, num_heads]
    # sizes
    NUM_SEQS: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    VALUE_HEAD_DIM: tl.constexpr,
    NUM_PAGES: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    MAX_BLOCKS: tl.constexpr,
    NUM_SPLITS: tl.constexpr,  # parts of each context; 0: pieces as planned
    SPLIT_BLOCKS: tl.constexpr,  # the least blocks in one of them; -1: every `NUM_SPLITS`-th block
    NUM_PARTS: tl.constexpr,
    MEMBERS: tl.constexpr,  # sequences of a pack, at most; 0 for a plan without packs
    MAX_PIECES: tl.constexpr,  # of sequences, in such a plan
    MAX_PACKS: tl.constexpr,
    MAX_PACK_PIECES: tl.constexpr,
    PACKED: tl.constexpr,  # the pieces are those of packs
    # strides: constants, or no load is wider than one element
    stride_k_page: tl.constexpr,
    stride_k_head: tl.constexpr,
    stride_k_slot: tl.constexpr,
    stride_v_page: tl.constexpr,
    stride_v_head: tl.constexpr,
    stride_v_slot: tl.constexpr,
    stride_half: tl.constexpr,  # from the keys to the values of a page of both; 0 for none
    stride_window_seq: tl.constexpr,  # 0 for one window
    # features
    SOFT_CAP: tl.constexpr,  # 0 for none
    HAS_WINDOW: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    HAS_ALIBI: tl.constexpr,
    HAS_DISTANCES: tl.constexpr,  # of pages that do not lie one after the other
    # types
    CACHE: tl.constexpr,  # "int8", "int4", "e4m3", "e5m2", "int8 + 128", ...; "" for floats
    TILES: tl.constexpr,  # values of a pool that are loaded as one element
    PTX: tl.constexpr,  # converts them
    PRODUCTS: tl.constexpr,  # "float16", "float32", "bf16x3"; "" for queries' and cache's
    SCALES: tl.constexpr,  # "head", "token", or "none"
    LATENT: tl.constexpr,  # the values are the keys' first entries
    # blocks
    BLOCK_GROUP: tl.constexpr,  # query heads of a sequence, or of all members of a pack
    BLOCK_MEMBERS: tl.constexpr,
    BLOCK_ENTRIES: tl.constexpr,  # of each member's table that are compared at a time
    BLOCK_STOPS: tl.constexpr,  # pieces of one pack, at most
    BLOCK_KV: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_D_REST: tl.constexpr,  # 0 for none
    CHAIN: tl.constexpr,  # products that are added up apart from others, of a logit
    BLOCK_DV: tl.constexpr,
    BLOCK_DV_REST: tl.constexpr,  # 0 for none
    SAME_TILE: tl.constexpr,  # the values are the keys' first entries, loaded once for both
    SPLIT_LOGITS: tl.constexpr,  # over two warpgroups: see `where_visible`
    PAGES: tl.constexpr,  # that a block's tokens are or lie in; 0: not known
    SUMS: tl.constexpr,  # of weights, a row, that are added up at the end; 0: at each block
):
    GROUP: tl.constexpr = NUM_HEADS // NUM_KV_HEADS
    STEP: tl.constexpr = BLOCK_KV * NUM_SPLITS if SPLIT_BLOCKS < 0 else BLOCK_KV
    tl.static_assert(NUM_HEADS % NUM_KV_HEADS == 0)
    tl.static_assert(BLOCK_D + BLOCK_D_REST >= HEAD_DIM)
    tl.static_assert(BLOCK_DV + BLOCK_DV_REST >= VALUE_HEAD_DIM)
    tl.static_assert(HEAD_DIM % TILES == 0 and VALUE_HEAD_DIM % TILES == 0)

    # Which work is mine: a KV head, a block of its query heads, a piece of a context.
    pid = tl.program_id(0)
    kv_head = (pid % NUM_KV_HEADS).to(tl.int64)
    pid = pid // NUM_KV_HEADS
    group_block = pid % tl.cdiv(GROUP, BLOCK_GROUP)
    piece = pid // tl.cdiv(GROUP, BLOCK_GROUP)
    begin = 0
    reach = MAX_BLOCKS * PAGE_SIZE  # no token of the piece lies beyond, whatever the length
    part = -1  # a whole context
    FIRST_PACK: tl.constexpr = 1 + MAX_PIECES + NUM_SEQS
    if PACKED:
        # The row lies there whatever the count says, and is not waited for twice. Of no pack there
        # is a piece of nothing: where there are none the launch ends here.
        row_ptr = work_ptr + (FIRST_PACK + 1 + piece) * 4
        pack = tl.load(row_ptr)
        begin = tl.load(row_ptr + 1)
        reach = tl.load(row_ptr + 2)
        part = tl.load(row_ptr + 3)
        if (piece >= tl.load(work_ptr + FIRST_PACK * 4)) | (reach <= begin):
            return
        offs_row = tl.arange(0, BLOCK_GROUP)
        offs_member = offs_row // GROUP
        pack, begin, reach, part, seq, seqs, length, mask_group = piece_of_pack(
            pack, begin, reach, part, offs_member, work_ptr, context_lens_ptr, NUM_SEQS,
            MAX_BLOCKS * PAGE_SIZE, MEMBERS, FIRST_PACK, MAX_PACKS, MAX_PACK_PIECES,
        )  # fmt: skip
    elif NUM_SPLITS == 0:
        if piece >= tl.load(work_ptr):
            return
        row_ptr = work_ptr + (1 + piece) * 4
        seq = tl.load(row_ptr).to(tl.int64)
        begin = tl.load(row_ptr + 1)
        reach = tl.minimum(tl.load(row_ptr + 2), reach)
        part = tl.load(row_ptr + 3)
        if HAS_WINDOW:
            is_first = begin < 0
            begin = tl.where(is_first, -1 - begin, begin)
        if MEMBERS > 0:
            if begin < 0:  # the first piece of a member begins where what its pack shares ends
                pack = -1 - begin
                begin = shared_end(
                    tl.minimum(pack, MAX_PACKS - 1), work_ptr,
                    part_lse_ptr + NUM_PARTS * NUM_HEADS, FIRST_PACK, MAX_PACK_PIECES, BLOCK_STOPS,
                )  # fmt: skip
                begin = tl.where(pack < MAX_PACKS, begin, -1)
        # Whatever the plan says, nothing outside is touched.
        if (seq < 0) | (seq >= NUM_SEQS) | (part >= NUM_PARTS):
            return
        if (begin < 0) | (begin > MAX_BLOCKS * PAGE_SIZE):
            return
    else:
        seq = (piece // NUM_SPLITS).to(tl.int64)
    first = 0
    if not PACKED:
        length = tl.load(context_lens_ptr + seq)
        length = tl.minimum(tl.maximum(length, 0), MAX_BLOCKS * PAGE_SIZE)
    if HAS_WINDOW:
        window = tl.load(sliding_window_ptr + seq * stride_window_seq)
        first = tl.maximum(length - tl.maximum(window, 0), 0)
    if NUM_SPLITS > 1 or (NUM_SPLITS == 1 and HAS_WINDOW):
        first_block, last_block = first // BLOCK_KV, tl.cdiv(length, BLOCK_KV)
        if SPLIT_BLOCKS < 0:
            begin = (first_block + piece % NUM_SPLITS) * BLOCK_KV
        else:
            split_blocks = tl.maximum(tl.cdiv(last_block - first_block, NUM_SPLITS), SPLIT_BLOCKS)
            block = tl.minimum(first_block + piece % NUM_SPLITS * split_blocks, last_block)
            begin = block * BLOCK_KV
            reach = tl.minimum(block + split_blocks, last_block) * BLOCK_KV
        part = piece
    if not PACKED:
        end = tl.minimum(reach, length)

    # Load once: queries, scale, slopes, the first block's page ids.
    if PACKED:
        offs_head = kv_head * GROUP + offs_row % GROUP
    else:
        offs_group = group_block * BLOCK_GROUP + tl.arange(0, BLOCK_GROUP)
        mask_group = offs_group < GROUP
        offs_head = kv_head * GROUP + offs_group
    offs_kv = tl.arange(0, BLOCK_KV)
    # Tokens whose table entries are loaded: the first of each page, if so much is known.
    BY_PAGE: tl.constexpr = PAGES > 0
    offs_entry = tl.arange(0, PAGES if BY_PAGE else BLOCK_KV)
    if PAGES > 1:
        offs_entry *= PAGE_SIZE
    if BY_PAGE:
        begin = begin // BLOCK_KV * BLOCK_KV  # where it is, unless the plan is wrong
    if PACKED:
        query_row_ptrs = query_ptr + (seqs * NUM_HEADS + offs_head)[:, None] * HEAD_DIM
    else:
        query_row_ptrs = query_ptr + (seq * NUM_HEADS + offs_head[:, None]) * HEAD_DIM
    q = load_queries(query_row_ptrs, mask_group, HEAD_DIM, BLOCK_D, BLOCK_D_REST, CHAIN, TILES)
    if PACKED:  # the entries that are compared are then at hand for what follows
        end = agreed_until(
            pack, begin, reach, seq, work_ptr, block_tables_ptr, NUM_SEQS, PAGE_SIZE, MAX_BLOCKS,
            MEMBERS, FIRST_PACK, MAX_PACKS, MAX_PACK_PIECES, BLOCK_MEMBERS, BLOCK_ENTRIES,
        )  # fmt: skip
        end = tl.minimum(end, tl.min(length, 0))
        note_stop(
            kv_head == 0, part, pack, end, reach, work_ptr, part_lse_ptr + NUM_PARTS * NUM_HEADS,
            FIRST_PACK, MAX_PACK_PIECES, BLOCK_STOPS,
        )  # fmt: skip
    offs_dv = (tl.arange(0, BLOCK_DV),)
    if BLOCK_DV_REST > 0:
        offs_dv += (BLOCK_DV + tl.arange(0, BLOCK_DV_REST),)
    if not HAS_WINDOW or NUM_SPLITS > 0:
        is_first = False
    m, l, acc = attend(
        q, begin, reach, end, first, is_first, length, kv_head, seq, offs_kv, offs_entry,
        offs_head, mask_group, key_ptr, value_ptr, block_tables_ptr, attn_scale_ptr,
        alibi_slopes_ptr, key_scale_ptr, value_scale_ptr, page_distances_ptr, HEAD_DIM,
        VALUE_HEAD_DIM, NUM_PAGES, PAGE_SIZE, MAX_BLOCKS, stride_k_page, stride_k_head,
        stride_k_slot, stride_v_page, stride_v_head, stride_v_slot, stride_half, SOFT_CAP,
        HAS_ALIBI, HAS_DISTANCES, CACHE, TILES, PTX, PRODUCTS, SCALES, LATENT, BLOCK_GROUP,
        BLOCK_KV, STEP, BLOCK_D, BLOCK_D_REST, CHAIN, BLOCK_DV, BLOCK_DV_REST, SAME_TILE,
        SPLIT_LOGITS, PAGES, SUMS, NUM_SPLITS == 0 and HAS_WINDOW, PACKED,
    )  # fmt: skip

    # Write the result, or this piece's part of it.
    if PACKED:
        row = (MAX_PIECES + part * MEMBERS + offs_member).to(tl.int64) * NUM_HEADS + offs_head
        write_part(part_out_ptr, part_lse_ptr, row, m, l, acc, offs_dv, mask_group, VALUE_HEAD_DIM)
        return
    if NUM_PARTS > 0:
        if part >= 0:
            row = part.to(tl.int64) * NUM_HEADS + offs_head
            write_part(
                part_out_ptr, part_lse_ptr, row, m, l, acc, offs_dv, mask_group, VALUE_HEAD_DIM
            )
            return
    row = seq * NUM_HEADS + offs_head
    write_result(
        out_ptr, lse_ptr, sinks_ptr, row, offs_head, m, l, acc, offs_dv, mask_group,
        VALUE_HEAD_DIM, HAS_SINKS,
    )  # fmt: skip
