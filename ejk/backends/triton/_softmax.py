"""The online softmax of the attention kernels and of the combinations of their parts.

The state of each row is `m`, `l` and `acc`: a tuple of tiles as `load_tiles` makes them of values,
first those of `BLOCK_DV` entries, then those of `BLOCK_DV_REST`. Where the value of a token has a
scale of its own, `acc` counts in `2^unit`: the largest scale so far, but for `HEADROOM`. A weight
times the scale of its value is then at most `2^(HEADROOM + 1)`, below the end of float16, and it is
no coarser than other weights unless its scale is `2^28` times smaller than the largest.
"""

import typing

import triton
import triton.language as tl

from ejk.backends.triton._products import dot_bf16x3, load_tiles, split_bf16x3
from ejk.backends.triton._quantised import FLOAT32_MAX, is_subnormal

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
FLOAT16_MAX = tl.constexpr(65504.0)
HEADROOM = tl.constexpr(14)
LEAST_UNIT = tl.constexpr(-126)  # before there is a scale


@triton.jit
@typing.no_type_check
def scaled(s, scale, SOFT_CAP: tl.constexpr):
    """Return logits in log2 units: products of queries and keys, scaled and capped."""
    if SOFT_CAP > 0:
        return SOFT_CAP * tanh_f32(s * over_tokens(scale / SOFT_CAP)) * LOG2E
    return s * over_tokens(scale * LOG2E)


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
    scale,  # a number, or [rows]
    m,  # [rows]
    l,  # [rows], or sums of a row apart
    unit,
    acc,  # tiles of [rows, entries]
    values,  # tiles of [tokens, entries], or where they are to be loaded from, [tokens, 1]
    value_scale,  # [tokens]
    exists,  # [tokens]: may be loaded
    dtype: tl.constexpr,  # of products
    VALUE_HEAD_DIM: tl.constexpr,
    MASKED: tl.constexpr,  # or everything exists
    FOLDED: tl.constexpr,  # the scale, not negative, is still to be multiplied in
    PER_TOKEN: tl.constexpr,  # there is a `value_scale`, which `unit` is for
    BLOCK_DV: tl.constexpr,
    BLOCK_DV_REST: tl.constexpr,
    SAME_TILE: tl.constexpr,  # the values are loaded
    CACHE: tl.constexpr,
    TILES: tl.constexpr,
    PTX: tl.constexpr,
    BF16X3: tl.constexpr = False,  # weights are float32, in three tiles of `dtype`
):
    """Return `m`, `l`, `unit` and `acc` after one more block of tokens."""
    c = scale * LOG2E
    m_new = tl.max(s, 1)
    if FOLDED:
        m_new = m_new * c
    m_new = tl.maximum(m, m_new)
    m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)
    if FOLDED:  # one instruction with the difference
        s = s * over_tokens(c)
    p = tl.exp2(s - m_safe[:, None])
    alpha = tl.exp2(m - m_safe)
    if not SAME_TILE:
        l = _summed(l, alpha, p)
        values_ptrs = values
        v = load_tiles(
            values_ptrs, exists, dtype, 0, BLOCK_DV, VALUE_HEAD_DIM, MASKED, CACHE, TILES, PTX
        )
    else:
        v = values
    weights = p
    rescale = alpha
    if PER_TOKEN:
        unit_new = tl.maximum(unit, _largest_exponent(value_scale) - HEADROOM)
        weights = p * (value_scale * exp2_of_integer(-unit_new))[None, :]
        # From the first unit the difference may be too far, but it has counted nothing.
        rescale = alpha * exp2_of_integer(tl.maximum(unit - unit_new, -127))
        unit = unit_new
    weights = split_bf16x3((weights,)) if BF16X3 else weights.to(dtype)
    added = ()
    for i in tl.static_range(TILES):
        scaled_acc = acc[i] * rescale[:, None]
        added += (_weighted(weights, v[i], scaled_acc, BF16X3),)
    if BLOCK_DV_REST > 0:
        v_rest = load_tiles(
            values, exists, dtype, BLOCK_DV, BLOCK_DV_REST, VALUE_HEAD_DIM, MASKED, CACHE, TILES,
            PTX,
        )  # fmt: skip
        for i in tl.static_range(TILES):
            scaled_acc = acc[TILES + i] * rescale[:, None]
            added += (_weighted(weights, v_rest[i], scaled_acc, BF16X3),)
    if is_subnormal(CACHE):  # sums of the weights as they were rounded
        ones = tl.full([s.shape[1], acc[len(acc) - 1].shape[1]], 1.0, dtype)
        sums = acc[len(acc) - 1] * rescale[:, None]
        added += (tl.dot(weights, ones, sums, input_precision="ieee"),)
    if SAME_TILE:  # while the product runs
        l = _summed(l, alpha, p)
    return m_new, l, unit, added


