"""Times `ejk.copy_kv_slots` and `ejk.copy_kv_pages`; checks them first, and records each result.

    python benchmarks/copy_kv.py                          slots and pages, many and few
    python benchmarks/copy_kv.py --tiny --output x.jsonl  few, interpreted on a CPU

Pools hold 8 KV heads of 128 in bfloat16, pages of 16. Each call of a program copies units of its
own, so that no cache holds them, but for those of 64 slots; the pools are donated. XLA's gather and
scatter does the same, and takes turns with it, run by run. The yardstick is the best rate at which
a kernel that does nothing else copies as many bytes, 8 MiB at least, of the same run. Bytes are
those of the units, read once and written once, whatever moves: "in conflict" means that each target
is another copy's source. Workloads compile side by side, each in a process of its own, and wait for
each other to use the device.
"""

import argparse
import concurrent.futures
import functools
import multiprocessing
import os
import statistics
import tempfile
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import ceiling
import command_line
import jax
import jax.numpy as jnp
import numpy as np
import timing
from ragged import append
from side_by_side import attempt

import ejk

NUM_KV_HEADS, HEAD_DIM, PAGE_SIZE = 8, 128, 16
SLOT_BYTES = 2 * NUM_KV_HEADS * HEAD_DIM * 2  # of a token's key and value
MOVED = 2**29  # bytes that a program moves, of few units less: more than the GPU's caches hold
MAX_CALLS = 32  # of a program
MIN_YARDSTICK = 2**23  # bytes: of fewer it would take hundreds of launches
ROUNDS = 15


class Workload(NamedTuple):
    """Copies of one call."""

    copies: int
    unit: str
    layout: str = "HND"
    in_conflict: bool = False

    @property
    def name(self) -> str:
        return (
            f"copy {self.copies} {self.unit}s, {self.layout}" + ", in conflict" * self.in_conflict
        )

    @property
    def slots(self) -> int:
        """Of a unit."""
        return PAGE_SIZE if self.unit == "page" else 1

    @property
    def moved_bytes(self) -> int:
        return 2 * self.copies * self.slots * SLOT_BYTES


WORKLOADS = (
    *(Workload(1024, "page", layout) for layout in ("HND", "NHD", "KV_HEADS_FIRST")),
    Workload(1024, "page", in_conflict=True),
    Workload(16, "page"),
    *(Workload(count, "slot", layout) for count in (8192, 2048, 64) for layout in ("HND", "NHD")),
    Workload(2048, "slot", in_conflict=True),
)
TINY = (Workload(3, "page"), Workload(5, "slot", "NHD"), Workload(4, "slot", in_conflict=True))


