"""Device time from the profiler (CUPTI), and wall time a layer."""

import contextlib
import fcntl
import glob
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Generator, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

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


def device_kernels(run: Callable[[], Any]) -> list[Kernel]:
    """Return what the device ran; on a CPU, which has no such record, each run as one kernel."""
    if jax.default_backend() != "cpu":
        return kernels(run)
    wall_us = wall_time(run, repeats=1, rounds=1)
    return [Kernel("run", i * wall_us, (i + 1) * wall_us) for i in range(REPEATS)]


def interleaved(runs: Sequence[Callable[[], Any]], rounds: int = 7) -> list[list[list[Kernel]]]:
    """Take turns, each run awaited; return what the device ran for each of `runs` in each round.

    What drifts with heat and power then drifts for all. Each round begins with another run, so that
    none always follows the same one. A kernel that is nobody's comes before each turn.
    """
    if jax.default_backend() == "cpu":
        return [[own[:1]] * rounds for own in map(device_kernels, runs)]
    order = [(first + i) % len(runs) for first in range(rounds) for i in range(len(runs))]
    mark, ones = jax.jit(jnp.cbrt), jnp.ones(8)

    def all_rounds() -> None:
        for i in order:
            jax.block_until_ready(mark(ones))
            jax.block_until_ready(runs[i]())

    turns: list[list[Kernel]] = []
    found = kernels(all_rounds, 1)
    for kernel in found:
        if kernel.name == found[0].name:
            turns.append([])
        else:
            turns[-1].append(kernel)
    if len(turns) != len(order) or not all(turns):
        raise RuntimeError(f"{len(turns)} turns for {len(order)}: has one {found[0].name}, too?")
    return [[turn for turn, own in zip(turns, order) if own == i] for i in range(len(runs))]


def without_plan(found: Iterable[Kernel]) -> tuple[float, float]:
    """Return microseconds that the device was busy, and those of plans, which these leave out."""
    plans, others = [], []
    for kernel in found:
        (plans if "plan" in kernel.name else others).append(kernel)
    return busy_us(others), busy_us(plans)


def device_time(calls: int, run: Callable[[], Any]) -> tuple[float, list[float]]:
    """Return microseconds of device time a call, and those of each plan, which it leaves out."""
    found = device_kernels(run)
    plans = [kernel for kernel in found if "plan" in kernel.name]
    plan_us = [kernel.end_us - kernel.begin_us for kernel in plans]
    return busy_us(k for k in found if k not in plans) / REPEATS / calls, plan_us


@contextlib.contextmanager
def exclusive(path: str | None) -> Generator[None]:
    """Hold the GPU: a file's lock, which is given back whatever becomes of the process."""
    if path is None:
        yield
        return
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
