"""Text from a small decoder with a paged key-value cache. `dense_cache.py` is the same, dense.

`diff dense_cache.py paged_cache.py` is what it takes to change. A sequence has the pages that it
needs, wherever they are. `rollouts.py` hands them out step by step, by `ejk.paging`.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from decoder import Config, Params, forward, random_params

import ejk

PAGE_SIZE = 16


def empty_cache(config: Config, num_rows: int, row_len: int):
    shape = (num_rows, row_len, config.num_kv_heads, config.head_dim)
    return [(jnp.zeros(shape), jnp.zeros(shape)) for _ in range(config.num_layers)]


@functools.partial(jax.jit, static_argnames="config", donate_argnames="cache")
def step(config: Config, params: Params, cache, place, tokens, positions):
    """Append `tokens [num_seqs, n]` at `positions` to the sequences, each at its place."""

    def attend(query, key, value, cache):
        lens, bounds = positions[:, -1] + 1, jnp.arange(len(tokens) + 1) * tokens.shape[1]
        sizes = dict(total_tokens=tokens.size, page_size=PAGE_SIZE, num_pages=len(cache[0]))
        slots = ejk.ragged_slot_mapping(place, lens, bounds, **sizes)
        query, key, value = (x.reshape(-1, *x.shape[2:]) for x in (query, key, value))
        cache = ejk.write_kv_cache(key, value, *cache, slots, cache_layout="NHD")
        out = ejk.ragged_page_attention(query, *cache, lens, place, bounds, cache_layout="NHD")
        return out, cache

    return forward(config, params, tokens, positions, attend, cache)


def generate(config: Config, params: Params, prompts: Sequence[Sequence[int]], num_new: int):
    """Continue all prompts greedily; return the new tokens, and the logits that chose each."""
    lens = np.array([len(prompt) for prompt in prompts])
    tokens = np.zeros((len(prompts), lens.max()), np.int32)  # padding is overwritten later
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    ends = np.append(0, np.cumsum(-(-(lens + num_new) // PAGE_SIZE)))
    place = ejk.dense_block_tables(ends, np.arange(ends[-1]), max_blocks=max(np.diff(ends)))
    cache = empty_cache(config, ends[-1], PAGE_SIZE)
    positions = np.broadcast_to(np.arange(lens.max()), tokens.shape)
    seen = []
    for new in range(num_new):
        logits, cache = step(config, params, cache, place, tokens, positions)
        last = lens - 1 if new == 0 else np.zeros_like(lens)
        seen.append(np.take_along_axis(np.asarray(logits), last[:, None, None], axis=1)[:, 0])
        tokens = seen[-1].argmax(-1)[:, None].astype(np.int32)
        positions = lens[:, None] + new
    logits = np.stack(seen, axis=1)
    return logits.argmax(-1), logits


if __name__ == "__main__":
    new, _ = generate(Config(), random_params(Config()), [[1, 2, 3, 4, 5], [6, 7]], 12)
    print(new)
