"""The memory of interpreted kernels: arrays in an imaginary address space. Knows no Triton.

Each pointer parameter owns a region, far from the others, so an access outside its array is an
error that names the array, never a crash or a wrong number. Whatever a kernel must not rely on is
poison: outputs before they are written, and lanes of a load that are masked off without `other=`.
"""

import abc
import contextlib
import functools
import typing
from collections.abc import Callable, Generator, Mapping
from typing import Any, Literal, NamedTuple

import numpy as np

from ejk.backends.triton.interpreter import grids

# A region spans 2**44 bytes and its array starts in the middle, so neither a negative nor a large
# offset reaches the neighbour. Region 0 stays empty: nothing is near address 0.
_REGION_BITS = 44
_REGION_MIDDLE = 1 << (_REGION_BITS - 1)

# A program that loads the same few addresses so often, and stores nothing, waits for another.
_PATIENCE = 10_000


class MemoryAccessError(RuntimeError):
    """An interpreted kernel touched memory that it must not touch."""


class DeadlockError(RuntimeError):
    """A program of an interpreted kernel waits for one that has not run yet."""


Kind = Literal["load", "store"]
Role = Literal["input", "in place", "output"]


class Access(NamedTuple):
    """One load or store of one program, before it happens. An atomic update is one of each.

    Attributes:
        kind: whether the program reads or writes.
        buffer: name of the kernel's pointer parameter.
        offsets: bytes from the start of the buffer, for each lane that is not masked off.
        itemsize: bytes a lane reads or writes.
        program: index of the program.
        role: what the buffer is to the launch; an output holds nothing before it is stored to.
        atomic: whether it is part of an atomic operation that other programs see.
        orders: whether it orders others of the program: an atomic load that acquires, an atomic
            store that releases.
        barriers: how often the program's threads have waited for each other before.
    """

    kind: Kind
    buffer: str
    offsets: np.ndarray
    itemsize: int
    program: int
    role: Role
    atomic: bool = False
    orders: bool = False
    barriers: int = 0


class Synchronisation(NamedTuple):
    """What an atomic operation promises to other programs."""

    atomic: bool
    acquires: bool
    releases: bool


_PLAIN = Synchronisation(atomic=False, acquires=False, releases=False)


class Observer(abc.ABC):
    """Sees what interpreted kernels do to memory. What it raises, the launch raises."""

    @abc.abstractmethod
    def launched(self, kernel: str, buffers: Mapping[str, np.ndarray], grid: grids.Grid) -> None:
        """Take note of a launch, with the array behind each pointer parameter."""

    @abc.abstractmethod
    def accessed(self, access: Access) -> None:
        """Take note of an access inside its buffer."""


_observers: list[Observer] = []


@contextlib.contextmanager
def observe(observer: Observer) -> Generator[None]:
    """Show an observer every launch that runs while the context is open, on any thread.

    JAX may return before a kernel has run: wait for the result inside the context.
    """
    _observers.append(observer)
    try:
        yield
    finally:
        _observers.remove(observer)


def poisoned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Return an array of values that give away whoever uses them: NaN or an extreme integer."""
    return np.full(shape, poison(dtype), dtype)


@functools.cache
def poison(dtype: np.dtype) -> Any:
    """Return the value that `poisoned` repeats."""
    if dtype == np.bool_:
        return True
    if dtype.kind in "iu":
        return np.iinfo(dtype).min if dtype.kind == "i" else np.iinfo(dtype).max
    return np.nan


# Not type-checked, here and below: it runs for every operation of a kernel, and a check of its
# arguments, as the tests make of the whole package, takes longer than the operation.
@typing.no_type_check
class _Region:
    """The memory behind one pointer parameter: the caller's, unless an input is not contiguous."""

    def __init__(self, number: int, name: str, array: np.ndarray | None, role: Role):
        self.start = (number << _REGION_BITS) + _REGION_MIDDLE
        self.name = name
        self.array = None if array is None else np.asarray(array, order="C")
        assert role == "input" or self.array is array, f"{name} must be C-contiguous"
        self.role: Role = role
        self.bytes = np.empty(0, np.uint8)
        if self.array is not None:
            self.bytes = self.array.reshape(-1).view(np.uint8)
        self._views: dict[np.dtype, np.ndarray] = {}

    def as_type(self, dtype: np.dtype) -> np.ndarray:
        """Return the region as a flat array of whole items of another type."""
        view = self._views.get(dtype)
        if view is None:
            whole = self.bytes.size // dtype.itemsize * dtype.itemsize
            view = self._views[dtype] = self.bytes[:whole].view(dtype)
        return view


