"""What `ejk` must compute, written as loops over float64 numbers. Imports nothing of `ejk`.

It follows the definition word by word and reads only the slots that a visible token owns: an
array full of NaN elsewhere gives the same answer.
"""

import math

import numpy as np


def page_attention(
    query,
    key_cache,
    value_cache,
    context_lens,
    block_tables,
    *,
    attn_scale=None,
    cache_layout="HND",
    sliding_window=None,
    attn_logits_soft_cap=None,
    sinks=None,
    alibi_slopes=None,
    value_head_dim=None,
):
    """Return the output `[num_seqs, num_heads, value_head_dim]` and the LSE, both in float64."""
    if key_cache.ndim == 5:
        key_cache, value_cache = halves(key_cache, cache_layout)
    num_seqs, num_heads, head_dim = query.shape
    num_kv_heads = _axis_sizes(key_cache, cache_layout)[2]
    group = num_heads // num_kv_heads
    scale = head_dim**-0.5 if attn_scale is None else float(attn_scale)
    if value_cache is None:
        value_cache = key_cache[..., :value_head_dim]

    out = np.zeros((num_seqs, num_heads, value_cache.shape[3]), np.float64)
    lse = np.full((num_seqs, num_heads), -np.inf)
    for s in range(num_seqs):
        positions = visible_positions(
            key_cache, context_lens[s], block_tables[s], cache_layout, sliding_window
        )
        last = length_of(key_cache, context_lens[s], block_tables[s], cache_layout) - 1
        for h in range(num_heads):
            logits, values = [], []
            for j in positions:
                k = token(key_cache, block_tables[s], j, h // group, cache_layout)
                logit = scale * np.dot(query[s, h].astype(np.float64), k)
                if attn_logits_soft_cap is not None:
                    logit = attn_logits_soft_cap * math.tanh(logit / attn_logits_soft_cap)
                if alibi_slopes is not None:
                    logit = logit + float(alibi_slopes[h]) * (j - last)
                logits.append(logit)
                values.append(token(value_cache, block_tables[s], j, h // group, cache_layout))
            sink = -np.inf if sinks is None else float(sinks[h])
            lse[s, h] = log_sum_exp([*logits, sink])
            for logit, v in zip(logits, values):
                out[s, h] += math.exp(logit - lse[s, h]) * v
    return out, lse


def visible_positions(key_cache, context_len, table, cache_layout="HND", sliding_window=None):
    """List the positions that one sequence sees."""
    num_pages, page_size, _ = _axis_sizes(key_cache, cache_layout)
    n = length_of(key_cache, context_len, table, cache_layout)
    first = 0 if sliding_window is None else max(n - int(sliding_window), 0)
    return [j for j in range(first, n) if 0 <= int(table[j // page_size]) < num_pages]


def halves(pool, cache_layout):
    """Take a fused pool apart: the axis right after the pages has the keys, then the values."""
    if cache_layout == "KV_HEADS_FIRST":
        return pool[:, :, 0], pool[:, :, 1]
    return pool[:, 0], pool[:, 1]


def token(cache, table, position, kv_head, cache_layout="HND"):
    """Read the key or the value of one position and one KV head."""
    _, page_size, _ = _axis_sizes(cache, cache_layout)
    page, slot = int(table[position // page_size]), position % page_size
    if cache_layout == "HND":
        vector = cache[page, kv_head, slot]
    elif cache_layout == "NHD":
        vector = cache[page, slot, kv_head]
    else:
        vector = cache[kv_head, page, slot]
    return vector.astype(np.float64)


def write_kv_cache(key, value, key_cache, value_cache, slot_mapping, *, cache_layout="HND"):
    """Return the caches after one token after the other was written to its slot."""
    caches = [None if cache is None else cache.copy() for cache in (key_cache, value_cache)]
    pools = halves(caches[0], cache_layout) if key_cache.ndim == 5 else caches
    num_pages, page_size, _ = _axis_sizes(pools[0], cache_layout)
    for i, slot in enumerate(slot_mapping):
        page, offset = divmod(int(slot), page_size)
        if 0 <= page < num_pages:
            for pool, rows in zip(pools, (key, value)):
                if rows is not None:
                    row(pool, page, offset, cache_layout)[...] = rows[i]
    return caches


def row(pool, page, offset, cache_layout):
    """All heads of one slot, `[num_kv_heads, head_dim]`."""
    if cache_layout == "HND":
        return pool[page, :, offset]
    if cache_layout == "NHD":
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


def plan_page_attention(context_lens, *, capacity, sliding_window, max_cuts, granule):
    """Return the pieces `(seq, begin, end, part)` and the splits `(seq, first part, parts)`.

    A context of more than two chunks is cut in the fewest pieces of at most a chunk, all but the
    last of one size. The longest pieces come first, of equally long ones the first sequence's.
    """
    ranges, granules = [], []
    for context_len in context_lens:
        n = min(max(int(context_len), 0), capacity)
        first = 0 if sliding_window is None else max(n - max(int(sliding_window), 0), 0)
        ranges.append((first, n))
        granules.append(-(-(n - first) // granule))
    total, longest = sum(granules), max(granules)
    chunk = max(longest, 1)
    if 4 * longest * max_cuts > 11 * total:  # longer than 2.75 fair shares
        chunk = -(-total // max_cuts)
    cuts = []
    for seq, count in enumerate(granules):
        size = -(-count // -(-count // chunk)) if count > 2 * chunk else count
        cuts.append((-size, seq, -(-count // size) if size else 1))

    pieces, splits = [], []
    for minus_size, seq, parts in sorted(cuts):
        first, n = ranges[seq]
        if parts > 1:
            splits.append((seq, len(pieces), parts))
        for i in range(parts):
            begin = first - minus_size * granule * i
            end = min(begin - minus_size * granule, n)
            pieces.append((seq, begin, end, len(pieces) if parts > 1 else -1))
    return pieces, splits


def log_sum_exp(logits):
    """Return `log(sum(exp(logits)))`, -inf if there is nothing to sum."""
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
    if cache_layout == "HND":
        return cache.shape[0], cache.shape[2], cache.shape[1]
    if cache_layout == "NHD":
        return cache.shape[0], cache.shape[1], cache.shape[2]
    return cache.shape[1], cache.shape[2], cache.shape[0]
