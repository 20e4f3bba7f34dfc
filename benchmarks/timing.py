"""How runs are timed: by turns, and without plans; the rest is what `python -m ejk bench` does.

It is this checkout's, also where `compare.py` times an `ejk` that has no command line yet.
"""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

import ejk

ejk.__path__.append(str(Path(__file__).parents[1] / "ejk"))

from ejk.cli._timing import (  # noqa: E402
    REPEATS,
    Kernel,
    busy_us,
    exclusive,  # noqa: F401
    kernels,
    kernels_by_device,  # noqa: F401
    wall_time,
)


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
