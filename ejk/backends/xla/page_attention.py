"""`ejk.page_attention` as an XLA program: runs everything, anywhere.

An online softmax over blocks of tokens, from the first block that any sequence sees to the last.
Temporary memory is two blocks, of keys and of values, and the logits of a block: at most
`BLOCK_BYTES` each of keys and values in float32, or one page a sequence where that is more. It does
not grow with the width of the table.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from ejk import _dispatch
from ejk._indices import Size, is_static, least
from ejk._rounding import rounded
from ejk.backends._fields import at_least
from ejk.backends.page_attention import (
    PageAttentionBackend,
    PageAttentionOperands,
    PageAttentionProblem,
)

# A CPU wants a block to stay in its caches: 8 sequences of 4,096 tokens (32/8/128, float32, pages
# of 16, two cores) took 70 ms with blocks of 2 MiB, 175 to 224 ms with 16 to 32 MiB. On the other
# platforms a step of the loop costs tens of microseconds, so blocks are large.
BLOCK_BYTES = {"cpu": 2 * 2**20}
BLOCK_BYTES_ELSEWHERE = 32 * 2**20
# What blocks are sized for where only those who run an export know the batch. Not measured.
SYMBOLIC_SEQS = 64


@dataclasses.dataclass(frozen=True)
class XlaPageAttention(PageAttentionBackend):
    """Run `ejk.page_attention` as an XLA program.

    Attributes:
        block_kv: tokens of each sequence that a step of the loop takes, in whole pages. None: at
            most 512, and as many as fit in 2 MiB of float32 keys on a CPU, 32 MiB elsewhere.
    """

    block_kv: int | None = None

    def __post_init__(self):
        at_least(self, block_kv=1)

    name = "xla"
    is_opaque = False
    features = frozenset(
        {
            "attn_logits_soft_cap",
            "sliding_window",
            "sinks",
            "alibi_slopes",
            "value_head_dim",
            "fused_pools",
            "return_lse",
            "axis_name",
            "axis_name with alibi_slopes",
            'cache_layout="HND"',
            'cache_layout="NHD"',
            'cache_layout="KV_HEADS_FIRST"',
        }
    )

    @property
    def platforms(self):
        return _dispatch.PLATFORMS

    def limits(self, problem, platform):
        return ()

    def run(self, problem, operands, platform):
        context = Context.of(problem, operands)
        block_bytes = BLOCK_BYTES.get(platform, BLOCK_BYTES_ELSEWHERE)
        blocks = Blocks.of(problem, block_bytes, self.block_kv)
        out, lse = _attend(problem, operands, context, blocks)
        return (out, lse) if problem.return_lse else (out,)


@dataclasses.dataclass(frozen=True)
class Context:
    """What each sequence sees: positions `[first, length)`."""

    length: jax.Array  # int32 [num_seqs]
    first: jax.Array  # int32 [num_seqs]

    @classmethod
    def of(cls, problem: PageAttentionProblem, operands: PageAttentionOperands) -> "Context":
        length = jnp.clip(operands.context_lens, 0, problem.capacity)
        if not problem.has_window:
            return cls(length, jnp.zeros_like(length))
        return cls(length, jnp.maximum(length - jnp.maximum(operands.sliding_window, 0), 0))


@dataclasses.dataclass(frozen=True)
class Blocks:
    """How the context is cut: `pages` of every sequence a step."""

    pages: int
    tokens: int

    @classmethod
    def of(
        cls, problem: PageAttentionProblem, block_bytes: int, tokens: int | None = None
    ) -> "Blocks":
        if tokens is None:
            # All sequences' keys or values of one token, in the type of the products.
            head_dim = max(problem.head_dim, problem.value_head_dim)
            num_seqs = problem.num_seqs if is_static(problem.num_seqs) else SYMBOLIC_SEQS
            tokens = min(512, block_bytes // (4 * num_seqs * problem.num_kv_heads * head_dim))
        pages = least(max(tokens // problem.page_size, 1), problem.max_blocks)
        return cls(pages, pages * problem.page_size)

    def span(self, context: Context) -> tuple[jax.Array, jax.Array]:
        """The blocks `[begin, end)` that some sequence sees a token of."""
        sees = context.first < context.length
        begin = jnp.min(jnp.where(sees, context.first, jnp.iinfo(jnp.int32).max))
        return begin // self.tokens, -(-jnp.max(context.length) // self.tokens)

    def load(self, problem, operands, context, tables, block):
        """Load one block: page ids, distances, which tokens are visible, keys and values."""
        pages = lax.dynamic_slice_in_dim(tables, block * self.pages, self.pages, axis=1)
        valid = (pages >= 0) & (pages < problem.num_pages)
        positions = block * self.tokens + jnp.arange(self.tokens, dtype=jnp.int32)
        visible = (
            (positions[None] >= context.first[:, None])
            & (positions[None] < context.length[:, None])
            & jnp.repeat(valid, problem.page_size, axis=1)
        )  # [num_seqs, tokens]
        pages = jnp.where(valid, pages, 0)
        keys, values = load_pages(problem, operands, pages, visible)
        return pages, self._distances(problem, operands, context, block), visible, keys, values

    def _distances(self, problem, operands, context, block):
        """Return the positions from each query to the tokens of a block, `[num_seqs, tokens]`."""
        tokens = jnp.arange(self.tokens, dtype=jnp.int32)
        if not problem.own_distances:
            return block * self.tokens + tokens[None] - (context.length[:, None] - 1)
        entries = block * self.pages + jnp.arange(self.pages, dtype=jnp.int32)
        begins = operands.page_distances.at[:, entries].get(mode="fill", fill_value=0)
        return jnp.repeat(begins, problem.page_size, axis=1) + tokens[None] % problem.page_size

    def pad(self, tables: jax.Array) -> jax.Array:
        """Widen the tables to whole blocks with invalid entries."""
        short = -(-tables.shape[1] // self.pages) * self.pages - tables.shape[1]
        return jnp.pad(tables, ((0, 0), (0, short)), constant_values=-1)


# The halves of fused pools. Each is gathered alone: both at once, taken apart later, took 71 ms
# instead of 47 (the sequences above, blocks of 256 tokens) and twice the temporary memory.
KEYS, VALUES = 0, 1


def page_index(problem, pages, half):
    """Return what selects `half` of `pages` in a pool: all of them where it holds nothing else."""
    chosen = (pages, half) if problem.fused else (pages,)
    return (slice(None),) * problem.layout.pages + chosen


def load_pages(problem, operands, pages, visible):
    """Read the keys and values of `pages [rows, pages]` where `visible [rows, tokens]`."""
    keys = _gather(problem, operands.key_cache, pages, KEYS, visible)
    if problem.latent:
        return keys, keys[..., : problem.value_head_dim]
    pool = operands.key_cache if problem.fused else operands.value_cache
    return keys, _gather(problem, pool, pages, VALUES, visible)


def _gather(problem, pool, pages, half, visible):
    """Read pages, with zeros for every slot that is not visible: it may hold NaN."""
    gathered = pool.at[page_index(problem, pages, half)].get(mode="promise_in_bounds")
    blocks = gathered.transpose(*problem.layout.gathered, 4)
    blocks = blocks.reshape(*blocks.shape[:2], -1, blocks.shape[4])
    # [num_seqs, num_kv_heads, tokens, head_dim]
    return jnp.where(visible[:, None, :, None], blocks, jnp.zeros((), blocks.dtype))


def logits(problem, operands, query, keys, distances):
    """Return every logit of a block, `[num_seqs, num_kv_heads, group, tokens]`, in float32."""
    scores = capped_products(problem, operands, query, keys)
    if problem.has_alibi:
        slopes = operands.alibi_slopes.reshape(1, problem.num_kv_heads, problem.group, 1)
        scores = scores + slopes * distances[:, None, None].astype(jnp.float32)
    return scores


def capped_products(problem, operands, query, keys):
    """Return the logits but for what depends on positions."""
    scores = operands.attn_scale * product("skgd,sktd->skgt", query, keys)
    if problem.soft_cap is not None:
        scores = problem.soft_cap * jnp.tanh(scores / problem.soft_cap)
    return scores


def product(formula: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """Multiply with float32 accumulation, and IEEE products for float32."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jnp.einsum(formula, a, b, precision=precision, preferred_element_type=jnp.float32)


def group_heads(problem, x: jax.Array) -> jax.Array:
    """Split axis 1 of `x`, query heads, in KV heads and the group that reads each."""
    return x.reshape(x.shape[0], problem.num_kv_heads, problem.group, *x.shape[2:])


def _attend(problem, operands, context, blocks):
    query = group_heads(problem, operands.query)
    tables = blocks.pad(operands.block_tables)

    def step(block, state):
        _, distances, visible, keys, values = blocks.load(problem, operands, context, tables, block)
        scores = logits(problem, operands, query, keys, distances)
        return accumulate(state, jnp.where(visible[:, None, None], scores, -jnp.inf), values)

    begin, end = blocks.span(context)
    state = lax.fori_loop(begin, end, step, nothing_seen(query.shape[:3], problem.value_head_dim))
    sinks = group_heads(problem, operands.sinks[None]) if problem.has_sinks else None
    out, lse = finish(state, sinks)
    heads = (problem.num_seqs, problem.num_heads)
    return rounded(out.reshape(*heads, -1), problem.out_dtype), lse.reshape(heads)


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
