"""Times ragged batches, checks them first, and appends a line a result to `results/`.

    python benchmarks/ragged.py                        every batch and contender
    python benchmarks/ragged.py --suite prefill shapes
    python benchmarks/ragged.py --batch "prefill 8 x 4,096, page 16" --contender "ejk mosaic_gpu"
    python benchmarks/ragged.py --suite prefix         prefixes read once, beside the same without
    python benchmarks/ragged.py --suite layers         the wall time a layer of 32
    python benchmarks/ragged.py --tiny --output x.jsonl   small batches, interpreted on a CPU

Prefills, chunks of prefills, mixed batches with their parts alone, verified drafts with the decode
call for the same contexts, options, quantised caches beside bfloat16. The contenders are the
backends of `ejk`, and cuDNN's dense causal attention to contiguous tensors where all prompts are
equally long. All contenders on all batches of a suite take turns. Suites compile side by side, each
in a process of its own, and wait for each other to use the device. Another yardstick is the rate of
a bfloat16 product of 8,192 x 8,192 matrices.

Each program is awaited, and each turn is timed by CUPTI through `jax.profiler`. Device time is how
long the device was busy, over the calls of the program: one, or four chained ones where one is
short. The figure is the median of seven turns. The plan, of which XLA makes one for all calls of a
program, is not in it; what else XLA prepares is.
"""

import argparse
import concurrent.futures
import datetime
import functools
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import ceiling
import command_line
import decode
import jax
import jax.numpy as jnp
import programs
import ragged_batches
import timing
from ragged_batches import Arrays, Batch
from ragged_programs import (
    DENSE,
    Program,
    Ready,
    Step,
    Tools,
    chain,
    compile_program,
    compile_tools,
    contenders,
    prepare,
    shapes_of,
)

ROUNDS = 7

Job = tuple[Batch, str, Step]


def race(jobs: Sequence[Job], tiny: bool, lock: str | None = None) -> list[dict]:
    """Let all contenders on all batches of a suite take turns; return a line for each."""
    batches = list(dict.fromkeys(batch for batch, _, _ in jobs))
    with concurrent.futures.ThreadPoolExecutor() as pool:
        over = map if tiny else pool.map  # interpreters of kernels want the main thread
        found = list(over(compiled, *zip(*jobs)))
        tools = dict(zip(batches, over(compile_tools, batches)))
    with timing.exclusive(lock):
        given = {batch: tools[batch].draw() for batch in batches}
        found = [
            own if isinstance(own, Exception) else checked(own, tools[own.batch], given[own.batch])
            for own in found
        ]
        ready = [own for own in found if isinstance(own, Ready)]
        timed = map(median_us, timing.interleaved([own.run for own in ready], ROUNDS))
    lines = []
    for (batch, name, _), own in zip(jobs, found):
        line: dict[str, Any] = {"workload": batch.name, "contender": name}
        if isinstance(own, Ready):
            line |= figures(own, *next(timed))
        elif tiny:
            raise own
        else:
            line["failed"] = f"{type(own).__name__}: {str(own).splitlines()[:1]}"[:300]
        lines.append(line)
    return with_ratios(lines, jobs)


def compiled(batch: Batch, name: str, step: Step) -> Program | Exception:
    """Compile a program, or return why not: one that fails must not cost the others their turn."""
    try:
        return compile_program(batch, step, name == DENSE)
    except Exception as error:
        return error


def checked(program: Program, tools: Tools, given: Arrays) -> Ready | Exception:
    """Check a program, or return why not."""
    try:
        return prepare(program, tools, given)
    except Exception as error:
        return error


def median_us(rounds: list[list[timing.Kernel]]) -> tuple[float, float, float]:
    """Return how long the device was busy, with plans, which that leaves out, and one kernel."""
    busy_us, plan_us = zip(*map(timing.without_plan, rounds))
    longest_us = [max(kernel.end_us - kernel.begin_us for kernel in turn) for turn in rounds]
    return statistics.median(busy_us), statistics.median(plan_us), statistics.median(longest_us)


def figures(own: Ready, busy_us: float, plan_us: float, longest_us: float) -> dict[str, Any]:
    device_us = busy_us / own.batch.calls
    return {
        "device_us": round(device_us, 2),
        "tflops": round(own.batch.flops / device_us / 1e6, 1),
        "plan_us": round(plan_us, 2) if plan_us else None,
        "longest_kernel_us": round(longest_us, 2),
        "error": own.error,
    }


