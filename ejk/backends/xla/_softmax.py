"""An online softmax over blocks of a context, and what a block holds: for both attentions.

Query rows are `[batch, num_kv_heads, rows, ...]`: a batch of sequences with one token each, or of
items with several. The rows of a KV head are `tokens * group`.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from ejk._cache_types import codes_of
from ejk._indices import Size
from ejk.backends.page_attention import PageAttentionOperands
from ejk.backends.paged_problem import PagedProblem
from ejk.backends.ragged_page_attention import RaggedPageAttentionOperands

# So many float32 products of a logit are added up at most before their sum is added to others. A
# CPU adds one after the other: a call with 576 was off by 1.6 times the error bound, in chains of
# 288 by 1.3, of 192 by 0.45 and of 128 by 0.23 times; one with 256 by 0.77. Chains of 128 take 5 %
# longer: 8 sequences of 4,096 latent tokens, 128 heads, two cores, 132 ms for 125.
LONGEST_CHAIN = 128

Operands = PageAttentionOperands | RaggedPageAttentionOperands


def bytes_of_block(platform: str) -> int:
    """Return how large a block's keys may be in float32, and its values.

    A CPU wants a block to stay in its caches: 8 sequences of 4,096 tokens (32/8/128, float32, pages
    of 16, two cores) took 70 ms with blocks of 2 MiB, 175 to 224 ms with 16 to 32 MiB. On the other
    platforms a step of the loop costs tens of microseconds, so blocks are large.
    """
    return 2 * 2**20 if platform == "cpu" else 32 * 2**20


class Block(NamedTuple):
    """One block of the contexts of a batch: so many pages of each."""

    pages: jax.Array  # int32 [batch, pages], of which none is invalid
    ahead: jax.Array  # int32 [batch, tokens, keys]: positions from each query token on
    visible: jax.Array  # bool [batch, tokens, keys]
    keys: jax.Array  # [batch, num_kv_heads, keys, head_dim], zero where nobody sees them
    values: jax.Array
    key_scale: jax.Array | None  # float32 [1, num_kv_heads, 1] or [batch, num_kv_heads, keys]
    value_scale: jax.Array | None

    @classmethod
    def load(
        cls,
        problem: PagedProblem,
        operands: Operands,
        entries: jax.Array,
        ahead: jax.Array,
        visible: jax.Array,
    ) -> "Block":
        """Read the pages of table `entries [batch, pages]`; who is invalid is `visible` to none."""
        valid = (entries >= 0) & (entries < problem.num_pages)
        visible = visible & jnp.repeat(valid, problem.page_size, axis=1)[:, None]
        pages, seen = jnp.where(valid, entries, 0), visible.any(1)
        keys = _numbers(problem, operands.key_cache, pages, KEYS, seen)
        key_scale = _scales(problem, operands.key_scale, pages, KEYS, seen)
        if problem.latent:
            values = keys[..., : problem.value_head_dim]
            return cls(pages, ahead, visible, keys, values, key_scale, key_scale)
        pool, scale = operands.value_cache, operands.value_scale
        if problem.fused:
            pool, scale = operands.key_cache, operands.key_scale if scale is None else scale
        values = _numbers(problem, pool, pages, VALUES, seen)
        value_scale = _scales(problem, scale, pages, VALUES, seen)
        return cls(pages, ahead, visible, keys, values, key_scale, value_scale)

    def logits(self, problem: PagedProblem, operands: Operands, query: jax.Array) -> jax.Array:
        """Return every logit, `[batch, num_kv_heads, rows, keys]`, in float32."""
        scores = operands.attn_scale * _query_key_products(query, self.keys)
        if self.key_scale is not None:
            scores = scores * self.key_scale[:, :, None]
        if problem.soft_cap is not None:
            scores = problem.soft_cap * jnp.tanh(scores / problem.soft_cap)
        if not problem.has_alibi:
            return scores
        slopes = operands.alibi_slopes.reshape(1, problem.num_kv_heads, 1, problem.group, 1)
        ahead = slopes * self.ahead[:, None, :, None].astype(jnp.float32)
        return scores + ahead.reshape(scores.shape)

    def sum_of_values(self, weights: jax.Array, visible: jax.Array) -> jax.Array:
        """Return the values' sum, each times one of `weights [batch, num_kv_heads, rows, keys]`."""
        weights, unit = self.with_value_scale(weights, visible)
        total = product("skgt,sktd->skgd", weights.astype(self.values.dtype), self.values)
        return total if unit is None else unit * total

    def with_value_scale(
        self, weights: jax.Array, visible: jax.Array
    ) -> tuple[jax.Array, jax.Array | None]:
        """Return weights of the values as they are stored, and what their sum is to be times.

        That is the largest scale that a row sees, `[batch, num_kv_heads, rows, 1]`: no weight
        exceeds its own size, so float16 holds them as well as it does without scales, whatever the
        scales are that other rows see. Scales may be NaN or infinite.
        """
        if self.value_scale is None:
            return weights, None
        scale = self.value_scale[:, :, None]
        sizes = jnp.where(visible & jnp.isfinite(scale), jnp.abs(scale), 0.0)
        unit = sizes.max(-1, keepdims=True)
        unit = jnp.where(unit > 0, unit, 1.0)
        scaled = weights * (scale / unit)
        return jnp.where(visible, scaled, 0.0), unit

    def visible_rows(self, problem: PagedProblem) -> jax.Array:
        """Say which tokens each row of the logits sees: `[batch, 1, rows, keys]`."""
        return jnp.repeat(self.visible, problem.group, axis=1)[:, None]


