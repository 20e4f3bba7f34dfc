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


def assert_written(case, caches):
    """Every bit of every cache is the oracle's: of what is written and of what is not."""
    expected = oracle.write_kv_cache(*case.operands(), cache_layout=case.cache_layout)
    bits_equal(caches, [cache for cache in expected if cache is not None])
