"""Times `ejk.write_kv_cache`, checks it first, and appends a line a result to `results/`.

    python benchmarks/write.py                         every number of tokens and layout
    python benchmarks/write.py --suite quantised       to caches of 8 and 4 bits, beside bfloat16
    python benchmarks/write.py --tiny --output x.jsonl    few tokens, interpreted on a CPU

New tokens of 8 KV heads of 128 in bfloat16 go to random slots of pools of pages of 16. Each call of
a program writes tokens of its own to slots of its own, so that no cache holds them; the pools are
donated. The yardstick is the best rate at which a kernel that does nothing else copies as many
bytes, of the same run.

A write to a quantised cache reads 16 bits a value and writes 8 or 4, and scales. The caches of one
layout take turns, call by call, and each line has its time over bfloat16's.
"""

import argparse
import functools
import itertools
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import ceiling
import command_line
import jax
import jax.numpy as jnp
import numpy as np
import timing
from caches import BFLOAT16, CACHES, LARGEST, SHORT, TINY_CACHES, Cache, Pool, dequantise
from ragged import append
from side_by_side import attempt
from workloads import HEAD_AXIS

import ejk

NUM_KV_HEADS, HEAD_DIM, PAGE_SIZE = 8, 128, 16
MOVED = 2**28  # bytes that a program moves, at least: more than the GPU's caches hold
SIZES = (8192, 64)
LAYOUTS = ("HND", "NHD")
ROUNDS = 15
TOLERANCE = {
    "bfloat16": 0.0,
    "int8": 0.51,
    "int4": 0.51,
    "float8_e4m3fn": 2**-4,
    "float8_e5m2": 2**-3,
}


class Tokens(NamedTuple):
    """What one call writes: no slot twice, also not by another call."""

    key: jax.Array  # [num_tokens, num_kv_heads, head_dim]
    value: jax.Array
    slots: jax.Array  # [num_tokens]


class Timed(NamedTuple):
    """What a call does, and the program of several that is timed."""

    moved_bytes: int
    calls: int
    run: Callable[[], Any]


def moved_bytes(num_tokens: int, cache: Cache = BFLOAT16) -> int:
    """Bytes of keys and values read, and of what is written for them."""
    read, written = 2 * HEAD_DIM, cache.row_bytes(HEAD_DIM)
    return 2 * num_tokens * NUM_KV_HEADS * (read + written)


