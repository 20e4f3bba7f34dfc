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
    for x, y in zip(a, b, strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(bits(x), bits(y))
