"""Times decode split over the GPUs of one host, checks it first, appends a line a result.

    python benchmarks/scaling.py                             every split over all GPUs
    python benchmarks/scaling.py --devices 2 --split heads
    python benchmarks/scaling.py --tiny --output x.jsonl     small, on simulated CPU devices

Lines go to `results/<device>_x<count>.jsonl`. Each split is compared with the same call on one
device, and that with the XLA program. Then both are timed as programs of chained calls: the wall
time of a call, twenty programs queued without waiting, and the time that the busiest device was
busy, from CUPTI through `jax.profiler`. No cache holds what a call reads. The speed of the link is
that of a large `all_gather` and a large `psum` of the same run, in bytes that each device receives.
"""

import argparse
import dataclasses
import functools
import os
import re
from collections.abc import Callable
from typing import Any

import command_line
import decode
import jax
import jax.numpy as jnp
import numpy as np
import programs
import ragged
import timing
import workloads
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import ejk

CALLS = 16
LINK_BYTES = 2**27  # of each device
MERGES = 64
BATCH = workloads.uniform("64 x 8,192", 64, 8, 128, 64, 8192, 16)
LONG = workloads.uniform("1 x 1,048,576", 32, 8, 128, 1, 1 << 20, 64)
TINY_BATCH = workloads.uniform("4 x 64", 8, 4, 16, 4, 64, 16)
TINY_LONG = workloads.uniform("1 x 512", 8, 4, 16, 1, 512, 16)
COLLECTIVE = re.compile(r"(all-gather|all-reduce|all-to-all|collective-permute)(?:-start)?\(")

Step = Callable[[workloads.Arrays], jax.Array]


@dataclasses.dataclass(frozen=True)
class Split:
    """A way to split a workload: where the arrays lie, and what is called."""

    name: str
    workload: workloads.Workload
    specs: workloads.Arrays
    """A `PartitionSpec` for each array, over the mesh axis `x`."""

    def step(self, mesh: jax.sharding.Mesh, backend: Any) -> Step:
        """Return what one call is."""
        if self.name != "pages":
            return functools.partial(attend, backend)  # plain jit, nothing else
        return jax.shard_map(
            functools.partial(attend_to_own_pages, backend),
            mesh=mesh,
            in_specs=(self.specs,),
            out_specs=P(),
        )


def attend(backend: Any, given: workloads.Arrays) -> jax.Array:
    return ejk.page_attention(*given, backend=backend)


def attend_to_own_pages(backend: Any, given: workloads.Arrays) -> jax.Array:
    return ejk.page_attention(*given, axis_name="x", backend=backend)


def splits(batch: workloads.Workload, long: workloads.Workload) -> list[Split]:
    heads, rows, pages = P(None, "x"), P("x"), P("x")
    return [
        Split("heads", batch, workloads.Arrays(heads, heads, heads, P(), P())),
        Split("sequences", batch, workloads.Arrays(rows, P(), P(), rows, rows)),
        Split("pages", long, workloads.Arrays(P(), pages, pages, P(), P())),
    ]


def arrays(w: workloads.Workload, mesh: jax.sharding.Mesh, specs: workloads.Arrays):
    """Draw a workload's arrays where they are to lie: the same on any mesh, split in any way.

    Keys and values are split alike.
    """
    rng = np.random.default_rng(0)
    query = 1.5 * rng.standard_normal((w.num_seqs, w.num_heads, w.head_dim), np.float32)
    pages = rng.permutation(w.num_pages).reshape(w.num_seqs, w.max_blocks)
    shape = (w.num_pages, w.num_kv_heads, w.page_size, w.head_dim)
    pool = jax.jit(
        lambda key: jax.random.normal(key, shape, jnp.bfloat16),
        out_shardings=NamedSharding(mesh, specs.key_cache),
    )

    def put(x, spec, dtype=np.int32):
        return jax.device_put(np.asarray(x, dtype), NamedSharding(mesh, spec))

    return workloads.Arrays(
        put(query, specs.query, jnp.bfloat16),
        pool(jax.random.key(1)),
        pool(jax.random.key(2)),
        put(w.context_lens, specs.context_lens),
        put(pages, specs.block_tables),
    )


def mesh_of(count: int) -> jax.sharding.Mesh:
    """Return a mesh whose one axis XLA manages, so that plain `jit` splits what lies on it."""
    axis_types = (AxisType.Auto,)
    return jax.make_mesh((count,), ("x",), axis_types=axis_types, devices=jax.devices()[:count])


def times(step: Step, given: workloads.Arrays) -> dict:
    """Time a program of chained calls: microseconds of a call."""
    tiny = jax.default_backend() == "cpu"
    calls, repeats, rounds = (2, 1, 1) if tiny else (CALLS, 20, 5)

    @jax.jit
    def run(query, rest):
        for _ in range(calls):
            query = step(workloads.Arrays(query, *rest))
        return query

    query, *rest = given
    wall_us = timing.wall_time(lambda: run(query, rest), repeats, rounds) / calls
    found = {"wall_us": round(wall_us, 2), "device_us": None}
    if not tiny:
        try:
            devices = timing.kernels_by_device(lambda: run(query, rest)).values()
            busy_us = max(map(timing.busy_us, devices)) / timing.REPEATS / calls
            found["device_us"] = round(busy_us, 2)
        except Exception as error:  # the wall time is worth having without it
            found["profiler_failed"] = f"{type(error).__name__}: {error}"[:200]
    return found


