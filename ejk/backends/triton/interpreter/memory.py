"""The memory of interpreted kernels: arrays in an imaginary address space. Knows no Triton.

Each pointer parameter owns a region, far from the others, so an access outside its array is an
error that names the array, never a crash or a wrong number. Whatever a kernel must not rely on is
poison: outputs before they are written, and lanes of a load that are masked off without `other=`.
"""

import abc
import contextlib
import dataclasses
import functools
import typing
from collections.abc import Generator, Mapping
from typing import Any, Literal

import numpy as np

# A region spans 2**44 bytes and its array starts in the middle, so neither a negative nor a large
# offset reaches the neighbour. Region 0 stays empty: nothing is near address 0.
_REGION_BITS = 44
_REGION_MIDDLE = 1 << (_REGION_BITS - 1)


class MemoryAccessError(RuntimeError):
    """An interpreted kernel touched memory that is not its own."""


@dataclasses.dataclass(frozen=True)
class Access:
    """One load or store of one program, before it happens.

    Attributes:
        kind: whether the program reads or writes.
        buffer: name of the kernel's pointer parameter.
        offsets: bytes from the start of the buffer, for each lane that is not masked off.
        itemsize: bytes a lane reads or writes.
        program: index of the program.
    """

    kind: Literal["load", "store"]
    buffer: str
    offsets: np.ndarray
    itemsize: int
    program: int


class Observer(abc.ABC):
    """Sees what interpreted kernels do to memory. What it raises, the launch raises."""

    @abc.abstractmethod
    def launched(self, kernel: str, buffers: Mapping[str, np.ndarray]) -> None:
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
    if dtype.kind == "i":
        return np.iinfo(dtype).min
    if dtype.kind == "u":
        return np.iinfo(dtype).max
    return np.nan


class _Region:
    """The memory behind one pointer parameter: the caller's, unless an input is not contiguous."""

    def __init__(self, number: int, name: str, array: np.ndarray | None, *, writable: bool):
        self.start = (number << _REGION_BITS) + _REGION_MIDDLE
        self.name = name
        self.array = None if array is None else np.asarray(array, order="C")
        assert not writable or self.array is array, f"{name} must be C-contiguous"
        self.writable = writable
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


# Not type-checked: it runs for every operation of a kernel, and a check of its arguments, as the
# tests make of the whole package, takes longer than the operation.
@typing.no_type_check
class Memory:
    """What the programs of one launch may touch.

    Attributes:
        program: index of the program that runs now.
        addresses: where each pointer parameter points.
    """

    def __init__(
        self,
        kernel: str,
        inputs: Mapping[str, np.ndarray | None],
        outputs: Mapping[str, np.ndarray | None],
    ):
        self.program = 0
        self._kernel = kernel
        parameters = [(name, array, False) for name, array in inputs.items()]
        parameters += [(name, array, True) for name, array in outputs.items()]
        self._regions = {
            number: _Region(number, name, array, writable=writable)
            for number, (name, array, writable) in enumerate(parameters, start=1)
        }
        self.addresses = {region.name: region.start for region in self._regions.values()}
        arrays = {r.name: r.array for r in self._regions.values() if r.array is not None}
        for observer in _observers:
            observer.launched(kernel, arrays)

    def load(self, addresses: np.ndarray, dtype: np.dtype) -> np.ndarray:
        """Return the items at `addresses`, in their shape."""
        parts = self._resolve("load", addresses.reshape(-1), dtype)
        if len(parts) == 1:
            array, indices, _ = parts[0]
            return array.take(indices).reshape(addresses.shape)
        items = np.empty(addresses.size, dtype)
        for array, indices, lanes in parts:
            items[lanes] = array.take(indices)
        return items.reshape(addresses.shape)

    def store(self, addresses: np.ndarray, items: np.ndarray) -> None:
        """Write items, one to each of the addresses; both flat."""
        for array, indices, lanes in self._resolve("store", addresses, items.dtype):
            array[indices] = items[lanes]

    def _resolve(
        self, kind: Literal["load", "store"], addresses: np.ndarray, dtype: np.dtype
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
            for observer in _observers:
                observer.accessed(Access(kind, region.name, offsets, dtype.itemsize, self.program))
            parts.append((region.as_type(dtype), offsets // dtype.itemsize, lanes))
        return parts

    def _check(self, kind: str, region: _Region, offsets: np.ndarray, itemsize: int) -> None:
        size = region.bytes.size
        if region.array is None:
            raise MemoryAccessError(f"{self._who()}: {kind} of {region.name!r}, which is absent")
        if kind == "store" and not region.writable:
            raise MemoryAccessError(f"{self._who()}: store to {region.name!r}, which is an input")
        if offsets.min() < 0 or offsets.max() > size - itemsize:
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
        if itemsize != region.array.itemsize and (offsets % itemsize).any():
            raise MemoryAccessError(f"{self._who()}: misaligned {kind} in {region.name!r}")

    def _who(self) -> str:
        return f"{self._kernel}, program {self.program}"
