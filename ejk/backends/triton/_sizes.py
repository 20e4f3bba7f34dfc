"""Sizes that Triton kernels of several operations have in common: pure functions."""

import math
from typing import Any

import jax.numpy as jnp
import numpy as np

from ejk.backends.gpu import Target
from ejk.backends.paged_problem import PagedProblem
from ejk.backends.write_kv_cache import WriteKVCacheProblem

# What kernels call the types of quantised caches. Arrays of `uint8` hold int4.
KERNEL_TYPES = {"int8": "int8", "uint8": "int4", "float8_e4m3fn": "e4m3", "float8_e5m2": "e5m2"}
MAX_CAPACITY = 2**31 - 2**20
SMALLEST_PAGE = 8  # tokens; whose id is loaded once for all of them
LONGEST_CHAIN = 64  # float32 products of a logit that are added up one after the other
# The most rows of a program on a quantised cache. With more, products would be those of warpgroups,
# which read keys and values from shared memory, where codes are not yet numbers.
QUANTISED_ROWS = 32
# The least rows of a tensor core's product. Those of float32, on ordinary cores, may have fewer.
MATRIX_ROWS = 16
GRANULE = 128  # tokens; planned pieces are whole multiples, or of half: see `granule_of`


def next_power_of_2(at_least: int) -> int:
    return 1 << (at_least - 1).bit_length()


