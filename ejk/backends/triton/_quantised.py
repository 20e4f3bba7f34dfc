"""Codes of quantised caches as float16, which holds each of them exactly.

Pools are read as words of 16 bits, which hold 2 values of 8 bits or 4 of 4. A block of words
becomes `TILES` tiles: tile `i` has entries `i`, `TILES + i`, `2 * TILES + i`, ... of each row, so
products are sums of products of tiles. Blocks of bytes would do for keys alone: between shared
memory and the product of values `ldmatrix` transposes nothing narrower than 16 bits, and a thread
would read byte by byte. Rows that words do not fit are read as bytes, whose `TILES` is 1, or 2.

`PTX` converts two words at once on NVIDIA GPUs, e4m3 by the instruction that those from sm_89 on
have for it. Elsewhere the same bits come from Triton's own operations. A float16 `1024 + n` has the
bits of `n` in its last ones, from which int8 and int4 follow by subtraction; float8_e5m2 is the
upper byte of a float16; e4m3 differs from it in the bias of the exponent, and in the code for NaN.

Decode takes integers as "int8 + 128" and "int4 + 8", so that none is negative: as the last bits of
a float16 whose other bits are zero. That is a subnormal number, `2^-24` times as large, and takes
no arithmetic at all. Tensor cores take subnormals as they are, and their products are exact. The
upper half of an int4 byte stays where it is, 16 times as large, and queries make up for that. The
128 or 8 that each code has too much leaves the sums: see `for_subnormal` and `of_subnormal`.

Source: numbers from the bits of a float (Kim et al., 2022, arXiv:2211.10017).
"""

import typing

import triton
import triton.language as tl

LARGEST = tl.constexpr(14)  # log2 of a row's largest query in float16, which ends at 2^16
SUBNORMALS = tl.constexpr(16777216.0)  # 2^24: the least subnormal float16 is 1 over it
FLOAT32_MAX = tl.constexpr(3.4028234663852886e38)
TINY = tl.constexpr(1.1754943508222875e-38)  # 2^-126, the least normal float32


@triton.jit
@typing.no_type_check
def pool_ptr(ptr, CACHE: tl.constexpr, TILES: tl.constexpr):
    """Return where a pool begins, as a pointer to what is loaded at once: `TILES` values."""
    if CACHE == "":
        return ptr
    elif (4 if _is_int4(CACHE) else 2) == TILES:
        return ptr.to(tl.pointer_type(tl.int16))
    else:
        return ptr.to(tl.pointer_type(tl.uint8))


@triton.jit
@typing.no_type_check
def tiles_of(x, dtype: tl.constexpr, CACHE: tl.constexpr, TILES: tl.constexpr, PTX: tl.constexpr):
    """Return a block of a pool as a tuple of `TILES` tiles of numbers of `dtype`."""
    if CACHE == "":
        tiles = (x,)
    elif PTX and x.dtype == tl.int16:
        tiles = _by_ptx(x, CACHE)
    else:
        words = x.to(tl.int16)
        tiles = ()
        for i in tl.static_range(TILES):
            if CACHE == "int4 + 8" and i % 2 == 1:
                tiles += (_upper_half(words >> ((i - 1) * 4)),)
            else:
                tiles += (_lowest(words >> (i * (4 if _is_int4(CACHE) else 8)), CACHE),)
    converted = ()
    for i in tl.static_range(TILES):
        converted += (tiles[i].to(dtype),)
    return converted


@triton.constexpr_function
def is_integer(CACHE: str) -> bool:
    return CACHE in ("int8", "int4") or is_subnormal(CACHE)


@triton.constexpr_function
def is_subnormal(CACHE: str) -> bool:
    return CACHE in ("int8 + 128", "int4 + 8")


@triton.constexpr_function
def _is_int4(CACHE: str) -> bool:
    return CACHE in ("int4", "int4 + 8")


@triton.jit
@typing.no_type_check
def _upper_half(x):
    """Return the code in the upper half of a byte as it is in "int4 + 8"."""
    return ((x & 0xF0) ^ 0x80).to(tl.float16, bitcast=True)


