"""Attention as loops over float64 numbers."""

import math
from collections.abc import Collection, Iterable
from typing import Any

import numpy as np

from ejk.testing.oracle._pools import Array, axis_sizes, dequantised, token

FLOAT32_END = 2.0**128  # logits are float32: from here on they are infinite
Rows = dict[int, tuple[int, Array]]
"""The rows that some sequence has: which, and the tokens that the row sees, `[tokens, 2]`: their
positions, and their distances from the row's own."""


def tokens(seen: Iterable[Any]) -> Array:
    """Make an array of positions and distances."""
    return np.array([*seen], np.int64).reshape(-1, 2)


def page_attention(
    query: Array,
    key_cache: Array,
    value_cache: Array | None,
    context_lens: Array,
    block_tables: Array,
    *,
    cache_layout: str = "HND",
    sliding_window: Any = None,
    key_scale: Any = None,
    value_scale: Any = None,
    **options: Any,
) -> tuple[Array, Array]:
    """Return the output `[num_seqs, num_heads, value_head_dim]` and the LSE, both in float64."""
    scales = key_scale, value_scale
    key_cache, value_cache = dequantised(key_cache, value_cache, *scales, cache_layout)
    rows: Rows = {}
    for s, table in enumerate(block_tables):
        last = length_of(key_cache, context_lens[s], table, cache_layout) - 1
        positions = visible_positions(
            key_cache, context_lens[s], table, cache_layout, sliding_window
        )
        rows[s] = s, tokens((j, j - last) for j in positions)
    return attend(query, key_cache, value_cache, block_tables, cache_layout, rows, **options)


def ragged_page_attention(
    query: Array,
    key_cache: Array,
    value_cache: Array | None,
    context_lens: Array,
    block_tables: Array,
    cu_q_lens: Array,
    *,
    cache_layout: str = "HND",
    sliding_window: Any = None,
    positions: Any = None,
    tree_mask: Any = None,
    causal: bool = True,
    key_scale: Any = None,
    value_scale: Any = None,
    **options: Any,
) -> tuple[Array, Array]:
    """Return the output `[total_tokens, num_heads, value_head_dim]` and the LSE, in float64."""
    scales = key_scale, value_scale
    key_cache, value_cache = dequantised(key_cache, value_cache, *scales, cache_layout)
    lens = [length_of(key_cache, n, t, cache_layout) for n, t in zip(context_lens, block_tables)]
    rows = ragged_rows(len(query), lens, cu_q_lens, sliding_window, positions, tree_mask, causal)
    rows = only_pages(rows, key_cache, block_tables, cache_layout)
    return attend(query, key_cache, value_cache, block_tables, cache_layout, rows, **options)


def ragged_rows(
    total: int,
    lens: Iterable[Any],
    cu_q_lens: Array,
    sliding_window: Any = None,
    positions: Any = None,
    tree_mask: Any = None,
    causal: bool = True,
) -> Rows:
    """Map each row of a sequence to that and to what the row sees, its pages valid or not."""
    rows: Rows = {}
    bounds = [min(max(int(c), 0), total) for c in cu_q_lens]
    bounds = [max(bounds[: s + 1]) for s in range(len(bounds))]
    for s, n in enumerate(map(int, lens)):
        begin, end = bounds[s : s + 2]
        context = n - (end - begin)  # tokens before the new ones

        def position(j: int, context: int = context, begin: int = begin) -> int:
            if positions is None or j < context:
                return j
            return max(int(positions[begin + j - context]), 0)

        for row in range(begin, end):
            t = context + row - begin
            seen = list(range(n if not causal else t + 1))
            if tree_mask is not None and t >= 0:
                columns = tree_mask[row][max(-context, 0) : n - context]
                new = [max(context, 0) + int(column) for column in np.flatnonzero(columns)]
                seen = [*range(context), *new]
            distances = [(j, (position(j) if causal else j) - position(t)) for j in seen]
            if sliding_window is not None:
                # Below 1 it shows nothing, whatever the positions.
                distances = [(j, d) for j, d in distances if -d < int(sliding_window) >= 1]
            rows[row] = s, tokens(distances)
    return rows


