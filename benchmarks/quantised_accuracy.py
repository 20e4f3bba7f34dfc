"""How far attention over each kind of cache is from float64, by how keys and values are spread.

    python benchmarks/quantised_accuracy.py          writes results/quantised_accuracy.json

Runs on a CPU in seconds. `ejk.write_kv_cache` fills the caches, `ejk.page_attention` reads them,
both in XLA with float32 queries, so that the cache alone is what rounds. The reference attends in
float64 to keys and values that were never rounded. Queries are scaled so that the logits of a row
have a standard deviation of 2 over its tokens, whatever the keys are.

An error is the root mean square over rows of what a channel of the output is off, over the root
mean square of that channel; of channels again the root mean square. A scale of a head is the
largest magnitude of these very keys, or values: one from other data does no better.
"""

import argparse
import datetime
import functools
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import caches
import decode
import jax
import jax.numpy as jnp
import numpy as np
from caches import Cache

import ejk

RESULTS = decode.RESULTS / "quantised_accuracy.json"
SEQS, TOKENS, NUM_KV_HEADS, GROUP, HEAD_DIM, PAGE_SIZE = 48, 512, 2, 4, 128, 16
LOGIT_STD = 2.0
OUTLIERS, OUTLIER_SIZE, MEAN_SIZE, TOKEN_SPREAD = 4, 16.0, 8.0, 0.5


class Drawn(NamedTuple):
    """Rows `[SEQS, TOKENS, NUM_KV_HEADS, HEAD_DIM]`, float64."""

    keys: np.ndarray
    values: np.ndarray


def normal(rng: np.random.Generator) -> Drawn:
    shape = (SEQS, TOKENS, NUM_KV_HEADS, HEAD_DIM)
    return Drawn(rng.normal(size=shape), rng.normal(size=shape))


def outlier_channels(rng: np.random.Generator) -> np.ndarray:
    """Return a factor for each channel of each head: a few are large."""
    size = np.ones((NUM_KV_HEADS, HEAD_DIM))
    for own in size:
        own[rng.choice(HEAD_DIM, OUTLIERS, replace=False)] = OUTLIER_SIZE
    return size


def outliers_in_keys(rng: np.random.Generator) -> Drawn:
    keys, values = normal(rng)
    return Drawn(keys * outlier_channels(rng), values)


def outliers_in_values(rng: np.random.Generator) -> Drawn:
    keys, values = normal(rng)
    return Drawn(keys, values * outlier_channels(rng))


def large_mean(rng: np.random.Generator) -> Drawn:
    """Shift each channel of the keys by a number of its own, the same for all tokens."""
    keys, values = normal(rng)
    return Drawn(keys + MEAN_SIZE * rng.normal(size=(NUM_KV_HEADS, HEAD_DIM)), values)


def unequal_tokens(rng: np.random.Generator) -> Drawn:
    """Let the tokens have sizes of their own: lognormal."""
    keys, values = normal(rng)
    sizes = np.exp(TOKEN_SPREAD * rng.normal(size=(2, SEQS, TOKENS, NUM_KV_HEADS, 1)))
    return Drawn(keys * sizes[0], values * sizes[1])


DISTRIBUTIONS: dict[str, Callable[[np.random.Generator], Drawn]] = {
    "normal": normal,
    "outlier channels in keys": outliers_in_keys,
    "outlier channels in values": outliers_in_values,
    "keys with a large mean": large_mean,
    "tokens of unequal size": unequal_tokens,
}


def attend(query: np.ndarray, drawn: Drawn) -> np.ndarray:
    """Attend in float64; `query [SEQS, NUM_KV_HEADS, GROUP, HEAD_DIM]`."""
    logits = np.einsum("shgd,sthd->shgt", query, drawn.keys) * HEAD_DIM**-0.5
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return np.einsum("shgt,sthd->shgd", weights, drawn.values)


def draw_queries(rng: np.random.Generator, drawn: Drawn) -> np.ndarray:
    """Draw queries in float32 whose logits are spread as `LOGIT_STD` says."""
    query = rng.normal(size=(SEQS, NUM_KV_HEADS, GROUP, HEAD_DIM))
    logits = np.einsum("shgd,sthd->shgt", query, drawn.keys) * HEAD_DIM**-0.5
    query *= LOGIT_STD / logits.std(-1, keepdims=True)
    return query.astype(np.float32).astype(np.float64)


def through_cache(cache: Cache, query: np.ndarray, drawn: Drawn) -> np.ndarray:
    """Write keys and values to a cache of pages, and attend to it."""
    rows = [jnp.asarray(x, jnp.float32).reshape(-1, NUM_KV_HEADS, HEAD_DIM) for x in drawn]
    num_pages = SEQS * TOKENS // PAGE_SIZE
    width = HEAD_DIM // 2 if cache.dtype == "int4" else HEAD_DIM
    pool = jnp.zeros((num_pages, NUM_KV_HEADS, PAGE_SIZE, width), cache.held_as)
    scales = {}
    if cache.scales == "head":
        made = [caches.quantise(cache, own, head_axis=1).scale for own in rows]
        scales = dict(zip(("key_scale", "value_scale"), made))
    if cache.scales == "token":
        scales = dict.fromkeys(("key_scale", "value_scale"), jnp.zeros(pool.shape[:-1]))
    slots = np.random.default_rng(1).permutation(num_pages).astype(np.int32)
    tables = slots.reshape(SEQS, -1)
    slots = (slots[:, None] * PAGE_SIZE + np.arange(PAGE_SIZE, dtype=np.int32)).reshape(-1)
    keys, values, *stored = ejk.write_kv_cache(*rows, pool, pool, slots, **scales, backend="xla")
    if stored:
        scales = dict(zip(("key_scale", "value_scale"), stored))
    lens = np.full(SEQS, TOKENS, np.int32)
    given = jnp.asarray(query, jnp.float32).reshape(SEQS, -1, HEAD_DIM)
    out = ejk.page_attention(given, keys, values, lens, tables, **scales, backend="xla")
    return np.asarray(out, np.float64).reshape(query.shape)


def error(out: np.ndarray, right: np.ndarray) -> float:
    """Return the relative error of a channel."""
    over = (0, 2)  # rows of a head: sequences and the query heads of a group
    squares = ((out - right) ** 2).mean(over) / (right**2).mean(over)
    return float(np.sqrt(squares.mean()))


def measure(names: Iterable[str] = DISTRIBUTIONS) -> dict[str, dict[str, float]]:
    """Return the error of each distribution and kind of cache."""
    found: dict[str, dict[str, float]] = {}
    for name in names:
        rng = np.random.default_rng(0)
        drawn = DISTRIBUTIONS[name](rng)
        query = draw_queries(rng, drawn)
        right = attend(query, drawn)
        run = functools.partial(through_cache, query=query, drawn=drawn)
        found[name] = {kind.name: float(f"{error(run(kind), right):.3g}") for kind in caches.ALL}
        print(name, found[name], flush=True)
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    facts = {
        "date": datetime.date.today().isoformat(),
        "versions": decode.versions(),
        "command": "python benchmarks/quantised_accuracy.py",
    }
    with jax.default_device(jax.devices("cpu")[0]):
        line = facts | {"bytes": {k.name: k.row_bytes(HEAD_DIM) / HEAD_DIM for k in caches.ALL}}
        line |= {"error": measure()}
    args.output.write_text(json.dumps(line, indent=1) + "\n")


if __name__ == "__main__":
    main()
