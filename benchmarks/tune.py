"""Times the Triton kernel's block sizes and writes the table of those that pay.

    python benchmarks/tune.py              times every cell on this GPU: results/tune_<device>.jsonl
    python benchmarks/tune.py --table      writes ejk/backends/triton/page_attention/tuned.py
    python benchmarks/tune.py --check      fails if that file is not what the results say

A cell is what the table distinguishes: capability, bytes of an element, head dimension, rows of
the product, and whether a call is large enough to fill the GPU. A large cell is timed on a batch of
equal contexts and on a ragged one; a small one on a single short context. Cells compile side by
side; one at a time uses the GPU.
"""

import argparse
import concurrent.futures
import dataclasses
import datetime
import functools
import json
import math
import multiprocessing
import os
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # every process gets its share

import decode
import jax
import jax.numpy as jnp
import numpy as np
import timing
import workloads

import ejk
from ejk.backends.gpu import SHARED_MEMORY, Target
from ejk.backends.page_attention import PageAttentionProblem
from ejk.backends.triton._sizes import MATRIX_ROWS, block_group
from ejk.backends.triton.page_attention import tuned as page_attention_tuned
from ejk.backends.triton.page_attention.blocks import DecodeBlocks, Tuning
from ejk.backends.triton.page_attention.occupancy import least_rows
from ejk.backends.triton.page_attention.sizes import Sizes
from ejk.backends.triton.page_attention.tuned import Cell, Pipeline

RESULTS = Path(__file__).parent / "results"
TABLE = Path(page_attention_tuned.__file__)
BEGIN = "TUNED: dict[Cell, Pipeline] = "  # the last thing in the file
CALLS = 4
LARGE_BYTES = 400e6
PAYS = 1.01  # what the heuristic must lose by to be overruled


@dataclasses.dataclass(frozen=True)
class Trial:
    """A cell, and the batches that stand for it."""

    dtype: str
    head_dim: int
    group: int
    large: bool

    @property
    def rows(self) -> int:
        least = least_rows(self.dtype == "float32", False, self.head_dim, None)
        return block_group(self.group, self.head_dim, None, least)

    @property
    def batches(self) -> list[workloads.Workload]:
        """Batches of one shape, so that one program serves both."""
        kv_heads = 8 if self.group <= 16 else 1
        heads = kv_heads * self.group
        if not self.large:
            only = workloads.uniform("small", heads, kv_heads, self.head_dim, 1, 1024, 16)
            return [dataclasses.replace(only, dtype=self.dtype)]
        token_bytes = 2 * kv_heads * self.head_dim * jnp.dtype(self.dtype).itemsize
        seqs = 64 if kv_heads > 1 else 128
        context = int(LARGE_BYTES / token_bytes / seqs) // 128 * 128
        equal = workloads.uniform("equal", heads, kv_heads, self.head_dim, seqs, context, 16)
        lens = np.random.default_rng(0).lognormal(0, 0.9, seqs)
        lens = np.clip(lens / lens.mean() * context, 16, 4 * context).astype(int)
        ragged = dataclasses.replace(equal, name="ragged", context_lens=tuple(map(int, lens)))
        shape = {"max_context_len": 4 * context, "dtype": self.dtype}
        return [dataclasses.replace(batch, **shape) for batch in (equal, ragged)]

    def ruled(self, capability: int) -> DecodeBlocks:
        """What the heuristic makes of the cell."""
        batch = self.batches[0]
        problem = PageAttentionProblem(
            num_seqs=batch.num_seqs,
            num_heads=batch.num_heads,
            num_kv_heads=batch.num_kv_heads,
            head_dim=self.head_dim,
            value_head_dim=self.head_dim,
            num_pages=batch.num_pages,
            page_size=batch.page_size,
            max_blocks=batch.max_blocks,
            query_dtype=jnp.dtype(self.dtype),
            cache_dtype=jnp.dtype(self.dtype),
            cache_layout="HND",
            latent=False,
            fused=False,
            has_window=False,
            soft_cap=None,
            has_sinks=False,
            has_alibi=False,
            return_lse=False,
            num_splits=0,
            plan=None,
            visible_bound=batch.max_context_len,
        )
        target = Target(capability, 132, SHARED_MEMORY[capability])
        return Sizes.of(problem, Tuning(), target, tuned={}).blocks

    def candidates(self) -> list[Pipeline]:
        """What is timed."""
        itemsize = jnp.dtype(self.dtype).itemsize
        if itemsize == 2:
            blocks, warps = (32, 64, 128, 256)[: 4 if self.large else 3], (4, 8)
            stages = (2, 3, 4, 5)[: 4 if self.large else 3]
        else:
            blocks, stages = (16, 32, 64, 128), (2, 3)
            warps = (1, 2, 4) if self.rows < MATRIX_ROWS else (2, 4, 8)
        found = []
        for block_kv in blocks:
            for num_stages in stages:
                one = 2 * block_kv * self.head_dim * itemsize
                in_flight = (num_stages - 1) * one
                # Less than 32 KiB in flight cannot fill the GPU's memory pipes, if a program is
                # alone; the rest must fit.
                is_alone = self.large and itemsize == 2
                if (2**15 if is_alone else 2**13) <= in_flight <= 220 * 2**10:
                    found += [Pipeline(block_kv, number, num_stages) for number in warps]
        return found


