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
        before = (case.key_cache, case.value_cache, *case.scales)
        before = [pool for pool in before if np.ndim(pool) > 2]
        pools = [_as_one_nan(x, *others) for x, *others in zip(pools, expected, before)]
    bits_equal(pools, expected)


def _as_one_nan(actual, expected, before):
    """Take over the NaN that is expected where some other was written."""
    if actual.dtype.kind in "iu":
        return actual
    was_written = bits(expected) != bits(before)
    return np.where(was_written & np.isnan(actual) & np.isnan(expected), expected, actual)
