"""Checks how the programs of interpreted Triton kernels share memory.

The interpreter refuses by itself every access outside the kernel's arrays. This adds what needs
more than one access to see: programs of a grid run in any order, so what one stores no other may
touch, and what nobody has stored nobody may load. Nor may a program load what another of its
threads may have stored, before these have waited for each other.
"""

import contextlib
import typing
from collections import Counter, defaultdict
from collections.abc import Generator, Iterator, Mapping

import numpy as np

from ejk.backends.triton.interpreter import grids
from ejk.backends.triton.interpreter.memory import Access, MemoryAccessError, Observer, observe


class RaceError(RuntimeError):
    """Two programs touched one address, at least one stored to it, and nothing orders them.

    Or a program loads what it has stored, with no barrier between.
    """


# A stamp is one more than a program's index, with above it how often the program has released what
# it did, or passed a barrier. 0 is nobody, so memory that nobody touches is never made.
_CLOCK = 32
_PROGRAM = (1 << _CLOCK) - 1


# Not type-checked, here and below: it runs for every access of a kernel, and a check of its
# arguments, as the tests make of the whole package, takes longer than the access.
@typing.no_type_check
class _Shadow:
    """Who touched each unit of a buffer last: for each manner, the last two programs."""

    def __init__(self, array: np.ndarray):
        self.unit = array.itemsize  # bytes; fewer once an access has been to fewer
        self._size = -(-array.nbytes // 16) * 16  # bytes, so that no access straddles the end
        self._stamps: dict[tuple[str, bool], list[np.ndarray]] = {}

    def touched(self, access: Access) -> Iterator[tuple[str, bool, np.ndarray]]:
        """Yield kind, whether atomic, and the stamps of who touched what an access touches."""
        if access.itemsize < self.unit:
            times = self.unit // access.itemsize
            self.unit = access.itemsize
            for pair in self._stamps.values():
                pair[:] = [np.repeat(stamps, times) for stamps in pair]
        for (kind, atomic), pair in self._stamps.items():
            for stamps in pair:
                view, rows = self._at(stamps, access)
                yield kind, atomic, view[rows]

    def record(self, access: Access, stamp: int) -> None:
        pair = self._stamps.setdefault((access.kind, access.atomic), [])
        if not pair:
            pair.append(np.zeros(self._size // self.unit, np.int64))
        view, rows = self._at(pair[0], access)
        before = view[rows]
        others = (before != 0) & ((before ^ stamp) & _PROGRAM != 0)
        if others.any() and (access.kind == "load" or access.atomic):
            if len(pair) == 1:
                pair.append(np.zeros_like(pair[0]))
            second, _ = self._at(pair[1], access)
            second[rows] = np.where(others, before, second[rows])
        view[rows] = stamp

    def _at(self, stamps: np.ndarray, access: Access) -> tuple[np.ndarray, np.ndarray]:
        rows = access.offsets // access.itemsize
        return stamps.reshape(-1, access.itemsize // self.unit), rows


@typing.no_type_check
class MemoryChecker(Observer):
    """Watches launches, and raises at the first mistake.

    Atomic operations order programs as in FastTrack: each has a vector of clocks, an atomic store
    that releases leaves it at its address, and an atomic load that acquires takes it from there.

    Attributes:
        lanes: how many elements were loaded and stored, by kind and buffer, over all launches.

    Source: Flanagan and Freund, FastTrack: efficient and precise dynamic race detection (2009).
    """

    def __init__(self) -> None:
        self.lanes: Counter[tuple[str, str]] = Counter()

    def launched(self, kernel: str, buffers: Mapping[str, np.ndarray], grid: grids.Grid) -> None:
        """Forget the programs of the launch before."""
        self._kernel, self._grid = kernel, grid
        self._shadows = {name: _Shadow(array) for name, array in buffers.items()}
        self._released: dict[tuple[str, int], dict[int, int]] = defaultdict(dict)
        self._begin(-1)

    def _begin(self, program: int) -> None:
        self._program = program
        self._clock = self._barriers = 0
        self._known: dict[int, int] = {}  # of other programs, all up to which clock is before me

    def accessed(self, access: Access) -> None:
        """Raise if others touched these bytes so that order matters, or nobody has stored them."""
        self.lanes[access.kind, access.buffer] += access.offsets.size
        if access.role == "input":
            return  # nobody stores to one
        if access.program != self._program:
            self._begin(access.program)
        self._clock += access.barriers - self._barriers
        self._barriers = access.barriers
        stamp = (self._clock << _CLOCK) + access.program + 1
        shadow = self._shadows[access.buffer]
        unwritten = None
        if access.kind == "load" and access.role == "output":
            unwritten = np.ones((access.offsets.size, 1), bool)
        for kind, atomic, stamps in shadow.touched(access):
            if kind == "store" and unwritten is not None:
                unwritten = unwritten & (stamps == 0)
            if "store" in (kind, access.kind) and not (atomic and access.atomic):
                self._compare(access, stamp, kind, stamps, shadow.unit)
        if unwritten is not None and unwritten.any():
            self._refuse_unwritten(access, unwritten)
        if access.orders:
            self._order(access)
        shadow.record(access, stamp)

    def _compare(
        self, access: Access, stamp: int, kind: str, stamps: np.ndarray, unit: int
    ) -> None:
        own = stamps == stamp
        if kind == "store" and access.kind == "load" and own.any():
            lane, part = np.argwhere(own)[0]
            raise RaceError(
                f"{self._kernel}: program {grids.name(access.program, self._grid)} loads byte "
                f"{access.offsets[lane] + part * unit} of {access.buffer!r}, which it has stored, "
                "before a barrier"
            )
        conflicts = (stamps != 0) & ~own
        if not conflicts.any():
            return
        for lane, part in np.argwhere(conflicts):
            clock, other = divmod(int(stamps[lane, part]) - 1, 1 << _CLOCK)
            if other == access.program or self._known.get(other, -1) >= clock:
                continue
            names = [grids.name(index, self._grid) for index in (other, access.program)]
            did = "both store" if kind == access.kind else f"{kind} and {access.kind}"
            raise RaceError(
                f"{self._kernel}: programs {names[0]} and {names[1]} {did} "
                f"byte {access.offsets[lane] + part * unit} of {access.buffer!r}"
            )

    def _refuse_unwritten(self, access: Access, unwritten: np.ndarray) -> None:
        lanes = unwritten.any(axis=1)
        raise MemoryAccessError(
            f"{self._kernel}, program {grids.name(access.program, self._grid)}: load of "
            f"{access.buffer!r} at byte {access.offsets[lanes][0]}, which no program has stored, "
            f"{lanes.sum()} of {lanes.size} lanes"
        )

    def _order(self, access: Access) -> None:
        for offset in access.offsets.tolist():
            left = self._released[access.buffer, offset]
            source, target = (self._known, left) if access.kind == "store" else (left, self._known)
            for program, clock in source.items():
                target[program] = max(clock, target.get(program, -1))
            if access.kind == "store":
                left[access.program] = self._clock
        self._clock += access.kind == "store"


@contextlib.contextmanager
def memory_checked() -> Generator[MemoryChecker]:
    """Check every interpreted launch of a Triton kernel that ends inside the context."""
    checker = MemoryChecker()
    with observe(checker):
        yield checker
