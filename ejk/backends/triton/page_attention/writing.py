"""How `page_attention_kernel` writes results. Not with `write_rows`, whose instructions come in
another order.
"""

import typing

import triton
import triton.language as tl

from ejk.backends.triton._softmax import LN2, add_sink, rounded, scaled_rows


@triton.jit
@typing.no_type_check
def write_part(out_ptr, lse_ptr, row, m, l, acc, offs_dv, mask_rows, VALUE_HEAD_DIM: tl.constexpr):
    """Write the part of one piece in float32, the tiles of `acc` from `offs_dv` on."""
    lse = tl.where(l == 0, float("-inf"), m + tl.log2(l))
    tl.store(lse_ptr + row, lse, mask=mask_rows)
    inverse = 1 / tl.where(l == 0, 1.0, l)
    row_ptrs = out_ptr + row[:, None] * VALUE_HEAD_DIM
    for i in tl.static_range(len(acc)):
        out = acc[i] * inverse[:, None]
        mask = mask_rows[:, None] & (offs_dv[i] < VALUE_HEAD_DIM)
        tl.store(row_ptrs + offs_dv[i], out, mask=mask)


@triton.jit
@typing.no_type_check
def write_result(
    out_ptr, lse_ptr, sinks_ptr, row, offs_head, m, l, acc, offs_dv, mask_rows,
    VALUE_HEAD_DIM: tl.constexpr, HAS_SINKS: tl.constexpr,
):  # fmt: skip
    """Write the result of a whole context, its sinks counted."""
    sinks = tl.full(l.shape, float("-inf"), tl.float32)
    saw_nothing = l == 0
    if HAS_SINKS:
        sinks = tl.load(sinks_ptr + offs_head, mask=mask_rows, other=float("-inf"))
        m, l, alpha, saw_nothing = add_sink(m, l, sinks)
        acc = scaled_rows(acc, alpha)
    # From base 2 and back would cost a sink that stands alone its last bit.
    lse = tl.where(saw_nothing, sinks, (m + tl.log2(l)) * LN2)
    tl.store(lse_ptr + row, lse, mask=mask_rows)
    l = tl.where(l == 0, 1.0, l)
    row_ptrs = out_ptr + row[:, None] * VALUE_HEAD_DIM
    for i in tl.static_range(len(acc)):
        out = rounded(acc[i] / l[:, None], out_ptr.dtype.element_ty)
        mask = mask_rows[:, None] & (offs_dv[i] < VALUE_HEAD_DIM)
        tl.store(row_ptrs + offs_dv[i], out, mask=mask)
