"""Tuning that was measured: which fields a backend gets for one problem on one kind of device.

A table of such entries is active in a `with` block or in the whole process. JAX traces anew where
another is active, so a program that was traced before a change is not used after it.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Generator
from typing import Any

import jax
import numpy as np

Value = int | float | str | bool | None
"""Of a fact, or of a field."""


@dataclasses.dataclass(frozen=True)
class Entry:
    """What was best of one problem: the fields of `backend` where all `facts` are the problem's."""

    operation: str
    backend: str
    device_kind: str
    facts: tuple[tuple[str, Value], ...]
    fields: tuple[tuple[str, Value], ...]

    def fits(self, backend: Any, problem: Any) -> bool:
        named = (self.operation, self.backend) == (problem.operation, backend.name)
        return named and all(fact(problem, name) == value for name, value in self.facts)


@dataclasses.dataclass(frozen=True, eq=False)
class Table:
    """The entries of one file. It equals itself alone, so that every call hashes it at no cost."""

    path: str
    entries: tuple[Entry, ...]


Tables = tuple[Table, ...]
"""Those that are active, the first to be asked first."""


def fact(problem: Any, name: str) -> Value:
    """Return a static fact of a problem as a file holds it: types of elements by their names."""
    value = getattr(problem, name)
    return value.name if isinstance(value, np.dtype) else value


def active() -> Tables:
    """Return the tables that a call which is traced now may use."""
    return _context().value if _context.cache_info().currsize else ()


@contextlib.contextmanager
def first(table: Table) -> Generator[None]:
    """Ask `table` first, within the block and this thread."""
    with _context()((table, *active())):
        yield


def set_process(tables: Tables) -> None:
    """Have every thread ask these tables, where no block says otherwise."""
    _context().set_global(tables)


def of_process() -> Tables:
    return _context().get_global() if _context.cache_info().currsize else ()


def tuned(tables: Tables, backend: Any, problem: Any, platform: str) -> Any:
    """Return `backend` with the fields of the first table that has an entry; else as it is.

    Of several entries of a table the one with the most facts counts, and of these the last. A
    backend keeps fields that its caller set, all of them.
    """
    if not tables or not _is_plain(backend):
        return backend
    kind = functools.cache(lambda: _device_kind(platform))  # asked for where something else fits
    for table in tables:
        fitting = [e for e in table.entries if e.fits(backend, problem) and e.device_kind == kind()]
        if fitting:
            *_, best = sorted(fitting, key=lambda entry: len(entry.facts))
            return dataclasses.replace(backend, **dict(best.fields))
    return backend


def _is_plain(backend: Any) -> bool:
    """Say whether a backend is as its class makes it, or interpreted: nobody set a field."""
    if not dataclasses.is_dataclass(backend):
        return False
    fields = dataclasses.fields(backend)
    return all(getattr(backend, f.name) == f.default for f in fields if f.name != "interpret")


def _device_kind(platform: str) -> str | None:
    """Return the kind of device that is lowered for, as JAX names it; None if none is known."""
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    if device is not None:
        return device.device_kind
    try:
        return jax.local_devices(backend=platform)[0].device_kind
    except RuntimeError:
        return None


@functools.cache
def _context() -> Any:
    """Make the value that JAX's caches depend on, once tuning is asked for."""
    return jax.make_user_context(())
