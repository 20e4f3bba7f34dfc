"""Times `ejk.write_kv_cache`, checks it first, and appends a line a result to `results/`.

    python benchmarks/write.py                         every number of tokens and layout
    python benchmarks/write.py --tiny --output x.jsonl    few tokens, interpreted on a CPU

New tokens of 8 KV heads of 128 in bfloat16 go to random slots of pools of pages of 16. Each call of
a program writes tokens of its own to slots of its own, so that no cache holds them; the pools are
donated. The yardstick is the best rate at which a kernel that does nothing else copies as many
bytes, of the same run.
"""

import argparse
import functools
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import timing
from ragged import append

import ejk

NUM_KV_HEADS, HEAD_DIM, PAGE_SIZE = 8, 128, 16
MOVED = 2**28  # bytes that a program moves, at least: more than the GPU's caches hold
SIZES = (8192, 64)
LAYOUTS = ("HND", "NHD")


class Tokens(NamedTuple):
    """What one call writes: no slot twice, also not by another call."""

    key: jax.Array  # [num_tokens, num_kv_heads, head_dim]
    value: jax.Array
    slots: jax.Array  # [num_tokens]


def moved_bytes(num_tokens: int) -> int:
    """Bytes of keys and values, read and written."""
    return 2 * 2 * num_tokens * NUM_KV_HEADS * HEAD_DIM * 2


def draw(num_tokens: int, calls: int) -> tuple[list[Tokens], int]:
    """Return the tokens of each call, and how many pages hold them all."""
    num_pages = -(-num_tokens * calls // PAGE_SIZE)
    slots = np.random.default_rng(0).permutation(num_pages * PAGE_SIZE)[: num_tokens * calls]
    shape = (calls, 2, num_tokens, NUM_KV_HEADS, HEAD_DIM)
    rows = jax.random.normal(jax.random.key(0), shape, jnp.bfloat16)
    slots = jnp.asarray(slots.reshape(calls, num_tokens), jnp.int32)
    return [Tokens(*rows[i], slots[i]) for i in range(calls)], num_pages


def pools_of(num_pages: int, layout: str) -> list[jax.Array]:
    inner = (NUM_KV_HEADS, PAGE_SIZE) if layout == "HND" else (PAGE_SIZE, NUM_KV_HEADS)
    return [jnp.zeros((num_pages, *inner, HEAD_DIM), jnp.bfloat16) for _ in range(2)]


def measure(num_tokens: int, layout: str, tiny: bool) -> dict:
    """Check, then time the writes of so many tokens."""
    calls = 2 if tiny else max(8, min(64, MOVED // moved_bytes(num_tokens)))
    tokens, num_pages = draw(num_tokens, calls)
    backend = ejk.TritonWriteKVCache(interpret=True) if tiny else "triton"
    write = functools.partial(ejk.write_kv_cache, cache_layout=layout, backend=backend)

    @functools.partial(jax.jit, donate_argnums=0)
    def run(pools, tokens):
        for key, value, slots in tokens:
            pools = write(key, value, *pools, slots)
        return pools

    pools = run(pools_of(num_pages, layout), tokens)
    check(pools, tokens, layout)

    def step():
        nonlocal pools
        pools = run(pools, tokens)
        return pools

    device_us = timing.busy_us(timing.device_kernels(step)) / timing.REPEATS / calls
    gb_per_s = moved_bytes(num_tokens) / device_us / 1e3
    return {"device_us": round(device_us, 2), "gb_per_s": round(gb_per_s, 1)}


def check(pools, tokens: list[Tokens], layout: str) -> None:
    """Every token must be in its slot, bit for bit."""
    for pool, name in zip(pools, ("key", "value")):
        by_slot = pool.swapaxes(1, 2) if layout == "HND" else pool
        by_slot = by_slot.reshape(-1, NUM_KV_HEADS, HEAD_DIM)
        for call in tokens:
            if not (by_slot[call.slots] == getattr(call, name)).all():
                raise AssertionError(f"a {name} is not in its slot, layout {layout}")


def results(tiny: bool):
    """Yield a line for each number of tokens and layout."""
    for num_tokens in (16, 3) if tiny else SIZES:
        if not tiny:
            import ceiling  # needs a device to launch on

            copied = ceiling.copy_ceiling(moved_bytes(num_tokens) // 2)
        for layout in LAYOUTS:
            found = measure(num_tokens, layout, tiny)
            if not tiny:
                found["of_ceiling"] = round(found["gb_per_s"] / copied, 4)
                found["ceiling_gb_per_s"] = round(copied, 1)
            yield {"workload": f"write {num_tokens}, {layout}", "contender": "ejk", **found}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tiny", action="store_true", help="few tokens, interpreted on a CPU")
    parser.add_argument("--output", type=Path, help="instead of results/<device>.jsonl")
    args = parser.parse_args()
    if args.tiny and args.output is None:
        parser.error("--tiny needs --output: it measures nothing that is to be kept")
    append(args.output, results(args.tiny), "write.py")


if __name__ == "__main__":
    main()
