"""Modules with a fault: loaded once more, one place of their source changed. And what they miss."""

import functools
import importlib.util
import inspect
import pathlib
import types


def load(module: types.ModuleType, old: str, new: str, folder: pathlib.Path) -> types.ModuleType:
    """Load a module with `new` in place of `old`, from a file: Triton reads kernels from files."""
    source = inspect.getsource(module)
    assert source.count(old) == 1, f"{old!r} is {source.count(old)} times in {module.__name__}"
    path = folder / "faulty.py"
    path.write_text(source.replace(old, new))
    spec = importlib.util.spec_from_file_location("faulty", path)
    assert spec is not None and spec.loader is not None
    faulty = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(faulty)
    return faulty


def answered(case):
    """Return a case that asks the oracle once, however many faults are tried on it."""
    vars(case)["expected"] = functools.cache(case.expected)
    return case
