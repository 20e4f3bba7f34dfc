"""Softmax and products of the attention kernels: a state, its rows over lanes, heads of blocks."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import tpu as pltpu

from ejk.backends.pallas._sizes import PagedSizes
from ejk.backends.pallas._tiles import LANES


class State(NamedTuple):
    """What a softmax has seen."""

    m: jax.Array  # [rows, 128], all lanes the same
    l: jax.Array  # [rows, 128], all lanes the same
    acc: jax.Array  # [rows, value_head_dim]


def state_scratch(rows: tuple[int, ...], value_head_dim: int) -> dict[str, Any]:
    """Return the memory of states: of one, or of several on the first axis."""
    widths = {"m_ref": LANES, "l_ref": LANES, "acc_ref": value_head_dim}
    return {name: pltpu.VMEM((*rows, width), jnp.float32) for name, width in widths.items()}


def weight_of_sink(m: jax.Array) -> jax.Array:
    """Return the weight of a sink beside itself: 0 of none, NaN of one that is not a number."""
    return jnp.where(m == -jnp.inf, 0.0, jnp.where(m < jnp.inf, 1.0, jnp.nan))


def merge(a: State, b: State) -> State:
    """Return what both have seen."""
    m = jnp.maximum(a.m, b.m)
    m_safe = jnp.where(m == -jnp.inf, 0.0, m)
    alpha, beta = jnp.exp(a.m - m_safe), jnp.exp(b.m - m_safe)
    width = a.acc.shape[1]
    acc = a.acc * across(alpha, width) + b.acc * across(beta, width)
    return State(m, a.l * alpha + b.l * beta, acc)


def scale_of_values(scale: jax.Array, state: State, initial: State) -> jax.Array:
    """Return what scales a result, `[rows, 1]`: where no token was seen a scale may be NaN."""
    saw_none = (state.m == initial.m) & (state.l == initial.l)
    return jnp.where(saw_none[:, :1] & ~(jnp.abs(scale) < jnp.inf), 0.0, scale)


def across(x: jax.Array, width: int) -> jax.Array:
    """Return `x [rows, 1]`, or `[rows, 128]` with all lanes the same, as wide as `width`."""
    if x.shape[1] == 1:
        return jnp.broadcast_to(x, (x.shape[0], width))
    return jnp.concatenate([x] * (-(-width // LANES)), axis=1)[:, :width]


def heads_of(
    buf: Any, slot: Any, k: int, half: int, sizes: PagedSizes[Any], masked: bool
) -> Iterator[jax.Array]:
    """Yield each head's keys (`half=0`) or values of a block, `[block_kv, head_dim]`.

    As products take them: see `operand_dtype`.
    """
    layout, dtype = sizes.problem.layout, sizes.operand_dtype(masked)
    fused = () if layout.halves is None else (half,)
    if layout.heads_inside:
        pages = buf[(slot, k, slice(None), *fused)].astype(dtype)
        pages = jnp.transpose(pages, (2, 0, 1, 3))
        heads = range(half if layout.interleaved else 0, pages.shape[0], layout.heads_of_head)
        blocks = (pages[head] for head in heads)
    else:
        order = slice(None, None, -1 if sizes.problem.cache_layout == "KV_HEADS_FIRST" else 1)
        where = ((*fused, head)[order] for head in range(sizes.kv_heads))
        blocks = (buf[(slot, k, slice(None), *index)] for index in where)
    for block in blocks:  # [block_pages, page_size, head_dim]
        yield block.astype(dtype).reshape(sizes.block_kv, block.shape[-1])


def product(a: jax.Array, b: jax.Array, *, contract: int) -> jax.Array:
    """Multiply `a [m, k]` with `b`, of which axis `contract` is summed over, in float32.

    Where only one of them is float32, nothing of it is lost: `a` is three parts of bfloat16.
    """
    if a.dtype != jnp.float32 and b.dtype == jnp.float32:
        a = a.astype(jnp.float32)
    if a.dtype == jnp.float32 and b.dtype != jnp.float32:
        parts = jnp.concatenate(in_bfloat16(a)).astype(jnp.bfloat16)
        first, second, third = jnp.split(product(parts, b, contract=contract), 3)
        return (third + second) + first
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else lax.Precision.DEFAULT
    dims = (((1,), (contract,)), ((), ()))
    return lax.dot_general(a, b, dims, precision=precision, preferred_element_type=jnp.float32)


def in_bfloat16(x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return three float32 arrays that bfloat16 holds, and whose sum is `x`."""

    def leading(x: jax.Array) -> jax.Array:  # the 8 leading bits, cut off as conversions are not
        bits = lax.bitcast_convert_type(x, jnp.int32) & jnp.int32(-(2**16))
        return lax.bitcast_convert_type(bits, jnp.float32)

    first = leading(x)
    rest = jnp.where(jnp.abs(x) == jnp.inf, 0.0, x - first)
    second = leading(rest)
    return first, second, rest - second
