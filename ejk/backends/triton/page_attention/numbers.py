"""What decode computes with: the types of its numbers, and how many sums it keeps."""

from typing import Any

import jax.numpy as jnp

from ejk.backends.gpu import Target
from ejk.backends.page_attention import PageAttentionProblem
from ejk.backends.triton._sizes import product_dtype, same_tile, type_constants
from ejk.backends.triton.page_attention.blocks import DecodeBlocks
from ejk.backends.triton.page_attention.occupancy import takes_bf16x3

# What the kernel calls codes of integers that it takes as subnormal float16.
SUBNORMAL = {"int8": "int8 + 128", "int4": "int4 + 8"}


def types_of(problem: PageAttentionProblem, target: Target) -> dict[str, Any]:
    """Return the types of the kernel's numbers, of which two are decode's alone.

    Products of float32 may be three of bfloat16, see `takes_bf16x3`. Codes of integers are
    subnormal float16, except on AMD, where nobody has seen the matrix cores take them. That, the
    masks left out and `sums_of` together, on an H200, 64 contexts of 4,096 tokens, 32 heads and 8
    KV heads of 128 entries, before and after: int8 and a scale per token 155.8 and 131.0 us, per
    head 131.6 and 126.8, int4 111.9 and 103.2.
    """
    types = type_constants(problem, target)
    if takes_bf16x3(problem, target):
        return types | {"PRODUCTS": "bf16x3"}
    if product_dtype(problem) == jnp.float16 and problem.cache_type.is_integer:
        return types if target.is_amd else types | {"CACHE": SUBNORMAL[types["CACHE"]]}
    return types


def sums_of(problem: PageAttentionProblem, blocks: DecodeBlocks) -> int:
    """Return how many sums of weights a row has until the end, so that no two warps share one.

    0 is one sum a row, for which warps wait for each other in every block. On an H200, the same
    contexts, with one and with several: e4m3 and a scale per token 141.7 and 132.8 us, per head
    127.5 and 127.7; int8 per token 134.8 and 131.0, per head 129.1 and 126.8. In latent attention
    a second program needs their registers: e4m3, 16 heads, 70.3 and 84.0.
    """
    cache = problem.cache_type
    pays = cache.is_integer or (cache.is_quantised and problem.scales == "token")
    if not pays or same_tile(problem):
        return 0
    return min(blocks.block_kv, max(16, 8 * blocks.num_warps))