# The halves of fused pools. Each is gathered alone: both at once, taken apart later, took 71 ms
# instead of 47 (the sequences above, blocks of 256 tokens) and twice the temporary memory.
KEYS, VALUES = 0, 1


def page_index(problem: PagedProblem, pages: jax.Array, half: int) -> tuple[Any, ...]:
    """Return what selects `half` of `pages` in a pool: all of them where it holds nothing else."""
    if problem.layout.interleaved:
        places = 2 * jnp.arange(problem.num_kv_heads, dtype=jnp.int32) + half
        return pages[:, :, None], slice(None), places
    chosen = (pages, half) if problem.fused else (pages,)
    return (slice(None),) * problem.layout.pages + chosen


def _numbers(
    problem: PagedProblem, pool: jax.Array, pages: jax.Array, half: int, seen: jax.Array
) -> jax.Array:
    """Read keys or values as products take them, without their scales."""
    is_float8 = problem.cache_dtype.name.startswith("float8")
    if is_float8:
        # On a CPU, XLA takes float8 for float16 and would convert the whole pool first, and bytes
        # of it would be a copy outside of the loop.
        pool, pages = lax.optimization_barrier((pool, pages))
        pool = lax.bitcast_convert_type(pool, jnp.uint8)
    block = _gather(problem, pool, pages, half, seen)
    if is_float8:
        block = lax.bitcast_convert_type(block, problem.cache_dtype)
    if not problem.cache_type.is_quantised:
        return block.astype(wider(problem.query_dtype, problem.cache_dtype))
    return codes_of(block, problem.cache_type).astype(problem.query_dtype)


def _scales(
    problem: PagedProblem, scale: jax.Array | None, pages: jax.Array, half: int, seen: jax.Array
) -> jax.Array | None:
    """Read scales, `[1, num_kv_heads, 1]` or `[batch, num_kv_heads, keys]`."""
    if scale is None:
        return None
    if problem.scales == "head":
        return scale[None, :, None]
    return _gather(problem, scale, pages, half, seen)


