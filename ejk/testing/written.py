"""Compares written caches with the oracle's, bit for bit."""

from collections.abc import Iterable
from typing import Any

import numpy as np

from ejk.testing import oracle
from ejk.testing.bits import bits_equal
from ejk.testing.oracle import Array


def assert_written(case: Any, pools: Iterable[Any]) -> None:
    """Every bit of every pool is the oracle's: of what is written and of what is not.

    Where new tokens become codes, one NaN is as good as another.
    """
    expected = case.expected()
    if case.key_cache.dtype != case.key.dtype or case.scales[0] is not None:
        written = [x for x in _written(case) if x is not None]
        written += [x.any(-1) for x in written]  # the scales of tokens come after the caches
        pools = [_as_one_nan(np.asarray(x), *of) for x, *of in zip(pools, expected, written)]
    bits_equal(pools, expected)


def _written(case: Any) -> list[Any]:
    """Mark what is written of the caches."""
    keys, values = case.key_cache, case.value_cache
    blank = np.zeros(keys.shape, bool), None if values is None else np.zeros(values.shape, bool)
    width = (keys if values is None else values).shape[-1]  # of one pool: fused
    key = np.ones((*case.key.shape[:2], keys.shape[-1]), bool)
    value = None if case.value is None else np.ones((*key.shape[:2], width), bool)
    rows = key, value
    return oracle.write_kv_cache(*rows, *blank, case.slot_mapping, cache_layout=case.cache_layout)


def _as_one_nan(actual: Array, expected: Array, written: Array) -> Array:
    """Take over the NaN that is expected where some other was written."""
    if actual.dtype.kind in "iu":
        return actual
    return np.where(written & np.isnan(actual) & np.isnan(expected), expected, actual)
