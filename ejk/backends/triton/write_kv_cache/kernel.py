"""Copies new tokens' keys and values to their slots, in place.

Grid, one axis, fastest first: block of `BLOCK_ROW` elements of a token's keys and values, block of
`BLOCK_TOKENS` tokens. In registers: the keys and values of the block, on their way while the slots
are looked at.

Programs run in any order, so no two may write to one slot. A token writes nothing if a later one
has its slot:

    overwritten_i = any over j > i of slot_j = slot_i

Each program compares its own tokens with all later ones, `BLOCK_OTHERS` at a time, from the cache:
for 8,192 tokens 34 million comparisons, which take about 5 us of an H100's ordinary cores while the
rows' 67 MB (8 heads of 128, 16 bits) take 25 us of its memory. The comparisons grow with the square
of the tokens; where there are too many, the launch marks such tokens beforehand and this loop is
left out (`HAS_DUPLICATES`).

Source: vLLM's `reshape_and_cache` (Kwon et al., 2023, arXiv:2309.06180), which leaves duplicates to
chance.
"""

import typing

import triton
import triton.language as tl


@triton.jit
@typing.no_type_check
def write_kv_cache_kernel(
    # inputs
    key_ptr,  # [num_tokens, num_kv_heads, head_dim]
    value_ptr,  # [num_tokens, num_kv_heads, value_head_dim]
    slot_mapping_ptr,  # int32 [num_tokens]
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
    # strides
    stride_k_page: tl.constexpr,
    stride_k_head: tl.constexpr,
    stride_k_slot: tl.constexpr,
    stride_v_page: tl.constexpr,
    stride_v_head: tl.constexpr,
    stride_v_slot: tl.constexpr,
    stride_half: tl.constexpr,  # of fused pools, from a page's keys to its values; 0: two pools
    # features
    HAS_DUPLICATES: tl.constexpr,  # two tokens may have one slot
    # blocks
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_OTHERS: tl.constexpr,
    BLOCK_ROW: tl.constexpr,
):
    K_ROW: tl.constexpr = NUM_KV_HEADS * HEAD_DIM
    V_ROW: tl.constexpr = NUM_KV_HEADS * VALUE_HEAD_DIM
    ROW: tl.constexpr = K_ROW if K_ROW > V_ROW else V_ROW

    # Which work is mine.
    pid = tl.program_id(0)
    offs_row = pid % tl.cdiv(ROW, BLOCK_ROW) * BLOCK_ROW + tl.arange(0, BLOCK_ROW)
    first_token = pid // tl.cdiv(ROW, BLOCK_ROW) * BLOCK_TOKENS
    tokens = first_token + tl.arange(0, BLOCK_TOKENS)
    is_token = tokens < NUM_TOKENS

    # Load once: slots, keys and values.
    slots = tl.load(slot_mapping_ptr + tokens, mask=is_token, other=-1)
    keys = _load_rows(key_ptr, tokens, offs_row, is_token, K_ROW)  # [BLOCK_TOKENS, BLOCK_ROW]
    if V_ROW > 0:
        values = _load_rows(value_ptr, tokens, offs_row, is_token, V_ROW)
    writes = (slots >= 0) & (slots < NUM_SLOTS)  # [BLOCK_TOKENS]

    # Loop over the later tokens: which of mine are overwritten?
    if HAS_DUPLICATES:
        overwritten = tl.zeros([BLOCK_TOKENS, BLOCK_OTHERS], tl.int32)
        for start in range(first_token, NUM_TOKENS, BLOCK_OTHERS):
            others = start + tl.arange(0, BLOCK_OTHERS)
            other_slots = tl.load(slot_mapping_ptr + others, mask=others < NUM_TOKENS, other=-1)
            is_later = others[None, :] > tokens[:, None]
            overwritten |= ((other_slots[None, :] == slots[:, None]) & is_later).to(tl.int32)
        writes = writes & (tl.max(overwritten, 1) == 0)

    # Write.
    page = (slots // PAGE_SIZE).to(tl.int64)
    offset = (slots % PAGE_SIZE).to(tl.int64)
    k_slots = page * stride_k_page + offset * stride_k_slot
    _store_rows(key_cache_ptr, keys, k_slots, offs_row, writes, K_ROW, HEAD_DIM, stride_k_head)
    if V_ROW > 0:
        pool_ptr = key_cache_ptr + stride_half if stride_half > 0 else value_cache_ptr
        v_slots = page * stride_v_page + offset * stride_v_slot
        _store_rows(
            pool_ptr, values, v_slots, offs_row, writes, V_ROW, VALUE_HEAD_DIM, stride_v_head
        )


@triton.jit
@typing.no_type_check
def _load_rows(rows_ptr, tokens, offs_row, is_token, ROW: tl.constexpr):
    """Load a block of rows, `[BLOCK_TOKENS, BLOCK_ROW]`."""
    ptrs = rows_ptr + tokens.to(tl.int64)[:, None] * ROW + offs_row[None, :]
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
