"""The error bound, the same for every backend. It is not to be widened.

Per row, in max-norm, against float64: at most twice the error of plain attention in the same
dtype, plus one rounding of the output, plus `2e-6 * max|v|` (float32) or `eps * max|v|` (16 bits).
"""

from collections.abc import Collection
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from ejk.testing import oracle
from ejk.testing.oracle import Array, DType


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
    logits, sizes, values = _row(case, s, h, Rows(case) if rows is None else rows)
    if not logits.size:
        return 0.0, 0.0  # the output is exactly 0, and the LSE is the sink
    finite = np.isfinite(expected)
    expected, values = expected[finite], values[:, finite]
    sink = -np.inf if case.options.get("sinks") is None else case.options["sinks"][h]
    plain, plain_lse = plain_attention(logits, values, float(np.float32(sink)), case.dtype)
    tail = 2e-6 if case.dtype == np.float32 else _finfo(case.dtype).eps
    bound = 2 * np.abs(plain.astype(np.float64) - expected).max(initial=0.0)
    largest = np.abs(values.astype(np.float64)).max(initial=0.0)
    bound += one_rounding(expected, case.dtype) + tail * largest
    # The LSE is float32 on every path. Its counterpart of max|v| is the largest logit, or the size
    # of the products' sums on the way to it: that a logit is small makes them no smaller.
    largest = max(1.0, np.abs(logits).max(), sizes.max())
    lse_bound = 2 * abs(float(plain_lse) - expected_lse)
    lse_bound += one_rounding(expected_lse, np.float32) + 2e-6 * largest
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
        self.keys, values = oracle.dequantised(keys, values, *scales, self.layout)
        latent = self.options.get("value_head_dim")
        self.values = self.keys[..., :latent] if values is None else values
        self.seen: dict[int, tuple[int, Array]] = {}
        self.gathered: dict[tuple[int, int], tuple[Array, Array]] = {}

    def of(self, r: int, kv_head: int) -> tuple[Array, Array, Array]:
        """Return the distances of the tokens that a row sees, float64 keys and values."""
        if r not in self.seen:
            self.seen[r] = self.case.seen(r)
        s, seen = self.seen[r]
        positions, distances = seen.T
        if (r, kv_head) not in self.gathered and len(seen):
            both = tuple(
                np.stack([oracle.token(x, self.tables[s], j, kv_head, self.layout) for j in js])
                for x, js in ((pool, positions.tolist()) for pool in (self.keys, self.values))
            )
            self.gathered[r, kv_head] = both[0], both[1].astype(self.case.dtype)
        nothing = np.zeros((0, self.case.shape.width))
        return distances, *self.gathered.get((r, kv_head), (nothing, nothing))


def _row(case: Any, r: int, h: int, rows: Rows) -> tuple[Array, Array, Array]:
    """Return one row's visible tokens: float32 logits, their sizes, values in the case's dtype.

    Products of either sign add up to about the root of the sum of their squares: the size of the
    sums that are rounded on the way to a logit, as far as a soft cap lets them through.
    """
    query, options = rows.query, rows.options
    distances, k, values = rows.of(r, h // (case.shape.num_heads // case.shape.num_kv_heads))
    if not len(distances):
        nothing = np.zeros(0, np.float32)
        return nothing, nothing, values.astype(case.dtype)
    logits = k.astype(np.float32) @ query[r, h].astype(np.float32)
    scale = options.get("attn_scale")
    scale = np.float32(case.shape.head_dim**-0.5 if scale is None else scale)
    logits *= scale
    sizes = np.linalg.norm(k * query[r, h].astype(np.float64), axis=1)
    sizes *= abs(float(scale))
    cap = options.get("attn_logits_soft_cap")
    if cap is not None:
        capped = np.tanh(logits / np.float32(cap))
        logits, sizes = np.float32(cap) * capped, sizes * (1 - capped**2)
    if options.get("alibi_slopes") is not None:
        logits += options["alibi_slopes"][h] * distances.astype(np.float32)
    return logits, sizes, values


def _finfo(dtype: npt.DTypeLike) -> Any:
    return ml_dtypes.finfo(dtype)