def two_parts(head_dim: int, least: int = 16) -> tuple[int, int]:
    """Cover `head_dim` with a power of two, or with two where that pads less: 576 is 512 + 64.

    None is smaller than `least`.

    Up to 128 one is better although it pads more: 80 as 128 took 150 us for ragged contexts on an
    H100, as 64 + 16 it took 187.
    """
    whole = max(least, next_power_of_2(head_dim))
    rest = max(least, next_power_of_2(head_dim - whole // 2))
    return (whole // 2, rest) if whole > 128 and rest < whole // 2 else (whole, 0)


def blocks_of(problem: PagedProblem) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return the `two_parts` of keys and of values. A product takes 16 entries or more."""
    least = 16 * loaded_together(problem)
    return two_parts(problem.head_dim, least), two_parts(problem.value_head_dim, least)


def widths(problem: PagedProblem) -> tuple[int, int]:
    """Return the entries of a key and of a value as the kernels take them, padded."""
    block_d, block_dv = blocks_of(problem)
    return sum(block_d), sum(block_dv)


def same_tile(problem: PagedProblem) -> bool:
    """Say whether the values are the keys' first entries as they were loaded, padding and all."""
    (block_d, _), block_dv = blocks_of(problem)
    return problem.latent and block_dv == (block_d, 0) and chain(problem) == block_d


def chain(problem: PagedProblem) -> int:
    """Return how many products of a logit are added up apart from others: all in 16 bits.

    Products in float32 are added one after the other. For 576 of them the error is 1.5 times what
    is allowed; in emulation it is 2.8 times that of 64 at a time, and 2.2 times that of 128.
    """
    (block_d, _), _ = blocks_of(problem)
    return min(block_d, LONGEST_CHAIN) if product_dtype(problem) == jnp.float32 else block_d


def rows_of_one_tile(is_same_tile: bool, target: Target) -> int | None:
    """Return the most rows of a program that loads keys and values as one tile; None for others.

    Every program reads the whole cache, so the more rows the better. One tile leaves shared memory
    for the queries of 64 rows, and eight warps have registers for their values, provided that the
    products are those of warpgroups, which read queries from shared memory. On AMD more than 16
    rows spill.
    """
    if not is_same_tile:
        return None
    if target.is_amd:
        return 16
    return 64 if target.is_like_hopper else 32


def block_group(
    group: int, value_head_dim: int, most_rows: int | None, least_rows: int = MATRIX_ROWS
) -> int:
    """Return how many of a group's query heads one program takes.

    A row of the product costs registers for its weighted values: 16 rows of 512 floats are 64
    registers a thread on four warps. More than 64 rows spill whatever the width.
    """
    if most_rows is None:
        most_rows = min(64, max(16, 16 * 512 // next_power_of_2(sum(two_parts(value_head_dim)))))
    return min(max(least_rows, next_power_of_2(group)), most_rows)


def shape_constants(problem: PagedProblem) -> dict[str, int]:
    """Return the shapes of queries, pools and tables, as the kernels take them."""
    return {
        "NUM_HEADS": problem.num_heads,
        "NUM_KV_HEADS": problem.num_kv_heads,
        "HEAD_DIM": problem.head_dim,
        "VALUE_HEAD_DIM": problem.value_head_dim,
        "NUM_PAGES": problem.num_pages,
        "PAGE_SIZE": problem.page_size,
        "MAX_BLOCKS": problem.max_blocks,
    }


def stride_constants(problem: PagedProblem | WriteKVCacheProblem) -> dict[str, int]:
    """Return the strides of both pools, as the kernels take them."""
    keys = strides(problem, problem.head_dim)
    values = keys if problem.latent else strides(problem, problem.value_head_dim)
    half = problem.head_dim if problem.layout.interleaved else keys["page"] // 2
    return {
        **{f"stride_k_{axis}": stride for axis, stride in keys.items()},
        **{f"stride_v_{axis}": stride for axis, stride in values.items()},
        "stride_half": half if problem.fused else 0,
    }


def strides(problem: PagedProblem | WriteKVCacheProblem, head_dim: int) -> dict[str, int]:
    """Elements from one page, KV head and slot of a pool to the next."""
    layout = problem.layout
    sizes = {
        layout.pages: problem.num_pages,
        layout.kv_heads: problem.num_kv_heads * layout.heads_of_head,
        layout.slots: problem.page_size,
    }
    if layout.halves is not None:
        sizes[layout.halves] = 2
    stride = {
        axis: head_dim * math.prod(sizes[a] for a in range(axis + 1, len(sizes))) for axis in sizes
    }
    return {
        "page": stride[layout.pages],
        "head": stride[layout.kv_heads] * layout.heads_of_head,
        "slot": stride[layout.slots],
    }


def value_bytes(problem: PagedProblem) -> float:
    """Return the bytes of a key's or value's entry in memory."""
    return problem.cache_dtype.itemsize / problem.cache_type.per_element


def loaded_together(problem: PagedProblem) -> int:
    """Return the values that a kernel loads as one element: see `_quantised`."""
    if not problem.cache_type.is_quantised:
        return 1
    in_byte = problem.cache_type.per_element
    whole = all(dim % (2 * in_byte) == 0 for dim in (problem.head_dim, problem.value_head_dim))
    return 2 * in_byte if whole else in_byte


def product_dtype(problem: PagedProblem) -> np.dtype:
    """Return the type of products: one that holds queries and cache exactly.

    Float16 holds all codes. It also holds bfloat16 queries, once each row is `normalised`.
    """
    query, cache = problem.query_dtype, problem.cache_dtype
    if query == cache:
        return query
    is_narrow = problem.cache_type.is_quantised or cache == jnp.float16
    return np.dtype(jnp.float16 if is_narrow and query.itemsize == 2 else jnp.float32)


def type_constants(problem: PagedProblem, target: Target) -> dict[str, Any]:
    """Return the types of a kernel's numbers, and how it converts them."""
    cache, products = KERNEL_TYPES.get(problem.cache_dtype.name, ""), product_dtype(problem)
    capability = target.compute_capability
    has_ptx = capability is not None and (cache != "e4m3" or capability >= 89)
    return {
        "CACHE": cache,
        "TILES": loaded_together(problem),
        "PTX": bool(cache) and has_ptx,
        "PRODUCTS": "" if problem.query_dtype == problem.cache_dtype else products.name,
        "SCALES": problem.scales,
        "LATENT": problem.latent,
    }


def feature_constants(problem: PagedProblem) -> dict[str, Any]:
    """Return which features of attention a kernel has to provide."""
    return {
        "SOFT_CAP": problem.soft_cap or 0.0,
        "HAS_WINDOW": problem.has_window,
        "HAS_SINKS": problem.has_sinks,
        "HAS_ALIBI": problem.has_alibi,
    }


def width_constants(problem: PagedProblem, rows: int) -> dict[str, int | bool]:
    """Return how a kernel takes the entries of keys and values, by blocks of rows."""
    block_d, block_dv = blocks_of(problem)
    is_same_tile = same_tile(problem)
    return {
        "BLOCK_D": block_d[0],
        "BLOCK_D_REST": block_d[1],
        "CHAIN": chain(problem),
        "BLOCK_DV": block_dv[0],
        "BLOCK_DV_REST": block_dv[1],
        "SAME_TILE": is_same_tile,
        "SPLIT_LOGITS": is_same_tile and rows == 64,
    }


def pages_of_block(problem: PagedProblem, block_kv: int, granule: int = GRANULE) -> int:
    """Return how many whole pages a block is, 1 if it lies in one page, 0 if that is not known.

    A window may begin anywhere in a page, and a piece of a plan at any `granule`. With small pages
    a thread would load more ids than it takes tokens.
    """
    if not same_tile(problem) or problem.has_window or granule % block_kv:
        return 0
    if problem.page_size % block_kv == 0:
        return 1
    pages, rest = divmod(block_kv, problem.page_size)
    return 0 if rest or problem.page_size < SMALLEST_PAGE else pages


def size_refusals(problem: PagedProblem) -> list[str]:
    """Say which sizes are too large for a kernel on pages to count in 32 bits."""
    reasons: list[str] = []
    if problem.capacity > MAX_CAPACITY:
        reasons.append(
            f"max_blocks * page_size={problem.capacity} must be at most {MAX_CAPACITY}: "
            "positions past the last token are 32-bit, too"
        )
    head_dim = max(problem.head_dim, problem.value_head_dim)
    heads = problem.num_kv_heads * problem.layout.heads_of_head
    if problem.page_size * heads * head_dim >= 2**31:
        reasons.append(f"a page of page_size={problem.page_size} has 2**31 elements or more")
    return reasons
