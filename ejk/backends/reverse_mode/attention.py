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
from ejk._dtypes import DTYPES
from ejk.backends.paged_problem import PagedProblem
from ejk.backends.reverse_mode import with_pull_back
from ejk.backends.xla._softmax import KEYS, VALUES, Block, Operands, page_index, product

# A CPU wants a block to stay in its caches; a GPU waits for the launches of each step. By the clock
# on an H200, 2 x 4,096 tokens of 32/8/128 take 39.3 ms with 8 MiB and 19.5 with 64; 64 x 256 take
# 13.5, 6.9 with 32, 5.6 with 64, 5.3 with 128 and 4.4 with 512, with eight times the memory of 64.
CPU_BLOCK_BYTES, BLOCK_BYTES = 8 * 2**20, 64 * 2**20


def reverse_mode(
    sizes_of: Callable[[Any, int], Any], pull_back: Callable[[Any, Any, Any, Any], Any]
) -> Callable[..., Any]:
    """Return a function `(problem, choice, operands)` that runs a backend and can be pulled back.

    `pull_back(problem, sizes, (operands, lse), cotangents)` returns the operands' cotangents, in
    blocks of `sizes_of(problem, bytes)`.
    """

    def forward(problem: PagedProblem, choice: _backend.Choice, operands: Any) -> tuple[Any, Any]:
        with_lse = dataclasses.replace(problem, return_lse=True)
        out, lse = _dispatch.call(with_lse, choice, operands)
        return (out, lse) if problem.return_lse else (out,), (operands, lse)

    def backward(problem: PagedProblem, kept: Any, cotangents: Any) -> Any:
        small, large = (sizes_of(problem, size) for size in (CPU_BLOCK_BYTES, BLOCK_BYTES))
        pull = functools.partial(pull_back, problem, large)
        if small != large:
            cpu = functools.partial(pull_back, problem, small)
            pull = functools.partial(lax.platform_dependent, cpu=cpu, default=pull)
        return _partition.left_to_xla(pull, kept[0])(kept, cotangents)

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
    """What the first pass finds, `[batch, num_kv_heads, rows]`."""

    sees: jax.Array  # whether there is a visible token, of whatever weight
    weights: jax.Array
    weighted: jax.Array  # each weight times `g . v_j`

    @classmethod
    def none(cls, rows: Rows) -> "Sums":
        nothing = jnp.zeros_like(rows.lse)
        return cls(nothing > 0, nothing, nothing)

    def add(self, problem: PagedProblem, operands: Operands, rows: Rows, block: Block) -> "Sums":
        scores = block.logits(problem, operands, rows.query)
        visible = block.visible_rows(problem)
        p = jnp.where(visible, jnp.exp(scores - rows.lse[..., None]), 0.0)
        dp = _of_values(rows.g, block)
        sees = self.sees | visible.any(-1)
        weighted = jnp.where(visible, p * dp, 0.0)  # a scale of nothing visible may be NaN
        return Sums(sees, self.weights + p.sum(-1), self.weighted + weighted.sum(-1))


class Softmax(NamedTuple):
    """Query rows once all that they see is known."""

    rows: Rows
    total: jax.Array  # what weights are to be divided by
    delta: jax.Array  # h - D

    @classmethod
    def of(cls, rows: Rows, sums: Sums) -> "Softmax":
        # The query of a row that sees nothing may hold NaN, which times 0 is NaN.
        rows = rows._replace(query=jnp.where(sums.sees[..., None], rows.query, 0))
        total = sums.weights
        if rows.sinks is not None:
            total = total + jnp.exp(rows.sinks - rows.lse)
        total = jnp.where(total == 0, 1.0, total)
        return cls(rows, total, rows.h - sums.weighted / total)

    def pull_back(self, problem: PagedProblem, operands: Operands, block: Block) -> "Cotangents":
        """Return the cotangents that a block makes."""
        visible = block.visible_rows(problem)

        def visible_logits(query: Any, keys: Any, key_scale: Any, scale: Any, slopes: Any) -> Any:
            given = operands._replace(attn_scale=scale, alibi_slopes=slopes)
            own = block._replace(keys=keys, key_scale=key_scale)
            return jnp.where(visible, own.logits(problem, given, query), 0.0)

        rows, own = self.rows, (block.keys, block.key_scale)
        inputs = (rows.query, *own, operands.attn_scale, operands.alibi_slopes)
        scores, pullback = jax.vjp(visible_logits, *inputs)
        p = jnp.exp(scores - rows.lse[..., None]) / self.total[..., None]
        p = jnp.where(visible, p, 0.0)
        dp = _of_values(rows.g, block)
        d_query, d_keys, d_key_scale, d_scale, d_slopes = pullback(p * (dp + self.delta[..., None]))
        d_values = product("skgt,skgd->sktd", p.astype(rows.g.dtype), rows.g)
        if block.value_scale is not None:  # that of a head may be NaN where nobody sees a token
            seen = visible.any(2)[..., None]
            d_values = jnp.where(seen, block.value_scale[..., None] * d_values, 0.0)
        d_value_scale = _of_value_scale(problem, p, rows.g, block, visible)
        if problem.latent:
            width = problem.head_dim - problem.value_head_dim
            d_keys = d_keys + jnp.pad(d_values, ((0, 0),) * 3 + ((0, width),)).astype(d_keys.dtype)
            d_key_scale = None if d_value_scale is None else d_key_scale + d_value_scale
        d_query = d_query.astype(jnp.float32)
        return Cotangents(d_query, d_keys, d_values, d_key_scale, d_value_scale, d_scale, d_slopes)

    def pull_back_sinks(self) -> jax.Array:
        """Return what each row adds to the cotangent of its sink."""
        assert self.rows.sinks is not None
        return jnp.exp(self.rows.sinks - self.rows.lse) / self.total * self.delta