@typing.no_type_check
class Memory:
    """What the programs of one launch may touch.

    Attributes:
        addresses: where each pointer parameter points.
    """

    def __init__(
        self,
        kernel: str,
        inputs: Mapping[str, np.ndarray | None],
        in_place: Mapping[str, np.ndarray | None],
        outputs: Mapping[str, np.ndarray | None],
        grid: grids.Grid,
    ):
        self._kernel = kernel
        self._grid = grid
        buffers: list[tuple[Role, Mapping[str, np.ndarray | None]]]
        buffers = [("input", inputs), ("in place", in_place), ("output", outputs)]
        self._regions: dict[int, _Region] = {}
        for role, arrays in buffers:
            for name, array in arrays.items():
                number = len(self._regions) + 1
                self._regions[number] = _Region(number, name, array, role)
        self.addresses = {region.name: region.start for region in self._regions.values()}
        arrays = {r.name: r.array for r in self._regions.values() if r.array is not None}
        self.begin(0)
        for observer in _observers:
            observer.launched(kernel, arrays, grid)

    def begin(self, program: int) -> None:
        """Let accesses be those of another program."""
        self._program, self._barriers = program, 0
        self._seen: set[tuple[int, int, int]] = set()  # loads since something changed
        self._repeats = 0

    def barrier(self) -> None:
        """Let the program's threads wait for each other: each sees what any has stored."""
        self._barriers += 1

    def load(self, addresses: np.ndarray, dtype: np.dtype) -> np.ndarray:
        """Return the items at `addresses`, in their shape."""
        parts = self._resolve("load", addresses.reshape(-1), dtype, _PLAIN)
        if len(parts) == 1:
            array, indices, _ = parts[0]
            items = array.take(indices).reshape(addresses.shape)
        else:
            items = np.empty(addresses.size, dtype)
            for array, indices, lanes in parts:
                items[lanes] = array.take(indices)
            items = items.reshape(addresses.shape)
        if parts:
            self._wait(addresses)
        return items

    def store(self, addresses: np.ndarray, items: np.ndarray) -> None:
        """Write items, one to each of the addresses; both flat."""
        self._seen.clear()
        for array, indices, lanes in self._resolve("store", addresses, items.dtype, _PLAIN):
            array[indices] = items[lanes]

    def update(
        self,
        addresses: np.ndarray,
        dtype: np.dtype,
        change: Callable[[Any, int], Any],
        kinds: tuple[Kind, ...],
        synchronisation: Synchronisation,
    ) -> np.ndarray:
        """Change items, one lane after the other, and return what each lane found; all flat."""
        found = np.empty(addresses.size, dtype)
        resolved = [self._resolve(kind, addresses, dtype, synchronisation) for kind in kinds]
        for array, indices, lanes in resolved[-1]:
            for lane, index in zip(np.arange(addresses.size)[lanes], indices):
                found[lane] = array[index]
                array[index] = change(array[index], lane)
                if array[index].tobytes() != found[lane].tobytes():
                    self._seen.clear()
        if addresses.size:
            self._wait(addresses)
        return found

    def _wait(self, addresses: np.ndarray) -> None:
        """Refuse to load the same again and again: nobody else runs who might change it."""
        flat = addresses.reshape(-1)
        loaded = flat.size, int(flat[0]), int(flat[-1])
        if loaded not in self._seen:
            self._seen.add(loaded)
            self._repeats = 0
            return
        self._repeats += 1
        if self._repeats > _PATIENCE:
            name = self._regions[loaded[1] >> _REGION_BITS].name
            raise DeadlockError(
                f"{self._who()}: loads {name!r} {_PATIENCE} times, and nothing changes: it waits "
                "for a program that runs after it, and here each runs to its end"
            )

    def _resolve(
        self, kind: Kind, addresses: np.ndarray, dtype: np.dtype, promised: Synchronisation
    ) -> list[tuple[np.ndarray, np.ndarray, Any]]:
        """Split addresses by region: a flat array, indices into it, lanes; refuse bad ones."""
        if not addresses.size:
            return []
        numbers = addresses >> _REGION_BITS
        first = int(numbers[0])
        if int(numbers.min()) == int(numbers.max()):
            split = [(first, slice(None))]
        else:
            split = [(int(number), numbers == number) for number in np.unique(numbers)]
        parts = []
        for number, lanes in split:
            region = self._regions.get(number)
            if region is None:
                raise MemoryAccessError(f"{self._who()}: {kind} through a pointer to nothing")
            offsets = (addresses[lanes] - region.start).view(np.int64)
            self._check(kind, region, offsets, dtype.itemsize)
            if _observers:
                orders = promised.acquires if kind == "load" else promised.releases
                access = Access(
                    kind, region.name, offsets, dtype.itemsize, self._program, region.role,
                    promised.atomic, orders, self._barriers,
                )  # fmt: skip
                for observer in _observers:
                    observer.accessed(access)
            parts.append((region.as_type(dtype), offsets // dtype.itemsize, lanes))
        return parts

    def _check(self, kind: Kind, region: _Region, offsets: np.ndarray, itemsize: int) -> None:
        size = region.bytes.size
        if region.array is None:
            raise MemoryAccessError(f"{self._who()}: {kind} of {region.name!r}, which is absent")
        if kind == "store" and region.role == "input":
            raise MemoryAccessError(f"{self._who()}: store to {region.name!r}, which is an input")
        bits = int(np.bitwise_or.reduce(offsets))  # negative, or odd, if any of them is
        if bits < 0 or offsets.max() > size - itemsize:
            outside = offsets[(offsets < 0) | (offsets > size - itemsize)]
            first = int(outside[0])
            where = (
                f"{-first} bytes before its start"
                if first < 0
                else f"{first + itemsize - size} bytes past its end"
            )
            raise MemoryAccessError(
                f"{self._who()}: {kind} outside {region.name!r} ({size} bytes), "
                f"{outside.size} of {offsets.size} lanes, the first {where}"
            )
        if bits & (itemsize - 1):
            raise MemoryAccessError(f"{self._who()}: misaligned {kind} in {region.name!r}")

    def _who(self) -> str:
        return f"{self._kernel}, program {grids.name(self._program, self._grid)}"