def draw(workload: Workload, calls: int) -> tuple[np.ndarray, int]:
    """Return sources and targets of each call, `[calls, 2, count]`, and the number of pages."""
    count, ends = workload.copies, 1 if workload.in_conflict else 2
    units = calls * ends * count
    num_pages = -(-units * workload.slots // PAGE_SIZE)
    ids = np.random.default_rng(0).permutation(units).reshape(calls, ends, count)
    if workload.in_conflict:  # each to the place of the next, and round
        ids = np.concatenate([ids, np.roll(ids, -1, axis=2)], axis=1)
    return ids.astype(np.int32), num_pages


def pools_of(num_pages: int, layout: str) -> tuple[jax.Array, jax.Array]:
    shape = {
        "HND": (num_pages, NUM_KV_HEADS, PAGE_SIZE, HEAD_DIM),
        "NHD": (num_pages, PAGE_SIZE, NUM_KV_HEADS, HEAD_DIM),
        "KV_HEADS_FIRST": (NUM_KV_HEADS, num_pages, PAGE_SIZE, HEAD_DIM),
    }[layout]
    keys, values = (jax.random.normal(jax.random.key(i), shape, jnp.bfloat16) for i in range(2))
    return keys, values


def compiled(workload: Workload, backend: Any, ids: np.ndarray, num_pages: int) -> Any:
    operation = {"slot": ejk.copy_kv_slots, "page": ejk.copy_kv_pages}[workload.unit]
    copy = functools.partial(operation, cache_layout=workload.layout, backend=backend)

    def run(pools, ids):
        for sources, targets in ids:
            pools = copy(*pools, sources, targets)
        return pools

    pools = jax.eval_shape(functools.partial(pools_of, num_pages, workload.layout))
    return jax.jit(run, donate_argnums=0).lower(pools, jnp.asarray(ids)).compile()


def prepare(workload: Workload, program: Any, ids: jax.Array, num_pages: int) -> Callable[[], Any]:
    """Check the copies; return what runs them."""
    pools = program(pools_of(num_pages, workload.layout), ids)
    if not is_right(workload, pools, pools_of(num_pages, workload.layout), ids):
        raise AssertionError(f"{workload.name}: a {workload.unit} is not where it belongs")

    def step():
        nonlocal pools
        pools = program(pools, ids)
        return pools

    return step


@functools.partial(jax.jit, static_argnums=0)
def is_right(workload: Workload, pools: Any, given: Any, ids: jax.Array) -> jax.Array:
    """Say whether every bit is where it belongs."""
    pages, slots = {"HND": (0, 2), "NHD": (0, 1), "KV_HEADS_FIRST": (1, 2)}[workload.layout]
    same = jnp.bool_(True)
    for pool, old in zip(pools, given):
        found, expected = (
            jnp.moveaxis(jax.lax.bitcast_convert_type(x, jnp.uint16), (pages, slots), (0, 1))
            .reshape(pool.shape[pages] * PAGE_SIZE // workload.slots, -1)
            for x in (pool, old)
        )  # fmt: skip
        for sources, targets in ids:
            expected = expected.at[targets].set(expected[sources])
        same &= (found == expected).all()
    return same


def measure(workload: Workload, tiny: bool, lock: str | None = None) -> list[dict[str, Any]]:
    """Return a line for each contender; both take turns."""
    calls = 2 if tiny else max(2, min(MAX_CALLS, MOVED // workload.moved_bytes))
    ids, num_pages = draw(workload, calls)
    triton = ejk.TritonCopyKVCache(interpret=True) if tiny else "triton"
    contenders = {"ejk": triton, "xla": "xla"}
    ready = {
        name: attempt(compiled, workload, backend, ids, num_pages)
        for name, backend in contenders.items()
    }
    with timing.exclusive(lock):
        given = jnp.asarray(ids)
        for name, own in ready.items():
            if not isinstance(own, Exception):
                ready[name] = attempt(prepare, workload, own, given, num_pages)
        right = {name: own for name, own in ready.items() if not isinstance(own, Exception)}
        times = dict(zip(right, timing.interleaved([*right.values()], ROUNDS)))
    lines = []
    for name, own in ready.items():
        line: dict[str, Any] = {"workload": workload.name, "contender": name}
        if name not in right:
            lines.append(line | {"failed": f"{type(own).__name__}: {own}"[:300]})
            continue
        device_us = statistics.median(timing.busy_us(turn) for turn in times[name]) / calls
        rate = workload.moved_bytes / device_us / 1e3
        lines.append(line | {"device_us": round(device_us, 2), "gb_per_s": round(rate, 1)})
    return lines


def results(tiny: bool) -> Iterator[dict]:
    """Yield a line for each workload and contender."""
    if tiny:
        for workload in TINY:
            yield from measure(workload, tiny)
        return
    os.environ["XLA_PYTHON_CLIENT_ALLOCATOR"] = "platform"  # none takes more than it holds
    context = multiprocessing.get_context("spawn")
    sizes = {w: max(w.moved_bytes // 2, MIN_YARDSTICK) for w in WORKLOADS}
    processes = min(len(WORKLOADS) + len({*sizes.values()}), max(2, (os.cpu_count() or 3) - 2))
    with (
        tempfile.NamedTemporaryFile() as lock,
        concurrent.futures.ProcessPoolExecutor(processes, mp_context=context) as pool,
    ):
        run = functools.partial(pool.submit, lock=lock.name)
        ceilings = {size: run(ceiling.copy_ceiling, size) for size in {*sizes.values()}}
        measured = {workload: run(measure, workload, tiny) for workload in WORKLOADS}
        for workload, lines in measured.items():
            copied = ceilings[sizes[workload]].result()
            for line in lines.result():
                if "gb_per_s" in line:
                    share = round(line["gb_per_s"] / copied, 4)
                    line |= {"of_ceiling": share, "ceiling_gb_per_s": round(copied, 1)}
                yield line


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    args = command_line.parsed(parser, "few copies, interpreted on a CPU")
    append(args.output, results(args.tiny), "copy_kv.py")


if __name__ == "__main__":
    main()