@triton.jit
@typing.no_type_check
def _summed(l, alpha, p):
    """Return the sums of weights with one more block: of a row, or of its tokens `i`, `n + i`, ..

    of which, for suitable `n`, a thread has all.
    """
    if l.type.numel == p.shape[0]:
        return l * alpha + tl.sum(p, 1)
    else:
        apart = tl.reshape(p, [p.shape[0], p.shape[1] // l.shape[1], l.shape[1]])
        return l * alpha[:, None] + tl.sum(apart, 1)


@triton.jit
@typing.no_type_check
def _weighted(weights, v, acc, BF16X3: tl.constexpr):
    """Return `acc` and a block's weighted values, which are added up apart if `BF16X3`."""
    if BF16X3:
        return tl.fma(dot_bf16x3(weights, 0, v), 1.0, acc)
    else:
        return tl.dot(weights, v, acc, input_precision="ieee")


@triton.jit
@typing.no_type_check
def _largest_exponent(scale):
    """Return the binary exponent of the largest magnitude: what is not finite counts as 2^127."""
    magnitude = scale.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    return (tl.minimum(tl.max(magnitude, 0), 254 << 23) >> 23) - 127


@triton.jit
@typing.no_type_check
def exp2_of_integer(exponent):
    """Return `2^exponent` in float32, of exponents from -126 to 127; 0 of -127."""
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
@typing.no_type_check
def over_tokens(scale):
    """Return a scale, of all rows or `[rows]`, as it multiplies `[rows, tokens]`."""
    if scale.type.is_block():
        return scale[:, None]
    else:
        return scale


@triton.jit
@typing.no_type_check
def scaled_rows(tiles, scale):
    """Multiply the rows of each tile by `scale [rows]`."""
    products = ()
    for i in tl.static_range(len(tiles)):
        products += (tiles[i] * scale[:, None],)
    return products


@triton.jit
@typing.no_type_check
def scaled_values(
    tiles, l, unit, kv_head, key_scale_ptr, value_scale_ptr, SCALES: tl.constexpr,
    LATENT: tl.constexpr,
):  # fmt: skip
    """Return the weighted values times the scale of values.

    Those of a row that saw nothing stay zero: the scale may be NaN.
    """
    if SCALES != "none":
        if SCALES == "token":
            value_scale = exp2_of_integer(unit)
        else:
            value_scale = tl.load((key_scale_ptr if LATENT else value_scale_ptr) + kv_head)
        tiles = scaled_rows(tiles, tl.where(l == 0, 0.0, value_scale))
    return tiles


@triton.jit
@typing.no_type_check
def zero_acc(
    ROWS: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_DV_REST: tl.constexpr, TILES: tl.constexpr
):
    """Return the tiles of weighted values of no token."""
    acc = ()
    for _ in tl.static_range(TILES):
        acc += (tl.zeros([ROWS, BLOCK_DV // TILES], tl.float32),)
    if BLOCK_DV_REST > 0:
        for _ in tl.static_range(TILES):
            acc += (tl.zeros([ROWS, BLOCK_DV_REST // TILES], tl.float32),)
    return acc


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
