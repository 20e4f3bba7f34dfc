"""What a layer costs for each way to write the loop over layers of a decoding step.

    python benchmarks/loops.py             appends to results/<device>.jsonl

Each way runs 32 layers of attention and nothing else; twenty steps are queued without waiting.
"""

import argparse
import datetime
import functools
import json
from pathlib import Path

import decode
import jax
import jax.numpy as jnp
import timing
import workloads

import ejk

LAYERS = 32
BATCHES = (
    workloads.uniform("1 x 1,024 tokens", 32, 8, 128, 1, 1024, 16),
    workloads.uniform("16 x 1,024 tokens", 32, 8, 128, 16, 1024, 16),
)


def ways(workload):
    """Yield each way's name and its jitted step, `(query, pools, lens, tables) -> query`."""
    num_pages = workload.num_pages

    def plan(lens):
        if workload.num_seqs == 1:
            return None  # a single sequence has nothing to deal out
        return ejk.plan_page_attention(
            lens,
            num_heads=workload.num_heads,
            num_kv_heads=workload.num_kv_heads,
            head_dim=workload.head_dim,
            page_size=workload.page_size,
            max_blocks=workload.max_blocks,
        )

    def attend(query, pools, lens, tables, layer, plan=None):
        own = jnp.where(tables >= 0, tables + layer * num_pages, -1)
        return ejk.page_attention(query, *pools, lens, own, plan=plan)

    def unrolled(query, pools, lens, tables):
        made = plan(lens)
        for layer in range(LAYERS):
            query = attend(query, pools, lens, tables, layer, made)
        return query

    def own_plans(query, pools, lens, tables):
        for layer in range(LAYERS):
            query = attend(query, pools, lens, tables, layer)
        return query

    def scan(query, pools, lens, tables, unroll=1):
        made = plan(lens)

        def body(query, layer):
            return attend(query, pools, lens, tables, layer, made), None

        return jax.lax.scan(body, query, jnp.arange(LAYERS), unroll=unroll)[0]

    def sliced(query, pools, lens, tables):
        made = plan(lens)
        stacks = [pool.reshape(LAYERS, num_pages, *pool.shape[1:]) for pool in pools]
        for layer in range(LAYERS):
            pools_of_layer = [stack[layer] for stack in stacks]
            query = ejk.page_attention(query, *pools_of_layer, lens, tables, plan=made)
        return query

    def own_pools(query, pools, lens, tables):
        made = plan(lens)
        for layer in range(LAYERS):
            query = ejk.page_attention(query, *pools[layer], lens, tables, plan=made)
        return query

    donate = functools.partial(jax.jit, donate_argnums=0)
    one = jax.jit(attend)

    def layer_by_layer(query, pools, lens, tables):
        for layer in range(LAYERS):
            query = one(query, pools, lens, tables, jnp.int32(layer))
        return query

    yield "unrolled, query donated", donate(unrolled)
    yield "unrolled, nothing donated", jax.jit(unrolled)
    yield "a plan in every call", donate(own_plans)
    yield "`lax.scan`", donate(scan)
    yield "`lax.scan(unroll=True)`", donate(functools.partial(scan, unroll=True))
    yield "a pool of its own for each layer", donate(own_pools)
    yield "`cache[layer]` of one stacked array", donate(sliced)
    yield "one jitted call a layer", layer_by_layer


def layer_us(step, query, *given) -> float:
    """Time steps that each take the query of the one before."""

    def run():
        nonlocal query
        query = step(query, *given)
        return query

    return timing.wall_time(run) / LAYERS


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, help="instead of results/<device>.jsonl")
    args = parser.parse_args()
    device = jax.devices()[0].device_kind
    path = args.output or decode.RESULTS / f"{device.replace(' ', '_')}.jsonl"
    facts = {
        "device": device,
        "date": datetime.date.today().isoformat(),
        "versions": decode.versions(),
        "command": "python benchmarks/loops.py",
    }
    with path.open("a") as file:
        for workload in BATCHES:
            query, keys, values, lens, tables = workloads.arrays(workload, LAYERS)
            for way, step in ways(workload):
                pools = (keys, values)
                if way == "a pool of its own for each layer":
                    pools = [
                        [jnp.copy(x) for x in pair]
                        for pair in zip(jnp.split(keys, LAYERS), jnp.split(values, LAYERS))
                    ]
                wall_us = layer_us(step, jnp.copy(query), pools, lens, tables)
                line = {"workload": f"loop, {workload.name}", "contender": way}
                line |= {"wall_us_per_layer": round(wall_us, 2)} | facts
                file.write(json.dumps(line) + "\n")
                print(f"{workload.name:<20} {way:<40} {wall_us:8.2f} us a layer", flush=True)


if __name__ == "__main__":
    main()