def _gather(
    problem: PagedProblem, pool: jax.Array, pages: jax.Array, half: int, seen: jax.Array
) -> jax.Array:
    """Read pages, with zeros for every slot that nobody has seen: it may hold NaN."""
    gathered = pool.at[page_index(problem, pages, half)].get(mode="promise_in_bounds")
    block = gathered.transpose(*problem.layout.gathered, *range(4, gathered.ndim))
    block = block.reshape(*block.shape[:2], -1, *block.shape[4:])
    # [batch, num_kv_heads, keys, head_dim], or without the last axis
    seen = seen.reshape(seen.shape[0], 1, -1, *[1] * (block.ndim - 3))
    return jnp.where(seen, block, jnp.zeros((), block.dtype))


def wider(dtype: Any, other: Any) -> Any:
    """Return the type that holds the numbers of two, of which no 16-bit one holds another's."""
    return dtype if dtype == other else jnp.float32


def _query_key_products(query: jax.Array, keys: jax.Array) -> jax.Array:
    """Return the products that logits are made of, `[batch, num_kv_heads, rows, keys]`."""
    width, is_float32 = query.shape[-1], wider(query.dtype, keys.dtype) == jnp.float32
    if not is_float32 or width <= LONGEST_CHAIN:
        return product("skgd,sktd->skgt", query, keys)
    chains = [slice(i, i + LONGEST_CHAIN) for i in range(0, width, LONGEST_CHAIN)]
    sums = (product("skgd,sktd->skgt", query[..., x], keys[..., x]) for x in chains)
    return functools.reduce(jnp.add, sums)


def product(formula: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """Multiply with float32 accumulation, and IEEE products for float32, which widens the other."""
    a, b = (x.astype(wider(a.dtype, b.dtype)) for x in (a, b))
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jnp.einsum(formula, a, b, precision=precision, preferred_element_type=jnp.float32)


def attend(
    problem: PagedProblem,
    operands: Operands,
    query: jax.Array,
    sinks: jax.Array | None,
    span: tuple[jax.Array, jax.Array],
    load: Callable[[jax.Array], Block],
) -> tuple[jax.Array, jax.Array]:
    """Return output and LSE of query rows that see the blocks `[begin, end)` of `span`."""

    def step(number: jax.Array, state: State) -> State:
        block = load(number)
        visible = block.visible_rows(problem)
        scores = jnp.where(visible, block.logits(problem, operands, query), -jnp.inf)
        return accumulate(state, scores, block, visible)

    state = nothing_seen(query.shape[:3], problem.value_head_dim)
    return finish(lax.fori_loop(*span, step, state), sinks)


State = tuple[jax.Array, jax.Array, jax.Array]
"""The running maximum `m`, the sum `l` and the weighted values `acc` of an online softmax."""


def nothing_seen(rows: tuple[Size, ...], value_head_dim: int) -> State:
    return (
        jnp.full(rows, -jnp.inf, jnp.float32),
        jnp.zeros(rows, jnp.float32),
        jnp.zeros((*rows, value_head_dim), jnp.float32),
    )


def accumulate(state: State, scores: jax.Array, block: Block, visible: jax.Array) -> State:
    """See one more block: logits `[..., rows, tokens]`, -inf where a token is not visible."""
    m, l, acc = state
    m_new = jnp.maximum(m, scores.max(-1))
    m_safe = jnp.where(m_new == -jnp.inf, 0.0, m_new)
    p = jnp.exp(scores - m_safe[..., None])
    alpha = jnp.exp(m - m_safe)
    acc = acc * alpha[..., None] + block.sum_of_values(p, visible)
    return m_new, l * alpha + p.sum(-1), acc


def finish(state: State, sinks: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """Return the output and the LSE of each row."""
    m, l, acc = state
    if sinks is not None:
        m_new = jnp.maximum(m, sinks)
        m_safe = jnp.where(m_new == -jnp.inf, 0.0, m_new)
        alpha = jnp.exp(m - m_safe)
        m, l, acc = m_new, l * alpha + jnp.exp(sinks - m_safe), acc * alpha[..., None]
    empty = l == 0
    out = jnp.where(empty[..., None], 0.0, acc / jnp.where(empty, 1.0, l)[..., None])
    return out, jnp.where(empty, -jnp.inf, m + jnp.log(jnp.where(empty, 1.0, l)))
