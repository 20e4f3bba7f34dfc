"""`ejk.check_ragged_page_attention_inputs`: the rules that only the device's values can break."""

from collections.abc import Iterator
from typing import Any

from ejk._arguments import check_sizes
from ejk._check_page_attention_inputs import NO_WINDOW, page_rule, sequence_rules
from ejk._check_values import Rule, check_values
from ejk._pools import check_pool
from ejk._typing import (
    Bounds,
    Cache,
    Lengths,
    PerToken,
    ScalarInt,
    Tables,
    Tokens,
    TreeMask,
    typed,
)
from ejk.backends.layouts import CacheLayout


@typed
def check_ragged_page_attention_inputs(
    query: Tokens,
    key_cache: Cache,
    value_cache: Cache | None,
    context_lens: Lengths,
    block_tables: Tables,
    cu_q_lens: Bounds,
    *,
    cache_layout: CacheLayout = "HND",
    sliding_window: ScalarInt | None = None,
    positions: PerToken | None = None,
    tree_mask: TreeMask | None = None,
) -> None:
    """Check the values that `ejk.ragged_page_attention` takes as they come.

    What `ejk.check_page_attention_inputs` says of lengths, page ids and window; and that

        0 <= cu_q_lens[s] <= cu_q_lens[s + 1] <= total_tokens
        cu_q_lens[s + 1] - cu_q_lens[s] <= context_lens[s]
        positions[row] >= 0                          for the rows of sequences
        tree_mask[row, row - cu_q_lens[s]]           for the rows of sequence s

    so that each new token is one of its sequence's tokens and sees itself. Rows of no sequence may
    hold anything. The arguments are those of `ejk.ragged_page_attention`; of query and pools only
    the shapes are used, and what the call itself refuses is left to it.

    With concrete arrays this waits for the device and raises. Under `jit` it adds checks of
    `jax.experimental.checkify`: transform the function with `checkify.checkify`.

    Raises:
        ValueError: with concrete arrays, naming the sequence or row, its value and the rule.

    Examples:
        >>> import jax.numpy as jnp, ejk
        >>> pool, tables = jnp.ones((8, 2, 16, 64)), jnp.array([[3, 5], [1, 0]])
        >>> args = (jnp.ones((8, 4, 64)), pool, pool, jnp.array([20, 6]), tables)
        >>> ejk.check_ragged_page_attention_inputs(*args, jnp.array([0, 1, 8]))
        Traceback (most recent call last):
        ValueError: context_lens[1]=6 must count the new tokens, of which cu_q_lens has more
    """
    num_pages, _, page_size = check_pool(key_cache, cache_layout)
    total_tokens, num_seqs = query.shape[0], context_lens.shape[0]
    check_sizes(
        block_tables=(block_tables, "num_seqs", num_seqs),
        cu_q_lens=(cu_q_lens, "num_seqs + 1", num_seqs + 1),
        positions=(positions, "total_tokens", total_tokens),
        tree_mask=(tree_mask, "total_tokens", total_tokens),
    )
    capacity = block_tables.shape[1] * page_size

    def rules(
        xp: Any, lens: Any, tables: Any, window: Any, bounds: Any, positions: Any, mask: Any
    ) -> Iterator[Rule]:
        yield from sequence_rules(lens, window, capacity)
        yield from _bound_rules(xp, lens, bounds, total_tokens)
        begins, q_lens = bounds[:-1], bounds[1:] - bounds[:-1]
        rows = xp.arange(total_tokens, dtype=bounds.dtype)[None]
        is_own = (rows >= begins[:, None]) & (rows < bounds[1:, None])  # [num_seqs, total_tokens]
        is_new = is_own.any(0)
        end = xp.clip(lens, 0, capacity)
        first = least = end - q_lens  # the first new token, and the least position of one
        if positions is not None:
            yield is_new & (positions < 0), 4, "positions[{i0}]={value} must be at least 0"
            least = xp.where(is_own, positions[None], capacity).min(1, initial=capacity)
        sees = xp.maximum(least, -1) + 1 - xp.clip(window, 0, capacity + 1)
        first = xp.minimum(first, sees)  # of what any of them sees
        # A sequence without new tokens sees nothing.
        end = xp.where(q_lens > 0, end, 0)
        yield page_rule(xp, tables, first, end, num_pages, page_size)
        if mask is not None:
            own = rows[0] - xp.where(is_own, begins[:, None], 0).sum(0)
            yield from _mask_rules(xp, mask, q_lens, is_new, own)

    window = NO_WINDOW if sliding_window is None else sliding_window
    arrays = (context_lens, block_tables, window, cu_q_lens, positions, tree_mask)
    limits = (capacity + 1, num_pages, NO_WINDOW, total_tokens + 1, NO_WINDOW, 0)
    check_values(rules, *arrays, limits=limits)


def _bound_rules(xp: Any, lens: Any, bounds: Any, total_tokens: int) -> Iterator[Rule]:
    """Yield what is asked of `cu_q_lens`."""
    yield (
        (bounds < 0) | (bounds > total_tokens),
        3,
        f"cu_q_lens[{{i0}}]={{value}} must be in [0, {total_tokens}], the rows of query",
    )
    falls = xp.concatenate([xp.zeros(1, bool), bounds[1:] < bounds[:-1]])
    yield falls, 3, "cu_q_lens[{i0}]={value} must not be below the bound before it"
    yield (
        bounds[1:] - bounds[:-1] > lens,
        0,
        "context_lens[{i0}]={value} must count the new tokens, of which cu_q_lens has more",
    )


def _mask_rules(xp: Any, mask: Any, q_lens: Any, is_new: Any, own: Any) -> Iterator[Rule]:
    """Yield what is asked of a mask where row `i` is new token `own[i]` of its sequence."""
    width = mask.shape[1]
    yield (
        q_lens > width,
        3,
        f"tree_mask.shape[1]={width} must be at least the new tokens of sequence {{i0}}",
    )
    itself = xp.arange(width, dtype=own.dtype)[None] == own[:, None]
    yield (
        is_new[:, None] & itself & ~mask,
        5,
        "tree_mask[{i0}, {i1}]={value} must be True: row {i0} is its sequence's new token "
        "{i1}, and sees itself",
    )
