"""Device time from the profiler (CUPTI), and wall time a layer."""

import contextlib
import fcntl
import glob
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Generator, Iterable
from typing import Any, NamedTuple

import jax

REPEATS = 5


class Kernel(NamedTuple):
    """One run of a kernel on the device."""

    name: str
    begin_us: float
    end_us: float


def kernels(run: Callable[[], Any], repeats: int = REPEATS) -> list[Kernel]:
    """Run `run` under the profiler; return every kernel that the devices ran, in order.

    The first run, untimed, compiles and warms up.
    """
    found = kernels_by_device(run, repeats).values()
    return sorted((kernel for own in found for kernel in own), key=lambda kernel: kernel.begin_us)


def kernels_by_device(run: Callable[[], Any], repeats: int = REPEATS) -> dict[str, list[Kernel]]:
    """The same for each device."""
    jax.block_until_ready(run())
    found: dict[str, list[Kernel]] = {}
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(repeats):
                jax.block_until_ready(run())
        [path] = glob.glob(f"{folder}/**/*.xplane.pb", recursive=True)
        for plane in jax.profiler.ProfileData.from_file(path).planes:
            own = [
                Kernel(event.name, event.start_ns / 1e3, (event.start_ns + event.duration_ns) / 1e3)
                for line in plane.lines
                if line.name.startswith("Stream")
                for event in line.events
            ]
            if plane.name.startswith("/device:GPU") and own:
                found[plane.name] = sorted(own, key=lambda kernel: kernel.begin_us)
    if not found:
        raise RuntimeError("the profiler saw no kernel: is this a CUDA device with CUPTI?")
    return found


def busy_us(found: Iterable[Kernel]) -> float:
    """Return how long at least one of the kernels, which are in order, was running."""
    busy, until = 0.0, -math.inf
    for kernel in found:
        busy += max(0.0, kernel.end_us - max(kernel.begin_us, until))
        until = max(until, kernel.end_us)
    return busy


def wall_time(run: Callable[[], Any], repeats: int = 20, rounds: int = 5) -> float:
    """Return the median time of a run in microseconds, with `repeats` queued before each wait."""
    jax.block_until_ready(run())
    rounds_us, result = [], None
    for _ in range(rounds):
        start = time.perf_counter()
        for _ in range(repeats):
            result = run()
        jax.block_until_ready(result)
        rounds_us.append((time.perf_counter() - start) / repeats * 1e6)
    return statistics.median(rounds_us)


def call_us(run: Callable[[], Any], calls: int = 1) -> float:
    """Return microseconds of one of the `calls` of a run: of a GPU, or of the clock elsewhere."""
    if jax.default_backend() == "gpu":
        return busy_us(kernels(run)) / REPEATS / calls
    return wall_time(run, repeats=3, rounds=5) / calls


@contextlib.contextmanager
def exclusive(path: str | None) -> Generator[None]:
    """Hold the GPU: a file's lock, which is given back whatever becomes of the process."""
    if path is None:
        yield
        return
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
