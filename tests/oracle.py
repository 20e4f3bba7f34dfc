"""What `ejk` must compute, written as loops over float64 numbers. Imports nothing of `ejk`.

It follows the definition word by word and reads only the slots that a visible token owns: an
array full of NaN elsewhere gives the same answer.
"""

import math

import numpy as np

FLOAT32_END = 2.0**128  # logits are float32: from here on they are infinite


def page_attention(
    query,
    key_cache,
    value_cache,
    context_lens,
    block_tables,
    *,
    cache_layout="HND",
    sliding_window=None,
    key_scale=None,
    value_scale=None,
    **options,
):
    """Return the output `[num_seqs, num_heads, value_head_dim]` and the LSE, both in float64."""
    scales = key_scale, value_scale
    key_cache, value_cache = dequantised(key_cache, value_cache, *scales, cache_layout)
    rows = []
    for s, table in enumerate(block_tables):
        last = length_of(key_cache, context_lens[s], table, cache_layout) - 1
        positions = visible_positions(
            key_cache, context_lens[s], table, cache_layout, sliding_window
        )
        rows.append((s, [(j, j - last) for j in positions]))
    return attend(query, key_cache, value_cache, block_tables, cache_layout, rows, **options)


def ragged_page_attention(
    query,
    key_cache,
    value_cache,
    context_lens,
    block_tables,
    cu_q_lens,
    *,
    cache_layout="HND",
    sliding_window=None,
    positions=None,
    tree_mask=None,
    causal=True,
    key_scale=None,
    value_scale=None,
    **options,
):
    """Return the output `[total_tokens, num_heads, value_head_dim]` and the LSE, in float64."""
    scales = key_scale, value_scale
    key_cache, value_cache = dequantised(key_cache, value_cache, *scales, cache_layout)
    lens = [length_of(key_cache, n, t, cache_layout) for n, t in zip(context_lens, block_tables)]
    rows = ragged_rows(len(query), lens, cu_q_lens, sliding_window, positions, tree_mask, causal)
    rows = only_pages(rows, key_cache, block_tables, cache_layout)
    return attend(query, key_cache, value_cache, block_tables, cache_layout, rows, **options)


def ragged_rows(
    total, lens, cu_q_lens, sliding_window=None, positions=None, tree_mask=None, causal=True
):
    """List each row's sequence and what it sees, tokens and their distances; or None for it."""
    rows = [None] * total
    bounds = [min(max(int(c), 0), total) for c in cu_q_lens]
    bounds = [max(bounds[: s + 1]) for s in range(len(bounds))]
    for s, n in enumerate(lens):
        begin, end = bounds[s : s + 2]
        context = n - (end - begin)  # tokens before the new ones

        def position(j, context=context, begin=begin):
            is_given = positions is not None and j >= context
            return max(int(positions[begin + j - context]), 0) if is_given else j

        for row in range(begin, end):
            t = context + row - begin
            seen = range(t + 1) if t >= 0 else []
            if not causal:
                seen = range(n)
            if tree_mask is not None and t >= 0:
                columns = tree_mask[row][max(-context, 0) : n - context]
                new = [max(context, 0) + int(column) for column in np.flatnonzero(columns)]
                seen = [*range(context), *new]
            distances = [(j, (position(j) if causal else j) - position(t)) for j in seen]
            if sliding_window is not None:
                # Below 1 it shows nothing, whatever the positions.
                distances = [(j, d) for j, d in distances if -d < int(sliding_window) >= 1]
            rows[row] = s, distances
    return rows


