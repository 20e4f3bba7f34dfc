"""A model of how long a planned batch takes.

Programs start in order, as slots of the machine get free, and share its memory's bandwidth: of `n`
that run, each gets `min(SPEED, slots / n)` of what it gets on a full machine. One time is what a
granule, 128 tokens, takes there.

Source: processor sharing (Kleinrock, 1967); list scheduling (Graham, 1969).
"""

import heapq
import math
from collections.abc import Sequence

# From timing plans made by hand on one NVIDIA H100 80GB HBM3 on 2026-11-28, head dimension 128 in
# bfloat16. The times are not kept here; `plan_cost.py` takes such times and fits these constants.
SPEED = 1.85  # of a program whose neighbours are idle
START = 0.4  # to start a piece, and to write its part
COMBINE = 0.45  # to combine parts, beyond a combination that finds nothing to do


def makespan(
    sizes: Sequence[int], programs: int, slots: int, start: float = START, speed: float = SPEED
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
        now += (end - virtual) / min(speed, slots / count)
        virtual, count = end, count - ended


def cut_batch(
    granules: Sequence[int],
    pieces: Sequence[int],
    programs: int,
    slots: int,
    start: float = START,
    speed: float = SPEED,
) -> float:
    """Return how long a batch takes of which each context is cut in so many equal pieces."""
    cut = [equal_pieces(*context) for context in zip(granules, pieces, strict=True)]
    cut.sort(key=lambda sizes: -sizes[0])
    return makespan([size for sizes in cut for size in sizes], programs, slots, start, speed)


def equal_pieces(granules: int, pieces: int) -> list[int]:
    """Cut in pieces of one size, all but the last."""
    size = math.ceil(granules / pieces)
    if not size:
        return [0]
    full, rest = divmod(granules, size)
    return [size] * full + [rest] * (rest > 0)


def ideal(granules: Sequence[int], programs: int, slots: int) -> float:
    """Return how long it takes if nothing is cut and no slot is ever idle."""
    return sum(count + START for count in granules) * programs / slots