def only_pages(rows: Rows, key_cache: Array, block_tables: Array, cache_layout: str) -> Rows:
    """Leave out the tokens whose table entries name no page."""
    num_pages, page_size, _ = axis_sizes(key_cache, cache_layout)

    def is_visible(s: int, j: int) -> bool:
        return 0 <= int(block_tables[s][j // page_size]) < num_pages

    return {
        row: (s, tokens((j, d) for j, d in seen.tolist() if is_visible(s, j)))
        for row, (s, seen) in rows.items()
    }


def attend(
    query: Array,
    key_cache: Array,
    value_cache: Array | None,
    block_tables: Array,
    cache_layout: str,
    rows: Rows,
    *,
    attn_scale: Any = None,
    attn_logits_soft_cap: float | None = None,
    sinks: Any = None,
    alibi_slopes: Any = None,
    value_head_dim: int | None = None,
) -> tuple[Array, Array]:
    """Return output and LSE of rows that each see tokens of one sequence."""
    num_rows, num_heads, head_dim = query.shape
    group = num_heads // axis_sizes(key_cache, cache_layout)[2]
    scale = head_dim**-0.5 if attn_scale is None else float(attn_scale)
    values_of = key_cache[..., :value_head_dim] if value_cache is None else value_cache

    out = np.zeros((num_rows, num_heads, values_of.shape[3]), np.float64)
    lse = np.full((num_rows, num_heads), -np.inf)
    for r, (s, seen) in rows.items():
        keys: list[Array] = []
        values: list[Array] = []
        for h in range(num_heads):
            if h % group == 0:  # the heads of a group read the same
                where = block_tables[s], seen[:, 0].tolist(), h // group, cache_layout
                keys, values = (_tokens(pool, *where) for pool in (key_cache, values_of))
            q = query[r, h].astype(np.float64)
            logits: list[float] = []
            for k, distance in zip(keys, seen[:, 1].tolist()):
                logit = scale * np.dot(q, k)
                if attn_logits_soft_cap is not None:
                    logit = attn_logits_soft_cap * math.tanh(logit / attn_logits_soft_cap)
                if alibi_slopes is not None:
                    logit = logit + float(alibi_slopes[h]) * distance
                if abs(logit) >= FLOAT32_END:
                    logit = math.copysign(np.inf, logit)
                logits.append(logit)
            sink = -np.inf if sinks is None else float(sinks[h])
            lse[r, h] = log_sum_exp([*logits, sink])
            if np.isnan(lse[r, h]):
                out[r, h] = np.nan
            for logit, v in zip(logits, values):
                out[r, h] += math.exp(logit - lse[r, h]) * v
    return out, lse


def _tokens(
    pool: Array, table: Array, positions: Iterable[int], kv_head: int, cache_layout: str
) -> list[Array]:
    return [token(pool, table, j, kv_head, cache_layout) for j in positions]


def visible_positions(
    key_cache: Array,
    context_len: Any,
    table: Array,
    cache_layout: str = "HND",
    sliding_window: Any = None,
) -> Iterable[int]:
    """List the positions that one sequence sees."""
    num_pages, page_size, _ = axis_sizes(key_cache, cache_layout)
    n = length_of(key_cache, context_len, table, cache_layout)
    first = 0 if sliding_window is None else max(n - int(sliding_window), 0)
    return [j for j in range(first, n) if 0 <= int(table[j // page_size]) < num_pages]


def merge_attention_states(outs: Array, lses: Array) -> tuple[Array, Array]:
    """Merge `outs [parts, rows, heads, dim]` and `lses [parts, rows, heads]` over the parts."""
    parts, rows, heads, dim = outs.shape
    out, lse = np.zeros((rows, heads, dim)), np.full((rows, heads), -np.inf)
    for r in range(rows):
        for h in range(heads):
            lse[r, h] = log_sum_exp([float(x) for x in lses[:, r, h]])
            for p in range(parts):
                if lses[p, r, h] != -np.inf:  # NaN is not lost
                    weight = math.exp(float(lses[p, r, h]) - lse[r, h])
                    out[r, h] += weight * outs[p, r, h].astype(np.float64)
    return out, lse


def log_sum_exp(logits: Collection[float]) -> float:
    """Return `log(sum(exp(logits)))`, -inf if there is nothing to sum, NaN of NaN or infinity."""
    if any(math.isnan(logit) or logit == math.inf for logit in logits):
        return np.nan
    top = max(logits, default=-np.inf)
    if top == -np.inf:
        return -np.inf
    return top + math.log(math.fsum(math.exp(logit - top) for logit in logits))


def length_of(cache: Array, context_len: Any, table: Array, cache_layout: str = "HND") -> int:
    """Clip one sequence's length to what its row of the table can name."""
    _, page_size, _ = axis_sizes(cache, cache_layout)
    return min(max(int(context_len), 0), len(table) * page_size)