def only_pages(rows, key_cache, block_tables, cache_layout):
    """Leave out the tokens whose table entries name no page."""
    num_pages, page_size, _ = _axis_sizes(key_cache, cache_layout)

    def is_visible(s, j):
        return 0 <= int(block_tables[s][j // page_size]) < num_pages

    return [row and (row[0], [x for x in row[1] if is_visible(row[0], x[0])]) for row in rows]


def attend(
    query,
    key_cache,
    value_cache,
    block_tables,
    cache_layout,
    rows,
    *,
    attn_scale=None,
    attn_logits_soft_cap=None,
    sinks=None,
    alibi_slopes=None,
    value_head_dim=None,
):
    """Return output and LSE of rows that each see tokens of one sequence."""
    num_rows, num_heads, head_dim = query.shape
    group = num_heads // _axis_sizes(key_cache, cache_layout)[2]
    scale = head_dim**-0.5 if attn_scale is None else float(attn_scale)
    if value_cache is None:
        value_cache = key_cache[..., :value_head_dim]

    out = np.zeros((num_rows, num_heads, value_cache.shape[3]), np.float64)
    lse = np.full((num_rows, num_heads), -np.inf)
    for r, (s, seen) in ((r, row) for r, row in enumerate(rows) if row is not None):
        for h in range(num_heads):
            logits, values = [], []
            for j, distance in seen:
                k = token(key_cache, block_tables[s], j, h // group, cache_layout)
                logit = scale * np.dot(query[r, h].astype(np.float64), k)
                if attn_logits_soft_cap is not None:
                    logit = attn_logits_soft_cap * math.tanh(logit / attn_logits_soft_cap)
                if alibi_slopes is not None:
                    logit = logit + float(alibi_slopes[h]) * distance
                if abs(logit) >= FLOAT32_END:
                    logit = math.copysign(np.inf, logit)
                logits.append(logit)
                values.append(token(value_cache, block_tables[s], j, h // group, cache_layout))
            sink = -np.inf if sinks is None else float(sinks[h])
            lse[r, h] = log_sum_exp([*logits, sink])
            if np.isnan(lse[r, h]):
                out[r, h] = np.nan
            for logit, v in zip(logits, values):
                out[r, h] += math.exp(logit - lse[r, h]) * v
    return out, lse


def visible_positions(key_cache, context_len, table, cache_layout="HND", sliding_window=None):
    """List the positions that one sequence sees."""
    num_pages, page_size, _ = _axis_sizes(key_cache, cache_layout)
    n = length_of(key_cache, context_len, table, cache_layout)
    first = 0 if sliding_window is None else max(n - int(sliding_window), 0)
    return [j for j in range(first, n) if 0 <= int(table[j // page_size]) < num_pages]


def dequantised(key_cache, value_cache, key_scale=None, value_scale=None, cache_layout="HND"):
    """Return keys and values as they are seen, in float64 where they have scales or are codes."""
    if holds_both(key_cache, cache_layout):
        if np.ndim(key_scale) > 1:
            key_scale, value_scale = halves(key_scale, cache_layout)
        key_cache, value_cache = halves(key_cache, cache_layout)
    return [
        None if cache is None else _times(codes(cache), scale, cache_layout)
        for cache, scale in ((key_cache, key_scale), (value_cache, value_scale))
    ]


def codes(cache):
    """Take the values of int4, two a byte, apart: in the low four bits the first."""
    if cache.dtype != np.uint8:
        return cache
    pairs = np.stack([cache % 16, cache // 16], axis=-1).astype(np.int8)
    pairs = np.where(pairs < 8, pairs, pairs - 16)
    return pairs.reshape(*cache.shape[:-1], 2 * cache.shape[-1])


def _times(cache, scale, cache_layout):
    """Multiply a cache by a scale: a number, one a KV head, or one of each token and head."""
    if scale is None:
        return cache
    scale = np.asarray(scale).astype(np.float64)
    if scale.ndim == 1:
        axis = {"HND": 1, "NHD": 2, "KV_HEADS_FIRST": 0, "INTERLEAVED": 2}[cache_layout]
        scale = np.expand_dims(scale, [a for a in range(3) if a != axis])
    with np.errstate(invalid="ignore"):  # of what nobody sees
        return cache.astype(np.float64) * (scale[..., None] if scale.ndim else scale)


def holds_both(pool, cache_layout):
    """Say whether a pool holds keys and values."""
    return pool.ndim == 5 or cache_layout == "INTERLEAVED"


def halves(pool, cache_layout):
    """Take a fused pool apart: the axis right after the pages has the keys, then the values.

    An interleaved one has a key and a value of each head in turn. Apart they lie as "NHD".
    """
    if cache_layout == "INTERLEAVED":
        return pool[:, :, 0::2], pool[:, :, 1::2]
    if cache_layout == "KV_HEADS_FIRST":
        return pool[:, :, 0], pool[:, :, 1]
    return pool[:, 0], pool[:, 1]


def token(cache, table, position, kv_head, cache_layout="HND"):
    """Read the key or the value of one position and one KV head."""
    _, page_size, _ = _axis_sizes(cache, cache_layout)
    page, slot = int(table[position // page_size]), position % page_size
    if cache_layout == "HND":
        vector = cache[page, kv_head, slot]
    elif cache_layout in ("NHD", "INTERLEAVED"):
        vector = cache[page, slot, kv_head]
    else:
        vector = cache[kv_head, page, slot]
    return vector.astype(np.float64)


LARGEST = {"int8": 127.0, "float8_e4m3fn": 448.0, "float8_e5m2": 57344.0, "uint8": 7.0}


def scales_of(rows, dtype):
    """Return the scale of each row of float32 `rows [..., width]`: its largest entry's code is that
    of the type.
    """
    size = np.abs(rows)
    if dtype.name.startswith("float8"):  # it has codes for NaN
        size = np.where(np.isnan(size), np.float32(0), size)
    scale = size.max(-1, initial=0) / np.float32(LARGEST[dtype.name])
    return np.where(scale < np.finfo(np.float32).tiny, np.float32(1), scale)


def quantised(rows, scale, dtype):
    """Return what a cache of `dtype` holds of float32 `rows [..., width]`, over their scale."""
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
        x = rows if scale is None else rows * (1 / np.float32(scale))
        if dtype.name not in LARGEST:
            return x.astype(dtype)
        x = np.clip(x, np.float32(-LARGEST[dtype.name]), np.float32(LARGEST[dtype.name]))
        if dtype.name.startswith("float8"):
            return x.astype(dtype)
        x = np.rint(np.where(np.isnan(x), 0, x)).astype(np.int8)
    if dtype != np.uint8:
        return x
    x = x.astype(np.uint8) % 16
    return x[..., 0::2] + 16 * x[..., 1::2]


def write_kv_cache(
    key,
    value,
    key_cache,
    value_cache,
    slot_mapping,
    *,
    cache_layout="HND",
    key_scale=None,
    value_scale=None,
):
    """Return the caches, then the scales if each token has some, after one token after the other.

    Keys and values of the cache's type without scales keep their bits.
    """
    per_token = np.ndim(key_scale) > 1
    caches = [None if cache is None else cache.copy() for cache in (key_cache, value_cache)]
    scales = [x.copy() if np.ndim(x) > 1 else x for x in (key_scale, value_scale)]
    pools, scale_pools = caches, scales
    if holds_both(key_cache, cache_layout):
        pools = halves(caches[0], cache_layout)
        scale_pools = halves(scales[0], cache_layout) if per_token else scales
    num_pages, page_size, _ = _axis_sizes(pools[0], cache_layout)
    for i, slot in enumerate(slot_mapping):
        page, offset = divmod(int(slot), page_size)
        if not 0 <= page < num_pages:
            continue
        for pool, rows, scale in zip(pools, (key, value), scale_pools):
            if rows is None:
                continue
            new = rows[i]
            if per_token:
                new = new.astype(np.float32)
                row(scale, page, offset, cache_layout)[...] = scales_of(new, pool.dtype)
                new = quantised(new, scales_of(new, pool.dtype)[..., None], pool.dtype)
            elif scale is not None or new.dtype != pool.dtype:
                scale = None if scale is None else np.reshape(scale, (-1, 1))
                new = quantised(new.astype(np.float32), scale, pool.dtype)
            row(pool, page, offset, cache_layout)[...] = new
    return [*caches, *scales] if per_token else caches


def copy_kv_cache(
    unit, key_cache, value_cache, sources, targets, *, cache_layout="HND", key_scale=None,
    value_scale=None,
):  # fmt: skip
    """Return the caches, then the scales if each token has some, after one copy after the other.

    Of slots, or of pages slot by slot. Sources are read in the arrays that were given.
    """
    given = [key_cache, value_cache]
    if np.ndim(key_scale) > 1:
        given += [key_scale, value_scale]
    copied = [None if x is None else x.copy() for x in given]
    pairs = [(old, new) for old, new in zip(given, copied) if old is not None]
    if key_cache.ndim == 5:
        split = [(halves(old, cache_layout), halves(new, cache_layout)) for old, new in pairs]
        pairs = [pair for olds, news in split for pair in zip(olds, news)]
    num_pages, page_size, _ = _axis_sizes(key_cache, cache_layout)
    slots = page_size if unit == "page" else 1
    num_units = num_pages * page_size // slots
    for source, target in zip(map(int, sources), map(int, targets)):
        if not (0 <= source < num_units and 0 <= target < num_units):
            continue
        for i in range(slots):
            at, to = (divmod(x * slots + i, page_size) for x in (source, target))
            for old, new in pairs:
                row(new, *to, cache_layout)[...] = row(old, *at, cache_layout)
    return copied


def row(pool, page, offset, cache_layout):
    """All heads of one slot, `[num_kv_heads, head_dim]`."""
    if cache_layout == "HND":
        return pool[page, :, offset]
    if cache_layout in ("NHD", "INTERLEAVED"):
        return pool[page, offset]
    return pool[:, page, offset]


def merge_attention_states(outs, lses):
    """Merge `outs [parts, rows, heads, dim]` and `lses [parts, rows, heads]` over the parts."""
    parts, rows, heads, dim = outs.shape
    out, lse = np.zeros((rows, heads, dim)), np.full((rows, heads), -np.inf)
    for r in range(rows):
        for h in range(heads):
            lse[r, h] = log_sum_exp([float(x) for x in lses[:, r, h]])
            for p in range(parts):
                if lses[p, r, h] > -np.inf:
                    weight = math.exp(float(lses[p, r, h]) - lse[r, h])
                    out[r, h] += weight * outs[p, r, h].astype(np.float64)
    return out, lse


def log_sum_exp(logits):
    """Return `log(sum(exp(logits)))`, -inf if there is nothing to sum, NaN of NaN or infinity."""
    if any(math.isnan(logit) or logit == math.inf for logit in logits):
        return np.nan
    top = max(logits, default=-np.inf)
    if top == -np.inf:
        return -np.inf
    return top + math.log(math.fsum(math.exp(logit - top) for logit in logits))


def length_of(cache, context_len, table, cache_layout="HND"):
    """Clip one sequence's length to what its row of the table can name."""
    _, page_size, _ = _axis_sizes(cache, cache_layout)
    return min(max(int(context_len), 0), len(table) * page_size)


def _axis_sizes(cache, cache_layout):
    """Return `num_pages, page_size, num_kv_heads`."""
    if cache.ndim == 5:
        cache, _ = halves(cache, cache_layout)
    if cache_layout == "HND":
        return cache.shape[0], cache.shape[2], cache.shape[1]
    if cache_layout in ("NHD", "INTERLEAVED"):
        return cache.shape[0], cache.shape[1], cache.shape[2]
    return cache.shape[1], cache.shape[2], cache.shape[0]
