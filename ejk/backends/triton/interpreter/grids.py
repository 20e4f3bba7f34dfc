"""The grids of interpreted kernels: how many programs, in which order, and their names.

Programs run one after another, each to its end. A GPU promises no order, so whatever a kernel
computes has to have the same bits in all of them.
"""

import contextlib
import math
from collections.abc import Generator, Iterator

import numpy as np

Grid = tuple[int, int, int]
Position = tuple[int, int, int]

_seeds: list[int] = []


@contextlib.contextmanager
def shuffled(seed: int) -> Generator[None]:
    """Run the programs of every interpreted launch in an order drawn from `seed`.

    It holds while the context is open, on any thread: JAX may return before a kernel has run, so
    wait for the result inside. Equal grids are shuffled equally.
    """
    _seeds.append(seed)
    try:
        yield
    finally:
        _seeds.remove(seed)


def programs(grid: Grid) -> Iterator[tuple[int, Position]]:
    """Yield index and position of each program, in the order in which they run."""
    order = np.arange(math.prod(grid))
    if _seeds:
        order = np.random.default_rng(_seeds[-1]).permutation(order)
    for index in order.tolist():
        yield index, position(index, grid)


def position(index: int, grid: Grid) -> Position:
    """Return where a program lies in a grid whose first axis is the fastest."""
    x, y, _ = grid
    return index % x, index // x % y, index // (x * y)


def name(index: int, grid: Grid) -> str:
    """Return what errors call a program: its index, or its position if there are several axes."""
    return str(index if grid[1:] == (1, 1) else position(index, grid))
