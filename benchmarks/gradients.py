"""Times gradients through pages, checks them first, and appends a line a result to `results/`.

    python benchmarks/gradients.py                            every batch and contender
    python benchmarks/gradients.py --tiny --output x.jsonl    few tokens, on a CPU

A layer of a trainer: `ejk.write_kv_cache` writes a batch's keys and values to empty pools,
`ejk.ragged_page_attention` attends to them, and a weighted sum of the outputs is differentiated in
queries, keys and values. Dense causal attention to the same tokens, by XLA and by cuDNN, takes
turns with it. A line has the time of the gradients, which holds a forward pass, and that of the
forward pass alone; both are device time. `wall_us` is the gradients' time by the clock: the host
starts each step of a loop.
"""

import argparse
import functools
import math
import statistics
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import command_line
import jax
import jax.numpy as jnp
import numpy as np
import timing
from ragged import append
from side_by_side import attempt

import ejk

ROUNDS = 7
TOLERANCE = 2e-2  # of the largest entry of a gradient, in bfloat16
CUDNN = "cuDNN dense"


class Batch(NamedTuple):
    """So many sequences, equally long, all of whose tokens are new."""

    num_seqs: int
    tokens: int
    num_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 128
    page_size: int = 16

    @property
    def name(self) -> str:
        return f"gradients {self.num_seqs} x {self.tokens:,}"

    @property
    def max_blocks(self) -> int:
        return math.ceil(self.tokens / self.page_size)


BATCHES = (Batch(64, 256), Batch(8, 1024), Batch(2, 4096))
TINY = (Batch(2, 24, num_heads=4, num_kv_heads=2, head_dim=64),)


class Tokens(NamedTuple):
    """What every contender is given, `[num_seqs * tokens, heads, head_dim]`."""

    query: jax.Array
    key: jax.Array
    value: jax.Array


Attend = Callable[[Batch, Tokens], jax.Array]


def paged(batch: Batch, given: Tokens) -> jax.Array:
    """Write to empty pools and attend to them."""
    num_pages = batch.num_seqs * batch.max_blocks
    pages = np.random.default_rng(0).permutation(num_pages).astype(np.int32)
    tables = jnp.asarray(pages.reshape(batch.num_seqs, -1))
    lens = jnp.full(batch.num_seqs, batch.tokens, jnp.int32)
    bounds = jnp.arange(batch.num_seqs + 1, dtype=jnp.int32) * batch.tokens
    slots = ejk.ragged_slot_mapping(
        tables, lens, bounds,
        total_tokens=len(given.query), page_size=batch.page_size, num_pages=num_pages,
    )  # fmt: skip
    cache = ejk.empty_kv_cache(
        num_pages=num_pages,
        num_kv_heads=batch.num_kv_heads,
        page_size=batch.page_size,
        head_dim=batch.head_dim,
        dtype=given.key.dtype,
    )
    cache = ejk.write_kv_cache(given.key, given.value, *cache[:2], slots)
    return ejk.ragged_page_attention(
        given.query, *cache, lens, tables, bounds, max_q_len=batch.tokens
    )


def dense(implementation: Any, batch: Batch, given: Tokens) -> jax.Array:
    """Attend to the tokens of each sequence in an array."""
    rows = (x.reshape(batch.num_seqs, batch.tokens, *x.shape[1:]) for x in given)
    out = jax.nn.dot_product_attention(*rows, is_causal=True, implementation=implementation)
    return out.reshape(given.query.shape)


def contenders(tiny: bool) -> dict[str, Attend]:
    found: dict[str, Attend] = {"ejk": paged, "XLA dense": functools.partial(dense, "xla")}
    return found if tiny else found | {CUDNN: functools.partial(dense, "cudnn")}


def draw(batch: Batch) -> tuple[Tokens, jax.Array]:
    """Return tokens, and what the outputs are weighted by."""
    total, kv_heads = batch.num_seqs * batch.tokens, batch.num_kv_heads
    heads = (batch.num_heads, kv_heads, kv_heads, batch.num_heads)
    keys = jax.random.split(jax.random.key(0), 4)
    rows = [
        jax.random.normal(key, (total, n, batch.head_dim), jnp.bfloat16)
        for key, n in zip(keys, heads)
    ]
    return Tokens(*rows[:3]), rows[3]


def gradients_of(batch: Batch, attend: Attend) -> Callable[[Tokens, jax.Array], Tokens]:
    def loss(given: Tokens, weights: jax.Array) -> jax.Array:
        return jnp.sum(attend(batch, given).astype(jnp.float32) * weights)

    return jax.jit(jax.grad(loss))


class Timed(NamedTuple):
    """The programs of a contender that was checked."""

    error: float
    forward: Callable[[], Any]
    gradients: Callable[[], Any]


def prepare(
    batch: Batch, attend: Attend, given: Tokens, weights: jax.Array, exact: Tokens
) -> Timed:
    """Check a contender's gradients; return what is timed."""
    gradients = gradients_of(batch, attend)
    forward = jax.jit(functools.partial(attend, batch))
    error = 0.0
    for found, right in zip(gradients(given, weights), exact):
        off = jnp.abs(found.astype(jnp.float32) - right).max() / jnp.abs(right).max()
        error = max(error, float(off))
    if not error < TOLERANCE:
        raise AssertionError(f"wrong on {batch.name}: relative error {error:.1e}")
    return Timed(error, lambda: forward(given), lambda: gradients(given, weights))


def exact_gradients(batch: Batch, given: Tokens, weights: jax.Array) -> Tokens:
    """Return the gradients in float32."""
    given = Tokens(*(x.astype(jnp.float32) for x in given))
    with jax.default_matmul_precision("highest"):
        return gradients_of(batch, functools.partial(dense, "xla"))(given, weights)


def results(tiny: bool) -> Iterator[dict]:
    """Yield a line for each batch and contender."""
    for batch in TINY if tiny else BATCHES:
        given, weights = draw(batch)
        exact = exact_gradients(batch, given, weights)
        found = {
            name: attempt(prepare, batch, attend, given, weights, exact)
            for name, attend in contenders(tiny).items()
        }
        ready = {name: own for name, own in found.items() if isinstance(own, Timed)}
        runs = [run for own in ready.values() for run in (own.forward, own.gradients)]
        turns = timing.interleaved(runs, ROUNDS)
        times = [statistics.median(map(timing.busy_us, turn)) for turn in turns]
        by_name = dict(zip(ready, zip(times[::2], times[1::2])))
        walls = {name: timing.wall_time(own.gradients, repeats=2) for name, own in ready.items()}
        for name, own in found.items():
            line: dict[str, Any] = {"workload": batch.name, "contender": name}
            if not isinstance(own, Timed):
                yield line | {"failed": f"{type(own).__name__}: {own}"[:300]}
                continue
            forward_us, device_us = by_name[name]
            line |= {
                "device_us": round(device_us, 2),
                "forward_us": round(forward_us, 2),
                "wall_us": round(walls[name], 2),
                "error": float(f"{own.error:.1e}"),
            }
            if CUDNN in by_name:
                line["of_cudnn"] = round(by_name[CUDNN][1] / device_us, 4)
            yield line


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    args = command_line.parsed(parser, "few tokens, on a CPU")
    append(args.output, results(args.tiny), "gradients.py")


if __name__ == "__main__":
    main()
