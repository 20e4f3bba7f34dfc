"""What `ragged_page_attention_kernel` does to a block of keys and values, and before and after."""

import typing

import triton
import triton.language as tl

from ejk.backends.triton._products import load_rows, query_key_products
from ejk.backends.triton.page_attention_kernel import LOG2E, rounded, tanh_f32

SCANNED = tl.constexpr(512)  # table entries that are looked at together


@triton.jit
@typing.no_type_check
def rows_of_block(
    first_token, q_len, row_block, kv_head, GROUP: tl.constexpr, BLOCK_ROWS: tl.constexpr
):
    """Return which new token, token of the batch and head each row is, and whether it is one.

    Rows past the last are copies of its token: they see nothing that others do not.
    """
    rows = row_block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    new = tl.minimum(rows, q_len * GROUP - 1) // GROUP  # [BLOCK_ROWS]
    tokens = (first_token + new).to(tl.int64)
    return new, tokens, kv_head * GROUP + rows % GROUP, rows < q_len * GROUP


@triton.jit
@typing.no_type_check
def token_ptrs(
    head_ptr, pages, key, PAGE_SIZE: tl.constexpr, stride_page: tl.constexpr,
    stride_slot: tl.constexpr,
):  # fmt: skip
    """Return where a KV head's tokens `key` begin, that lie in `pages`."""
    return head_ptr + (pages.to(tl.int64) * stride_page + (key % PAGE_SIZE) * stride_slot)[:, None]


@triton.jit
@typing.no_type_check
def see_block(
    q,  # parts of [BLOCK_ROWS, HEAD_DIM]
    m,  # [BLOCK_ROWS]
    l,
    acc,  # [BLOCK_ROWS, BLOCK_DV]
    acc_rest,
    k_ptrs,  # [BLOCK_KV, 1]
    v_ptrs,
    key_position,  # [BLOCK_KV]
    position,  # [BLOCK_ROWS]
    exists,  # [BLOCK_KV]: may be loaded
    visible,  # [BLOCK_ROWS, BLOCK_KV]
    slopes,
    scale,
    HEAD_DIM: tl.constexpr,
    VALUE_HEAD_DIM: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    HAS_ALIBI: tl.constexpr,
    MASKED: tl.constexpr,  # or everything exists and is visible
    BLOCK_D: tl.constexpr,
    BLOCK_D_REST: tl.constexpr,
    CHAIN: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_DV_REST: tl.constexpr,
):
    """Return `m`, `l`, `acc` and `acc_rest` after one more block of tokens."""
    # [BLOCK_ROWS, BLOCK_KV]
    s = query_key_products(q, k_ptrs, exists, HEAD_DIM, MASKED, BLOCK_D, BLOCK_D_REST, CHAIN)
    c = scale * LOG2E
    if SOFT_CAP > 0:
        s = SOFT_CAP * tanh_f32(s * (scale / SOFT_CAP)) * LOG2E
    elif HAS_ALIBI or MASKED:
        s = s * c
    if HAS_ALIBI:
        ahead = (key_position[None, :] - position[:, None]).to(tl.float32)
        s += (slopes * LOG2E)[:, None] * ahead
    FOLDED: tl.constexpr = SOFT_CAP == 0 and not HAS_ALIBI and not MASKED
    if MASKED:
        s = tl.where(visible, s, float("-inf"))

    m_new = tl.max(s, 1)
    if FOLDED:
        m_new = m_new * c
    m_new = tl.maximum(m, m_new)
    m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)
    if FOLDED:  # one instruction with the difference
        s = s * c
    p = tl.exp2(s - m_safe[:, None])
    alpha = tl.exp2(m - m_safe)
    l = l * alpha + tl.sum(p, 1)
    v = load_rows(v_ptrs, exists, 0, BLOCK_DV, VALUE_HEAD_DIM, MASKED)
    p = p.to(v.dtype)
    acc = tl.dot(p, v, acc * alpha[:, None], input_precision="ieee")
    if BLOCK_DV_REST > 0:
        v_rest = load_rows(v_ptrs, exists, BLOCK_DV, BLOCK_DV_REST, VALUE_HEAD_DIM, MASKED)
        acc_rest = tl.dot(p, v_rest, acc_rest * alpha[:, None], input_precision="ieee")
    return m_new, l, acc, acc_rest


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
def write_rows(ptr, row, out, mask_rows, FIRST: tl.constexpr, WIDTH: tl.constexpr):
    """Store `out`, rounded, from entry `FIRST` of each row on."""
    offs = FIRST + tl.arange(0, out.shape[1])
    out = rounded(out, ptr.dtype.element_ty)
    mask = mask_rows[:, None] & (offs < WIDTH)
    tl.store(ptr + row[:, None] * WIDTH + offs, out, mask=mask)
