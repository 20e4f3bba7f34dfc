"""The scales of a block's tokens, and codes of 8 bits that the matrix unit misreads."""

import functools
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from ejk.backends.pallas._sizes import PagedSizes
from ejk.backends.pallas._tiles import SUBLANES


def token_scales(
    bufs: tuple[Any, Any], slot: Any, k: int, half: int, sizes: PagedSizes[Any]
) -> jax.Array | None:
    """Return the scales of a block's keys (`half=0`) or values, `[kv_heads, block_kv]`.

    What no visible token owns may be NaN among them.
    """
    if sizes.problem.scales != "token":
        return None
    buf, layout = bufs[half if sizes.scale_pools > 1 else 0], sizes.problem.layout
    if layout.halves is not None:
        halves_first = sizes.problem.cache_layout != "KV_HEADS_FIRST"
        where = (half,) if halves_first else (slice(None), half)
        pages = [buf[(slot, k, page, *where)] for page in range(sizes.block_pages)]
    else:
        pages = [buf[slot, k, page] for page in range(sizes.block_pages)]
    if layout.heads_inside:  # [page_size, kv_heads] each
        scales = jnp.concatenate(pages).T
        if not layout.interleaved:
            return scales
        return jnp.concatenate([scales[2 * i + half][None] for i in range(sizes.kv_heads)])
    return jnp.concatenate(pages, axis=1)


def scaled(x: jax.Array, scales: jax.Array | None, head: int) -> jax.Array:
    """Multiply rows of a head `[rows, block_kv]` by the scales of its tokens."""
    return x if scales is None else x * scales[head : head + 1]


def nan_bits(x: jax.Array) -> jax.Array:
    """Return integers of which `any_nan` says whether `x`, float8_e4m3fn, has a NaN: 0x7f or 0xff.

    Four codes are looked at at a time: one more than 0x7f has the highest of 8 bits.
    """
    words = pltpu.bitcast(x, jnp.int32)
    words = (words & 0x7F7F7F7F) + 0x01010101
    while words.shape[0] % (2 * SUBLANES) == 0:
        words = words[: words.shape[0] // 2] | words[words.shape[0] // 2 :]
    return words


def any_nan(bits: Iterable[jax.Array]) -> jax.Array:
    """Say, as an integer, whether there is a NaN in any of `nan_bits`."""
    highest = functools.reduce(jnp.bitwise_or, bits) & jnp.int32(-0x7F7F7F80)
    return jnp.any(highest != 0).astype(jnp.int32)
