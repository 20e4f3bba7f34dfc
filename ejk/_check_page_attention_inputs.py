"""`ejk.check_page_attention_inputs`: the rules that only the device's values can break."""

from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from ejk._indices import as_int32
from ejk._page_attention_problem import check_pool, fail
from ejk._typing import Cache, Lengths, Query, ScalarInt, Tables, typed
from ejk.backends.page_attention import CacheLayout


@typed
def check_page_attention_inputs(
    query: Query,
    key_cache: Cache,
    value_cache: Cache | None,
    context_lens: Lengths,
    block_tables: Tables,
    *,
    cache_layout: CacheLayout = "HND",
    sliding_window: ScalarInt | None = None,
) -> None:
    """Check the lengths, page ids and window that `ejk.page_attention` takes as they come.

    `ejk.page_attention` never reads outside its arrays: it clips a length and hides the tokens of
    a bad entry. Nearly always those are a caller's mistakes, and this finds them. The arguments are
    the first five of `ejk.page_attention`, and its `cache_layout` and `sliding_window`; of query
    and pools only the shapes are used, and what the call itself refuses is left to it.

    With concrete arrays this waits for the device and raises. Under `jit` it adds checks of
    `jax.experimental.checkify`: transform the function with `checkify.checkify`.

    Raises:
        ValueError: with concrete arrays, naming the sequence, the entry, its value and the rule.

    Example:
        >>> import jax.numpy as jnp, ejk
        >>> pool = jnp.ones((8, 2, 16, 64))
        >>> args = (jnp.ones((1, 4, 64)), pool, pool, jnp.array([20]), jnp.array([[3, 8]]))
        >>> ejk.check_page_attention_inputs(*args)
        Traceback (most recent call last):
        ValueError: block_tables[0, 1]=8 must be in [0, 8): sequence 0 sees tokens of that page
    """
    num_pages, _, page_size = check_pool(key_cache, cache_layout)
    num_seqs = query.shape[0]
    for name, x in (("context_lens", context_lens), ("block_tables", block_tables)):
        if x.shape[0] != num_seqs:
            fail(f"{name}.shape[0]={x.shape[0]} must be num_seqs={num_seqs}")
    capacity = block_tables.shape[1] * page_size
    arrays = (context_lens, block_tables, 2**31 - 1 if sliding_window is None else sliding_window)
    if any(isinstance(x, Tracer) for x in arrays):
        from jax.experimental import checkify

        lens, tables, window = map(as_int32, arrays, (capacity + 1, num_pages, 2**31 - 1))
        given = (lens, tables, window)
        for bad, which, message in _rules(jnp, *given, num_pages, page_size):
            if bad.size == 0:
                continue
            worst = jnp.unravel_index(jnp.argmax(bad), bad.shape)
            facts: Any = {f"i{axis}": index for axis, index in enumerate(worst)}
            checkify.check(~bad.any(), message, value=given[which][worst], **facts)
        return
    lens, tables, window = map(_as_int64, arrays)
    for bad, which, message in _rules(np, lens, tables, window, num_pages, page_size):
        if bad.any():
            worst = tuple(np.argwhere(bad)[0])
            facts = {f"i{axis}": index for axis, index in enumerate(worst)}
            value = np.asarray(arrays[which])[worst]
            raise ValueError(message.format(value=value, **facts))


def _as_int64(x: Any) -> Any:
    """Widen on the host. What only uint64 holds becomes the largest int64: too large for all."""
    x = np.asarray(x)
    return np.minimum(x, min(np.iinfo(x.dtype).max, np.iinfo(np.int64).max)).astype(np.int64)


def _rules(xp, lens, tables, window, num_pages, page_size) -> Iterator[tuple]:
    """Yield where each rule is broken, by which of the three arrays, and what to say of it."""
    capacity = tables.shape[1] * page_size
    yield window < 1, 2, "sliding_window={value} must be at least 1"
    yield (
        (lens < 0) | (lens > capacity),
        0,
        f"context_lens[{{i0}}]={{value}} must be in [0, {capacity}], the tokens that a row of "
        "block_tables can name",
    )
    lens = xp.clip(lens, 0, capacity)[:, None]
    begins = xp.arange(tables.shape[1], dtype=lens.dtype)[None] * page_size
    needed = (begins < lens) & (begins + page_size > lens - xp.maximum(window, 0))
    yield (
        needed & ((tables < 0) | (tables >= num_pages)),
        1,
        f"block_tables[{{i0}}, {{i1}}]={{value}} must be in [0, {num_pages}): sequence {{i0}} sees "
        "tokens of that page",
    )
