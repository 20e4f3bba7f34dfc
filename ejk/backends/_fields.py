"""The checks that every backend object makes of its fields."""

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
            how = ": 90 is sm_90, a device's '9.0'" if field == "compute_capability" else ""
            raise TypeError(f"{field}={describe(value)} must be an int{how}")
        if value < bound:
            raise ValueError(f"{field}={value} must be at least {bound}")
        object.__setattr__(backend, field, int(value))  # it is frozen, and may be of NumPy


def check_interpret(backend: Any, *, of_pallas: bool = False) -> None:
    """Raise unless `interpret` is a bool or, of Pallas, `pltpu.InterpretParams`."""
    value = backend.interpret
    if isinstance(value, bool | np.bool_):
        object.__setattr__(backend, "interpret", bool(value))
    elif not of_pallas:
        raise TypeError(f"interpret={describe(value)} must be a bool")
    else:
        from jax.experimental.pallas import tpu as pltpu

        if not isinstance(value, pltpu.InterpretParams):
            raise TypeError(f"interpret={describe(value)} must be a bool or pltpu.InterpretParams")
