"""`prefix_groups` of a ragged batch: a backend runs twice, and what it finds is merged.

The first run reads what groups share: all new tokens of a group are those of one sequence, whose
context is the shared pages, seen by each of them as a whole. The second reads what each sequence
has of its own, in tables that leave the shared pages out. Windows and slopes count distances, and
these stay what they are. Sinks are the second run's.

Both are the caller's call where nothing is shared: the first then has no rows.

Source: attention states merged over shared prefixes, after Hydragen (Juravsky et al., 2024,
arXiv:2402.05099) and the cascades of FlashInfer (Ye et al., 2025, arXiv:2501.01005).
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ejk._merge_attention_states import merge_attention_states
from ejk._rounding import rounded
from ejk.backends.paged_problem import NO_GROUPS
from ejk.backends.prefix_groups import SharedPrefixes
from ejk.backends.ragged_page_attention import (
    RaggedPageAttentionOperands,
    RaggedPageAttentionProblem,
    sane_bounds,
    sequences_of_rows,
)

Results = tuple[jax.Array, ...]
Attend = Callable[[RaggedPageAttentionProblem, RaggedPageAttentionOperands], Results]


def attend_in_groups(
    problem: RaggedPageAttentionProblem,
    operands: RaggedPageAttentionOperands,
    attend: Attend,
    least_saved_bytes: int | None,
    fits: Callable[[RaggedPageAttentionProblem], bool] = lambda problem: True,
) -> Results:
    """Run a backend's `attend`, and what groups share apart, where there may be any that pay.

    `fits` says whether the backend takes a problem.
    """
    if not problem.num_prefix_groups:
        return attend(problem, operands)
    alone = dataclasses.replace(problem, num_prefix_groups=0)
    prefix, own = prefix_problem(alone), own_problem(alone)
    if not (fits(prefix) and fits(own)):
        return attend(alone, operands._replace(**NO_GROUPS))
    rows = Rows.of(problem, operands)
    shares = shared_prefixes(problem, operands, rows, least_saved_bytes)
    place = rows.places(shares)
    found = attend(prefix, prefix_operands(prefix, operands, rows, shares, place))
    parts = tuple(x[place] for x in found), attend(own, own_operands(operands, rows, shares))
    out, lse = merge_attention_states(*(jnp.stack(xs) for xs in zip(*parts)))
    return (rounded(out, problem.out_dtype), lse)[: len(problem.results)]


def own_problem(problem: RaggedPageAttentionProblem) -> RaggedPageAttentionProblem:
    """Return the problem of what each sequence has of its own."""
    return dataclasses.replace(problem, return_lse=True, keeps_float32=True)


def prefix_problem(problem: RaggedPageAttentionProblem) -> RaggedPageAttentionProblem:
    """Return the problem of what groups share."""
    return dataclasses.replace(
        problem,
        has_sinks=False,
        has_positions=problem.has_window or problem.has_alibi,
        tree_width=0,
        causal=False,
        q_len_bound=problem.total_tokens,
        return_lse=True,
        keeps_float32=True,
    )


class Rows(NamedTuple):
    """The query rows of a ragged batch, and their sequences."""

    lens: jax.Array  # int32 [num_seqs]: tokens of each sequence, clipped
    q_lens: jax.Array  # int32 [num_seqs]: new ones
    bounds: jax.Array  # int32 [num_seqs + 1], sane
    seq: jax.Array  # int32 [total_tokens]
    is_new: jax.Array  # bool [total_tokens]: it is some sequence's
    position: jax.Array  # int32 [total_tokens]: what window and slopes count from

    @classmethod
    def of(
        cls, problem: RaggedPageAttentionProblem, operands: RaggedPageAttentionOperands
    ) -> "Rows":
        lens = jnp.clip(operands.context_lens, 0, problem.capacity)
        bounds = sane_bounds(problem, operands.cu_q_lens)
        is_new, seq = sequences_of_rows(problem.num_seqs, problem.total_tokens, bounds)
        position = lens[seq] - (bounds[seq + 1] - jnp.arange(problem.total_tokens, dtype=jnp.int32))
        if problem.has_positions:
            position = jnp.maximum(operands.positions, 0)
        return cls(lens, bounds[1:] - bounds[:-1], bounds, seq, is_new, position)

    def first_positions(self) -> jax.Array:
        """Return the least position of each sequence's new tokens: int32 `[num_seqs]`."""
        most = jnp.full_like(self.lens, jnp.iinfo(jnp.int32).max)
        position = jnp.where(self.is_new, self.position, jnp.iinfo(jnp.int32).max)
        return most.at[self.seq].min(position)

    def places(self, shares: SharedPrefixes) -> jax.Array:
        """Return where each row is once rows are put together group by group.

        Rows of sequences that share nothing come after all of those, then rows of none.
        """
        order, total = shares.order, self.bounds[-1] - self.bounds[0]
        ends = jnp.cumsum(self.q_lens[order], dtype=jnp.int32)
        begins = jnp.zeros_like(ends).at[order].set(ends - self.q_lens[order])
        row = jnp.arange(self.seq.shape[0], dtype=jnp.int32)
        outside = jnp.where(row < self.bounds[0], total + row, row)
        return jnp.where(self.is_new, begins[self.seq] + row - self.bounds[self.seq], outside)


