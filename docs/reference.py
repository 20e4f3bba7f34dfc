"""Shows docstrings and signatures as their readers want them: an extension of Sphinx."""

import inspect
import re
import types
import typing
from typing import Any

PLAIN = {"integer": "int", "floating": "float", "ndarray": "Array", "NoneType": "None"}


def spell(hint: Any) -> str:
    """Write a type: an array by its axes, a number as `int` or `float` whosever it is."""
    if isinstance(hint, str) or hint is ...:
        return "..." if hint is ... else hint
    if hasattr(hint, "dim_str"):
        return of_axes(hint.__name__.split("[")[0], ", ".join(hint.dim_str.split()))
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        said = re.fullmatch(r"an? (integer|boolean) array \[(.*)\]", args[1])
        kind = {"integer": "Integer", "boolean": "Bool"}
        return of_axes(kind[said[1]], said[2]) if said else spell(args[0])
    if origin in (typing.Union, types.UnionType):
        names = dict.fromkeys(map(spell, args))
        names.pop("int" if "float" in names else "_DimExpr", None)  # a size of `jax.export`
        return " | ".join(names)
    if origin is typing.Literal:
        return " | ".join(map(repr, args))
    if args:
        return f"{spell(origin)}[{', '.join(map(spell, args))}]" if origin else str(hint)
    name = getattr(hint, "__name__", str(hint))
    return PLAIN.get(name, name)


def of_axes(kind: str, axes: str) -> str:
    # In quotes, or each axis would be looked up as a name.
    return f"{kind}[{axes!r}]" if re.match(r"[a-z]", axes) else "Array"


def signature(app, what, name, thing, options, shown, returns):
    """Write the signature of a function or a class, a parameter a line."""
    if shown is None or what == "exception":
        return shown and ("", None)
    found = inspect.signature(thing)
    parameters = [
        p.replace(annotation=typed(p.annotation), default=short(p.default))
        for p in found.parameters.values()
        if p.name != "self"
    ]
    arguments = str(found.replace(parameters=parameters, return_annotation=found.empty))
    result = found.return_annotation
    return arguments, None if what == "class" or result is found.empty else spell(result)


def typed(annotation: Any) -> Any:
    return annotation if annotation is inspect.Parameter.empty else Shown(spell(annotation))


class Shown(str):
    """Text that is shown without quotes."""

    __repr__ = str.__str__


def short(default: Any) -> Any:
    """Name a function instead of showing its address."""
    return Shown(default.__qualname__) if inspect.isroutine(default) else default


def formulas(app, what, name, thing, options, lines):
    """Make code of indented lines after a line that ends in a colon, as Markdown does."""
    for i in range(len(lines) - 2, 0, -1):
        before, here = lines[i - 1], lines[i + 1]
        deeper = len(here) - len(here.lstrip()) - (len(before) - len(before.lstrip()))
        if before.rstrip().endswith(":") and not lines[i].strip() and deeper >= 4:
            indent = before[: len(before) - len(before.lstrip())]
            lines[i:i] = ["", f"{indent}.. code-block:: text"]


def setup(app):
    app.setup_extension("sphinx.ext.autodoc")
    app.connect("autodoc-process-signature", signature)
    app.connect("autodoc-process-docstring", formulas, priority=100)  # before napoleon
    return {"parallel_read_safe": True}
