"""`ejk.check_page_attention_inputs`: the rules that only the device's values can break."""

from collections.abc import Iterator
from typing import Any

from ejk._arguments import check_sizes
from ejk._check_values import Rule, check_values
from ejk._pools import check_pool
from ejk._typing import Cache, Lengths, Query, ScalarInt, Tables, typed
from ejk.backends.layouts import CacheLayout

NO_WINDOW = 2**31 - 1


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

    Examples:
        >>> import jax.numpy as jnp, ejk
        >>> pool = jnp.ones((8, 2, 16, 64))
        >>> args = (jnp.ones((1, 4, 64)), pool, pool, jnp.array([20]), jnp.array([[3, 8]]))
        >>> ejk.check_page_attention_inputs(*args)
        Traceback (most recent call last):
        ValueError: block_tables[0, 1]=8 must be in [0, 8): sequence 0 sees tokens of that page
    """
    num_pages, _, page_size = check_pool(key_cache, cache_layout)
    axis = ("num_seqs", query.shape[0])
    check_sizes(context_lens=(context_lens, *axis), block_tables=(block_tables, *axis))
    capacity = block_tables.shape[1] * page_size

    def rules(xp: Any, lens: Any, tables: Any, window: Any) -> Iterator[Rule]:
        yield from sequence_rules(lens, window, capacity)
        lens = xp.clip(lens, 0, capacity)
        first = lens - xp.maximum(window, 0)
        yield page_rule(xp, tables, first, lens, num_pages, page_size)

    window = NO_WINDOW if sliding_window is None else sliding_window
    limits = (capacity + 1, num_pages, NO_WINDOW)
    check_values(rules, context_lens, block_tables, window, limits=limits)


def sequence_rules(lens: Any, window: Any, capacity: int) -> Iterator[Rule]:
    """Yield what is asked of lengths and window, the first and third array of the check."""
    yield window < 1, 2, "sliding_window={value} must be at least 1"
    yield (
        (lens < 0) | (lens > capacity),
        0,
        f"context_lens[{{i0}}]={{value}} must be in [0, {capacity}], the tokens that a row of "
        "block_tables can name",
    )


def page_rule(xp: Any, tables: Any, first: Any, end: Any, num_pages: int, page_size: int) -> Rule:
    """Ask for a page wherever a sequence sees tokens, from position `first` on up to `end`."""
    begins = xp.arange(tables.shape[1], dtype=end.dtype)[None] * page_size
    needed = (begins < end[:, None]) & (begins + page_size > first[:, None])
    return (
        needed & ((tables < 0) | (tables >= num_pages)),
        1,
        f"block_tables[{{i0}}, {{i1}}]={{value}} must be in [0, {num_pages}): sequence {{i0}} sees "
        "tokens of that page",
    )
