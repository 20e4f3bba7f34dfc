"""The check that every backend object makes of its integer fields."""

from typing import Any

import numpy as np

from ejk._describe import describe


def at_least(backend: Any, **bounds: int) -> None:
    """Raise unless each field named in `bounds` is None or an integer not below its bound."""
    for field, bound in bounds.items():
        value = getattr(backend, field)
        if value is None:
            continue
        if not isinstance(value, int | np.integer) or isinstance(value, bool):
            raise TypeError(f"{field}={describe(value)} must be an int")
        if value < bound:
            raise ValueError(f"{field}={value} must be at least {bound}")
        object.__setattr__(backend, field, int(value))  # it is frozen, and may be of NumPy