def shared_prefixes(
    problem: RaggedPageAttentionProblem,
    operands: RaggedPageAttentionOperands,
    rows: Rows,
    least_saved_bytes: int | None,
) -> SharedPrefixes:
    """Find what sequences share, and dissolve the groups that do not pay.

    A group saves that its prefix is read for each of its sequences, as far as their windows show
    it. It costs that its queries are copied, and that both runs' float32 results are written and
    read. Counted in bytes; modelled, not measured.
    """
    first = rows.first_positions()
    # No new token may be in what is shared, nor be placed in it by the caller.
    limits = jnp.maximum(jnp.minimum(rows.lens - rows.q_lens, first), 0)
    groups = jnp.where(rows.q_lens > 0, operands.prefix_groups, -1)
    shares = SharedPrefixes.of(
        groups, operands.prefix_pages, operands.block_tables, limits, problem.page_size
    )
    seen = shares.tokens
    if problem.has_window:
        hidden = first - (jnp.maximum(operands.sliding_window, 1) - 1)
        seen = seen - jnp.clip(hidden, 0, seen)
    seen = seen.astype(jnp.float32)
    width = problem.head_dim + (0 if problem.latent else problem.value_head_dim)
    token_bytes = problem.num_kv_heads * width * problem.cache_dtype.itemsize
    token_bytes /= problem.cache_type.per_element
    saved = (shares.total(seen) - shares.most(seen)) * token_bytes
    if least_saved_bytes is not None:
        return shares.only(saved >= least_saved_bytes)
    row_bytes = 2 * problem.head_dim * problem.query_dtype.itemsize
    row_bytes += 4 * jnp.dtype(jnp.float32).itemsize * problem.value_head_dim
    cost = shares.total(rows.q_lens.astype(jnp.float32)) * (problem.num_heads * row_bytes)
    return shares.only(saved > cost)


def prefix_operands(
    problem: RaggedPageAttentionProblem,
    operands: RaggedPageAttentionOperands,
    rows: Rows,
    shares: SharedPrefixes,
    place: jax.Array,
) -> RaggedPageAttentionOperands:
    """Return the operands of what groups share: each is its first sequence's, with all rows."""
    row = jnp.arange(problem.total_tokens, dtype=jnp.int32)
    source = jnp.zeros_like(row).at[place].set(row)
    is_leader = shares.leader == jnp.arange(problem.num_seqs, dtype=jnp.int32)
    return operands._replace(
        query=operands.query[source],
        context_lens=jnp.where(is_leader, shares.tokens, 0),
        cu_q_lens=shares.bounds(rows.q_lens),
        sinks=None,
        positions=rows.position[source] if problem.has_positions else None,
        tree_mask=None,
        **NO_GROUPS,
    )


def own_operands(
    operands: RaggedPageAttentionOperands, rows: Rows, shares: SharedPrefixes
) -> RaggedPageAttentionOperands:
    """Return the operands of what each sequence has of its own: without what it shares."""
    num_seqs, max_blocks = operands.block_tables.shape
    seq = jnp.arange(num_seqs, dtype=jnp.int32)[:, None]
    entry = jnp.arange(max_blocks, dtype=jnp.int32)[None] + shares.pages[:, None]
    tables = operands.block_tables.at[seq, entry].get(mode="fill", fill_value=-1)
    positions = operands.positions
    if positions is not None:
        positions = rows.position - shares.tokens[rows.seq]
    return operands._replace(
        context_lens=rows.lens - shares.tokens,
        block_tables=tables,
        positions=positions,
        **NO_GROUPS,
    )
