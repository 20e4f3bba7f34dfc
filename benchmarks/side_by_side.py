"""Times `ejk` over many batches, in processes that compile side by side.

Each process compiles what its next batch needs while another one has the device. A file's lock
says whose turn it is to draw, check and time. Other processes that compile would disturb a wall
time, so device time alone is measured.
"""

import concurrent.futures
import functools
import multiprocessing
import os
import tempfile
from collections.abc import Iterator

import ceiling
import contenders
import numpy as np
import programs
import timing

OWN = "ejk"
SUITES = ("shapes", "order", "waves", "latent", "map")
CEILINGS = tuple(4**n for n in range(12, 17))  # bytes: 16 MiB to 4 GiB


def jobs(chosen, tiny: bool, processes: int | None) -> Iterator[programs.Job]:
    """Yield each batch, in order, with what waits for its result."""
    processes = processes or (2 if tiny else max(1, (os.cpu_count() or 3) - 2))
    context = multiprocessing.get_context("spawn")
    os.environ["XLA_PYTHON_CLIENT_ALLOCATOR"] = "platform"  # none takes more than it holds
    with (
        tempfile.NamedTemporaryFile() as lock,
        concurrent.futures.ProcessPoolExecutor(processes, mp_context=context) as pool,
    ):
        rates = [] if tiny else [pool.submit(ceiling.read_ceiling, n, lock.name) for n in CEILINGS]
        matmuls = [] if tiny else [pool.submit(ceiling.matmul_rate, ceiling.MATMUL, lock.name)]
        futures = [pool.submit(measure, workload, tiny, lock.name) for workload in chosen]
        read = [future.result() for future in rates] or [1.0] * len(CEILINGS)
        [matmul_tflops] = [future.result() for future in matmuls] or [1.0]

        def result(workload, future):
            line = future.result()
            rate = float(np.interp(np.log(workload.kv_bytes), np.log(CEILINGS), read))
            products = matmul_tflops if workload.latent else None
            return line | ceiling.shares(workload, line["device_us"], rate, products)

        for workload, future in zip(chosen, futures):
            yield workload, OWN, functools.partial(result, workload, future)


def measure(workload, tiny: bool, lock: str) -> dict:
    """Compile, then check and time one batch as soon as the device is free."""
    [own] = [c for c in contenders.contenders(tiny) if c.name == OWN]
    ready = programs.compile_calls(workload, own, 2 if tiny else None)
    with timing.exclusive(lock):
        error, calls, run = ready()
        device_us, _ = timing.device_time(calls, run)
    return {"device_us": round(device_us, 2), "error": error}
