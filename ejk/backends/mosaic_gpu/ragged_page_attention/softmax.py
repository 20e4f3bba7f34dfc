"""The online softmax of 64 rows: what a warpgroup keeps in registers, and its steps.

In log2 units, with `s` the logits of a block:

    m' = max(s) where that exceeds m by more than SLACK, else m
    p = 2^(s - m');  alpha = 2^(m - m');  l' = alpha * l + sum(p);  acc' = alpha * acc + p . v

A maximum that is a little too small costs nothing: weights are up to 2^SLACK then, of any type
alike. But `acc` has rarely to be scaled (FlashAttention-4).
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from ejk.backends.mosaic_gpu._arithmetic import LN2, LOG2E, SLACK, spread
from ejk.backends.mosaic_gpu._private import ROW, TILE
from ejk.backends.mosaic_gpu._private_softmax import in_log2, raised
from ejk.backends.mosaic_gpu._tensor_cores import ROWS

# Sums are kept of every eighth weight: those of a thread, which so need no exchange.
SUMS = 8


class State(NamedTuple):
    """The running state of a warpgroup's rows."""

    acc: Any  # float32 [ROWS, head_dim]
    m: Any  # float32 [ROWS], log2
    l: Any  # float32 [ROWS, SUMS]


def empty(head_dim: int) -> State:
    acc = plgpu.layout_cast(jnp.zeros((ROWS, head_dim), jnp.float32), TILE)
    m = plgpu.layout_cast(jnp.full((ROWS,), -jnp.inf, jnp.float32), ROW)
    l = plgpu.layout_cast(jnp.zeros((ROWS, SUMS), jnp.float32), TILE)
    return State(acc, m, l)


def weigh(plain: bool, s: Any, units: tuple[Any, ...], state: State) -> tuple[State, Any, Any]:
    """Return the state but for `acc`, weights, and what `acc` is to be multiplied by.

    The units, see `in_log2`, are of a polynomial that rises: its last step and the difference are
    one instruction.
    """
    m, alpha = raised(plain, state.m, s, units, SLACK)
    finite = jnp.where(m == -jnp.inf, 0.0, m)
    p = jnp.exp2(in_log2(s, units) - spread(finite, s.shape[1]))
    sums = sum((p[:, i : i + SUMS] for i in range(SUMS, s.shape[1], SUMS)), p[:, :SUMS])
    return State(state.acc, m, state.l * spread(alpha, SUMS) + sums), p, alpha


class Result(NamedTuple):
    """What rows come to."""

    factor: Any  # float32 [ROWS]: of `acc`
    lse: Any  # float32 [ROWS]


def result_of_part(m: Any, l: Any) -> Result:
    """Return the result of a part; its LSE is in log2 units."""
    l = jnp.where(m == jnp.inf, jnp.nan, l)  # a logit overflowed, and its weight may be 0
    saw_nothing = l == 0
    lse = jnp.where(saw_nothing, -jnp.inf, m + jnp.log2(l))
    return Result(1 / jnp.where(saw_nothing, 1.0, l), lse)


def result(m: Any, l: Any, sink: Any) -> Result:
    """Return the result, a sink in the denominator, which is -inf for none."""
    l = jnp.where(m == jnp.inf, jnp.nan, l)
    in_log2 = sink * LOG2E
    # A finite sink stays finite: from 2.36e38 on it would be infinite here, and its weight NaN.
    is_beyond = (in_log2 == jnp.inf) & (sink < jnp.inf)
    in_log2 = jnp.where(is_beyond, float(jnp.finfo(jnp.float32).max), in_log2)
    new = jnp.maximum(m, in_log2)
    finite = jnp.where(new == -jnp.inf, 0.0, new)
    alpha = jnp.exp2(m - finite)
    l = l * alpha
    sink_alone = (l == 0) & (sink < jnp.inf)
    l = l + jnp.exp2(in_log2 - finite)
    # From base 2 and back would cost a sink that stands alone its last bit.
    lse = jnp.where(sink_alone, sink, (new + jnp.log2(l)) * LN2)
    return Result(alpha / jnp.where(l == 0, 1.0, l), lse)
