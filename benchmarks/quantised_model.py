"""What each kind of cache changes of what a language model predicts.

    python benchmarks/quantised_model.py             writes results/quantised_model.json

Runs on a CPU in minutes. SmolLM2-135M, the model of `make demo`, reads 2,000 tokens of
`quantised_text.txt` in float32, a chunk at a time. Each chunk is written to the paged cache, which
rounds, and then attends to all that the cache holds. The text was written for this; no model has
read it before. What the model expects at each token is compared with the same over a float32 cache:
how often its first choice is the same, and how much less likely it finds the token that follows.

Scales of a head, for each layer, are the largest magnitudes over the type's that the four messages
of the demo made: the text has others, which saturate.
"""

import argparse
import datetime
import functools
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import decode
import jax
import jax.numpy as jnp
import numpy as np
from caches import ALL, LARGEST, Cache

import ejk

FOLDER = Path(__file__).parent
sys.path.insert(0, str(FOLDER.parent / "examples"))

import generate  # noqa: E402
import paged_decode  # noqa: E402
import smollm2  # noqa: E402

RESULTS = decode.RESULTS / "quantised_model.json"
TEXT = FOLDER / "quantised_text.txt"
TOKENS, CHUNK, PAGE_SIZE = 2000, 200, 16


class Expected(NamedTuple):
    """What the model expects after each token of the text."""

    choice: np.ndarray  # int [tokens]: the likeliest token
    log_likelihood: np.ndarray  # [tokens]: of the token that follows, in nats


def largest_magnitudes(model: smollm2.SmolLM2, texts: Sequence[Sequence[int]]) -> jax.Array:
    """Return those of keys and of values, `[num_layers, 2, num_kv_heads]`, over texts."""

    def attend(layer, query, key, value, most):
        own = jnp.abs(jnp.stack([key, value])).max((1, 3))
        out = jax.nn.dot_product_attention(query[None], key[None], value[None], is_causal=True)
        return out[0], most.at[layer].max(own)

    config = model.config
    most = jnp.zeros((config.num_layers, 2, config.num_kv_heads))
    for tokens in texts:
        positions = jnp.arange(len(tokens))
        given = jnp.asarray(tokens), positions, attend, most
        _, most = smollm2.hidden_states(config, model.params, *given)
    return most


def empty_pools(cache: Cache, spec: paged_decode.CacheSpec, config: smollm2.Config) -> ejk.KVCache:
    sizes = (spec.num_pages, config.num_kv_heads, spec.page_size, config.head_dim)
    options = dict(num_layers=config.num_layers, token_scales=cache.scales == "token")
    return ejk.empty_kv_cache(*sizes, dtype=cache.dtype, **options)


@functools.partial(jax.jit, static_argnames=("config", "spec"), donate_argnames="pools")
def read_chunk(
    params: smollm2.Params,
    pools: ejk.KVCache,
    head_scales: jax.Array | None,  # [num_layers, 2, num_kv_heads]
    tokens: jax.Array,  # [rows + 1]: what follows the last is among them
    first: jax.Array,
    table: jax.Array,  # [1, max_blocks]
    *,
    config: smollm2.Config,
    spec: paged_decode.CacheSpec,
) -> tuple[jax.Array, jax.Array, ejk.KVCache]:
    """Write and read the next tokens; return the choice and the likelihood of what follows each."""
    rows = len(tokens) - 1
    positions = first + jnp.arange(rows)
    slots = spec.slot_mapping(table, positions[None])[0]

    def attend(layer, query, key, value, pools):
        layer_slots, layer_table = spec.of_layer(layer, slots, table)
        scales = pools[2:] if head_scales is None else head_scales[layer]
        keys, values, *stored = ejk.write_kv_cache(
            key, value, *pools[:2], layer_slots, key_scale=scales[0], value_scale=scales[1]
        )
        key_scale, value_scale = stored or scales
        out = ejk.ragged_page_attention(
            query,
            keys,
            values,
            first[None] + rows,
            layer_table,
            jnp.array([0, rows]),
            key_scale=key_scale,
            value_scale=value_scale,
        )
        return out, ejk.KVCache(keys, values, *stored)

    hidden, pools = smollm2.hidden_states(config, params, tokens[:-1], positions, attend, pools)
    scores = jax.nn.log_softmax(smollm2.logits(params, hidden))
    found = jnp.take_along_axis(scores, tokens[1:, None], axis=1)[:, 0]
    return scores.argmax(-1), found, pools


def read(model: smollm2.SmolLM2, tokens: np.ndarray, cache: Cache, most: jax.Array) -> Expected:
    """Read the text over one kind of cache."""
    rows = len(tokens) - 1
    spec = paged_decode.CacheSpec(-(-rows // PAGE_SIZE), PAGE_SIZE)
    table = np.random.default_rng(0).permutation(spec.num_pages)[None].astype(np.int32)
    scales = most / LARGEST[cache.dtype] if cache.scales == "head" else None
    pools, chunks = empty_pools(cache, spec, model.config), []
    for first in range(0, rows, CHUNK):
        given = tokens[first : first + CHUNK + 1], jnp.int32(first), table
        *found, pools = read_chunk(
            model.params, pools, scales, *given, config=model.config, spec=spec
        )
        chunks.append(jax.device_get(found))
    return Expected(*(np.concatenate(own) for own in zip(*chunks)))


def compare(found: Expected, exact: Expected) -> dict[str, float]:
    """Return the agreement of the choices, and the change of log-likelihood a token."""
    change = (found.log_likelihood - exact.log_likelihood).astype(np.float64)
    return {
        "agreement": round(float((found.choice == exact.choice).mean()), 4),
        "change": round(float(change.mean()), 5),
        "standard_error": round(float(change.std()) / len(change) ** 0.5, 5),
    }


def measure(model: smollm2.SmolLM2, tokens: np.ndarray) -> tuple[float, dict[str, dict]]:
    """Return the log-likelihood a token over a float32 cache, and what each kind changes."""
    chats = [model.encode_chat(message) for message in generate.DEFAULT_CHATS]
    most = largest_magnitudes(model, chats)
    exact, found = read(model, tokens, Cache("float32"), most), {}
    for kind in ALL:
        size = kind.row_bytes(model.config.head_dim) / model.config.head_dim
        found[kind.name] = {"bytes": size, **compare(read(model, tokens, kind, most), exact)}
        print(kind.name, found[kind.name], flush=True)
    return round(float(exact.log_likelihood.mean()), 4), found


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    model = smollm2.load()
    tokens = np.asarray(model.encode(TEXT.read_text())[: TOKENS + 1], np.int32)
    log_likelihood, kinds = measure(model, tokens)
    line = {
        "date": datetime.date.today().isoformat(),
        "versions": decode.versions(),
        "command": "python benchmarks/quantised_model.py",
        "model": smollm2.PACKAGE,
        "tokens": len(tokens) - 1,
        "log_likelihood": log_likelihood,
        "kinds": kinds,
    }
    args.output.write_text(json.dumps(line, indent=1) + "\n")


if __name__ == "__main__":
    main()
