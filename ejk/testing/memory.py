"""Checks how interpreted Triton kernels share memory between programs.

The interpreter itself refuses every access outside the kernel's arrays. This adds what needs more
than one access to see: programs of a grid run in any order, so what one stores no other may touch.
"""

import contextlib
from collections import Counter
from collections.abc import Generator, Mapping

import numpy as np

from ejk.backends.triton.interpreter.memory import Access, Observer, observe

NOBODY = -1


class RaceError(RuntimeError):
    """Two programs touched one address and at least one of them stored to it."""


class MemoryChecker(Observer):
    """An observer of launches that raises `RaceError`.

    Attributes:
      lanes: how many elements were loaded and stored, by kind and buffer, over all launches.
    """

    def __init__(self) -> None:
        self.lanes: Counter[tuple[str, str]] = Counter()
        self._kernel = ""
        self._writers: dict[str, np.ndarray] = {}
        self._readers: dict[str, np.ndarray] = {}

    def launched(self, kernel: str, buffers: Mapping[str, np.ndarray]) -> None:
        """Forgets the programs of the launch before."""
        self._kernel = kernel
        self._sizes = {name: array.nbytes for name, array in buffers.items()}
        self._writers.clear()
        self._readers.clear()

    def accessed(self, access: Access) -> None:
        """Raises if another program has touched the same bytes in a way that makes order matter."""
        self.lanes[access.kind, access.buffer] += access.offsets.size
        if access.kind == "store":
            self._compare(access, self._writers.get(access.buffer), "both store")
            self._compare(access, self._readers.get(access.buffer), "load and store")
            self._record(access, self._writers)
        elif self._writers:
            # Inputs are never stored to, so a kernel that has not stored yet reads freely; outputs
            # hold poison until then.
            self._compare(access, self._writers.get(access.buffer), "store and load")
            self._record(access, self._readers)

    def _bytes(self, access: Access) -> np.ndarray:
        return access.offsets[:, None] + np.arange(access.itemsize)

    def _record(self, access: Access, programs: dict[str, np.ndarray]) -> None:
        if access.buffer not in programs:
            programs[access.buffer] = np.full(self._sizes[access.buffer], NOBODY, np.int64)
        programs[access.buffer][self._bytes(access)] = access.program

    def _compare(self, access: Access, programs: np.ndarray | None, what: str) -> None:
        if programs is None:
            return
        touched = programs[self._bytes(access)]
        conflicts = (touched != NOBODY) & (touched != access.program)
        if conflicts.any():
            lane, byte = np.argwhere(conflicts)[0]
            raise RaceError(
                f"{self._kernel}: programs {touched[lane, byte]} and {access.program} {what} "
                f"byte {access.offsets[lane] + byte} of {access.buffer!r}"
            )


@contextlib.contextmanager
def memory_checked() -> Generator[MemoryChecker]:
    """Checks every interpreted launch that ends inside the context."""
    checker = MemoryChecker()
    with observe(checker):
        yield checker
