"""Times `ejk` over many batches, in processes that compile side by side.

Each process compiles what its next batch needs while another one has the device. A file's lock
says whose turn it is to draw, check and time. Other processes that compile would disturb a wall
time, so device time alone is measured. Batches of a group are compiled and timed in one process,
where they take turns call by call.
"""

import concurrent.futures
import contextlib
import functools
import multiprocessing
import os
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import ceiling
import contenders
import prefix
import programs
import timing
import workloads

OWN = "ejk"
SUITES = ("shapes", "order", "waves", "latent", "map", "quantised", "prefix")
ROUNDS = 15


@contextlib.contextmanager
def started(
    chosen: Sequence[workloads.Workload], tiny: bool, processes: int | None
) -> Iterator[tuple[ceiling.Yardsticks, list[programs.Job]]]:
    """Start to measure; yield the yardsticks, and for each batch what waits for its result."""
    processes = processes or (2 if tiny else max(1, (os.cpu_count() or 3) - 2))
    processes = min(processes, len(chosen) + len(ceiling.SIZES) + 1)
    context = multiprocessing.get_context("spawn")
    os.environ["XLA_PYTHON_CLIENT_ALLOCATOR"] = "platform"  # none takes more than it holds
    with (
        tempfile.NamedTemporaryFile() as lock,
        concurrent.futures.ProcessPoolExecutor(processes, mp_context=context) as pool,
    ):
        run = functools.partial(pool.submit, with_lock, lock.name)
        rates = [] if tiny else [run(ceiling.read_ceiling, size) for size in ceiling.SIZES]
        rates += [] if tiny else [run(ceiling.matmul_rate, ceiling.MATMUL)]
        groups: dict[str, list[workloads.Workload]] = {}
        for workload in chosen:
            groups.setdefault(workload.group or workload.name, []).append(workload)
        futures = {
            name: run(race, group, tiny) if len(group) > 1 else run(measure, *group, tiny)
            for name, group in groups.items()
        }
        *read, matmul = [rate.result() for rate in rates] or [1.0] * (len(ceiling.SIZES) + 1)
        yardsticks = ceiling.Yardsticks(read, matmul)

        def result(workload):
            line = futures[workload.group or workload.name].result()[workload.name]
            if isinstance(line, Exception):
                raise line
            return line | yardsticks.shares(workload, line["device_us"])

        yield yardsticks, [(w, OWN, functools.partial(result, w)) for w in chosen]


def with_lock(lock: str, function: Callable[..., Any], *arguments: Any) -> Any:
    return function(*arguments, lock=lock)


def measure(workload, tiny: bool, lock: str) -> dict[str, Any]:
    """Compile, then check and time one batch as soon as the device is free."""
    if isinstance(workload, prefix.Shared):
        return prefix.measure(workload, tiny, lock)
    [own] = [c for c in contenders.contenders(tiny) if c.name == OWN]
    ready = programs.compile_calls(workload, own, 2 if tiny else None)
    with timing.exclusive(lock):
        error, calls, run = ready()
        device_us, _ = timing.device_time(calls, run)
    return {workload.name: {"device_us": round(device_us, 2), "error": error}}


def race(group: Sequence[workloads.Workload], tiny: bool, lock: str) -> dict[str, Any]:
    """Compile and check the batches of a group, then time them in turn; one may have failed."""
    [own] = [c for c in contenders.contenders(tiny) if c.name == OWN]
    layers = 2 if tiny else programs.uncached_layers(group[0])

    def compiled(workload):
        return attempt(programs.compile_calls, workload, own, layers)

    with concurrent.futures.ThreadPoolExecutor() as pool:
        over = map if tiny else pool.map  # interpreters of kernels want the main thread
        ready = list(over(compiled, group))
    with timing.exclusive(lock):
        found = {w.name: attempt(check) for w, check in zip(group, ready)}
        right = {w: own for w, own in found.items() if isinstance(own, programs.Checked)}
        turns = timing.interleaved([own.run for own in right.values()], ROUNDS)
    for (name, own), rounds in zip(right.items(), turns):
        busy_us = statistics.median(timing.without_plan(turn)[0] for turn in rounds)
        found[name] = {"device_us": round(busy_us / own.calls, 2), "error": own.error}
    return with_ratios(found, group[0].name)


def with_ratios(found: dict[str, Any], first: str) -> dict[str, Any]:
    """Add to what was measured its time over that of the first of the group, in the same turns."""
    base_us = found[first]["device_us"] if isinstance(found[first], dict) else None
    for name, line in found.items():
        if base_us and isinstance(line, dict) and name != first:
            ratio = round(line["device_us"] / base_us, 4)
            found[name] = line | {"base": first, "base_us": base_us, "of_base": ratio}
    return found


def attempt(function: Callable[..., Any], *arguments: Any) -> Any:
    """Return the result or the exception: a batch that fails costs no other its turn."""
    if isinstance(function, Exception):
        return function
    try:
        return function(*arguments)
    except Exception as error:
        return error