def trials() -> list[Trial]:
    found = []
    for large in (True, False):
        for head_dim in (128, 64, 80, 96, 192, 256, 512):
            for group in (4, 32, 64):
                trial = Trial("bfloat16", head_dim, group, large)
                if group <= 16 or trial.rows == group:
                    found.append(trial)
        for head_dim in (128, 64, 256):
            found += [Trial("float32", head_dim, group, large) for group in (1, 2, 4, 8, 16)]
    return found


def measure(trial: Trial, lock_path: str) -> dict:
    """Compile every candidate, then time them all under one profile."""
    batch = trial.batches[0]
    num_pages = max(b.num_pages for b in trial.batches)

    def call(backend, query, keys, values, lens, tables):
        for _ in range(CALLS):
            query = ejk.page_attention(query, keys, values, lens, tables, backend=backend)
        return query

    dtype = jnp.dtype(trial.dtype)
    pool = jax.ShapeDtypeStruct((num_pages, batch.num_kv_heads, 16, trial.head_dim), dtype)
    seqs = batch.num_seqs
    shapes = (
        jax.ShapeDtypeStruct((seqs, batch.num_heads, trial.head_dim), dtype),
        pool,
        pool,
        jax.ShapeDtypeStruct((seqs,), jnp.int32),
        jax.ShapeDtypeStruct((seqs, batch.max_blocks), jnp.int32),
    )
    programs, compile_s = {}, {}
    for blocks in trial.candidates():
        backend = ejk.TritonPageAttention(**blocks._asdict())
        start = time.perf_counter()
        try:
            run = functools.partial(call, backend)
            programs[blocks] = jax.jit(run).lower(*shapes).compile()
        except ejk.UnsupportedError:
            continue  # more shared memory than there is
        compile_s[blocks] = time.perf_counter() - start

    times = {blocks: [] for blocks in programs}
    with timing.exclusive(lock_path):
        for batch in trial.batches:
            arrays = workloads.arrays(batch, 1)
            pad = [(0, num_pages - batch.num_pages), (0, 0), (0, 0), (0, 0)]
            keys, values = (jnp.pad(x, pad) for x in (arrays.key_cache, arrays.value_cache))
            given = (arrays.query, keys, values, arrays.context_lens, arrays.block_tables)
            for blocks, took in device_times(programs, given).items():
                times[blocks].append(took)
            del arrays, keys, values, given
    return {
        **dataclasses.asdict(trial),
        "compile_s": {name(b): round(s, 2) for b, s in compile_s.items()},
        "device_us": {name(b): [round(us, 2) for us in took] for b, took in times.items()},
    }


def device_times(programs, given) -> dict[Pipeline, float]:
    """Return the device time of a call of each program, of one profile of them all."""

    def run():
        return [program(*given) for program in programs.values()]

    found = [k for k in timing.kernels(run) if "plan" not in k.name]
    # The programs run one after another: so many attention kernels each.
    times, index, count = dict.fromkeys(programs, 0.0), -1, 0
    order = list(programs)
    for kernel in found:
        if kernel.name == "page_attention_kernel":
            if count % CALLS == 0:
                index = (index + 1) % len(order)
            count += 1
        if index >= 0:
            times[order[index]] += kernel.end_us - kernel.begin_us
    assert count == CALLS * len(order) * timing.REPEATS, f"{count} kernels of {len(order)} programs"
    return {blocks: us / CALLS / timing.REPEATS for blocks, us in times.items()}


