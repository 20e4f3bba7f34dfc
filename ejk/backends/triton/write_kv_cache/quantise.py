"""Rows of new tokens as a cache of another type holds them: codes and scales.

A row is what a token and a KV head have. Its scale, if it is computed, is its largest magnitude
over the largest code; its codes are `row * (1 / scale)`, rounded to nearest even and saturated.
"""

import typing

import triton
import triton.language as tl

# Added to it, a number below 2**22 is rounded to an integer, which the sum's last bits are.
ROUNDING = tl.constexpr(1.5 * 2**23)
TINY = tl.constexpr(1.1754943508222875e-38)  # the least normal float32
NAN8 = tl.constexpr(0x7F)  # in e4m3, and one of several in e5m2


@triton.jit
@typing.no_type_check
def load_heads(
    rows_ptr, tokens, heads, is_token, NUM_KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, HAS_ALL: tl.constexpr,
):  # fmt: skip
    """Load `[tokens, heads, BLOCK_D]`; zeros past a head's end."""
    offs_d = tl.arange(0, BLOCK_D)[None, None, :]
    row = tokens.to(tl.int64)[:, None] * NUM_KV_HEADS + heads[None, :]
    mask = is_token[:, None] & (heads < NUM_KV_HEADS)[None, :]
    ptrs = rows_ptr + (row * HEAD_DIM)[:, :, None] + offs_d
    if HAS_ALL and HEAD_DIM == BLOCK_D:
        return tl.load(ptrs)
    else:
        return tl.load(ptrs, mask=mask[:, :, None] & (offs_d < HEAD_DIM), other=0.0)