@triton.jit
@typing.no_type_check
def _lowest(x, CACHE: tl.constexpr):
    """Return the code in the lowest bits of words as float16."""
    if CACHE == "int4 + 8":
        return ((x & 0xF) ^ 8).to(tl.float16, bitcast=True)
    if CACHE == "int8 + 128":
        return ((x & 0xFF) ^ 0x80).to(tl.float16, bitcast=True)
    if CACHE == "int4":
        return ((x & 0xF) ^ 0x6408).to(tl.float16, bitcast=True) - 1032.0
    if CACHE == "int8":
        return ((x & 0xFF) ^ 0x6480).to(tl.float16, bitcast=True) - 1152.0
    sign_and_rest = x << 8
    if CACHE == "e5m2":
        return sign_and_rest.to(tl.float16, bitcast=True)
    # Both have the bits of a smaller number in float16, NaN those of 480.
    magnitude = (x & 0x7F) << 7
    magnitude = tl.where(magnitude == 0x3F80, 0x7E00, magnitude)
    bits = magnitude | (sign_and_rest & -0x8000)
    return bits.to(tl.float16, bitcast=True) * 256.0


@triton.jit
@typing.no_type_check
def _by_ptx(x, CACHE: tl.constexpr):
    """Return the codes in words as float16, two words a register."""
    if CACHE == "int4 + 8":
        return tl.inline_asm_elementwise(
            """
            {
            .reg .b32 upper;
            shr.u32 upper, $4, 8;
            lop3.b32 $0, $4, 0x000f000f, 0x00080008, 0x6a;
            lop3.b32 $1, $4, 0x00f000f0, 0x00800080, 0x6a;
            lop3.b32 $2, upper, 0x000f000f, 0x00080008, 0x6a;
            lop3.b32 $3, upper, 0x00f000f0, 0x00800080, 0x6a;
            }
            """,
            "=&r,=&r,=&r,=&r,r",
            [x],
            dtype=(tl.float16, tl.float16, tl.float16, tl.float16),
            is_pure=True,
            pack=2,
        )
    elif CACHE == "int8 + 128":
        return tl.inline_asm_elementwise(
            """
            {
            .reg .b32 upper;
            shr.u32 upper, $2, 8;
            lop3.b32 $0, $2, 0x00ff00ff, 0x00800080, 0x6a;
            lop3.b32 $1, upper, 0x00ff00ff, 0x00800080, 0x6a;
            }
            """,
            "=&r,=&r,r",
            [x],
            dtype=(tl.float16, tl.float16),
            is_pure=True,
            pack=2,
        )
    elif CACHE == "int4":
        return tl.inline_asm_elementwise(
            """
            {
            .reg .b32 upper, low, high, sixteenth, offset;
            mov.b32 low, 0x64086408;
            mov.b32 high, 0x64806480;
            mov.b32 sixteenth, 0x2c002c00;
            mov.b32 offset, 0xd480d480;
            shr.u32 upper, $4, 8;
            lop3.b32 $0, $4, 0x000f000f, low, 0x6a;
            lop3.b32 $1, $4, 0x00f000f0, high, 0x6a;
            lop3.b32 $2, upper, 0x000f000f, low, 0x6a;
            lop3.b32 $3, upper, 0x00f000f0, high, 0x6a;
            sub.f16x2 $0, $0, low;
            fma.rn.f16x2 $1, $1, sixteenth, offset;
            sub.f16x2 $2, $2, low;
            fma.rn.f16x2 $3, $3, sixteenth, offset;
            }
            """,
            "=&r,=&r,=&r,=&r,r",
            [x],
            dtype=(tl.float16, tl.float16, tl.float16, tl.float16),
            is_pure=True,
            pack=2,
        )
    elif CACHE == "int8":
        return tl.inline_asm_elementwise(
            """
            {
            .reg .b32 upper, offset;
            mov.b32 offset, 0x64806480;
            shr.u32 upper, $2, 8;
            lop3.b32 $0, $2, 0x00ff00ff, offset, 0x6a;
            lop3.b32 $1, upper, 0x00ff00ff, offset, 0x6a;
            sub.f16x2 $0, $0, offset;
            sub.f16x2 $1, $1, offset;
            }
            """,
            "=&r,=&r,r",
            [x],
            dtype=(tl.float16, tl.float16),
            is_pure=True,
            pack=2,
        )
    elif CACHE == "e5m2":
        return tl.inline_asm_elementwise(
            """
            prmt.b32 $0, $2, 0, 0x2404;
            and.b32 $1, $2, 0xff00ff00;
            """,
            "=&r,=r,r",
            [x],
            dtype=(tl.float16, tl.float16),
            is_pure=True,
            pack=2,
        )
    else:
        return tl.inline_asm_elementwise(
            """
            {
            .reg .b32 sorted;
            .reg .b16 even, odd;
            prmt.b32 sorted, $2, 0, 0x3120;
            mov.b32 {even, odd}, sorted;
            cvt.rn.f16x2.e4m3x2 $0, even;
            cvt.rn.f16x2.e4m3x2 $1, odd;
            }
            """,
            "=&r,=&r,r",
            [x],
            dtype=(tl.float16, tl.float16),
            is_pure=True,
            pack=2,
        )


