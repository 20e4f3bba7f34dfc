"""The names that a package offers are that package's, wherever they are written."""

from collections.abc import Collection
from typing import Any


def publish(package: dict[str, Any], hidden: Collection[str] = ()) -> list[str]:
    """Return the names that a package offers, and have functions and classes say that it is theirs.

    `help()`, a traceback and a pickle then read `ejk.page_attention`, not the name of a module that
    may change. The price: `inspect.getsource` looks for a class in the module that `__module__`
    names, and does not find it; of a function, and of a class's methods, it finds the source.

    Args:
        package: the namespace of the package, `globals()`. What it has imported from elsewhere, and
            what begins with an underscore, is not offered.
        hidden: names that are not, either.
    """
    own = package["__name__"] + "."
    names = sorted(
        name
        for name, x in package.items()
        if not name.startswith("_") and name not in hidden and _home(x).startswith(own)
    )
    for name in names:
        if hasattr(package[name], "__module__"):  # a module has none
            package[name].__module__ = package["__name__"]
    return names


def _home(x: Any) -> str:
    """Name the module in which a function or class is written, or a module itself."""
    return getattr(x, "__module__", None) or getattr(x, "__name__", "")
