"""How many programs a multiprocessor runs at a time, and what their products are."""

from typing import NamedTuple

import jax.numpy as jnp

from ejk.backends.gpu import Target
from ejk.backends.page_attention_plan import equal_shares, even_shares
from ejk.backends.paged_problem import PagedProblem
from ejk.backends.triton._sizes import (
    GRANULE,
    MATRIX_ROWS,
    product_dtype,
    same_tile,
    two_parts,
    value_bytes,
)

# From so many tokens of a KV head, a multiprocessor's share of a batch, several programs save more
# than their parts cost, and of heads that are padded, whose products take as long as memory, from
# a quarter. On an H200 with one and with three, of 128 entries, 16 contexts of 2,048 tokens, 1,985
# a multiprocessor, took 37.1 and 39.4 us, and 200 of 2,000 with one KV head, 3,030, 60.5 and 57.7;
# of 80 entries 8 of 2,048, 992, 19.8 and 17.3.
BUSY = 3000
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


def takes_bf16x3(problem: PagedProblem, target: Target) -> bool:
    """Say whether decode takes products of float32 as three of bfloat16, which holds the cache.

    Float32 has 24 bits, bfloat16 8. Tensor cores have no products of float32, and the ordinary ones
    are slow: on an H200, 64 contexts of 4,096 tokens, 32 heads and 8 KV heads of 128 entries,
    queries in float32 on bfloat16 took 2,849 us and take 298, on int8 2,751 and 296.
    """
    is_mixed = product_dtype(problem) == jnp.float32 and problem.cache_dtype != jnp.float32
    return is_mixed and problem.cache_dtype != jnp.float16 and not target.is_amd


class Load(NamedTuple):
    """What a batch of decode gives the machine to do."""

    num_seqs: int
    programs: int  # of a piece of a context
    longest: int  # tokens that a context shows, at most; 0 where nothing may follow from them
    num_sms: int

    @property
    def are_few(self) -> bool:
        """Say whether there are no more programs than multiprocessors if no context is cut."""
        return self.longest > 0 and self.num_seqs * self.programs <= self.num_sms

    def fills(self, is_padded: bool) -> bool:
        """Say whether there is so much to do that several programs a multiprocessor pay.

        One of them computes while others wait for memory, but contexts are cut in more parts. Of
        one alone each multiprocessor has a part. Short ones are not cut; of many, those of up to
        1,024 tokens, several run anyhow, see `choose_blocks`: 256 of 768 tokens took 127.6 us so on
        an H200, and 141.5 dealt out to three. Nor do several pay where contexts of one length give
        each multiprocessor one part, all of one size.
        """
        num_seqs, num_sms = self.num_seqs, self.num_sms
        are_many = num_seqs * self.programs >= 4 * num_sms
        if num_seqs <= 1 or self.longest <= (8 if are_many else 4) * GRANULE:
            return False
        tokens = num_seqs * self.programs * self.longest // num_sms
        if is_padded:
            return tokens >= BUSY // 4
        shares = equal_shares(even_shares(num_sms, self.programs), num_seqs)
        is_even = shares % num_seqs == 0 and 20 * shares * self.programs >= 19 * num_sms
        return tokens >= BUSY and not is_even


def programs_per_sm(problem: PagedProblem, rows: int, target: Target, load: Load | None) -> int:
    """Return how many programs of `rows` query heads a multiprocessor runs at a time.

    Those on quantised caches are another matter, see `quantised_per_sm`, and of a kernel that is
    not decode's, without a load, one runs.

    Times on an H200 of 400 MB in 64 equal, in 64 unequal and in 100 equal contexts of 8 KV heads,
    in us, of one program, and of three with blocks of half as many tokens, if contexts are cut:
        group 4, 64 entries     107.1 101.2 116.5    96.8  96.3 100.9
        group 4, 80 entries     136.3 138.2 140.0   109.0 110.2 106.6
        group 4, 96 entries     112.0 112.5 121.8   105.2 102.7 113.5
        group 4, 128 entries     99.4  96.1 104.1    93.3  92.7  93.6
        group 4, 256 entries     90.2  88.8  93.1    88.4  87.3  82.6
    Of 128 entries 64 contexts of 1,024 tokens take 73.7 and 68.5, but 2 of 32,768, which are cut in
    even parts for one program each, 67.2 and 71.3, and 65 with one KV head 244.9 and 252.1. With 32
    rows of 64 entries two take 105.2, 107.6 and 111.6, in place of 117 and 132 for equal and
    unequal ones; with 32 and 64 rows of 128 several are no faster than one. 33 contexts of 32,000
    tokens, 71 heads of 64 entries on a KV head, took 165.9 and 124.0 on an H100 with one and two.
    Queries in float32 on bfloat16, 8 KV heads of 256, 8 contexts of 16,000 tokens, 374.7 and 259.7;
    of 128, 64 of 4,096, 297.4 and 317.8.
    """
    width = problem.value_head_dim
    if load is None:
        return 1
    if rows < MATRIX_ROWS:
        return few_rows_per_sm(width)
    if same_tile(problem):
        return 1
    if rows > 32:
        return 2 if width <= 64 else 1
    if takes_bf16x3(problem, target):
        return 2 if sum(two_parts(width)) == 256 and target.is_like_hopper else 1
    is_16_bit = product_dtype(problem).itemsize == value_bytes(problem) == 2
    is_padded = sum(two_parts(width)) != width
    if not (is_16_bit and target.is_like_hopper and load.fills(is_padded)):
        return 1
    if rows == MATRIX_ROWS:
        return 3 if width <= 256 else 1
    return 2 if width <= 64 else 1


def few_rows_per_sm(value_head_dim: int) -> int:
    """Return the same for programs whose products have few rows: see `least_rows`.

    They are small, and wait for ordinary cores. On an H200 with 1, 3 and 6: 64 contexts of 4,096
    tokens, 8 KV heads of 128, 1,198, 837 and 895 us; 32 of 1,024, 8 of 256, 215.3, 215.3 and 177.6.
    """
    return 3 if value_head_dim <= 128 else 6


def quantised_per_sm(problem: PagedProblem, programs: int, target: Target) -> int:
    """Return the same for programs on quantised caches, which are small, so that several fit.

    Where values are not latent, a plan counts on four only if two rounds have room for all. On an
    H200, e4m3 and a scale per head, with 1 and with 4: one context of 32,768 tokens 26.9 and 25.0
    us, 32 of 2,048 with 32 KV heads 146.8 and 155.0; latent, 16 heads, with 1 and with 2: 122.5 and
    71.6.
    """
    if same_tile(problem):
        return 2
    return 4 if programs <= 2 * target.num_sms else 1


def packs_per_sm(is_quantised: bool, per_sm: int) -> int:
    """Return the same for packs, whose sequences alone would have `per_sm` programs."""
    return per_sm if is_quantised else 1


def granule_of(per_sm: int, value_head_dim: int) -> int:
    """Return of how many tokens pieces are multiples.

    Where several programs run, a share is few granules, and rounding it up to whole ones costs as
    many hundredths. So they are as many tokens as blocks of 128 entries then have.
    """
    return GRANULE // 2 if per_sm > 2 and value_head_dim > 64 else GRANULE
