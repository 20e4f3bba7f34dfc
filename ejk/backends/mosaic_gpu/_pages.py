"""Which tokens of a block lie in pages that exist: a bit for each page of the block."""

import functools
from collections.abc import Iterable
from typing import Any

import jax.numpy as jnp
from jax import lax

from ejk._indices import Size


def exists(page: Any, num_pages: Size) -> Any:
    """Say whether an id names a page."""
    return (page >= 0) & (page < num_pages)


def page_bits(exist: Iterable[Any]) -> Any:
    """Return a bit for each page, from the lowest on: whether it exists."""
    bits = (there.astype(jnp.int32) << i for i, there in enumerate(exist))
    return functools.reduce(jnp.bitwise_or, bits)


def in_pages(token: Any, exist: Any, page_tokens: int) -> Any:
    """Say which tokens of a block, counted from its first, lie in pages whose bit is set.

    A page, or what a block has of it, is `page_tokens`, a power of two.
    """
    page = lax.shift_right_logical(token, jnp.full_like(token, page_tokens.bit_length() - 1))
    return lax.shift_right_logical(lax.broadcast(exist, token.shape), page) & 1 == 1