def name(blocks: Pipeline) -> str:
    return "/".join(map(str, blocks))


def run_all(output: Path | None, processes: int, chosen: list[Trial]) -> None:
    """Measure every cell; append a line each as it is done."""
    context = multiprocessing.get_context("spawn")
    with (
        tempfile.NamedTemporaryFile() as lock,
        concurrent.futures.ProcessPoolExecutor(processes, mp_context=context) as pool,
    ):
        futures = {pool.submit(measure, trial, lock.name): trial for trial in chosen}
        device = jax.devices()[0]
        path = output or RESULTS / f"tune_{device.device_kind.replace(' ', '_')}.jsonl"
        facts = {
            "device": device.device_kind,
            "capability": round(float(device.compute_capability) * 10),
            "date": datetime.date.today().isoformat(),
            "versions": decode.versions(),
            "command": " ".join(["python", *sys.argv]),
        }
        with path.open("a") as file:
            for future in concurrent.futures.as_completed(futures):
                trial = futures[future]
                try:
                    line = future.result() | facts
                except Exception as error:  # one cell's failure must not cost the others theirs
                    print(trial, f"{type(error).__name__}: {str(error)[:300]}", flush=True)
                    continue
                file.write(json.dumps(line) + "\n")
                file.flush()
                _, best, gain = choose([line])
                print(trial, name(best), f"{gain - 1:+.1%}", flush=True)


def choose(lines: list[dict]) -> tuple[Pipeline, Pipeline, float]:
    """Return the heuristic's blocks, those that lose least on every device, and what they gain."""
    blocks = _trial_of(lines[0]).ruled(lines[0]["capability"])
    ruled = Pipeline(blocks.block_kv, blocks.num_warps, blocks.num_stages)
    gains: dict[str, float] = {}
    for candidate in lines[0]["device_us"]:
        if all(candidate in line["device_us"] for line in lines):
            ratios = [
                usual / us
                for line in lines
                for us, usual in zip(line["device_us"][candidate], line["device_us"][name(ruled)])
            ]
            gains[candidate] = math.exp(sum(map(math.log, ratios)) / len(ratios))
    best = max(gains, key=lambda candidate: gains[candidate])
    return ruled, Pipeline(*map(int, best.split("/"))), gains[best]


def _trial_of(line: dict) -> Trial:
    return Trial(*(line[field.name] for field in dataclasses.fields(Trial)))


def table() -> str:
    """Write the table: of the results, what beats the heuristic by more than `PAYS`."""
    cells: dict[Cell, dict[str, dict]] = {}
    for path in sorted(RESULTS.glob("tune_*.jsonl")):
        for line in map(json.loads, path.read_text().splitlines()):
            trial = _trial_of(line)
            itemsize = jnp.dtype(trial.dtype).itemsize
            cell = Cell(line["capability"], itemsize, trial.head_dim, trial.rows, trial.large)
            cells.setdefault(cell, {})[line["device"]] = line
    text = ""
    for cell in sorted(cells):
        lines = list(cells[cell].values())
        ruled, best, gain = choose(lines)
        if gain < PAYS:
            continue
        took = "; ".join(
            f"{line['device']}: {sum(line['device_us'][name(best)]):.1f}"
            f" for {sum(line['device_us'][name(ruled)]):.1f} us"
            for line in lines
        )
        text += f"    # {took}\n    Cell{tuple(cell)}: Pipeline{tuple(best)},\n"
    return TABLE.read_text().split(BEGIN)[0] + BEGIN + "{\n" + text + "}\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--output", type=Path, help="instead of results/tune_<device>.jsonl")
    parser.add_argument("--processes", type=int, default=max(1, (os.cpu_count() or 2) - 2))
    parser.add_argument("--dtype", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--head-dim", nargs="+", type=int, help="some, instead of all")
    args = parser.parse_args()
    if args.table:
        TABLE.write_text(table())
    elif args.check:
        stale = table() != TABLE.read_text()
        sys.exit(f"{TABLE.name} is stale: python benchmarks/tune.py --table" if stale else 0)
    else:
        chosen = [
            trial
            for trial in trials()
            if trial.dtype in args.dtype and trial.head_dim in (args.head_dim or [trial.head_dim])
        ]
        run_all(args.output, args.processes, chosen)


if __name__ == "__main__":
    main()