@triton.jit
@typing.no_type_check
def normalised(q, scale):
    """Return queries `[rows, ...]` as float16, and what scales their products, `[rows]`.

    Each row is multiplied by the power of two, with the sign of `scale`, that makes its largest
    entry about `2^LARGEST`. That is exact, and neither end of float16 is met. The scale of the
    products is positive: the largest product is the largest logit.
    """
    largest = tl.max(tl.abs(q[0].to(tl.float32)), 1)
    for i in tl.static_range(1, len(q)):
        largest = tl.maximum(largest, tl.max(tl.abs(q[i].to(tl.float32)), 1))
    exponent = (largest.to(tl.int32, bitcast=True) >> 23) - 127
    # An infinite row keeps room for what is finite; of a tiny one the inverse is to be normal.
    exponent = tl.minimum(tl.maximum(exponent, LARGEST - 126), 127)
    exponent = exponent - LARGEST
    factor = ((127 - exponent) << 23).to(tl.float32, bitcast=True)
    inverse = ((127 + exponent) << 23).to(tl.float32, bitcast=True)
    signed = tl.where(scale < 0, -factor, factor)
    normal = ()
    for i in tl.static_range(len(q)):
        normal += ((q[i].to(tl.float32) * signed[:, None]).to(tl.float16),)
    scale = tl.abs(scale) * inverse
    return normal, tl.where(scale < TINY, TINY, scale)


@triton.jit
@typing.no_type_check
def for_subnormal(q, scale, CACHE: tl.constexpr):
    """Return `normalised` queries for subnormal codes, and what scales their products, `[rows]`.

    The third is what the products begin with, `[rows]`: it takes off what each code has too much.
    """
    LEAST: tl.constexpr = 8.0 if CACHE == "int4 + 8" else 128.0
    total = tl.zeros([q[0].shape[0]], tl.float32)
    tiles = ()
    for i in tl.static_range(len(q)):
        total += tl.sum(q[i].to(tl.float32), 1)
        if CACHE == "int4 + 8" and i % 2 == 1:
            tiles += (q[i] * 0.0625,)
        else:
            tiles += (q[i],)
    # A finite scale stays so: its products are small, and a logit that overflows is NaN.
    larger = tl.minimum(scale * SUBNORMALS, FLOAT32_MAX)
    scale = tl.where(scale < float("inf"), larger, scale)
    return tiles, scale, total * (-LEAST / SUBNORMALS)


@triton.jit
@typing.no_type_check
def of_subnormal(acc, CACHE: tl.constexpr):
    """Return tiles of weighted values from those of subnormals, the last of which sums weights."""
    LEAST: tl.constexpr = 8.0 if CACHE == "int4 + 8" else 128.0
    LAST: tl.constexpr = len(acc) - 1
    least = tl.max(acc[LAST], 1) * LEAST  # every column has the sum
    tiles = ()
    for i in tl.static_range(LAST):
        if CACHE == "int4 + 8" and i % 2 == 1:
            tiles += (acc[i] * (SUBNORMALS / 16) - least[:, None],)
        else:
            tiles += (acc[i] * SUBNORMALS - least[:, None],)
    return tiles
