"""Times decode attention, checks it first, and appends a line a result to `results/`.

    python benchmarks/decode.py                            every workload, every contender
    python benchmarks/decode.py --workload W1a W6 --contender ejk
    python benchmarks/decode.py --suite shapes             shapes that nobody tunes for
    python benchmarks/decode.py --suite options            every option against the plain call
    python benchmarks/decode.py --suite order              what pages in random order cost

Device time is how long the device was busy with a program of eight chained calls, over eight, from
CUPTI through `jax.profiler`: the mean of five runs. Of short contexts there are 64 calls, each on
pages of its own, so that the cache does not hold them all. What a step makes once for all its
layers, the plan and each layer's block tables, is not in it; the plan is timed apart. The wall time
a layer is that of a program of 32 chained layers with all of that inside, its query donated, over
one pool that holds as many layers as fit, twenty or fifty programs queued without waiting.
"""

import argparse
import datetime
import importlib.metadata
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import ceiling
import contenders
import jax
import jax.numpy as jnp
import numpy as np
import timing
import workloads

CALLS = 8
LAYERS = 32
CACHED = 2**28  # bytes; a program that reads less may find them in the GPU's cache
RESULTS = Path(__file__).parent / "results"
TOLERANCE = 2e-2  # of the largest value, in bfloat16; what is timed must first be right


class Prepared(NamedTuple):
    """A workload that a contender has been checked on and is ready to be timed with."""

    error: float
    calls: int  # chained calls of one `run`
    run: Callable[[], jax.Array]
    step: Callable[[], jax.Array]  # a program of LAYERS calls with all that a step makes once


def prepare(workload, contender) -> Prepared:
    """Check one contender on one workload, and make the programs that are timed."""
    layers = 1
    if not contender.one_layer:
        most = contender.most_bytes // workload.pool_bytes
        layers = max(1, min(LAYERS if workload.pool_bytes > 2**24 else 2 * LAYERS, most))
    if contender.contiguous:
        arrays = contenders.contiguous_arrays(workload)
    else:
        arrays = workloads.arrays(workload, layers, contender.cache_layout)

    def tables_of_layer(arrays, layer):
        return contenders.layer_tables(workload, arrays, layer % layers)

    def program(calls):
        def run(query, rest, tables=None):
            given = workloads.Arrays(query, *rest)
            begun = contender.begin(workload, given)
            for layer in range(calls):
                own = tables_of_layer(given, layer) if tables is None else tables[layer]
                query = contender.step(workload, given, query, begun, own)
            return query

        return run

    error = check(workload, contender, arrays, program(1))
    query, *rest = arrays
    calls = CALLS if CALLS * workload.pool_bytes > CACHED else 2 * LAYERS
    run = jax.jit(program(calls))
    tables = [tables_of_layer(arrays, layer) for layer in range(calls)]
    stack = jax.jit(program(LAYERS), donate_argnums=0)
    donated = jnp.array(query)

    def step():
        nonlocal donated
        donated = stack(donated, rest)
        return donated

    return Prepared(error, calls, lambda: run(query, rest, tables), step)


def device_time(calls, run, kernels=timing.kernels) -> tuple[float, list[float]]:
    """Return microseconds of device time a call, and those of each plan, which it leaves out."""
    found = kernels(run)
    plans = [kernel for kernel in found if "plan" in kernel.name]
    plan_us = [kernel.end_us - kernel.begin_us for kernel in plans]
    return timing.busy_us(k for k in found if k not in plans) / timing.REPEATS / calls, plan_us


def measure(workload, contender, ceiling_gb_per_s: float) -> dict:
    """Check, then time one contender on one workload."""
    error, calls, run, step = prepare(workload, contender)
    device_us, plan_us = device_time(calls, run)
    wall_us = timing.wall_time(step, repeats=20 if workload.kv_bytes > 2**28 else 50) / LAYERS
    gb_per_s = workload.kv_bytes / device_us / 1e3
    return {
        "device_us": round(device_us, 2),
        "wall_us_per_layer": round(wall_us, 2),
        "gb_per_s": round(gb_per_s, 1),
        "of_ceiling": round(gb_per_s / ceiling_gb_per_s, 4),
        "plan_us": round(statistics.median(plan_us), 2) if plan_us else None,
        "error": error,
    }


