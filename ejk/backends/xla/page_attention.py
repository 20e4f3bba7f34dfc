"""`ejk.page_attention` as an XLA program: runs everything, anywhere.

An online softmax over blocks of tokens, from the first block that any sequence sees to the last.
Temporary memory is two blocks, of keys and of values, and the logits of a block: at most
`bytes_of_block` each of keys and values, or one page a sequence where that is more. It does
not grow with the width of the table.
"""

import dataclasses
import functools
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from ejk._backend import Tunable
from ejk._indices import is_static, least
from ejk._rounding import rounded
from ejk.backends._fields import at_least
from ejk.backends.layouts import POOLS
from ejk.backends.page_attention import (
    PageAttentionBackend,
    PageAttentionOperands,
    PageAttentionProblem,
)
from ejk.backends.paged_problem import AXIS, CACHES, PagedProblem
from ejk.backends.xla._backend import XlaBackend
from ejk.backends.xla._softmax import Block, attend, bytes_of_block

# What blocks are sized for where only those who run an export know the batch. Not measured.
SYMBOLIC_SEQS = 64


@dataclasses.dataclass(frozen=True)
class XlaPageAttention(XlaBackend, PageAttentionBackend):
    """Run `ejk.page_attention` as an XLA program.

    Attributes:
        block_kv: tokens of each sequence that a step of the loop takes, in whole pages. None: at
            most 512, and as many as fit in 2 MiB of float32 keys on a CPU, 32 MiB elsewhere.
    """

    block_kv: int | None = None

    features = (
        frozenset({"attn_logits_soft_cap", "sliding_window", "sinks", "alibi_slopes"})
        | {"value_head_dim", "return_lse"}
        | POOLS
        | AXIS
        | CACHES
    )
    tunable: ClassVar[Tunable] = {"block_kv": (64, 128, 256, 512, 1024, 2048)}

    def __post_init__(self):
        at_least(self, block_kv=1)

    def run(
        self, problem: PageAttentionProblem, operands: PageAttentionOperands, platform: str
    ) -> tuple[jax.Array, ...]:
        sizes = Sizes.of(problem, bytes_of_block(platform), self.block_kv)
        out, lse = _attend(problem, operands, sizes)
        return (out, lse) if problem.return_lse else (out,)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How the contexts are cut: so much of each of them a step."""

    pages: int
    tokens: int

    @classmethod
    def of(
        cls, problem: PageAttentionProblem, block_bytes: int, tokens: int | None = None
    ) -> "Sizes":
        if tokens is None:
            # All sequences' keys or values of one token, in the type of the products.
            head_dim = max(problem.head_dim, problem.value_head_dim)
            num_seqs = problem.num_seqs if is_static(problem.num_seqs) else SYMBOLIC_SEQS
            tokens = min(512, block_bytes // (4 * num_seqs * problem.num_kv_heads * head_dim))
        pages = least(max(tokens // problem.page_size, 1), problem.max_blocks)
        return cls(pages, pages * problem.page_size)


class Context(NamedTuple):
    """What each sequence sees: positions `[first, length)`."""

    length: jax.Array  # int32 [num_seqs]
    first: jax.Array  # int32 [num_seqs]

    @classmethod
    def of(cls, problem: PageAttentionProblem, operands: PageAttentionOperands) -> "Context":
        length = jnp.clip(operands.context_lens, 0, problem.capacity)
        if not problem.has_window:
            return cls(length, jnp.zeros_like(length))
        return cls(length, jnp.maximum(length - jnp.maximum(operands.sliding_window, 0), 0))

    def span(self, sizes: Sizes) -> tuple[jax.Array, jax.Array]:
        """Return the blocks `[begin, end)` that some sequence sees a token of."""
        sees = self.first < self.length
        begin = jnp.min(jnp.where(sees, self.first, jnp.iinfo(jnp.int32).max))
        return begin // sizes.tokens, -(-jnp.max(self.length) // sizes.tokens)


def load_block(
    problem: PageAttentionProblem,
    operands: PageAttentionOperands,
    sizes: Sizes,
    context: Context,
    number: jax.Array,
) -> Block:
    """Load one block of every sequence's context."""
    pages = number * sizes.pages + jnp.arange(sizes.pages, dtype=jnp.int32)
    tokens = jnp.arange(sizes.tokens, dtype=jnp.int32)
    positions = number * sizes.tokens + tokens[None]
    if problem.own_distances:
        begins = operands.page_distances.at[:, pages].get(mode="fill", fill_value=0)
        ahead = jnp.repeat(begins, problem.page_size, axis=1) + tokens[None] % problem.page_size
    else:
        ahead = positions - (context.length[:, None] - 1)
    visible = (positions >= context.first[:, None]) & (positions < context.length[:, None])
    entries = operands.block_tables.at[:, pages].get(mode="fill", fill_value=-1)
    return Block.load(problem, operands, entries, ahead[:, None], visible[:, None])


def group_heads(problem: PagedProblem, x: jax.Array) -> jax.Array:
    """Split axis 1 of `x`, query heads, in KV heads and the group that reads each."""
    return x.reshape(x.shape[0], problem.num_kv_heads, problem.group, *x.shape[2:])


def sinks_of_rows(
    problem: PageAttentionProblem, operands: PageAttentionOperands
) -> jax.Array | None:
    """Return each row's sink, `[1, num_kv_heads, group]`."""
    return group_heads(problem, operands.sinks[None]) if problem.has_sinks else None


def _attend(
    problem: PageAttentionProblem, operands: PageAttentionOperands, sizes: Sizes
) -> tuple[jax.Array, jax.Array]:
    context = Context.of(problem, operands)
    query, sinks = group_heads(problem, operands.query), sinks_of_rows(problem, operands)
    load = functools.partial(load_block, problem, operands, sizes, context)
    out, lse = attend(problem, operands, query, sinks, context.span(sizes), load)
    heads = (problem.num_seqs, problem.num_heads)
    return rounded(out.reshape(*heads, -1), problem.out_dtype), lse.reshape(heads)
