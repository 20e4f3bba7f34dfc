"""A model of how long a planned batch takes.

Programs start in order, as slots of the machine get free, and share its memory's bandwidth. Of `n`
that run, each gets of what it gets on a full machine

    rate(n) = SPEED / (1 + (SPEED * n / slots)^4)^(1/4)

which is SPEED of few, and `slots / n` of many. Programs that memory does not bound have a rate
of 1. One time is what a granule, 128 tokens, takes on a full machine.

Source: processor sharing (Kleinrock, 1967); list scheduling (Graham, 1969).
"""

import heapq
import math
from collections.abc import Sequence

# As `plan_cost.py` fits them to its times, results/plan_cost_NVIDIA_H100_80GB_HBM3.jsonl: head
# dimension 128 in bfloat16. They predict the times of contexts of 1,024 tokens or more to 1.0 % in
# the median; the worst, 66 x 1,024, to 6.8 %.
SPEED = 2.33  # of a program whose neighbours are idle; on an H200 1.1 to 1.3
START = 0.25  # to start a piece, and to write its part
COMBINE = 0.5  # to combine parts, beyond a combination that finds nothing to do


def rate(share: float, speed: float | None) -> float:
    """Return how fast a program is if that share of the slots is busy; of no `speed`, always 1."""
    return speed / (1 + (speed * share) ** 4) ** 0.25 if speed else 1.0


def makespan(
    sizes: Sequence[int],
    programs: int,
    slots: int,
    start: float = START,
    speed: float | None = SPEED,
) -> float:
    """Return when the last program ends, of pieces of so many granules in order of their start."""
    waiting, left = iter(sizes), 0
    size = 0
    running: list[tuple[float, int]] = []  # (virtual time of the end, programs)
    count, virtual, now = 0, 0.0, 0.0
    while True:
        while count < slots:
            if not left:
                size = next(waiting, -1)
                if size < 0:
                    break
                left = programs
            started = min(left, slots - count)
            heapq.heappush(running, (virtual + size + start, started))
            count, left = count + started, left - started
        if not running:
            return now
        end, ended = heapq.heappop(running)
        now += (end - virtual) / rate(count / slots, speed)
        virtual, count = end, count - ended


def cut_batch(
    cut: Sequence[Sequence[int]],
    programs: int,
    slots: int,
    start: float = START,
    speed: float | None = SPEED,
) -> float:
    """Return how long contexts take that are cut in pieces of such sizes, the longest first."""
    sizes = sorted((size for context in cut for size in context), reverse=True)
    return makespan(sizes, programs, slots, start, speed)


def equal_pieces(granules: int, pieces: int) -> list[int]:
    """Cut in pieces of one size, all but the last."""
    size = math.ceil(granules / pieces)
    if not size:
        return [0]
    full, rest = divmod(granules, size)
    return [size] * full + [rest] * (rest > 0)


def ideal(granules: Sequence[int], programs: int, slots: int, start: float = START) -> float:
    """Return how long it takes if nothing is cut and no slot is ever idle."""
    return sum(count + start for count in granules) * programs / slots
