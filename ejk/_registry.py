"""The backends that a call may choose from: those that are registered, then `ejk`'s own."""

from collections.abc import Sequence

from ejk import _tuning
from ejk._backend import Backend, Choice, Problem
from ejk._nearest import did_you_mean
from ejk._typing import typed

_registered: list[Backend] = []


@typed
def register_backend(backend: Backend) -> None:
    """Offer `backend` for automatic choice, ahead of all others of its operation.

    A backend of the same name and operation is replaced: registering
    `ejk.TritonPageAttention(compute_capability=90, num_sms=132)` is how a machine without a GPU
    lowers for one. Calls that were already traced keep their choice. `unregister_backend` undoes
    it.

    Raises:
        TypeError: `backend` is not an object of a subclass of `ejk.Backend`.
    """
    _registered[:] = [backend, *(other for other in _registered if not _same(other, backend))]


@typed
def unregister_backend(backend: Backend) -> None:
    """Take back what `register_backend` did with a backend of this name and operation."""
    _registered[:] = [other for other in _registered if not _same(other, backend)]


def _same(a: Backend, b: Backend) -> bool:
    return (a.name, a.problem_type) == (b.name, b.problem_type)


def choose(
    choice: str | Backend | None, problem_type: type[Problem], own: Sequence[Backend]
) -> Choice:
    """Return the backends that may run a call.

    Args:
        choice: what the caller passed as `backend=`.
        problem_type: the operation's.
        own: the operation's own backends, best first.
    """
    if isinstance(choice, Backend):
        return Choice((choice,), automatic=False, tuning=_tuning.active())
    registered = [b for b in _registered if issubclass(problem_type, b.problem_type)]
    backends = (*registered, *(b for b in own if not any(_same(b, other) for other in registered)))
    if choice in (None, "auto"):
        return Choice(backends, automatic=True, tuning=_tuning.active())
    named = tuple(backend for backend in backends if backend.name == choice)
    if not named:
        names = list(dict.fromkeys(backend.name for backend in backends))
        raise ValueError(
            f"backend={choice!r} must be one of {', '.join(map(repr, names))}, a backend object or "
            f"None{did_you_mean(choice, names)}"
        )
    return Choice(named, automatic=False, tuning=_tuning.active())
