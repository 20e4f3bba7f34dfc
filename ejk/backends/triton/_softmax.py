"""The online softmax of the attention kernels and of the combinations of their parts.

The state of each row is `m`, `l`, `acc` and, of values in two parts, `acc_rest`; else `acc_rest` is
there and never used.
"""

import typing

import triton
import triton.language as tl

from ejk.backends.triton._products import load_rows

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
FLOAT32_MAX = tl.constexpr(3.4028234663852886e38)
FLOAT16_MAX = tl.constexpr(65504.0)


@triton.jit
@typing.no_type_check
def scaled(s, scale, SOFT_CAP: tl.constexpr):
    """Return logits in log2 units: products of queries and keys, scaled and capped."""
    if SOFT_CAP > 0:
        return SOFT_CAP * tanh_f32(s * (scale / SOFT_CAP)) * LOG2E
    return s * (scale * LOG2E)


@triton.jit
@typing.no_type_check
def where_visible(s, visible, is_true, SPLIT: tl.constexpr):
    """Return logits, -inf where a token is not visible.

    With `SPLIT` two warpgroups compute the logits of half of the tokens each. Where the result of a
    product enters another one, the compiler gives whole rows to every warp: 64 rows are one
    warpgroup's, so both compute all logits, which makes half as many products more. It does not
    look through a branch, here that of `is_true`. As that always is, the branch itself goes later.
    """
    if not SPLIT:
        return tl.where(visible, s, float("-inf"))
    if is_true:
        s = tl.where(visible, s, float("-inf"))
    return s


@triton.jit
@typing.no_type_check
def add_block(
    s,  # [rows, tokens]: logits, -inf where a row does not see a token; products if `FOLDED`
    scale,
    m,  # [rows]
    l,  # [rows]
    acc,  # [rows, BLOCK_DV]
    acc_rest,  # [rows, BLOCK_DV_REST]
    values,  # [tokens, BLOCK_DV], or where they are to be loaded from, [tokens, 1]
    exists,  # [tokens]: may be loaded
    VALUE_HEAD_DIM: tl.constexpr,
    MASKED: tl.constexpr,  # or everything exists
    FOLDED: tl.constexpr,  # the scale, not negative, is still to be multiplied in
    BLOCK_DV: tl.constexpr,
    BLOCK_DV_REST: tl.constexpr,
):
    """Return `m`, `l`, `acc` and `acc_rest` after one more block of tokens."""
    c = scale * LOG2E
    m_new = tl.max(s, 1)
    if FOLDED:
        m_new = m_new * c
    m_new = tl.maximum(m, m_new)
    m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)
    if FOLDED:  # one instruction with the difference
        s = s * c
    p = tl.exp2(s - m_safe[:, None])
    alpha = tl.exp2(m - m_safe)
    IS_LOADED: tl.constexpr = not values.dtype.is_ptr()
    v = values
    if not IS_LOADED:
        l = l * alpha + tl.sum(p, 1)
        v = load_rows(values, exists, 0, BLOCK_DV, VALUE_HEAD_DIM, MASKED)
    weights = p.to(v.dtype)
    acc = tl.dot(weights, v, acc * alpha[:, None], input_precision="ieee")
    if BLOCK_DV_REST > 0:
        v_rest = load_rows(values, exists, BLOCK_DV, BLOCK_DV_REST, VALUE_HEAD_DIM, MASKED)
        acc_rest = tl.dot(weights, v_rest, acc_rest * alpha[:, None], input_precision="ieee")
    if IS_LOADED:  # while the product runs
        l = l * alpha + tl.sum(p, 1)
    return m_new, l, acc, acc_rest


@triton.jit
@typing.no_type_check
def write_rows(ptr, row, out, mask_rows, FIRST: tl.constexpr, WIDTH: tl.constexpr):
    """Store `out`, rounded, from entry `FIRST` of each row on."""
    offs = FIRST + tl.arange(0, out.shape[1])
    out = rounded(out, ptr.dtype.element_ty)
    mask = mask_rows[:, None] & (offs < WIDTH)
    tl.store(ptr + row[:, None] * WIDTH + offs, out, mask=mask)


@triton.jit
@typing.no_type_check
def add_sink(m, l, sink):
    """Count a sink in the denominator; `alpha` rescales the weighted values.

    Returns `m`, `l`, `alpha`, and whether the sink alone has weight: the LSE is then the sink.
    """
    in_log2 = sink * LOG2E
    # A finite sink stays finite: from 2.36e38 on it would be infinite here, and its weight NaN.
    is_beyond = (in_log2 == float("inf")) & (sink < float("inf"))
    in_log2 = tl.where(is_beyond, FLOAT32_MAX, in_log2)
    m_new = tl.maximum(m, in_log2)
    m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)
    alpha = tl.exp2(m - m_safe)
    l *= alpha
    sink_alone = (l == 0) & (sink < float("inf"))
    return m_new, l + tl.exp2(in_log2 - m_safe), alpha, sink_alone


@triton.jit
@typing.no_type_check
def rounded(out, dtype: tl.constexpr):
    """Round to the output's type. What is finite stays so: float16 ends where values may be."""
    if dtype == tl.float16:
        nearest = tl.minimum(tl.maximum(out, -FLOAT16_MAX), FLOAT16_MAX)
        out = tl.where(tl.abs(out) < float("inf"), nearest, out)
    return out.to(dtype)


@triton.jit
@typing.no_type_check
def tanh_f32(x):
    """Tanh to a few float32 ulp: the device library's is not there on every target.

    Below 1/4 its Taylor series to x^9, whose remainder is under 1e-8 of the result.
    """
    x2 = x * x
    series = x * (1 + x2 * (-1 / 3 + x2 * (2 / 15 + x2 * (-17 / 315 + x2 * (62 / 2835)))))
    return tl.where(tl.abs(x) < 0.25, series, 1 - 2 / (tl.exp2(x * (2 * LOG2E)) + 1))
