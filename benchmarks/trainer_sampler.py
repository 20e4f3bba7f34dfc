"""How far apart log-probabilities are that a prefill and a decode give the same tokens.

    python benchmarks/trainer_sampler.py     writes results/trainer_sampler.json, or of a GPU
                                             results/trainer_sampler_<device>.json

A trainer reads whole sequences at once; a sampler has drawn them token by token. Were their
log-probabilities equal, the ratio of the two policies would start at exactly 1. They are not, as
two programs round differently. A decoder of random weights is run in each type of numbers and over
each type of cache:

- `ejk`: `ragged_page_attention` over all tokens, against `page_attention` of one token after the
  other. Both read what `write_kv_cache` has written, codes of quantised caches too.
- `dense`: `jax.nn.dot_product_attention` at once, against itself one token after the other: what
  the type of numbers alone does to two programs.
- `trainer`: dense attention at once, against the decode by `ejk`: a quantised cache adds its own
  rounding.

A difference is of natural logarithms, over the tokens of all sequences; logits are normalised in
float32. What `ejk` differs by is held to a bound, of the type of numbers and of the cache: where
keys become codes, a difference in the last bit may make the next code of it.
"""

import argparse
import datetime
import functools
import itertools
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import decode
import jax
import jax.numpy as jnp
import numpy as np
import paging

import ejk

sys.path.append(str(Path(__file__).parents[1] / "examples"))
from decoder import Config, Params, forward, random_params

NAME = "trainer_sampler"  # of the file of results, to which a GPU adds its own
CONFIG = Config(num_layers=4, num_heads=8, num_kv_heads=2, head_dim=64, vocabulary=512)
SEQS, TOKENS, PAGE_SIZE = 4, 96, 16
BOUNDS = {"float32": 2e-5, "bfloat16": 0.06, "float16": 0.02}
OF_CODES = {"same": 0.0, "int8": 0.01, "float8_e4m3fn": 0.05}

Step = tuple[jax.Array, Any]  # logits, and the caches after it


