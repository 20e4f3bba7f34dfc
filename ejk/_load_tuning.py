"""`ejk.load_tuning` and `ejk.tuning`: use what `python -m ejk tune` has measured."""

import dataclasses
import functools
import json
import os
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from typing import Annotated, Any

from ejk import (
    _copy_kv_cache,
    _page_attention,
    _ragged_page_attention,
    _registry,
    _tuning,
    _write_kv_cache,
)
from ejk._backend import Backend, Problem
from ejk._errors import TuningError
from ejk._nearest import did_you_mean
from ejk._typing import typed
from ejk.backends.copy_kv_cache import CopyKVCacheProblem
from ejk.backends.page_attention import PageAttentionProblem
from ejk.backends.ragged_page_attention import RaggedPageAttentionProblem
from ejk.backends.write_kv_cache import WriteKVCacheProblem

VERSION = 1  # of the format
OPERATIONS: dict[str, tuple[type[Problem], tuple[Backend, ...]]] = {
    "page_attention": (PageAttentionProblem, _page_attention.BACKENDS),
    "ragged_page_attention": (RaggedPageAttentionProblem, _ragged_page_attention.BACKENDS),
    "write_kv_cache": (WriteKVCacheProblem, _write_kv_cache.BACKENDS),
    "copy_kv_cache": (CopyKVCacheProblem, _copy_kv_cache.BACKENDS),
}
NAMES = ("operation", "backend", "device_kind")
PARTS = (*NAMES, "facts", "fields")
# An int would be a file that is open already, which would be read and closed.
Path = Annotated[str | os.PathLike[str], "a str or an os.PathLike"]


@typed
def load_tuning(path: Path) -> None:
    """Use a file of tuning for every call that is traced from now on, in the whole process.

    An entry of the file holds fields for one backend, on one kind of device, for problems that
    have all its facts. It is used where `ejk` chooses that backend, and for a plain
    `ejk.TritonPageAttention()` or its like. A backend of which the caller set a field keeps all of
    them, and a call whose bits must not follow from its batch, `num_splits >= 1`, its own blocks.
    Fields that cannot run a call are not used. The file that was loaded last is asked first; what
    it held when it was loaded before is forgotten. Programs that were traced before are traced
    anew.

    Args:
        path: a file that `python -m ejk tune` has written.

    Raises:
        TypeError: `path` is no path.
        OSError: the file cannot be read.
        TuningError: it holds something else than tuning; the file, the entry and the rule are
            named, and nothing of it is used.

    Examples:
        >>> import ejk, json, pathlib, tempfile
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "tuning.json"
        >>> _ = path.write_text(json.dumps({"version": 1, "entries": []}))
        >>> ejk.load_tuning(path)
    """
    table, before = _read(path), _tuning.of_process()
    _tuning.set_process((table, *(other for other in before if other.path != table.path)))


@typed
@contextmanager
def tuning(path: Path) -> Generator[None]:
    """Use a file of tuning as `ejk.load_tuning` does, inside a `with` block and of this thread.

    Args:
        path: a file that `python -m ejk tune` has written.

    Raises:
        TypeError: `path` is no path.
        OSError: the file cannot be read.
        TuningError: it holds something else than tuning.

    Examples:
        >>> import ejk, json, pathlib, tempfile
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "tuning.json"
        >>> _ = path.write_text(json.dumps({"version": 1, "entries": []}))
        >>> with ejk.tuning(path):
        ...     pass  # calls
    """
    with _tuning.first(_read(path)):
        yield


def _read(path: Path) -> _tuning.Table:
    with open(path, encoding="utf-8") as file:
        try:
            text = file.read()
        except UnicodeDecodeError as error:
            raise TuningError(f"{path}: must be JSON: {error}") from None
    return _table(os.fspath(path), text)


@functools.lru_cache(maxsize=64)
def _table(path: str, text: str) -> _tuning.Table:
    """Check a file and return its entries: the same object for the same file, or JAX retraces."""

    def must(holds: bool, rule: str) -> None:
        if not holds:
            raise TuningError(f"{path}: {rule}")

    try:
        given = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise TuningError(f"{path}: must be JSON: {error}") from None
    must(isinstance(given, dict), "must be an object with version and entries")
    version, entries = given.get("version"), given.get("entries")
    must(version == VERSION, f"version={version!r} must be {VERSION}")
    must(isinstance(entries, list), "entries must be a list")
    checked = (_entry(f"{path}: entries[{i}]", entry) for i, entry in enumerate(entries))
    return _tuning.Table(path, tuple(checked))


def _entry(where: str, given: Any) -> _tuning.Entry:
    def must(holds: bool, rule: str) -> None:
        if not holds:
            raise TuningError(f"{where}: {rule}")

    must(isinstance(given, dict), "must be an object")
    missing = [name for name in PARTS if name not in given]
    must(not missing, f"has no {', '.join(missing)}")
    for name in NAMES:
        must(isinstance(given[name], str), f"{name}={given[name]!r} must be a string")
    for name in ("facts", "fields"):
        must(isinstance(given[name], dict), f"{name} must be an object")
    operation, name = given["operation"], given["backend"]
    must(operation in OPERATIONS, _one_of("operation", operation, OPERATIONS))
    problem_type, own = OPERATIONS[operation]
    backends = {b.name: b for b in _registry.choose(None, problem_type, own).backends}
    must(name in backends, _one_of("backend", name, backends))
    facts = _checked_facts(must, problem_type, given["facts"])
    _check_fields(where, must, backends[name], given["fields"])
    pairs = (tuple(sorted(part.items())) for part in (facts, given["fields"]))
    return _tuning.Entry(operation, name, given["device_kind"], *pairs)


Must = Callable[[bool, str], None]


def _checked_facts(
    must: Must, problem_type: type[Problem], facts: Mapping[str, Any]
) -> Mapping[str, Any]:
    """Return the facts, of a call that is cut in parts with that it leaves their number open."""
    of_type: Any = problem_type
    known = [field.name for field in dataclasses.fields(of_type)]
    for name, value in facts.items():
        must(name in known, f"facts: {_one_of('fact', name, known)}")
        scalar = isinstance(value, int | float | str | None)
        must(scalar, f"facts: {name}={value!r} must be a number, a string, true, false or null")
    splits = facts.get("num_splits", 0)
    must(splits == 0, f"facts: num_splits={splits!r} must be 0: others promise bits of no batch's")
    return {"num_splits": 0, **facts} if "num_splits" in known else facts


def _check_fields(where: str, must: Must, backend: Backend, fields: Mapping[str, Any]) -> None:
    for name in fields:
        must(name in backend.tunable, f"fields: {_one_of('field', name, backend.tunable)}")
    for name, value in fields.items():
        kinds = {type(tried) for tried in backend.tunable[name]}
        must(type(value) in kinds, f"fields: {name}={value!r} must be {_spell(kinds)}")
    try:
        type(backend)(**fields)
    except (TypeError, ValueError) as error:
        raise TuningError(f"{where}: fields: {error}") from None


def _spell(kinds: set[type]) -> str:
    return " or ".join(sorted({int: "an int", str: "a string"}[kind] for kind in kinds))


def _one_of(what: str, given: str, known: Mapping[str, Any] | list[str]) -> str:
    return f"{what} {given!r} must be one of {', '.join(known) or 'none'}" + did_you_mean(
        given, known
    )
