"""What `check` and `repro` share: the engine, where it is installed, and backends by name."""

import dataclasses
import importlib
import os
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Annotated, Any

import typer

from ejk._backend import Backend
from ejk._backend_report import default_platform
from ejk._nearest import did_you_mean

BackendNames = Annotated[
    list[str] | None,
    typer.Option(
        "--backend", help="A name, or module:Class of another package's; may be repeated."
    ),
]
Interpret = Annotated[
    bool, typer.Option("--interpret", help="Run kernels by their interpreters, on a CPU.")
]


def engine(module: str) -> ModuleType:
    """Import a module of `ejk.testing`; without Hypothesis, say what installs it."""
    try:
        return importlib.import_module(f"ejk.testing.{module}")
    except ModuleNotFoundError as error:
        if error.name != "hypothesis":
            raise
        said = 'hypothesis is not installed: pip install "ejk[testing]"'
        raise typer.BadParameter(said) from None


def backends(operation: str, given: Sequence[str] | None, interpret: bool) -> dict[str, Any]:
    """Return the backends of an operation by name: those that are asked for, or that run here.

    Kernels that are interpreted are, where there is a CPU, and no others.
    """
    found: dict[str, Backend] = engine("verdicts").backends_of(operation)
    if given is None:
        here = {n: interpreted(b, interpret) for n, b in found.items()}
        return {n: b for n, b in here.items() if default_platform() in b.platforms}
    named: dict[str, Any] = {}
    for name in given:
        if ":" in name:
            backend = of_class(name)
            if backend.problem_type.operation == engine("compositions").implemented_as(operation):
                named[backend.name] = interpreted(backend, interpret)
        elif name in found:
            named[name] = interpreted(found[name], interpret)
    return named


def interpreted(backend: Any, interpret: bool) -> Any:
    if interpret and hasattr(backend, "interpret"):
        return dataclasses.replace(backend, interpret=True)
    return backend


def check_names(given: Sequence[str] | None, operations: Sequence[str]) -> None:
    """Raise for a name that no backend of the operations has."""
    known = {n: None for op in operations for n in engine("verdicts").backends_of(op)}
    for name in given or ():
        if ":" not in name and name not in known:
            rule = f"{name!r} must be one of {', '.join(known)}, or module:Class"
            raise typer.BadParameter(rule + did_you_mean(name, known), param_hint="'--backend'")


def of_class(name: str) -> Any:
    """Import another package's backend, also from the working directory, and make one."""
    module, _, attribute = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found = getattr(importlib.import_module(module), attribute)()
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise typer.BadParameter(f"{name!r}: {error}", param_hint="'--backend'") from None
    if not isinstance(found, Backend):
        rule = f"{name!r} must be a subclass of ejk.Backend"
        raise typer.BadParameter(rule, param_hint="'--backend'")
    return found
