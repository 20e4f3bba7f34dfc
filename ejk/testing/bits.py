"""Comparisons of bits: NaN equals itself, 0 is not -0."""

from collections.abc import Iterable
from typing import Any

import numpy as np

from ejk.testing.oracle import Array


def bits(x: Any) -> Array:
    """View an array as unsigned integers."""
    return np.asarray(x).view(f"u{np.asarray(x).dtype.itemsize}")


def bits_equal(a: Iterable[Any], b: Iterable[Any]) -> None:
    """Compare what two calls return."""
    for i, (x, y) in enumerate(zip(a, b, strict=True)):
        x, y = np.asarray(x), np.asarray(y)
        assert (x.dtype, x.shape) == (y.dtype, y.shape), f"result {i} is of another kind"
        differ = np.argwhere(bits(x) != bits(y))
        if len(differ):
            at = tuple(differ[0].tolist())
            numbers = " and ".join(f"{z[at]} ({bits(z)[at]:#x})" for z in (x, y))
            raise AssertionError(
                f"result {i} differs in {len(differ)} of {x.size} numbers: at {at} {numbers}"
            )
