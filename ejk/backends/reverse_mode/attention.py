"""Reverse mode of attention to pages: what is the same for every operation and every backend.

The forward pass keeps the LSE; the backward pass recomputes the weights from it, a block of tokens
at a time, as an XLA program. With `p_j = exp(l_j - lse)`, the output's cotangent `g` and the LSE's
`h`:

    D      = sum over j of p_j * (g . v_j)
    d l_j  = p_j * (g . v_j - D + h)
    d sink = exp(sink - lse) * (h - D)
    d v_j  = p_j * g

A first pass over the context sums `D` and the weights, which the second divides by their sum: the
LSE's rounding would otherwise be an error of every weight, and that of a 16-bit output one of `D`.
What no visible token owns gets exactly 0, whatever it holds.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from ejk import _backend, _dispatch, _partition
from ejk.backends.page_attention import PagedProblem
from ejk.backends.reverse_mode import with_pull_back
from ejk.backends.xla._softmax import KEYS, VALUES, Block, Operands, page_index, product

# One size for all platforms: the backward pass does not know which it is lowered for.
BLOCK_BYTES = 8 * 2**20


def reverse_mode(pull_back: Callable[[Any, Any, Any], Any]) -> Callable[..., Any]:
    """Return a function `(problem, choice, operands)` that runs a backend and can be pulled back.

    `pull_back(problem, (operands, lse), cotangents)` returns the operands' cotangents.
    """

    def forward(problem: PagedProblem, choice: _backend.Choice, operands: Any) -> tuple[Any, Any]:
        with_lse = dataclasses.replace(problem, return_lse=True)
        out, lse = _dispatch.call(with_lse, choice, operands)
        return (out, lse) if problem.return_lse else (out,), (operands, lse)

    def backward(problem: PagedProblem, kept: Any, cotangents: Any) -> Any:
        pull = _partition.left_to_xla(functools.partial(pull_back, problem), kept[0])
        return pull(kept, cotangents)

    call = with_pull_back(forward, backward)

    @_dispatch.compiled
    def differentiable(problem: PagedProblem, choice: _backend.Choice, operands: Any) -> Any:
        scale = problem.head_dim**-0.5 if operands.attn_scale is None else operands.attn_scale
        operands = operands._replace(attn_scale=jnp.asarray(scale).astype(jnp.float32))
        return call(problem, choice, _dispatch.vary_together(operands))

    return differentiable


class Rows(NamedTuple):
    """Query rows, `[batch, num_kv_heads, rows, ...]`, and what came back for their results."""

    query: jax.Array
    g: jax.Array  # cotangent of the output
    h: jax.Array  # of the LSE
    lse: jax.Array
    sinks: jax.Array | None  # [1, num_kv_heads, rows], or with all of the batch

    def without_minus_infinity(self) -> "Rows":
        """Give rows that see nothing an LSE that makes no NaN: they have no gradient anyway."""
        return self._replace(lse=jnp.where(self.lse == -jnp.inf, 0.0, self.lse))


class Sums(NamedTuple):
    """What the first pass adds up, `[batch, num_kv_heads, rows]`."""

    weights: jax.Array
    weighted: jax.Array  # each weight times `g . v_j`

    @classmethod
    def none(cls, rows: Rows) -> "Sums":
        return cls(jnp.zeros_like(rows.lse), jnp.zeros_like(rows.lse))

    def add(self, problem: PagedProblem, operands: Operands, rows: Rows, block: Block) -> "Sums":
        scores = block.logits(problem, operands, rows.query, block.keys)
        visible = block.visible_rows(problem)
        p = jnp.where(visible, jnp.exp(scores - rows.lse[..., None]), 0.0)
        dp = product("skgd,sktd->skgt", rows.g, block.values.astype(rows.g.dtype))
        return Sums(self.weights + p.sum(-1), self.weighted + (p * dp).sum(-1))


class Softmax(NamedTuple):
    """Query rows once all that they see is known."""

    rows: Rows
    total: jax.Array  # what weights are to be divided by
    delta: jax.Array  # h - D

    @classmethod
    def of(cls, rows: Rows, sums: Sums) -> "Softmax":
        # The query of a row that sees nothing may hold NaN, which times 0 is NaN.
        sees = sums.weights > 0
        rows = rows._replace(query=jnp.where(sees[..., None], rows.query, 0))
        total = sums.weights
        if rows.sinks is not None:
            total = total + jnp.exp(rows.sinks - rows.lse)
        total = jnp.where(total == 0, 1.0, total)
        return cls(rows, total, rows.h - sums.weighted / total)

    def pull_back(self, problem: PagedProblem, operands: Operands, block: Block) -> tuple[Any, ...]:
        """Return the cotangents of query, keys, values, scale and slopes that a block makes."""
        visible = block.visible_rows(problem)

        def visible_logits(query: jax.Array, keys: jax.Array, scale: jax.Array, slopes: Any):
            given = operands._replace(attn_scale=scale, alibi_slopes=slopes)
            return jnp.where(visible, block.logits(problem, given, query, keys), 0.0)

        rows = self.rows
        inputs = (rows.query, block.keys, operands.attn_scale, operands.alibi_slopes)
        scores, pullback = jax.vjp(visible_logits, *inputs)
        p = jnp.exp(scores - rows.lse[..., None]) / self.total[..., None]
        p = jnp.where(visible, p, 0.0)
        dp = product("skgd,sktd->skgt", rows.g, block.values.astype(rows.g.dtype))
        d_query, d_keys, d_scale, d_slopes = pullback(p * (dp + self.delta[..., None]))
        d_values = product("skgt,skgd->sktd", p.astype(rows.g.dtype), rows.g)
        if problem.latent:
            width = problem.head_dim - problem.value_head_dim
            d_keys = d_keys + jnp.pad(d_values, ((0, 0),) * 3 + ((0, width),)).astype(d_keys.dtype)
        return d_query.astype(jnp.float32), d_keys, d_values, d_scale, d_slopes

    def pull_back_sinks(self) -> jax.Array:
        """Return what each row adds to the cotangent of its sink."""
        assert self.rows.sinks is not None
        return jnp.exp(self.rows.sinks - self.rows.lse) / self.total * self.delta


def pull_back_rows(
    problem: PagedProblem,
    operands: Operands,
    rows: Rows,
    span: tuple[jax.Array, jax.Array],
    load: Callable[[jax.Array], Block],
    grads: Any,
) -> tuple[Any, jax.Array, jax.Array | None]:
    """Pull back rows that see the blocks `[begin, end)` of `span`.

    Returns `grads` with the cotangents of pools, scale and slopes added, and those of the rows'
    queries and sinks.
    """

    def add_up(number: jax.Array, sums: Sums) -> Sums:
        return sums.add(problem, operands, rows, load(number))

    def step(number: jax.Array, carry: tuple[Any, jax.Array]) -> tuple[Any, jax.Array]:
        (grads, d_rows), block = carry, load(number)
        d_query, d_keys, d_values, d_scale, d_slopes = softmax.pull_back(problem, operands, block)
        grads = _add_to_pools(problem, grads, block.pages, d_keys, d_values)
        grads = grads._replace(
            attn_scale=grads.attn_scale + d_scale,
            alibi_slopes=grads.alibi_slopes + d_slopes if problem.has_alibi else None,
        )
        return grads, d_rows + d_query

    rows = rows.without_minus_infinity()
    softmax = Softmax.of(rows, lax.fori_loop(*span, add_up, Sums.none(rows)))
    nothing = jnp.zeros_like(rows.query, jnp.float32)
    grads, d_rows = lax.fori_loop(*span, step, (grads, nothing))
    return grads, d_rows, softmax.pull_back_sinks() if problem.has_sinks else None


def _add_to_pools(
    problem: PagedProblem, grads: Any, pages: jax.Array, d_keys: jax.Array, d_values: jax.Array
) -> Any:
    """Add a block's cotangents to those of `key_cache` and `value_cache` in `grads`."""
    key_cache = _scatter(problem, grads.key_cache, pages, KEYS, d_keys)
    value_cache = grads.value_cache
    if problem.fused:
        key_cache = _scatter(problem, key_cache, pages, VALUES, d_values)
    elif not problem.latent:
        value_cache = _scatter(problem, value_cache, pages, VALUES, d_values)
    return grads._replace(key_cache=key_cache, value_cache=value_cache)


def _scatter(
    problem: PagedProblem, grad: jax.Array, pages: jax.Array, half: int, block: jax.Array
) -> jax.Array:
    """Add `[batch, num_kv_heads, keys, head_dim]` to the pool; pages may occur twice."""
    batch, num_kv_heads, _, head_dim = block.shape
    block = block.astype(jnp.float32)
    block = block.reshape(batch, num_kv_heads, -1, problem.page_size, head_dim)
    block = jnp.moveaxis(block, (0, 1, 2, 3), problem.layout.gathered)
    return grad.at[page_index(problem, pages, half)].add(block, mode="promise_in_bounds")


def float_zeros(operands: Any) -> Any:
    """Return float32 zeros for each float operand, None for the integers."""

    def zeros(x: Any) -> jax.Array | None:
        if x is None or not jnp.issubdtype(x.dtype, jnp.floating):
            return None
        return jnp.zeros_like(x, jnp.float32)

    return type(operands)(*map(zeros, operands))


def as_given(grads: Any, operands: Any) -> Any:
    """Round each cotangent to its operand's dtype."""
    rounded = (None if d is None else d.astype(x.dtype) for d, x in zip(grads, operands))
    return type(operands)(*rounded)