@triton.jit
@typing.no_type_check
def store_heads(
    pool_ptr,
    scale_ptr,
    rows,  # [tokens, heads, BLOCK_D]
    page,  # int64 [tokens]
    offset,  # int64 [tokens]
    heads,
    writes,  # [tokens, heads]
    HEAD_DIM: tl.constexpr,
    stride_page: tl.constexpr,
    stride_head: tl.constexpr,
    stride_slot: tl.constexpr,
    SCALES: tl.constexpr,
    CACHE: tl.constexpr,
    LARGEST: tl.constexpr,
    PER_ELEMENT: tl.constexpr,
    NATIVE: tl.constexpr,
):
    """Store codes of rows, and their scales if these are computed."""
    dtype: tl.constexpr = pool_ptr.dtype.element_ty
    slots = page * stride_page + offset * stride_slot
    row = slots[:, None] + (heads.to(tl.int64) * stride_head)[None, :]  # [tokens, heads]
    rows = rows.to(tl.float32)
    has_codes = writes  # of others integers are 0
    if SCALES == "head":
        mask = tl.max(writes.to(tl.int32), 0) > 0
        inverse = tl.div_rn(1.0, tl.load(scale_ptr + heads, mask=mask, other=1.0))
        rows *= inverse[None, :, None]
    if SCALES == "token":
        scales = scales_of(rows, LARGEST, CACHE)
        tl.store(scale_ptr + row // HEAD_DIM, scales, mask=writes)
        has_codes = scales < float("inf")
        rows *= tl.div_rn(1.0, scales)[:, :, None]
    codes = codes_of(rows, has_codes, SCALES == "token", CACHE, LARGEST, PER_ELEMENT, NATIVE, dtype)
    offs = tl.arange(0, codes.shape[2])[None, None, :]
    mask = writes[:, :, None] & (offs < HEAD_DIM // PER_ELEMENT)
    tl.store(pool_ptr + (row // PER_ELEMENT)[:, :, None] + offs, codes, mask=mask)


@triton.jit
@typing.no_type_check
def scales_of(rows, LARGEST: tl.constexpr, CACHE: tl.constexpr):
    """Return the scales of `rows [tokens, heads, BLOCK_D]`: 1 if there is no normal number.

    NaN that codes cannot say is said by the scale.
    """
    if CACHE == "int8" or CACHE == "int4":
        sizes = tl.abs(rows)
        if rows.shape[2] > 1:
            first, second = tl.split(_pairs(sizes))
            sizes = tl.maximum(first, second, propagate_nan=tl.PropagateNan.ALL)
        largest = tl.max(sizes.to(tl.int32, bitcast=True), 2)  # as bits NaN is the largest
        largest = largest.to(tl.float32, bitcast=True)
        scales = tl.div_rn(largest, LARGEST)
        return tl.where(scales < TINY, 1.0, scales)
    else:
        scales = tl.div_rn(tl.max(tl.abs(rows), 2), LARGEST)
        return tl.where(scales >= TINY, scales, 1.0)


@triton.jit
@typing.no_type_check
def codes_of(
    rows, has_codes, IN_RANGE: tl.constexpr, CACHE: tl.constexpr, LARGEST: tl.constexpr,
    PER_ELEMENT: tl.constexpr, NATIVE: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """Return `rows`, divided by their scales, as elements of a cache.

    If they are `IN_RANGE`, those that have integers for codes are finite and need not be saturated.
    """
    # Instructions that take four codes at a time need as many.
    FOURS: tl.constexpr = rows.numel >= 4 * PER_ELEMENT
    if CACHE == "":
        return rows.to(dtype)
    elif CACHE == "e4m3":
        return _float8(rows, tl.float8e4nv, LARGEST, NATIVE).to(dtype, bitcast=True)
    elif CACHE == "e5m2":
        return _float8(rows, tl.float8e5, LARGEST, NATIVE).to(dtype, bitcast=True)
    elif NATIVE and FOURS and PER_ELEMENT == 1:
        if not IN_RANGE:  # and keep NaN, which the conversion makes 0
            rows = tl.maximum(rows, -LARGEST, propagate_nan=tl.PropagateNan.ALL)
        return _int8(rows).to(dtype)
    elif NATIVE and FOURS:
        low, high = tl.split(_pairs(rows))
        return _int4(low, high).to(dtype)
    else:
        if not IN_RANGE:
            rows = tl.where(rows == rows, rows, 0.0)
            rows = tl.maximum(rows, -LARGEST)
        # Always, or the compiler would fuse the product with the sum, and round once.
        rows = tl.minimum(rows, LARGEST)
        codes = (rows + ROUNDING).to(tl.int32, bitcast=True)
        if IN_RANGE:
            codes &= tl.where(has_codes, -1, 0)[:, :, None]
        if PER_ELEMENT == 2:
            low, high = tl.split(_pairs(codes))
            codes = (low & 0xF) | (high << 4)
        return codes.to(dtype)


@triton.jit
@typing.no_type_check
def _pairs(x):
    """Give the neighbours along the last axis an axis of their own."""
    return x.reshape(x.shape[0], x.shape[1], x.shape[2] // 2, 2)


@triton.jit
@typing.no_type_check
def _int8(rows):
    """Round to nearest even, saturated, NaN to 0: sm_90 does so for two numbers, and packs them.

    That is 0.5 instructions a number. By the bits of a sum, with NaN and saturation, it is 6.
    """
    return tl.inline_asm_elementwise(
        """
        {
        .reg .b32 a, b, c, d;
        cvt.rni.s32.f32 a, $1;
        cvt.rni.s32.f32 b, $2;
        cvt.rni.s32.f32 c, $3;
        cvt.rni.s32.f32 d, $4;
        cvt.pack.sat.s8.s32.b32 c, d, c, 0;
        cvt.pack.sat.s8.s32.b32 $0, b, a, c;
        }
        """,
        "=r,f,f,f,f",
        [rows],
        dtype=tl.int8,
        is_pure=True,
        pack=4,
    )


@triton.jit
@typing.no_type_check
def _int4(low, high):
    """Do the same to numbers that are in range, two to a byte."""
    return tl.inline_asm_elementwise(
        """
        {
        .reg .b32 a, b, c, d, e, f, g, h;
        cvt.rni.s32.f32 a, $1;
        cvt.rni.s32.f32 b, $2;
        cvt.rni.s32.f32 c, $3;
        cvt.rni.s32.f32 d, $4;
        cvt.rni.s32.f32 e, $5;
        cvt.rni.s32.f32 f, $6;
        cvt.rni.s32.f32 g, $7;
        cvt.rni.s32.f32 h, $8;
        cvt.pack.sat.s8.s32.b32 c, d, c, 0;
        cvt.pack.sat.s8.s32.b32 a, b, a, c;
        cvt.pack.sat.s8.s32.b32 g, h, g, 0;
        cvt.pack.sat.s8.s32.b32 e, f, e, g;
        shl.b32 e, e, 4;
        lop3.b32 $0, 0x0f0f0f0f, a, e, 0xca;
        }
        """,
        "=r,f,f,f,f,f,f,f,f",
        [low, high],
        dtype=tl.uint8,
        is_pure=True,
        pack=4,
    )


@triton.jit
@typing.no_type_check
def _float8(rows, dtype: tl.constexpr, LARGEST: tl.constexpr, NATIVE: tl.constexpr):
    """Round to 8-bit floats, saturated: by bits where the target does not do so itself."""
    if NATIVE:
        return rows.to(dtype)
    else:
        DROPPED: tl.constexpr = 23 - dtype.fp_mantissa_width
        BIAS: tl.constexpr = dtype.exponent_bias
        LEAST_NORMAL: tl.constexpr = 2.0 ** (1 - BIAS)
        # The last place of this one is the least subnormal number.
        UNIT: tl.constexpr = 2.0 ** (1 - BIAS + DROPPED)
        UNIT_BITS: tl.constexpr = (127 + 1 - BIAS + DROPPED) << 23
        sign = (rows.to(tl.int32, bitcast=True) >> 24) & 0x80
        size = tl.minimum(tl.abs(rows), LARGEST)
        bits = size.to(tl.int32, bitcast=True)
        half = (1 << (DROPPED - 1)) - 1 + ((bits >> DROPPED) & 1)
        normal = ((bits + half) >> DROPPED) - ((127 - BIAS) << (23 - DROPPED))
        subnormal = (size + UNIT).to(tl.int32, bitcast=True) - UNIT_BITS
        code = tl.where(size < LEAST_NORMAL, subnormal, normal)
        return tl.where(rows == rows, code | sign, NAN8).to(tl.uint8)