def empty_pools(config: Config, tokens: jax.Array, dtype: str, cache: str) -> list[ejk.KVCache]:
    """Return pools for each layer; the pages of a sequence lie one after the other."""
    sizes = (tokens.size // PAGE_SIZE, config.num_kv_heads, PAGE_SIZE, config.head_dim)
    scaled = {} if cache == "same" else {"token_scales": True}
    kind = dtype if cache == "same" else cache
    return [ejk.empty_kv_cache(*sizes, dtype=kind, **scaled) for _ in range(config.num_layers)]


def through_pages(
    config: Config, params: Params, tokens: jax.Array, positions: jax.Array, pools: Any, width: int
) -> Step:
    """Compute the logits of new `tokens [num_seqs, num_new]`; the pools hold those before them."""
    num_seqs, num_new = tokens.shape
    blocks = width // PAGE_SIZE
    tables = jnp.arange(num_seqs * blocks, dtype=jnp.int32).reshape(num_seqs, blocks)
    lens = positions[:, -1] + 1
    slots = (jnp.arange(num_seqs, dtype=jnp.int32)[:, None] * width + positions).reshape(-1)
    bounds = jnp.arange(num_seqs + 1, dtype=jnp.int32) * num_new

    def attend(query: jax.Array, key: jax.Array, value: jax.Array, pool: ejk.KVCache):
        dtype = params["embedding"].dtype
        rows = [x.reshape(-1, *x.shape[2:]).astype(dtype) for x in (query, key, value)]
        scales = {n: x for n, x in pool._asdict().items() if n.endswith("scale") and x is not None}
        pool = ejk.KVCache(*ejk.write_kv_cache(*rows[1:], *pool[:2], slots, **scales))
        scales = {n: x for n, x in pool._asdict().items() if n in scales}
        given = rows[0], *pool[:2], lens, tables
        if num_new == 1:
            out = ejk.page_attention(*given, **scales)
        else:
            out = ejk.ragged_page_attention(*given, bounds, **scales)
        return out.reshape(query.shape), pool

    return forward(config, params, tokens, positions, attend, pools)


def through_arrays(
    config: Config, params: Params, tokens: jax.Array, positions: jax.Array, caches: Any, width: int
) -> Step:
    """The same by dense attention; a cache is `(keys, values)`, `[num_seqs, width, heads, dim]`."""
    begin, lens = positions[0, 0], positions[:, -1] + 1

    def attend(query: jax.Array, key: jax.Array, value: jax.Array, cache: Sequence[jax.Array]):
        dtype = params["embedding"].dtype
        cache = [
            jax.lax.dynamic_update_slice(old, new.astype(dtype), (0, begin, 0, 0))
            for old, new in zip(cache, (key, value))
        ]
        # XLA of a CPU multiplies no float16 into float32.
        wide = jnp.float32 if dtype == jnp.float16 and jax.default_backend() == "cpu" else dtype
        given = [x.astype(dtype).astype(wide) for x in (query, *cache)]
        which = {"is_causal": True} if tokens.shape[1] > 1 else {"key_value_seq_lengths": lens}
        return jax.nn.dot_product_attention(*given, **which).astype(dtype), cache

    return forward(config, params, tokens, positions, attend, caches)


@functools.partial(jax.jit, static_argnames=("compute", "config", "at_once"))
def log_probs(
    compute: Callable[..., Step],
    config: Config,
    params: Params,
    tokens: jax.Array,
    caches: Any,
    at_once: bool,
) -> jax.Array:
    """Return the log-probability of each token but the first, given those before it."""
    num_seqs, width = tokens.shape
    if at_once:
        positions = jnp.broadcast_to(jnp.arange(width, dtype=jnp.int32), tokens.shape)
        logits, _ = compute(config, params, tokens, positions, caches, width)
    else:

        def step(caches: Any, position: jax.Array) -> tuple[Any, jax.Array]:
            now = jax.lax.dynamic_slice(tokens, (0, position), (num_seqs, 1))
            at = jnp.broadcast_to(position, (num_seqs, 1))
            logits, caches = compute(config, params, now, at, caches, width)
            return caches, logits[:, 0]

        _, logits = jax.lax.scan(step, caches, jnp.arange(width, dtype=jnp.int32))
        logits = logits.transpose(1, 0, 2)
    found = jax.nn.log_softmax(logits[:, :-1].astype(jnp.float32))
    return jnp.take_along_axis(found, tokens[:, 1:, None], axis=-1)[..., 0]


def both(
    compute: Callable[..., Step], config: Config, params: Params, tokens: jax.Array, caches: Any
) -> list[jax.Array]:
    """Return the log-probabilities at once, and one token after the other."""
    precision = "highest" if params["embedding"].dtype == jnp.float32 else "default"
    with jax.default_matmul_precision(precision):
        return [log_probs(compute, config, params, tokens, caches, x) for x in (True, False)]


def difference(a: jax.Array, b: jax.Array) -> dict[str, float]:
    """Return the largest and the mean difference."""
    off = np.abs(np.asarray(a, np.float64) - np.asarray(b, np.float64))
    return {"largest": float(f"{off.max():.3g}"), "mean": float(f"{off.mean():.3g}")}


def bound(dtype: str, cache: str) -> float:
    """Return what the largest difference by `ejk` is held to."""
    return BOUNDS[dtype] + OF_CODES[cache]


def measure(
    kinds: Sequence[tuple[str, str]] = tuple(itertools.product(BOUNDS, OF_CODES)),
    config: Config = CONFIG,
    seqs: int = SEQS,
    num_tokens: int = TOKENS,
) -> list[dict[str, Any]]:
    """Return the differences of each type of numbers and of caches."""
    lines = []
    rng = np.random.default_rng(0)
    tokens = jnp.asarray(rng.integers(0, config.vocabulary, (seqs, num_tokens)), jnp.int32)
    for dtype in dict(kinds):
        params = jax.tree.map(lambda x, dtype=dtype: x.astype(dtype), random_params(config))
        shape = (seqs, num_tokens, config.num_kv_heads, config.head_dim)
        arrays = [[jnp.zeros(shape, dtype)] * 2 for _ in range(config.num_layers)]

        dense = both(through_arrays, config, params, tokens, arrays)
        for cache in [cache for of, cache in kinds if of == dtype]:
            paged = both(
                through_pages, config, params, tokens, empty_pools(config, tokens, dtype, cache)
            )
            line = {"dtype": dtype, "cache": cache, "bound": bound(dtype, cache)}
            line |= {"ejk": difference(*paged), "dense": difference(*dense)}
            lines.append(line | {"trainer": difference(dense[0], paged[1])})
            print(lines[-1], flush=True)
    return lines


def main() -> None:
    on_cpu = jax.default_backend() == "cpu"
    machine = paging.processor() if on_cpu else jax.devices()[0].device_kind
    name = NAME if on_cpu else f"{NAME}_{machine.replace(' ', '_')}"
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=decode.RESULTS / f"{name}.json")
    args = parser.parse_args()
    facts = {
        "date": datetime.date.today().isoformat(),
        "versions": decode.versions(),
        "machine": machine,
        "command": "python benchmarks/trainer_sampler.py",
        "tokens": [SEQS, TOKENS],
        "model": CONFIG._asdict(),
    }
    lines = measure()
    args.output.write_text(json.dumps(facts | {"differences": lines}, indent=1) + "\n")


if __name__ == "__main__":
    main()