class Cotangents(NamedTuple):
    """What a block of keys and values adds to those of the operands: to pools' of its own slots."""

    query: jax.Array
    keys: jax.Array
    values: jax.Array
    key_scale: jax.Array | None
    value_scale: jax.Array | None
    attn_scale: jax.Array
    alibi_slopes: jax.Array | None


def _of_values(g: jax.Array, block: Block) -> jax.Array:
    """Return the output's cotangent times each value, `[batch, num_kv_heads, rows, keys]`."""
    dp = product("skgd,sktd->skgt", g, block.values)
    return dp if block.value_scale is None else dp * block.value_scale[:, :, None]


def _of_value_scale(
    problem: PagedProblem, p: jax.Array, g: jax.Array, block: Block, visible: jax.Array
) -> jax.Array | None:
    """Return what a block adds to the cotangent of its values' scales, in their shape."""
    if block.value_scale is None:
        return None
    unscaled = product("skgd,sktd->skgt", g, block.values)
    of_tokens = jnp.where(visible, p * unscaled, 0.0).sum(2)
    return of_tokens.sum((0, 2), keepdims=True) if problem.scales == "head" else of_tokens


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
        d = softmax.pull_back(problem, operands, block)
        grads = _add_to_pools(problem, grads, block.pages, d)
        grads = grads._replace(
            attn_scale=grads.attn_scale + d.attn_scale,
            alibi_slopes=grads.alibi_slopes + d.alibi_slopes if problem.has_alibi else None,
        )
        return grads, d_rows + d.query

    rows = rows.without_minus_infinity()
    softmax = Softmax.of(rows, lax.fori_loop(*span, add_up, Sums.none(rows)))
    nothing = jnp.zeros_like(rows.query, jnp.float32)
    grads, d_rows = lax.fori_loop(*span, step, (grads, nothing))
    return grads, d_rows, softmax.pull_back_sinks() if problem.has_sinks else None


def _add_to_pools(problem: PagedProblem, grads: Any, pages: jax.Array, d: Cotangents) -> Any:
    """Add a block's cotangents to those of the pools and their scales in `grads`."""
    added: list[tuple[str, int, Any]] = []
    if not problem.cache_type.is_quantised:
        added += [("key_cache", KEYS, d.keys), ("value_cache", VALUES, d.values)]
    if problem.scales != "none":
        added += [("key_scale", KEYS, d.key_scale), ("value_scale", VALUES, d.value_scale)]
    for name, half, block in added:
        if half == VALUES and problem.latent:
            continue  # they are the keys'
        if half == VALUES and getattr(grads, name) is None:  # they lie in fused pools
            name = name.replace("value", "key")
        grad = getattr(grads, name)
        is_of_head = grad.ndim == 1
        grad = grad + block[0, :, 0] if is_of_head else _scatter(problem, grad, pages, half, block)
        grads = grads._replace(**{name: grad})
    return grads


def _scatter(
    problem: PagedProblem, grad: jax.Array, pages: jax.Array, half: int, block: jax.Array
) -> jax.Array:
    """Add `[batch, num_kv_heads, keys, ...]` to the pool; pages may occur twice."""
    batch, num_kv_heads, _, *width = block.shape
    block = block.astype(jnp.float32)
    block = block.reshape(batch, num_kv_heads, -1, problem.page_size, *width)
    block = jnp.moveaxis(block, (0, 1, 2, 3), problem.layout.gathered)
    return grad.at[page_index(problem, pages, half)].add(block, mode="promise_in_bounds")


def float_zeros(operands: Any) -> Any:
    """Return float32 zeros for each float operand, None for integers and for float8."""

    def zeros(x: Any) -> jax.Array | None:
        if x is None or x.dtype.name not in DTYPES:
            return None
        return jnp.zeros_like(x, jnp.float32)

    return type(operands)(*map(zeros, operands))


def as_given(grads: Any, operands: Any) -> Any:
    """Round each cotangent to its operand's dtype."""
    rounded = (None if d is None else d.astype(x.dtype) for d, x in zip(grads, operands))
    return type(operands)(*rounded)
