"""An online softmax over blocks of a context, and what a block holds: for both attentions.

Query rows are `[batch, num_kv_heads, rows, ...]`: a batch of sequences with one token each, or of
items with several. The rows of a KV head are `tokens * group`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from ejk._indices import Size
from ejk.backends.page_attention import PageAttentionOperands, PagedProblem
from ejk.backends.ragged_page_attention import RaggedPageAttentionOperands

# A CPU wants a block to stay in its caches: 8 sequences of 4,096 tokens (32/8/128, float32, pages
# of 16, two cores) took 70 ms with blocks of 2 MiB, 175 to 224 ms with 16 to 32 MiB. On the other
# platforms a step of the loop costs tens of microseconds, so blocks are large.
BLOCK_BYTES = {"cpu": 2 * 2**20}
BLOCK_BYTES_ELSEWHERE = 32 * 2**20

Operands = PageAttentionOperands | RaggedPageAttentionOperands


class Block(NamedTuple):
    """One block of the contexts of a batch: so many pages of each."""

    pages: jax.Array  # int32 [batch, pages], of which none is invalid
    ahead: jax.Array  # int32 [batch, tokens, keys]: positions from each query token on
    visible: jax.Array  # bool [batch, tokens, keys]
    keys: jax.Array  # [batch, num_kv_heads, keys, head_dim], zero where nobody sees them
    values: jax.Array

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
        keys = _gather(problem, operands.key_cache, pages, KEYS, seen)
        if problem.latent:
            return cls(pages, ahead, visible, keys, keys[..., : problem.value_head_dim])
        pool = operands.key_cache if problem.fused else operands.value_cache
        return cls(pages, ahead, visible, keys, _gather(problem, pool, pages, VALUES, seen))

    def logits(
        self, problem: PagedProblem, operands: Operands, query: jax.Array, keys: jax.Array
    ) -> jax.Array:
        """Return every logit, `[batch, num_kv_heads, rows, keys]`, in float32."""
        scores = operands.attn_scale * product("skgd,sktd->skgt", query, keys)
        if problem.soft_cap is not None:
            scores = problem.soft_cap * jnp.tanh(scores / problem.soft_cap)
        if not problem.has_alibi:
            return scores
        slopes = operands.alibi_slopes.reshape(1, problem.num_kv_heads, 1, problem.group, 1)
        ahead = slopes * self.ahead[:, None, :, None].astype(jnp.float32)
        return scores + ahead.reshape(scores.shape)

    def visible_rows(self, problem: PagedProblem) -> jax.Array:
        """Say which tokens each row of the logits sees: `[batch, 1, rows, keys]`."""
        return jnp.repeat(self.visible, problem.group, axis=1)[:, None]


# The halves of fused pools. Each is gathered alone: both at once, taken apart later, took 71 ms
# instead of 47 (the sequences above, blocks of 256 tokens) and twice the temporary memory.
KEYS, VALUES = 0, 1


def page_index(problem: PagedProblem, pages: jax.Array, half: int) -> tuple[Any, ...]:
    """Return what selects `half` of `pages` in a pool: all of them where it holds nothing else."""
    chosen = (pages, half) if problem.fused else (pages,)
    return (slice(None),) * problem.layout.pages + chosen


def _gather(
    problem: PagedProblem, pool: jax.Array, pages: jax.Array, half: int, seen: jax.Array
) -> jax.Array:
    """Read pages, with zeros for every slot that nobody has seen: it may hold NaN."""
    gathered = pool.at[page_index(problem, pages, half)].get(mode="promise_in_bounds")
    block = gathered.transpose(*problem.layout.gathered, 4)
    block = block.reshape(*block.shape[:2], -1, block.shape[4])
    # [batch, num_kv_heads, keys, head_dim]
    return jnp.where(seen[:, None, :, None], block, jnp.zeros((), block.dtype))


def product(formula: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """Multiply with float32 accumulation, and IEEE products for float32."""
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
        scores = block.logits(problem, operands, query, block.keys)
        scores = jnp.where(block.visible_rows(problem), scores, -jnp.inf)
        return accumulate(state, scores, block.values)

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


def accumulate(state: State, scores: jax.Array, values: jax.Array) -> State:
    """See one more block: logits `[..., rows, tokens]`, -inf where a token is not visible."""
    m, l, acc = state
    m_new = jnp.maximum(m, scores.max(-1))
    m_safe = jnp.where(m_new == -jnp.inf, 0.0, m_new)
    p = jnp.exp(scores - m_safe[..., None])
    alpha = jnp.exp(m - m_safe)
    acc = acc * alpha[..., None] + product("skgt,sktd->skgd", p.astype(values.dtype), values)
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