def with_ratios(lines: list[dict], jobs: Sequence[Job]) -> list[dict]:
    """Add what was measured in the same turns: cuDNN on the same batch, ejk on what is compared."""
    times = {(line["workload"], line["contender"]): line.get("device_us") for line in lines}
    for (batch, name, _), line in zip(jobs, lines):
        dense_us, base_us = times.get((batch.name, DENSE)), times.get((batch.base, name))
        if dense_us and "device_us" in line:
            line["of_cudnn"] = round(dense_us / line["device_us"], 4)
        if base_us:
            line["base_us"] = base_us
        if base_us and batch.cache is not None and "device_us" in line:
            line["of_base"] = round(line["device_us"] / base_us, 4)
    return lines


def layers(jobs: Sequence[Job], tiny: bool, lock: str | None = None) -> list[dict]:
    """Time a program of 32 chained calls, its query donated: what a layer takes, by the wall."""
    calls, lines = 2 if tiny else programs.LAYERS, []
    for batch, name, step in jobs:
        if name == DENSE:
            continue  # it reads no pages
        line = {"workload": f"{batch.name}: layers", "contender": name}
        given = shapes_of(batch)
        program = jax.jit(functools.partial(chain, batch, step, calls), donate_argnums=0)
        program = program.lower(given.query, given).compile()
        with timing.exclusive(lock):
            given = ragged_batches.arrays(batch)
            queries = [jnp.array(given.query)]

            def run(program=program, given=given, queries=queries):
                queries[0] = program(queries[0], given)
                return queries[0]

            wall_us = timing.wall_time(run, repeats=2 if tiny else 10) / calls
        lines.append(line | {"wall_us_per_layer": round(wall_us, 2)})
    return lines


def append(path: Path | None, lines, script: str, prefix: str = "") -> None:
    """Append each result with where and how it came about, and print it."""
    device = jax.devices()[0].device_kind
    path = path or decode.RESULTS / f"{prefix}{device.replace(' ', '_')}.jsonl"
    facts = {
        "device": device,
        "date": datetime.date.today().isoformat(),
        "versions": decode.versions(),
        "command": " ".join(["python", f"benchmarks/{script}", *sys.argv[1:]]),
    }
    with path.open("a") as file:
        for line in lines:
            file.write(json.dumps(line | facts) + "\n")
            file.flush()
            print(", ".join(f"{name} {value}" for name, value in line.items()), flush=True)


def results(suites: dict[str, list[Batch]], args: argparse.Namespace) -> Iterator[dict]:
    """Yield a line for each batch and contender."""
    measures = []
    for suite, batches in suites.items():
        if jobs := jobs_of(batches, args):
            measures.append(functools.partial(layers if suite == "layers" else race, jobs))
    if args.tiny:
        for measure in measures:
            yield from measure(tiny=True)
    else:
        yield from side_by_side(measures)


def jobs_of(batches: Sequence[Batch], args: argparse.Namespace) -> list[Job]:
    return [
        (batch, name, step)
        for batch in batches
        if not args.batch or batch.name in args.batch
        for name, step in contenders(batch, args.tiny).items()
        if not args.contender or name in args.contender
    ]


def side_by_side(measures: Sequence[Callable[..., list[dict]]]) -> Iterator[dict]:
    """Let each suite compile in a process of its own; they take turns on the device."""
    context = multiprocessing.get_context("spawn")
    with (
        tempfile.NamedTemporaryFile() as lock,
        concurrent.futures.ProcessPoolExecutor(len(measures) + 1, mp_context=context) as pool,
    ):
        product = pool.submit(ceiling.matmul_rate, ceiling.MATMUL, lock.name)
        futures = [pool.submit(measure, tiny=False, lock=lock.name) for measure in measures]
        for future in concurrent.futures.as_completed(futures):
            for line in future.result():
                yield with_product(line, product.result())


def with_product(line: dict, matmul_tflops: float) -> dict:
    share = {"of_matmul": round(line["tflops"] / matmul_tflops, 4)} if "tflops" in line else {}
    return line | share | {"matmul_tflops": round(matmul_tflops, 1)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--suite", nargs="+", choices=ragged_batches.SUITES, help="instead of all")
    parser.add_argument("--batch", nargs="+", help="names, instead of all of a suite")
    parser.add_argument("--contender", nargs="+", help="names, instead of all")
    args = command_line.parsed(parser, "small ones, interpreted on a CPU")
    suites = ragged_batches.TINY if args.tiny else ragged_batches.SUITES
    if args.suite:
        suites = {name: suites[name] for name in args.suite}
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # the processes share one device
    append(args.output, results(suites, args), "ragged.py")


if __name__ == "__main__":
    main()
