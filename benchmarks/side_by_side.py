"""Times `ejk` over many batches, in processes that compile side by side.

Each process compiles what its next batch needs while another one has the device. A file's lock
says whose turn it is to draw, check and time. Other processes that compile would disturb a wall
time, so device time alone is measured.
"""

import concurrent.futures
import contextlib
import functools
import multiprocessing
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import ceiling
import contenders
import programs
import timing
import workloads

OWN = "ejk"
SUITES = ("shapes", "order", "waves", "latent", "map")


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
        futures = [run(measure, workload, tiny) for workload in chosen]
        *read, matmul = [rate.result() for rate in rates] or [1.0] * (len(ceiling.SIZES) + 1)
        yardsticks = ceiling.Yardsticks(read, matmul)

        def result(workload, future):
            line = future.result()
            return line | yardsticks.shares(workload, line["device_us"])

        yield (
            yardsticks,
            [(w, OWN, functools.partial(result, w, future)) for w, future in zip(chosen, futures)],
        )


def with_lock(lock: str, function: Callable[..., Any], *arguments: Any) -> Any:
    return function(*arguments, lock=lock)


def measure(workload, tiny: bool, lock: str) -> dict:
    """Compile, then check and time one batch as soon as the device is free."""
    [own] = [c for c in contenders.contenders(tiny) if c.name == OWN]
    ready = programs.compile_calls(workload, own, 2 if tiny else None)
    with timing.exclusive(lock):
        error, calls, run = ready()
        device_us, _ = timing.device_time(calls, run)
    return {"device_us": round(device_us, 2), "error": error}
