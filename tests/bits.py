"""Comparisons of bits: NaN equals itself, 0 is not -0."""

import numpy as np
import oracle


def bits(x):
    return np.asarray(x).view(f"u{np.asarray(x).dtype.itemsize}")


def bits_equal(a, b):
    """Compare what two calls return."""
    for x, y in zip(a, b, strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(bits(x), bits(y))


def assert_written(case, pools):
    """Every bit of every pool is the oracle's: of what is written and of what is not.

    Where new tokens become codes, one NaN is as good as another.
    """
    scales = dict(zip(("key_scale", "value_scale"), case.scales))
    expected = oracle.write_kv_cache(*case.operands(), cache_layout=case.cache_layout, **scales)
    expected = [pool for pool in expected if pool is not None]
    if case.key_cache.dtype != case.key.dtype or case.scales[0] is not None:
        written = [x for x in _written(case) if x is not None]
        written += [x.any(-1) for x in written]  # the scales of tokens come after the caches
        pools = [_as_one_nan(*x) for x in zip(pools, expected, written)]
    bits_equal(pools, expected)


def _written(case):
    """Mark what is written of the caches."""
    caches = case.key_cache, case.value_cache
    blank = [None if x is None else np.zeros(x.shape, bool) for x in caches]
    of_values = blank[0] if blank[1] is None else blank[1]  # fused
    key = np.ones((*case.key.shape[:2], blank[0].shape[-1]), bool)
    value = None if case.value is None else np.ones((*key.shape[:2], of_values.shape[-1]), bool)
    rows = key, value
    return oracle.write_kv_cache(*rows, *blank, case.slot_mapping, cache_layout=case.cache_layout)


def _as_one_nan(actual, expected, written):
    """Take over the NaN that is expected where some other was written."""
    if actual.dtype.kind in "iu":
        return actual
    return np.where(written & np.isnan(actual) & np.isnan(expected), expected, actual)