def check(workload, contender, arrays, program) -> float:
    """Compare a few sequences with float32 products over gathered keys and values."""
    out = np.asarray(jax.jit(program)(arrays[0], arrays[1:]), np.float32)
    options = {k: v for k, v in workload.options if k != "return_lse"}
    if options or contender.contiguous:
        return float("nan")  # the tests check options; a dense cache has no pages to gather
    worst = 0.0
    w = workload
    for seq in sorted({0, w.num_seqs // 2, w.num_seqs - 1}):
        n = w.context_lens[seq]
        pages = arrays.block_tables[seq, : -(-n // w.page_size)]
        axis = 1 if contender.cache_layout == "KV_HEADS_FIRST" else 0
        order = {"HND": (1, 0, 2, 3), "NHD": (2, 0, 1, 3), "KV_HEADS_FIRST": (0, 1, 2, 3)}
        keys, values = (
            jnp.take(pool, pages, axis=axis)
            .transpose(order[contender.cache_layout])
            .reshape(w.num_kv_heads, -1, w.head_dim)[:, :n]
            .astype(jnp.float32)
            for pool in (arrays.key_cache, arrays.value_cache)
        )
        query = arrays.query[seq].astype(jnp.float32).reshape(w.num_kv_heads, -1, w.head_dim)
        logits = jnp.einsum("kgd,ktd->kgt", query, keys, precision="highest") * w.head_dim**-0.5
        weights = jax.nn.softmax(logits, axis=-1)
        expected = jnp.einsum("kgt,ktd->kgd", weights, values, precision="highest")
        expected = np.asarray(expected).reshape(out[seq].shape)
        worst = max(worst, float(np.abs(out[seq] - expected).max() / np.abs(expected).max()))
    if not worst < TOLERANCE:
        raise AssertionError(f"{contender.name} is wrong on {w.name}: relative error {worst:.1e}")
    return float(f"{worst:.1e}")


def versions() -> dict[str, str]:
    names = ("jax", "jaxlib", "jax-triton", "triton", "ejkernel", "nvidia-cudnn-cu13")
    found = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--suite", choices=workloads.SUITES, default="named")
    parser.add_argument("--workload", nargs="+", help="names, instead of a whole suite")
    parser.add_argument("--contender", nargs="+", help="names")
    parser.add_argument("--output", type=Path, help="instead of results/<device>.jsonl")
    args = parser.parse_args()

    device = jax.devices()[0].device_kind
    path = args.output or RESULTS / f"{device.replace(' ', '_')}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    facts = {
        "device": device,
        "date": datetime.date.today().isoformat(),
        "versions": versions(),
        "command": "python benchmarks/decode.py " + " ".join(sys.argv[1:]),
    }
    chosen = workloads.SUITES[args.suite]
    if args.workload:
        chosen = [
            w for suite in workloads.SUITES.values() for w in suite if w.name in args.workload
        ]
    found = [
        c for c in contenders.contenders() if args.contender is None or c.name in args.contender
    ]
    with path.open("a") as file:
        for workload in chosen:
            ceiling_gb_per_s = ceiling.read_ceiling(workload.kv_bytes)
            for contender in found:
                line = {"workload": workload.name, "contender": contender.name}
                try:
                    if refusal := contender.can_run(workload):
                        raise NotImplementedError(refusal)
                    line |= measure(workload, contender, ceiling_gb_per_s)
                except Exception as error:  # one that fails must not cost the others their turn
                    reason = str(error).splitlines()[0] if str(error) else ""
                    line["failed"] = f"{type(error).__name__}: {reason}"[:300]
                line |= {"ceiling_gb_per_s": round(ceiling_gb_per_s, 1)} | facts
                file.write(json.dumps(line) + "\n")
                file.flush()
                show(line)


def show(line):
    head = f"{line['workload']:<28} {line['contender']:<30}"
    if "failed" in line:
        print(f"{head} {line['failed'][:100]}", flush=True)
        return
    plan = f", plan {line['plan_us']} us" if line["plan_us"] else ""
    print(
        f"{head} {line['device_us']:9.1f} us  {line['of_ceiling']:6.1%} of the ceiling  "
        f"{line['wall_us_per_layer']:9.1f} us wall a layer{plan}",
        flush=True,
    )


if __name__ == "__main__":
    main()
