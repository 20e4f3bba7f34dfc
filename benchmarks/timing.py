"""Device time from the profiler (CUPTI), and wall time a layer."""

import collections
import glob
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax

REPEATS = 5


def kernel_times(run: Callable[[], Any], repeats: int = REPEATS) -> dict[str, list[float]]:
    """Run `run` under the profiler; return every kernel's device times in microseconds.

    The first run, untimed, compiles and warms up.
    """
    jax.block_until_ready(run())
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(repeats):
                jax.block_until_ready(run())
        [path] = glob.glob(f"{folder}/**/*.xplane.pb", recursive=True)
        times = collections.defaultdict(list)
        for plane in jax.profiler.ProfileData.from_file(path).planes:
            if not plane.name.startswith("/device:GPU"):
                continue
            for line in plane.lines:
                if not line.name.startswith("Stream"):
                    continue
                for event in line.events:
                    times[event.name].append(event.duration_ns / 1e3)
    if not times:
        raise RuntimeError("the profiler saw no kernel: is this a CUDA device with CUPTI?")
    return dict(times)


def wall_time(run: Callable[[], Any], repeats: int = 20, rounds: int = 5) -> float:
    """Return the median time of a run in microseconds, with `repeats` queued before each wait."""
    jax.block_until_ready(run())
    rounds_us = []
    for _ in range(rounds):
        start = time.perf_counter()
        for _ in range(repeats):
            result = run()
        jax.block_until_ready(result)
        rounds_us.append((time.perf_counter() - start) / repeats * 1e6)
    return statistics.median(rounds_us)
