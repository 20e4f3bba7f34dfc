"""How rules about values that only the device knows are checked: at once, or under `checkify`."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

Rule = tuple[Any, int, str]
"""Where a rule is broken, which array's values are wrong, by its number, and what to say."""


def check_values(rules: Callable[..., Iterable[Rule]], *arrays: Any, limits: Sequence[int]) -> None:
    """Raise `ValueError` at the first place where a rule is broken, or check it by `checkify`.

    Args:
        rules: called with `numpy` or `jax.numpy` and the arrays as signed integers. What is said
            may hold `{value}` and the place, `{i0}` and `{i1}`.
        arrays: integers, booleans or None.
        limits: for each a value too large to be right, which traced ones are clipped to.
    """
    traced = any(isinstance(x, Tracer) for x in arrays)
    given = [_signed(x, limit, traced) for x, limit in zip(arrays, limits)]
    for bad, which, message in rules(jnp if traced else np, *given):
        if bad.size == 0:
            continue
        if traced:
            from jax.experimental import checkify

            worst = jnp.unravel_index(jnp.argmax(bad), bad.shape)
            checkify.check(~bad.any(), message, value=given[which][worst], **_place(worst))
        elif bad.any():
            worst = tuple(np.argwhere(bad)[0])
            value = np.asarray(arrays[which])[worst]
            raise ValueError(message.format(value=value, **_place(worst)))


def _place(indices: Sequence[Any]) -> dict[str, Any]:
    return {f"i{axis}": index for axis, index in enumerate(indices)}


def _signed(x: Any, limit: int, traced: bool) -> Any:
    """Return int64 on the host; int32 where values are traced, those below -2 as -2."""
    if x is None:
        return None
    if not (traced and isinstance(x, jax.Array)):
        x = np.asarray(x)
    if x.dtype == np.bool_:
        return x
    if not traced:
        # What only uint64 holds becomes the largest int64: too large for all.
        return np.minimum(x, min(np.iinfo(x.dtype).max, np.iinfo(np.int64).max)).astype(np.int64)
    own = jnp.iinfo(x.dtype)
    return jnp.asarray(x.clip(max(own.min, -2), min(own.max, limit)).astype(jnp.int32))
