"""Tokens, warps and stages that were measured for float32, and for caches that are converted."""

import jax.numpy as jnp

from ejk.backends.gpu import Target
from ejk.backends.paged_problem import PagedProblem
from ejk.backends.triton._sizes import next_power_of_2, product_dtype, same_tile, value_bytes
from ejk.backends.triton.page_attention.occupancy import Load, takes_bf16x3
from ejk.backends.triton.page_attention.tuned import Pipeline


def of_few_rows(wide: int, rows: int) -> Pipeline:
    """Return the pipeline for products of float32 with fewer rows than tensor cores take.

    What was best of large batches on an H200 (`python benchmarks/tune.py --dtype float32`), or
    within 28 % of it where heads have 64 entries. 64 contexts of 4,096 tokens, 32 heads and 8 KV
    heads of 128 entries took 837 us, and 1,927 with products padded to 16 rows; 32 of 1,024 tokens
    with 32 KV heads 374 with two warps, and 964.
    """
    is_narrow = wide <= 64
    block_kv = 64 if is_narrow or (rows > 4 and wide <= 128) else 32
    num_warps = 1 if rows <= 2 and not is_narrow else 2
    return Pipeline(block_kv, num_warps, 3 if is_narrow or (rows <= 4 and wide <= 128) else 2)


def of_converted(
    problem: PagedProblem, wide: int, rows: int, target: Target, load: Load | None
) -> Pipeline:
    """Return the pipeline for a cache whose elements are converted.

    On an H200, 64 contexts of 4,096 tokens, 32 heads and 8 KV heads of 128 entries, in us:
        e4m3, scale per head    64, 2, 3: 127.5    64, 4, 3: 129.6    128, 4, 2: 160.4
        e4m3, scale per token   64, 2, 3: 132.8    64, 2, 4: 136.9    128, 4, 3: 149.7
        int8, scale per head    64, 2, 3: 126.8    64, 4, 3: 134.5    128, 4, 2: 127.7
        int8, scale per token   64, 2, 3: 131.0    64, 4, 3: 211.9    128, 4, 3: 147.1
        int4, scale per token   128, 2, 3: 103.2   128, 4, 3: 118.5   256, 4, 2: 113.5
        float32 on bfloat16     64, 4, 3: 297.4    128, 8, 2: 297.4   32, 4, 3: 297.2
        float32 on int8         64, 4, 3: 247.2    32, 4, 3: 274.2    64, 4, 2: 252.1
    With 64 entries:
        int4                    128, 2, 4: 68.3    128, 2, 3: 74.0    64, 1, 3: 75.2
        int8, scale per token   128, 2, 3: 75.0    64, 2, 3: 84.0
    With 256 entries, 8 KV heads, 8 contexts of 16,000 tokens, and 100 of 2,000:
        int8, scale per token   64, 4, 3: 152, 250    32, 2, 3: 166, 222    32, 4, 3: 185, 255
        int4                    64, 2, 3: 112, 184    64, 4, 3: 156, 219    32, 4, 3: 161, 214
        float32 on bfloat16     64, 4, 2: 260, 403    64, 4, 3: 301, 514    16, 4, 3: 744, 710
        float32 on int8         64, 4, 3: 243, 399    64, 4, 2: 280, 397    16, 4, 3: 438, 711
    and 32 of 4,096, e4m3 with a scale per head, 32, 4, 3: 137.8 and 64, 4, 3: 178.8. Latent e4m3,
    16 heads, 64, 8, 3: 70.3 and 64, 8, 2: 75.8.
    """
    wide = next_power_of_2(wide)  # as blocks and warps must be: 192 entries are in two parts
    if product_dtype(problem) == jnp.float32:
        if load is not None and takes_bf16x3(problem, target) and wide <= 256:
            return Pipeline(64, 4, 2 if wide == 256 and value_bytes(problem) == 2 else 3)
        return Pipeline(max(16, min(64, 4096 // wide)), 4, 3)
    if same_tile(problem) and wide == 512:
        return Pipeline(64 if rows == 16 else 32, 8, 3)
    if value_bytes(problem) < 1 and rows == 16 and wide <= 128:
        if wide == 64 and load is not None:
            return Pipeline(128, 2, 4)
        return Pipeline(128, 2, 3) if wide == 128 else Pipeline(64, 1, 3)
    if problem.scales == "token" and rows == 16 and wide == 256 and load is not None:
        if value_bytes(problem) < 1:
            return Pipeline(64, 2, 3)
        return Pipeline(64, 4, 3) if load.are_few else Pipeline(32, 2, 3)
    return Pipeline(max(16, min(128, 8192 // wide)), max(2, wide // 64) * rows // 16, 3)
