"""How many programs a multiprocessor runs at a time, and the least rows of their products."""

from ejk._indices import Size, is_static
from ejk.backends.gpu import Target
from ejk.backends.triton._sizes import MATRIX_ROWS

LONG = 1536  # tokens a multiprocessor from which two programs save more than their parts cost
# The most entries of values for which fewer rows than `MATRIX_ROWS` were measured.
FEW_ROWS_WIDTH = 256


def least_rows(
    is_float32: bool, is_latent: bool, value_head_dim: int, target: Target | None
) -> int:
    """Return the least rows of a product: fewer query heads of a group are padded to them.

    Products of float32 pools run on ordinary cores, where a row costs what it has products.
    """
    is_amd = target is not None and target.is_amd
    is_few = is_float32 and not is_latent and value_head_dim <= FEW_ROWS_WIDTH and not is_amd
    return 1 if is_few else MATRIX_ROWS


def programs_per_sm(
    is_latent: bool, rows: int, value_head_dim: int, tokens: Size, target: Target | None
) -> int:
    """Return how many programs of `rows` query heads a multiprocessor runs at a time.

    `tokens` is its share of the batch, at most.

    A program that waits for memory fills a multiprocessor alone, with the blocks that are under
    way. Of two programs with 64 rows one exponentiates while the other multiplies. Times on an H100
    with one and with two, in us: 33 contexts of 32,000 tokens, 71 heads of dimension 64 on a KV
    head, 165.9 and 124.0; 20 of 4,000, 64 heads of dimension 128 on each of 8 KV heads, 128.9 and
    137.2; 64 latent contexts of 4,096 tokens, 32 heads, 127.9 and 119.5, with 16 heads 114.0 and
    121.9; 2 of 32,000, 47.5 and 55.4, as twice as many pieces have twice as many parts.
    """
    if rows < MATRIX_ROWS:
        return few_rows_per_sm(value_head_dim)
    if is_latent:
        is_hopper = target is None or target.compute_capability in (90, None)
        is_long = is_static(tokens) and tokens >= LONG
        return 2 if rows == 32 and is_hopper and is_long else 1
    return 2 if rows == 64 and value_head_dim <= 64 else 1


def few_rows_per_sm(value_head_dim: int) -> int:
    """Return the same for programs whose products have few rows: see `least_rows`.

    They are small, and wait for ordinary cores. On an H200 with 1, 3 and 6: 64 contexts of 4,096
    tokens, 8 KV heads of 128, 1,198, 837 and 895 us; 32 of 1,024, 8 of 256, 215.3, 215.3 and 177.6.
    """
    return 3 if value_head_dim <= 128 else 6


def quantised_per_sm(is_latent: bool, programs: Size, num_sms: int) -> int:
    """Return the same for programs on quantised caches, which are small, so that several fit.

    Where values are not latent, a plan counts on four only if two rounds have room for all. On an
    H200, e4m3 and a scale per head, with 1 and with 4: one context of 32,768 tokens 26.9 and 25.0
    us, 32 of 2,048 with 32 KV heads 146.8 and 155.0; latent, 16 heads, with 1 and with 2: 122.5 and
    71.6.
    """
    if is_latent:
        return 2
    return 4 if is_static(programs) and programs <= 2 * num_sms else 1
