"""Which rows of a ragged batch are whose, and which are nobody's."""

import typing

import triton
import triton.language as tl


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
def clipped_bounds(cu_q_lens_ptr, offs, NUM_SEQS: tl.constexpr, TOTAL_TOKENS: tl.constexpr):
    """Load `cu_q_lens` at `offs`, clipped to tokens that there are; 0 past its end."""
    bounds = tl.load(cu_q_lens_ptr + offs, mask=offs <= NUM_SEQS, other=0)
    return tl.minimum(tl.maximum(bounds, 0), TOTAL_TOKENS)


@triton.jit
@typing.no_type_check
def clear_rows(
    pid,
    cu_q_lens_ptr,
    out_ptr,
    lse_ptr,
    NUM_SEQS: tl.constexpr,
    TOTAL_TOKENS: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    VALUE_HEAD_DIM: tl.constexpr,
    BLOCK_BOUNDS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
):
    """Write the rows before the first sequence and after the last: 0, their LSE -inf."""
    top = 0
    for start in range(0, NUM_SEQS + 1, BLOCK_BOUNDS):
        offs = start + tl.arange(0, BLOCK_BOUNDS)
        bounds = clipped_bounds(cu_q_lens_ptr, offs, NUM_SEQS, TOTAL_TOKENS)
        top = tl.maximum(top, tl.max(bounds, 0))
    first = tl.minimum(tl.maximum(tl.load(cu_q_lens_ptr), 0), TOTAL_TOKENS)
    tokens = pid * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    outside = (tokens < TOTAL_TOKENS) & ((tokens < first) | (tokens >= top))
    if tl.max(outside.to(tl.int32), 0) == 0:
        return
    offs = tl.arange(0, 128)[None, :]
    WIDTH: tl.constexpr = NUM_HEADS * VALUE_HEAD_DIM
    zeros = tl.zeros([BLOCK_TOKENS, 128], out_ptr.dtype.element_ty)
    row = tokens.to(tl.int64)[:, None]
    for start in range(0, WIDTH, 128):
        mask = outside[:, None] & (start + offs < WIDTH)
        tl.store(out_ptr + row * WIDTH + start + offs, zeros, mask=mask)
    for start in range(0, NUM_HEADS, 128):
        mask = outside[:, None] & (start + offs < NUM_HEADS)
        nothing = tl.full([BLOCK_TOKENS, 128], float("-inf"), tl.float32)
        tl.store(lse_ptr + row * NUM_HEADS + start + offs, nothing, mask=mask)
