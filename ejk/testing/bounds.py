"""The error bound, the same for every backend. It is not to be widened.

Per row, in max-norm, against float64: at most twice the error of plain attention in the same
dtype, plus one rounding of the output, plus `2e-6 * max|v|` (float32) or `eps * max|v|` (16 bits).
How far plain attention is off is a matter of the order in which it adds up, and in one order it may
be hardly at all. So logits are added up in a few, and the largest error counts. The first order is
one product after the other in chains of 64, which are added then: wider heads in one chain would
err more, and a backend that does so fails. Sums over tokens are NumPy's, forwards and backwards.
"""

import functools
from collections.abc import Collection
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from ejk.testing import oracle
from ejk.testing.oracle import Array, DType

ORDERS, CHAIN = 4, 64
OFFSETS = {np.dtype(np.int8): 128, np.dtype(np.uint8): 8}
"""What some kernel increases codes by, so that a product takes them as unsigned numbers."""


def assert_close(case: Any, out: Any, lse: Any = None, leave_out: Collection[Any] = ()) -> None:
    """Check an output, and an LSE if there is one, against the oracle, row by row.

    What must be NaN or infinite is, and what is finite is within its bound. Rows of `leave_out` may
    be anything.
    """
    expected, expected_lse = case.expected()
    assert np.shape(out) == expected.shape
    assert np.asarray(out).dtype == case.dtype, "the output is of the query's dtype"
    out, rows = np.asarray(out).astype(np.float64), Rows(case)
    for s in range(expected.shape[0]):
        for h in range(expected.shape[1]):
            if s not in leave_out:
                _assert_row(case, s, h, out, lse, expected[s, h], expected_lse[s, h], rows)
    if lse is not None:
        assert np.asarray(lse).dtype == np.float32


def _assert_row(
    case: Any,
    s: int,
    h: int,
    out: Array,
    lse: Any,
    expected: Array,
    expected_lse: float,
    rows: "Rows",
) -> None:
    odd = ~np.isfinite(expected)
    if odd.any():
        np.testing.assert_array_equal(out[s, h][odd], expected[odd], f"out[{s}, {h}]")
    bound, lse_bound = bounds(case, s, h, expected, expected_lse, rows)
    lost = ~odd & ~np.isfinite(out[s, h])
    assert not lost.any(), f"out[{s}, {h}] must be finite, is {out[s, h][lost][0]}"
    error = np.abs(out[s, h][~odd] - expected[~odd]).max(initial=0.0)
    assert error <= bound, f"out[{s}, {h}] is off by {error:.3g}, allowed {bound:.3g}"
    if lse is not None:
        assert_lse(lse[s, h], expected_lse, lse_bound, f"lse[{s}, {h}]")


def assert_lse(actual: Any, expected: Any, bound: float, name: str) -> None:
    """Compare two LSEs, -inf and NaN being equal to themselves alone."""
    if expected == -np.inf:
        assert actual == -np.inf, f"{name} is {actual}, must be -inf: the row sees nothing"
    elif np.isnan(expected):
        assert np.isnan(actual), f"{name} is {actual}, must be NaN"
    else:
        error = abs(float(actual) - expected)
        assert error <= bound, f"{name} is off by {error:.3g}, allowed {bound:.3g}"


def bounds(
    case: Any, s: int, h: int, expected: Array, expected_lse: float, rows: "Rows | None" = None
) -> tuple[float, float]:
    """Return the allowed error of one row's output and of its LSE."""
    if np.isnan(expected_lse):
        return 0.0, 0.0  # both are NaN
    orders, sizes, values = _row(case, s, h, Rows(case) if rows is None else rows)
    if not sizes.size:
        return 0.0, 0.0  # the output is exactly 0, and the LSE is the sink
    finite = np.isfinite(expected)
    expected, values = expected[finite], values[:, finite]
    sink = -np.inf if case.options.get("sinks") is None else case.options["sinks"][h]
    tail = 2e-6 if case.dtype == np.float32 else _finfo(case.dtype).eps
    error = lse_error = 0.0
    for tokens, logits in orders:
        plain, lse = plain_attention(logits, values[tokens], float(np.float32(sink)), case.dtype)
        off = np.abs(plain.astype(np.float64) - expected).max(initial=0.0)
        error, lse_error = np.maximum(error, off), np.maximum(lse_error, abs(lse - expected_lse))
    bound = 2 * error + one_rounding(expected, case.dtype)
    bound += tail * np.abs(values.astype(np.float64)).max(initial=0.0)
    # The LSE is float32 on every path. Its counterpart of max|v| is the largest logit, or the size
    # of the products' sums on the way to it: that a logit is small makes them no smaller.
    logits = orders[0][1]
    largest = max(1.0, np.abs(logits[np.isfinite(logits)]).max(initial=0.0), sizes.max())
    lse_bound = 2 * lse_error + one_rounding(expected_lse, np.float32) + 2e-6 * largest
    return float(bound), float(lse_bound)


