"""Writes new tokens' keys and values to their slots, in place: copied, or converted and quantised.

Grid, one axis, fastest first: block of `BLOCK_ROW` elements of a token's keys and values, or of
`BLOCK_HEADS` heads where they are converted, block of `BLOCK_TOKENS` tokens. In registers: the keys
and values of the block, on their way while the slots are looked at.

Programs run in any order, so no two may write to one slot. A token writes nothing if a later one
has its slot:

    overwritten_i = any over j > i of slot_j = slot_i

Each program compares its own tokens with all later ones, `BLOCK_OTHERS` at a time, from the cache:
for 8,192 tokens 34 million comparisons, 2 us of an H200's ordinary cores, while the rows' 67 MB (8
heads of 128, 16 bits) take 18 us of its memory. The comparisons grow with the square of the tokens;
where there are too many, the launch marks such tokens beforehand and this loop is left out
(`HAS_DUPLICATES`).

Source: vLLM's `reshape_and_cache` (Kwon et al., 2023, arXiv:2309.06180), which leaves duplicates to
chance.
"""

import typing

import triton
import triton.language as tl

from ejk.backends.triton.write_kv_cache.later import load_slots, overwritten_by_later
from ejk.backends.triton.write_kv_cache.quantise import load_heads, store_heads


@triton.jit
@typing.no_type_check
def write_kv_cache_kernel(
    # inputs
    key_ptr,  # [num_tokens, num_kv_heads, head_dim]
    value_ptr,  # [num_tokens, num_kv_heads, value_head_dim]
    slot_mapping_ptr,  # int32 [num_tokens]
    # inputs, or of each token and head inputs and outputs, which are there as the caches are
    value_scale_ptr,  # float32 [num_kv_heads], or the axes of a cache without the last
    key_scale_ptr,  # the same
    # inputs and outputs: what is not written stays
    key_cache_ptr,  # four axes, or five of fused pools
    value_cache_ptr,  # absent if there are no values, or in fused pools
    # sizes
    NUM_TOKENS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    VALUE_HEAD_DIM: tl.constexpr,  # 0: there are no values
    NUM_SLOTS: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    # strides, in codes
    stride_k_page: tl.constexpr,
    stride_k_head: tl.constexpr,
    stride_k_slot: tl.constexpr,
    stride_v_page: tl.constexpr,
    stride_v_head: tl.constexpr,
    stride_v_slot: tl.constexpr,
    stride_half: tl.constexpr,  # of fused pools, from a page's keys to its values; 0: two pools
    # features
    HAS_DUPLICATES: tl.constexpr,  # two tokens may have one slot
    CONVERTS: tl.constexpr,  # or bits are copied
    SCALES: tl.constexpr,  # "none", "head", or "token": these are computed
    CACHE: tl.constexpr,  # what codes are: "int8", "int4", "e4m3", "e5m2", or "" for other floats
    LARGEST: tl.constexpr,  # code; 0 of floats of 16 bits and more
    PER_ELEMENT: tl.constexpr,  # codes
    NATIVE: tl.constexpr,  # the target rounds to 8-bit floats itself, and packs integers
    # blocks
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_OTHERS: tl.constexpr,
    BLOCK_ROW: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,  # 1 where bits are copied
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    K_ROW: tl.constexpr = NUM_KV_HEADS * HEAD_DIM
    V_ROW: tl.constexpr = NUM_KV_HEADS * VALUE_HEAD_DIM
    ROW: tl.constexpr = K_ROW if K_ROW > V_ROW else V_ROW

    BLOCKS: tl.constexpr = (
        tl.cdiv(NUM_KV_HEADS, BLOCK_HEADS) if CONVERTS else tl.cdiv(ROW, BLOCK_ROW)
    )

    # Which work is mine.
    pid = tl.program_id(0)
    if CONVERTS:
        heads = pid % BLOCKS * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
    else:
        offs_row = pid % BLOCKS * BLOCK_ROW + tl.arange(0, BLOCK_ROW)
    first_token = pid // BLOCKS * BLOCK_TOKENS
    tokens = first_token + tl.arange(0, BLOCK_TOKENS)
    is_token = tokens < NUM_TOKENS

    # Load once: slots, keys and values.
    # Masked loads write over zeros, which cost an instruction for two registers.
    WHOLE: tl.constexpr = NUM_TOKENS % BLOCK_TOKENS == 0
    slots = load_slots(slot_mapping_ptr, tokens, NUM_TOKENS, BLOCK_TOKENS)
    if CONVERTS:  # [BLOCK_TOKENS, BLOCK_HEADS, BLOCK_D]
        HAS_ALL: tl.constexpr = WHOLE and NUM_KV_HEADS % BLOCK_HEADS == 0
        keys = load_heads(
            key_ptr, tokens, heads, is_token, NUM_KV_HEADS, HEAD_DIM, BLOCK_D, HAS_ALL
        )
        if V_ROW > 0:
            values = load_heads(
                value_ptr, tokens, heads, is_token, NUM_KV_HEADS, VALUE_HEAD_DIM, BLOCK_DV, HAS_ALL
            )
    else:  # [BLOCK_TOKENS, BLOCK_ROW]
        keys = _load_rows(
            key_ptr, tokens, offs_row, is_token, K_ROW, WHOLE and K_ROW % BLOCK_ROW == 0
        )
        if V_ROW > 0:
            values = _load_rows(
                value_ptr, tokens, offs_row, is_token, V_ROW, WHOLE and V_ROW % BLOCK_ROW == 0
            )
    writes = (slots >= 0) & (slots < NUM_SLOTS)  # [BLOCK_TOKENS]

    # Which of mine are overwritten by a later one?
    if HAS_DUPLICATES:
        # Or ptxas moves loads of rows behind the comparison, which then waits for slots first.
        tl.debug_barrier()
        overwritten = overwritten_by_later(
            slot_mapping_ptr, first_token, NUM_TOKENS, BLOCK_TOKENS, BLOCK_OTHERS
        )
        writes = writes & ((overwritten >> (tokens - first_token)) & 1 == 0)

    # Write.
    page = (slots // PAGE_SIZE).to(tl.int64)
    offset = (slots % PAGE_SIZE).to(tl.int64)
    if V_ROW > 0:
        pool_ptr = value_cache_ptr
        if stride_half > 0:
            pool_ptr = key_cache_ptr + stride_half // PER_ELEMENT
    if CONVERTS:
        writes = writes[:, None] & (heads < NUM_KV_HEADS)[None, :]
        store_heads(
            key_cache_ptr, key_scale_ptr, keys, page, offset, heads, writes, HEAD_DIM,
            stride_k_page, stride_k_head, stride_k_slot, SCALES, CACHE, LARGEST, PER_ELEMENT,
            NATIVE,
        )  # fmt: skip
        if V_ROW > 0:
            scale_ptr = value_scale_ptr
            if SCALES == "token" and stride_half > 0:
                scale_ptr = key_scale_ptr + stride_half // HEAD_DIM
            store_heads(
                pool_ptr, scale_ptr, values, page, offset, heads, writes, VALUE_HEAD_DIM,
                stride_v_page, stride_v_head, stride_v_slot, SCALES, CACHE, LARGEST, PER_ELEMENT,
                NATIVE,
            )  # fmt: skip
    else:
        k_slots = page * stride_k_page + offset * stride_k_slot
        _store_rows(key_cache_ptr, keys, k_slots, offs_row, writes, K_ROW, HEAD_DIM, stride_k_head)
        if V_ROW > 0:
            v_slots = page * stride_v_page + offset * stride_v_slot
            _store_rows(
                pool_ptr, values, v_slots, offs_row, writes, V_ROW, VALUE_HEAD_DIM, stride_v_head
            )


@triton.jit
@typing.no_type_check
def _load_rows(
    rows_ptr, tokens, offs_row, is_token, ROW: tl.constexpr, HAS_ALL: tl.constexpr
):  # fmt: skip
    """Load a block of rows, `[BLOCK_TOKENS, BLOCK_ROW]`."""
    ptrs = rows_ptr + tokens.to(tl.int64)[:, None] * ROW + offs_row[None, :]
    if HAS_ALL:
        return tl.load(ptrs)
    else:
        return tl.load(ptrs, mask=is_token[:, None] & (offs_row < ROW)[None, :], other=0.0)


@triton.jit
@typing.no_type_check
def _store_rows(
    pool_ptr,
    rows,
    slots,  # int64 [BLOCK_TOKENS]: elements from the pool's start
    offs_row,
    writes,
    ROW: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    stride_head: tl.constexpr,
):
    """Store a block of rows, each head where it belongs."""
    offs_head = (offs_row // HEAD_DIM).to(tl.int64) * stride_head + offs_row % HEAD_DIM
    mask = writes[:, None] & (offs_row < ROW)[None, :]
    tl.store(pool_ptr + slots[:, None] + offs_head[None, :], rows, mask=mask)