class OneDevice:
    """The same calls on one device: what they give, checked, and how long they take."""

    def __init__(self, backend: Any):
        self.backend = backend
        self.known: dict[str, tuple[np.ndarray, dict]] = {}

    def of(self, workload: workloads.Workload) -> tuple[np.ndarray, dict]:
        if workload.name not in self.known:
            given = arrays(workload, mesh_of(1), workloads.Arrays(P(), P(), P(), P(), P()))
            step = functools.partial(attend, self.backend)
            out = np.asarray(jax.jit(step)(given), np.float32)
            expected = jax.jit(functools.partial(attend, "xla"))(given)
            error = compare(out, np.asarray(expected, np.float32), f"{workload.name}, one device")
            self.known[workload.name] = out, times(step, given) | {"error": error}
        return self.known[workload.name]

    def times(self, workload: workloads.Workload) -> dict:
        return self.of(workload)[1] | {"devices": 1}


def compare(out: np.ndarray, expected: np.ndarray, what: str) -> float:
    """Return the largest difference, of the largest value; raise if it is too large."""
    error = float(np.abs(out - expected).max() / np.abs(expected).max())
    if not error < programs.TOLERANCE:
        raise AssertionError(f"wrong: {what}, relative error {error:.1e}")
    return float(f"{error:.1e}")


def measure(split: Split, count: int, one: OneDevice) -> dict:
    """Check, then time one split over `count` devices."""
    expected, alone = one.of(split.workload)
    mesh = mesh_of(count)
    given = arrays(split.workload, mesh, split.specs)
    step = split.step(mesh, one.backend)
    compiled = jax.jit(step).lower(given).compile()
    out = np.asarray(compiled(given), np.float32)
    error = compare(out, expected, f"{split.workload.name}, {split.name} over {count}")
    own = times(step, given)
    return own | {
        "speedup": ratio(alone["device_us"], own["device_us"]),
        "wall_speedup": ratio(alone["wall_us"], own["wall_us"]),
        "error": error,
        "collectives": len(COLLECTIVE.findall(compiled.as_text())),
    }


def ratio(alone_us: float | None, own_us: float | None) -> float | None:
    return round(alone_us / own_us, 3) if alone_us and own_us else None


def link(name: str, count: int, tiny: bool) -> dict:
    """Time a collective over `count` devices."""
    mesh = mesh_of(count)
    size = 2**10 if tiny else LINK_BYTES // 4
    repeats, rounds = (1, 1) if tiny else (20, 5)

    def gather(x):
        return jax.lax.all_gather(x, "x", tiled=True, to="invarying")

    def merges(x):
        for _ in range(MERGES):  # of the partial results of one sequence, one after the other
            parts = gather(x).reshape(count, -1)
            x = jax.lax.pcast(parts.mean(0), "x", to="varying")
        return gather(x)

    calls = 1
    if name == "merge of 32 heads of 128":
        size, calls = 32 * (128 + 1), MERGES + 1
    collective = {
        "all_gather": gather,
        "psum": lambda x: jax.lax.psum(x, "x"),
    }.get(name, merges)
    run = jax.jit(jax.shard_map(collective, mesh=mesh, in_specs=P("x"), out_specs=P()))
    ones = jax.jit(
        lambda: jnp.ones(count * size, jnp.float32), out_shardings=NamedSharding(mesh, P("x"))
    )()
    if not float(run(ones)[0]) > 0:
        raise AssertionError(f"wrong: {name} over {count}")
    wall_us = timing.wall_time(lambda: run(ones), repeats, rounds) / calls
    received = 4 * size * (count - 1) * (2 / count if name == "psum" else 1)
    rate = {} if calls > 1 else {"link_gb_per_s": round(received / wall_us / 1e3, 1)}
    return {"wall_us": round(wall_us, 2), "received_bytes": int(received)} | rate


def results(count: int, names: list[str], tiny: bool):
    """Yield a line for each collective, and for each split with what one device does."""

    def attempt(line: dict, run: Callable[[], dict]) -> dict:
        try:
            return line | {"devices": count} | run()
        except Exception as error:  # one that fails must not cost the others their turn
            if tiny:
                raise
            reason = (str(error).splitlines() or [""])[0]
            return line | {"devices": count, "failed": f"{type(error).__name__}: {reason}"[:300]}

    rates = {}
    for name in ("all_gather", "psum", "merge of 32 heads of 128"):
        line = {"workload": "scaling link", "contender": f"{name} over {count}"}
        line = attempt(line, functools.partial(link, name, count, tiny))
        rates[name] = line.get("link_gb_per_s")
        yield line
    one = OneDevice(ejk.TritonPageAttention(interpret=True, num_sms=6) if tiny else "triton")
    told = set()
    for split in splits(*((TINY_BATCH, TINY_LONG) if tiny else (BATCH, LONG))):
        if split.name not in names:
            continue
        workload = f"scaling {split.workload.name}"
        if workload not in told:
            told.add(workload)
            yield attempt(
                {"workload": workload, "contender": "one device"},
                functools.partial(one.times, split.workload),
            )
        line = {"workload": workload, "contender": f"{split.name} over {count}"}
        rate = {"link_gb_per_s": rates["all_gather"]}
        yield attempt(line, functools.partial(measure, split, count, one)) | rate


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--devices", type=int, help="how many; all by default")
    parser.add_argument("--split", nargs="+", default=["heads", "sequences", "pages"])
    args = command_line.parsed(
        parser, "small, on simulated devices", "results/<device>_x<count>.jsonl"
    )
    if args.tiny:
        jax.config.update("jax_platforms", "cpu")
        of = args.devices or 2
        os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={of}"
    count = args.devices or jax.device_count()
    kind = jax.devices()[0].device_kind.replace(" ", "_")
    path = args.output or decode.RESULTS / f"{kind}_x{count}.jsonl"
    ragged.append(path, results(count, args.split, args.tiny), "scaling.py")


if __name__ == "__main__":
    main()
