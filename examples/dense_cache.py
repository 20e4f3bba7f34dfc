"""Text from a small decoder with a dense key-value cache. `paged_cache.py` is the same, paged.

`diff dense_cache.py paged_cache.py` is what it takes to change. A row of the dense cache is as long
as the longest sequence will be.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from decoder import Config, Params, forward, random_params


def empty_cache(config: Config, num_rows: int, row_len: int):
    shape = (num_rows, row_len, config.num_kv_heads, config.head_dim)
    return [(jnp.zeros(shape), jnp.zeros(shape)) for _ in range(config.num_layers)]


@functools.partial(jax.jit, static_argnames="config", donate_argnames="cache")
def step(config: Config, params: Params, cache, place, tokens, positions):
    """Append `tokens [num_seqs, n]` at `positions` to the sequences, each at its place."""

    def attend(query, key, value, cache):
        keys = cache[0].at[place, positions].set(key)
        values = cache[1].at[place, positions].set(value)
        visible = jnp.arange(keys.shape[1]) <= positions[:, None, :, None]
        out = jax.nn.dot_product_attention(query, keys, values, mask=visible)
        return out, (keys, values)

    return forward(config, params, tokens, positions, attend, cache)


def generate(config: Config, params: Params, prompts: Sequence[Sequence[int]], num_new: int):
    """Continue all prompts greedily; return the new tokens, and the logits that chose each."""
    lens = np.array([len(prompt) for prompt in prompts])
    tokens = np.zeros((len(prompts), lens.max()), np.int32)  # padding is overwritten later
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    place = np.arange(len(prompts))[:, None]
    cache = empty_cache(config, len(prompts), max(lens) + num_new)
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