def draw(num_tokens: int, calls: int) -> tuple[list[Tokens], int]:
    """Return the tokens of each call, and how many pages hold them all."""
    num_pages = -(-num_tokens * calls // PAGE_SIZE)
    slots = np.random.default_rng(0).permutation(num_pages * PAGE_SIZE)[: num_tokens * calls]
    shape = (calls, 2, num_tokens, NUM_KV_HEADS, HEAD_DIM)
    rows = jax.random.normal(jax.random.key(0), shape, jnp.bfloat16)
    slots = jnp.asarray(slots.reshape(calls, num_tokens), jnp.int32)
    return [Tokens(*rows[i], slots[i]) for i in range(calls)], num_pages


def pools_of(num_pages: int, layout: str, cache: Cache) -> list[Pool]:
    """Make empty pools of keys and of values; scales of a head would fit values up to 8."""
    inner = (NUM_KV_HEADS, PAGE_SIZE) if layout == "HND" else (PAGE_SIZE, NUM_KV_HEADS)
    width = HEAD_DIM // 2 if cache.dtype == "int4" else HEAD_DIM
    scale = {
        "none": lambda: None,
        "head": lambda: jnp.full(NUM_KV_HEADS, 8 / LARGEST[cache.dtype], jnp.float32),
        "token": lambda: jnp.zeros((num_pages, *inner), jnp.float32),
    }[cache.scales]
    return [Pool(jnp.zeros((num_pages, *inner, width), cache.held_as), scale()) for _ in range(2)]


def prepare(num_tokens: int, layout: str, cache: Cache, tiny: bool) -> Timed:
    """Check the writes of so many tokens; return what runs them."""
    calls = 2 if tiny else max(8, min(64, MOVED // moved_bytes(num_tokens)))
    tokens, num_pages = draw(num_tokens, calls)
    backend = ejk.TritonWriteKVCache(interpret=True) if tiny else "triton"
    write = functools.partial(ejk.write_kv_cache, cache_layout=layout, backend=backend)

    @functools.partial(jax.jit, donate_argnums=0)
    def run(pools, tokens):
        for key, value, slots in tokens:
            (keys, key_scale), (values, value_scale) = pools
            scales = (
                {} if key_scale is None else {"key_scale": key_scale, "value_scale": value_scale}
            )
            keys, values, *stored = write(key, value, keys, values, slots, **scales)
            pools = [Pool(*own) for own in zip((keys, values), stored or (key_scale, value_scale))]
        return pools

    pools = run(pools_of(num_pages, layout, cache), tokens)
    check(pools, tokens, layout, cache)

    def step():
        nonlocal pools
        pools = run(pools, tokens)
        return pools

    return Timed(moved_bytes(num_tokens, cache), calls, step)


def check(pools, tokens: list[Tokens], layout: str, cache: Cache) -> None:
    """Every token must be in its slot: bit for bit, or as near as the cache's values are."""
    head_axis = HEAD_AXIS[layout]
    for pool, name in zip(pools, ("key", "value")):
        rows = dequantise(cache, pool, head_axis)
        by_slot = rows.swapaxes(1, 2) if layout == "HND" else rows
        by_slot = by_slot.reshape(-1, NUM_KV_HEADS, HEAD_DIM)
        for call in tokens:
            wanted = getattr(call, name).astype(jnp.float32)
            most = jnp.abs(wanted).max(-1, keepdims=True) if cache.scales == "token" else 8.0
            step = (
                jnp.abs(wanted) + 1e-3
                if cache.dtype in SHORT
                else most / LARGEST.get(cache.dtype, 1)
            )
            if not (jnp.abs(by_slot[call.slots] - wanted) <= TOLERANCE[cache.dtype] * step).all():
                raise AssertionError(f"a {name} is not in its slot, layout {layout}, {cache.name}")


def results(suites: Sequence[str], tiny: bool) -> Iterator[dict]:
    """Yield a line for each number of tokens and layout, and of the quantised suite each cache."""
    for suite in suites:
        quantised = suite == "quantised"
        caches = (TINY_CACHES if tiny else CACHES) if quantised else (BFLOAT16,)
        sizes, layouts = (16, 3) if tiny else SIZES, LAYOUTS
        if quantised:
            sizes, layouts = sizes[:1], layouts[:1] if tiny else layouts
        for num_tokens, layout in itertools.product(sizes, layouts):
            yield from race(num_tokens, layout, caches, tiny)


def race(num_tokens: int, layout: str, caches: Sequence[Cache], tiny: bool) -> Iterator[dict]:
    """Time writes to each kind of cache, in turn."""
    ready = [attempt(prepare, num_tokens, layout, cache, tiny) for cache in caches]
    right = [own for own in ready if isinstance(own, Timed)]
    times = iter(timing.interleaved([own.run for own in right], ROUNDS))
    base_us = None
    for cache, own in zip(caches, ready):
        name = f"write {num_tokens}, {layout}" + f": {cache.name}" * (len(caches) > 1)
        line: dict[str, Any] = {"workload": name, "contender": "ejk"}
        if not isinstance(own, Timed):
            yield line | {"failed": f"{type(own).__name__}: {own}"[:300]}
            continue
        busy_us = statistics.median(timing.busy_us(turn) for turn in next(times))
        device_us = busy_us / own.calls
        gb_per_s = own.moved_bytes / device_us / 1e3
        line |= {"device_us": round(device_us, 2), "gb_per_s": round(gb_per_s, 1)}
        if not tiny:
            copied = ceiling.copy_ceiling(own.moved_bytes // 2)
            line |= {
                "of_ceiling": round(gb_per_s / copied, 4),
                "ceiling_gb_per_s": round(copied, 1),
            }
        if base_us is not None:
            line |= {"base_us": round(base_us, 2), "of_base": round(device_us / base_us, 4)}
        elif cache == BFLOAT16:
            base_us = device_us
        yield line


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--suite", nargs="+", choices=("named", "quantised"), help="instead of all")
    args = command_line.parsed(parser, "few tokens, interpreted on a CPU")
    append(args.output, results(args.suite or ("named", "quantised"), args.tiny), "write.py")


if __name__ == "__main__":
    main()