def plain_attention(logits: Array, values: Array, sink: float, dtype: DType) -> tuple[Array, Any]:
    """Softmax, then the product, with every intermediate array in `dtype`."""
    scores = logits.astype(dtype).astype(np.float32)
    top = max(scores.max(), sink)
    p = np.exp(scores - top)
    total = p.sum() + np.exp(sink - top)
    p = (p / total).astype(dtype).astype(np.float32)
    exact = max(logits.max(), sink)
    lse = exact + np.log(np.exp(logits - exact).sum() + np.exp(sink - exact))
    out = p @ values.astype(np.float32)
    if dtype == np.float16:  # the mean of finite numbers is finite
        out = np.where(np.isfinite(out), np.clip(out, -65504, 65504), out)
    return out.astype(dtype), lse


def one_rounding(x: Any, dtype: npt.DTypeLike) -> float:
    """Half a unit in the last place of the largest of `x`."""
    info = _finfo(dtype)
    largest = float(np.abs(x[np.isfinite(x)]).max(initial=0.0)) if np.ndim(x) else abs(float(x))
    return max(largest if np.isfinite(largest) else 0.0, float(info.tiny)) * float(info.eps) / 2


class Rows:
    """What the rows of a case see, gathered once for all heads of a group."""

    def __init__(self, case: Any) -> None:
        self.case, self.options = case, case.semantics()
        self.query, keys, values, _, self.tables, *_ = case.operands()
        self.layout = self.options.get("cache_layout", "HND")
        scales = self.options.get("key_scale"), self.options.get("value_scale")
        unsigned, offset = None, OFFSETS.get(keys.dtype, 0)
        if offset:
            unsigned = oracle.codes(keys).astype(np.int16) + offset
            unsigned, _ = oracle.dequantised(unsigned, values, *scales, self.layout)
        self.keys, values = oracle.dequantised(keys, values, *scales, self.layout)
        self.multiplied = self.keys if unsigned is None else unsigned
        latent = self.options.get("value_head_dim")
        self.values = self.keys[..., :latent] if values is None else values
        self.seen: dict[int, tuple[int, Array]] = {}
        self.gathered: dict[tuple[int, int], tuple[Array, ...]] = {}
        rng, width = np.random.default_rng(0), case.shape.head_dim
        self.entries = [np.arange(width), *(rng.permutation(width) for _ in range(ORDERS - 1))]

    def of(self, r: int, kv_head: int) -> tuple[Array, ...]:
        """Return the distances of the tokens that a row sees, and float64 keys.

        Then the keys as products take them, and values.
        """
        if r not in self.seen:
            self.seen[r] = self.case.seen(r)
        s, seen = self.seen[r]
        positions, distances = seen.T
        if (r, kv_head) not in self.gathered and len(seen):
            where, js = (self.tables[s], kv_head), positions.tolist()
            keys = self._tokens(self.keys, *where, js)
            values = self._tokens(self.values, *where, js)
            is_code = self.multiplied is not self.keys
            multiplied = self._tokens(self.multiplied, *where, js) if is_code else keys
            self.gathered[r, kv_head] = keys, multiplied, values.astype(self.case.dtype)
        nothing = np.zeros((0, self.case.shape.width))
        return distances, *self.gathered.get((r, kv_head), (nothing,) * 3)

    def _tokens(self, pool: Array, table: Array, kv_head: int, positions: list[int]) -> Array:
        return np.stack([oracle.token(pool, table, j, kv_head, self.layout) for j in positions])


def _row(case: Any, r: int, h: int, rows: Rows) -> tuple[list[tuple[Array, Array]], Array, Array]:
    """Return float32 logits in a few orders, their sizes, and values in the case's dtype.

    An order is one of the tokens, and of the products of a logit. Products of either sign add up to
    about the root of the sum of their squares: the size of the sums that are rounded on the way to
    a logit, as far as a soft cap lets them through. Those of codes are of what a product takes.
    """
    query, options = rows.query[r, h].astype(np.float32), rows.options
    group = case.shape.num_heads // case.shape.num_kv_heads
    distances, k, multiplied, values = rows.of(r, h // group)
    values = values.astype(case.dtype)
    if not len(distances):
        return [], np.zeros(0, np.float32), values
    scale = options.get("attn_scale")
    scale = np.float32(case.shape.head_dim**-0.5 if scale is None else scale)
    cap, slopes = options.get("attn_logits_soft_cap"), options.get("alibi_slopes")
    sizes = np.linalg.norm(multiplied * query.astype(np.float64), axis=1) * abs(float(scale))
    tokens, orders = np.arange(len(distances)), []
    for i, entries in enumerate(rows.entries):
        own = k.astype(np.float32)[np.ix_(tokens, entries)]
        if i:
            logits = own @ query[entries] * scale
        else:
            ends = [*range(CHAIN, len(query), CHAIN)]
            chains = (np.add.accumulate(x, axis=1) for x in np.split(own * query, ends, axis=1))
            logits = functools.reduce(np.add, (x[:, -1] for x in chains)) * scale
        if cap is not None:
            logits = np.tanh(logits / np.float32(cap))
            if not i:
                sizes = sizes * (1 - logits**2)
            logits = np.float32(cap) * logits
        if slopes is not None:
            logits += slopes[h] * distances[tokens].astype(np.float32)
        orders.append((tokens, logits))
        tokens = tokens[::-1]
    return orders, sizes, values


def _finfo(dtype: npt.DTypeLike) -> Any:
    return ml_dtypes.finfo(dtype)
