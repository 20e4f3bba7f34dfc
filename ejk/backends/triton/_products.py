"""Rows of pools and queries, and the products of the two, as the attention kernels need them."""

import typing

import triton
import triton.language as tl

from ejk.backends.triton._quantised import normalised, tiles_of


@triton.jit
@typing.no_type_check
def slot_offsets(
    page, slot, stride_page: tl.constexpr, stride_slot: tl.constexpr, TILES: tl.constexpr
):
    """Return where slots of pages begin, in a pool whose elements are `TILES` values each."""
    return page * (stride_page // TILES) + slot * (stride_slot // TILES)


@triton.jit
@typing.no_type_check
def token_ptrs(
    head_ptr, page, key, PAGE_SIZE: tl.constexpr, stride_page: tl.constexpr,
    stride_slot: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Return where a KV head's tokens `key`, which lie in `page`, begin: `[tokens, 1]`."""
    offs = slot_offsets(page.to(tl.int64), key % PAGE_SIZE, stride_page, stride_slot, TILES)
    return head_ptr + offs[:, None]


@triton.jit
@typing.no_type_check
def of_tokens(entries, PAGES: tl.constexpr, PAGE_SIZE: tl.constexpr):
    """Repeat what a block's pages have once for each of their tokens."""
    if PAGES > 1:
        entries = tl.broadcast_to(entries[:, None], [PAGES, PAGE_SIZE])
        entries = tl.reshape(entries, [PAGES * PAGE_SIZE])
    return entries


@triton.jit
@typing.no_type_check
def load_rows(
    row_ptrs, exists, FIRST: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """Load `[rows, BLOCK]` of rows at `row_ptrs [rows, 1]`, from entry `FIRST` on.

    Zero where a row does not exist, its slot may hold NaN, and past its width. If not `MASKED`, all
    rows exist.
    """
    offs = FIRST + tl.arange(0, BLOCK)
    if MASKED:
        mask = exists[:, None]
        if FIRST + BLOCK > WIDTH:
            mask = mask & (offs < WIDTH)
        # Addresses are made after the mask: the other way round decode takes 0.3 % longer.
        return tl.load(row_ptrs + offs, mask=mask, other=0.0)
    if FIRST + BLOCK > WIDTH:
        return tl.load(row_ptrs + offs, mask=(offs < WIDTH)[None, :], other=0.0)
    return tl.load(row_ptrs + offs)


@triton.jit
@typing.no_type_check
def load_tiles(
    row_ptrs, exists, dtype: tl.constexpr, FIRST: tl.constexpr, BLOCK: tl.constexpr,
    WIDTH: tl.constexpr, MASKED: tl.constexpr, CACHE: tl.constexpr, TILES: tl.constexpr,
    PTX: tl.constexpr,
):  # fmt: skip
    """Load rows of a pool, as `load_rows` does, as `TILES` tiles of numbers: see `_quantised`."""
    rows = load_rows(row_ptrs, exists, FIRST // TILES, BLOCK // TILES, WIDTH // TILES, MASKED)
    return tiles_of(rows, dtype, CACHE, TILES, PTX)


@triton.jit
@typing.no_type_check
def load_queries(
    row_ptrs, exists, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_D_REST: tl.constexpr, CHAIN: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Load queries in the tiles that `query_key_products` takes."""
    q = ()
    for i in tl.static_range(BLOCK_D // CHAIN):
        q += _query_tiles(row_ptrs, exists, i * CHAIN, CHAIN, HEAD_DIM, TILES)
    if BLOCK_D_REST > 0:
        q += _query_tiles(row_ptrs, exists, BLOCK_D, BLOCK_D_REST, HEAD_DIM, TILES)
    return q


@triton.jit
@typing.no_type_check
def _query_tiles(
    row_ptrs, exists, FIRST: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr,
    TILES: tl.constexpr,
):  # fmt: skip
    """Load entries of queries as the tiles that `load_tiles` makes of them in a pool."""
    if TILES == 1:
        q = (load_rows(row_ptrs, exists, FIRST, BLOCK, WIDTH, True),)
    else:
        offs = FIRST + TILES * tl.arange(0, BLOCK // TILES)
        mask = exists[:, None] & (offs < WIDTH)
        q = ()
        for i in tl.static_range(TILES):
            q += (tl.load(row_ptrs + offs + i, mask=mask, other=0.0),)
    return q


@triton.jit
@typing.no_type_check
def for_products(q, scale, PRODUCTS: tl.constexpr):
    """Return queries in the type of products, "" for their own, and what scales the products.

    That is a number, or one of each row, and not negative, if the type is float16.
    """
    if PRODUCTS == "float16":
        return normalised(q, scale)
    elif PRODUCTS == "float32" or PRODUCTS == "bf16x3":
        converted = ()
        for i in tl.static_range(len(q)):
            converted += (q[i].to(tl.float32),)
        if PRODUCTS == "bf16x3":
            converted = split_bf16x3(converted)
        return converted, scale
    else:
        return q, scale


@triton.jit
@typing.no_type_check
def split_bf16x3(tiles):
    """Return three tiles of bfloat16 for each of float32, whose sum it is: 8 of its 24 bits each.

    Bits are cut off, not rounded, so that no finite number becomes infinite.
    """
    parts = ()
    for i in tl.static_range(len(tiles)):
        first = _leading(tiles[i])
        rest = tl.where(tl.abs(tiles[i]) == float("inf"), 0.0, tiles[i] - first)
        second = _leading(rest)
        parts += (first.to(tl.bfloat16), second.to(tl.bfloat16))
        parts += ((rest - second).to(tl.bfloat16),)
    return parts


@triton.jit
@typing.no_type_check
def _leading(x):
    """Return float32 cut off after the bits that bfloat16 has."""
    return (x.to(tl.int32, bitcast=True) & -0x10000).to(tl.float32, bitcast=True)


@triton.jit
@typing.no_type_check
def dot_bf16x3(parts, FIRST: tl.constexpr, other):
    """Return the product with bfloat16 of float32 in three parts, from tile `FIRST` on.

    Where the first part alone is not finite, that is the product: 0 times infinity of the others
    is nothing that the sum knew.
    """
    rest = tl.dot(parts[FIRST + 2], other)
    rest = tl.dot(parts[FIRST + 1], other, rest)
    return tl.dot(parts[FIRST], other) + tl.where(tl.abs(rest) < float("inf"), rest, 0.0)


@triton.jit
@typing.no_type_check
def query_key_products(
    q, k_ptrs, exists, HEAD_DIM: tl.constexpr, MASKED: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_D_REST: tl.constexpr, CHAIN: tl.constexpr, REST_APART: tl.constexpr,
    CACHE: tl.constexpr, TILES: tl.constexpr, PTX: tl.constexpr, begun=None,
):  # fmt: skip
    """Return `[rows, tokens]`: sums of `CHAIN` products, and of `BLOCK_D_REST`, added up apart.

    What is `begun` already is added to. `BLOCK_D_REST` follows on a chain that is alone, unless
    `REST_APART`. The other result is the keys' first `CHAIN` entries: `TILES` tiles
    `[tokens, CHAIN / TILES]`.
    """
    CHAINS: tl.constexpr = BLOCK_D // CHAIN
    BF16X3: tl.constexpr = len(q) > TILES * (CHAINS + (1 if BLOCK_D_REST > 0 else 0))
    dtype: tl.constexpr = q[0].dtype
    first = load_tiles(k_ptrs, exists, dtype, 0, CHAIN, HEAD_DIM, MASKED, CACHE, TILES, PTX)
    s = _products(q, first, 0, TILES, BF16X3, begun)
    for i in tl.static_range(1, CHAINS):
        k = load_tiles(k_ptrs, exists, dtype, i * CHAIN, CHAIN, HEAD_DIM, MASKED, CACHE, TILES, PTX)
        s = _add(s, _products(q, k, i * TILES, TILES, BF16X3))
    if BLOCK_D_REST > 0:
        k = load_tiles(
            k_ptrs, exists, dtype, BLOCK_D, BLOCK_D_REST, HEAD_DIM, MASKED, CACHE, TILES, PTX
        )
        if CHAINS > 1 or REST_APART or BF16X3:
            s = _add(s, _products(q, k, CHAINS * TILES, TILES, BF16X3))
        else:
            for i in tl.static_range(TILES):
                s = tl.dot(q[TILES + i], tl.trans(k[i]), s, input_precision="ieee")
    return s, first


@triton.jit
@typing.no_type_check
def _products(q, k, FIRST: tl.constexpr, TILES: tl.constexpr, BF16X3: tl.constexpr, begun=None):
    """Return the products of as many tiles of queries, from `FIRST` on, and of keys."""
    if BF16X3:
        s = dot_bf16x3(q, 3 * FIRST, tl.trans(k[0]))
        for i in tl.static_range(1, TILES):
            s = s + dot_bf16x3(q, 3 * (FIRST + i), tl.trans(k[i]))
    else:
        s = tl.dot(q[FIRST], tl.trans(k[0]), begun, input_precision="ieee")
        for i in tl.static_range(1, TILES):
            s = tl.dot(q[FIRST + i], tl.trans(k[i]), s, input_precision="ieee")
    return s


@triton.jit
@typing.no_type_check
def _add(s, products):
    """Return `s + products`. The compiler would make a plain sum one chain, from `s` on."""
    return tl.fma(products, 1.0, s)


@triton.jit
@typing.no_type_check
def in_order(tiles, TILES: tl.constexpr):
    """Return tiles whose entries are in order, each of `TILES` tiles that take turns."""
    ordered = ()
    for i in tl.static_range(len(tiles) // TILES):
        ordered += (interleaved(tiles, i * TILES, TILES),)
    return ordered


@triton.jit
@typing.no_type_check
def interleaved(tiles, FIRST: tl.constexpr, TILES: tl.constexpr):
    """Return `TILES` tiles, from `FIRST` on, as one whose entries are in order."""
    if TILES == 1:
        return tiles[FIRST]
    elif TILES == 2:
        return tl.interleave(tiles[FIRST], tiles[FIRST + 1])
    else:
        even = tl.interleave(tiles[FIRST], tiles[FIRST + 2])
        odd = tl.interleave(tiles[FIRST + 1], tiles[FIRST + 3])
        return tl.interleave(even, odd)
