"""Rows of pools and queries, and the products of the two, as the attention kernels need them."""

import typing

import triton
import triton.language as tl


@triton.jit
@typing.no_type_check
def token_ptrs(
    head_ptr, pages, key, PAGE_SIZE: tl.constexpr, stride_page: tl.constexpr,
    stride_slot: tl.constexpr,
):  # fmt: skip
    """Return where a KV head's tokens `key`, which lie in `pages`, begin: `[tokens, 1]`."""
    return head_ptr + (pages.to(tl.int64) * stride_page + (key % PAGE_SIZE) * stride_slot)[:, None]


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
def load_queries(
    row_ptrs, exists, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_D_REST: tl.constexpr, CHAIN: tl.constexpr,
):  # fmt: skip
    """Load queries in the parts that `query_key_products` takes."""
    q = ()
    for i in tl.static_range(BLOCK_D // CHAIN):
        q += (load_rows(row_ptrs, exists, i * CHAIN, CHAIN, HEAD_DIM, True),)
    if BLOCK_D_REST > 0:
        q += (load_rows(row_ptrs, exists, BLOCK_D, BLOCK_D_REST, HEAD_DIM, True),)
    return q


@triton.jit
@typing.no_type_check
def query_key_products(
    q, k_ptrs, exists, HEAD_DIM: tl.constexpr, MASKED: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_D_REST: tl.constexpr, CHAIN: tl.constexpr, REST_APART: tl.constexpr,
):  # fmt: skip
    """Return `[rows, tokens]`: sums of `CHAIN` products, and of `BLOCK_D_REST`, added up apart.

    `BLOCK_D_REST` follows on a chain that is alone, unless `REST_APART`. The other result is the
    keys' first `CHAIN` entries, `[tokens, CHAIN]`.
    """
    PARTS: tl.constexpr = BLOCK_D // CHAIN
    first = load_rows(k_ptrs, exists, 0, CHAIN, HEAD_DIM, MASKED)
    s = tl.dot(q[0], tl.trans(first), input_precision="ieee")
    for i in tl.static_range(1, PARTS):
        k = load_rows(k_ptrs, exists, i * CHAIN, CHAIN, HEAD_DIM, MASKED)
        s = _add(s, tl.dot(q[i], tl.trans(k), input_precision="ieee"))
    if BLOCK_D_REST > 0:
        k = load_rows(k_ptrs, exists, BLOCK_D, BLOCK_D_REST, HEAD_DIM, MASKED)
        if PARTS > 1 or REST_APART:
            s = _add(s, tl.dot(q[PARTS], tl.trans(k), input_precision="ieee"))
        else:
            s = tl.dot(q[PARTS], tl.trans(k), s, input_precision="ieee")
    return s, first


@triton.jit
@typing.no_type_check
def _add(s, products):
    """Return `s + products`. The compiler would make a plain sum one chain, from `s` on."""
    return tl.fma(products, 1.0, s)
