"""What every backend of `ejk.ragged_page_attention` is given: the problem and the operands."""

import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from ejk._backend import Backend
from ejk._indices import Size, count_up_to
from ejk.backends.paged_problem import PagedProblem


class RaggedPageAttentionOperands(NamedTuple):
    """The arrays of one call. Absent ones are None.

    Integers are the caller's own values. A backend clips lengths to `[0, capacity]`, takes an entry
    outside `[0, num_pages)` for invalid and a negative position for 0, and makes `cu_q_lens` sane:
    clipped to `[0, total_tokens]`, then its running maximum.
    """

    query: Any  # [total_tokens, num_heads, head_dim]
    key_cache: Any  # the pool of keys, or of keys and values: see LAYOUTS
    value_cache: Any  # the same, its last axis value_head_dim; None: key_cache has the values, too
    context_lens: Any  # int32 [num_seqs]
    block_tables: Any  # int32 [num_seqs, max_blocks]
    cu_q_lens: Any  # int32 [num_seqs + 1]
    attn_scale: Any  # float32 []
    sliding_window: Any  # int32 [], or None; [total_tokens] where the problem `is_part`
    sinks: Any  # float32 [num_heads], or None
    alibi_slopes: Any  # float32 [num_heads], or None
    positions: Any  # int32 [total_tokens], or None
    tree_mask: Any  # bool [total_tokens, tree_width], or None
    key_scale: Any = None  # as in `PageAttentionOperands`
    value_scale: Any = None
    row_lens: Any = None  # int32 [total_tokens]: tokens that each sees, where the problem `is_part`
    page_distances: Any = None  # as in `PageAttentionOperands`, but from the last token of each
    prefix_groups: Any = None  # as in `PageAttentionOperands`
    prefix_pages: Any = None


@dataclasses.dataclass(frozen=True)
class RaggedPageAttentionProblem(PagedProblem):
    """The static facts of one `ejk.ragged_page_attention` call. No axis is empty."""

    operation: ClassVar[str] = "ragged_page_attention"
    feature_names: ClassVar[frozenset[str]] = PagedProblem.feature_names | {
        "positions",
        "tree_mask",
        "causal=False",
        "axis_name with positions",
        "axis_name with tree_mask",
    }
    splits_sequences: ClassVar[bool] = False  # their rows are packed: no axis divides them

    total_tokens: Size
    has_positions: bool
    """Window or slopes count from positions that are given."""
    tree_width: int
    """Columns of the tree mask, 0 for none."""
    q_len_bound: Size
    """No sequence is expected to have more new tokens than this: for sizing work, nothing else."""
    visible_bound: Size
    """No token is expected to see more tokens than this: for sizing work, nothing else."""

    causal: bool = dataclasses.field(default=True, kw_only=True)
    """A new token sees its sequence up to itself; else all of it, and keys have no `positions`."""

    @property
    def num_rows(self) -> Size:
        return self.total_tokens

    @property
    def features(self) -> frozenset[str]:
        used = {
            "positions": self.has_positions,
            "tree_mask": self.tree_width > 0,
            "causal=False": not self.causal,
            "axis_name with positions": self.is_part and self.has_positions,
            "axis_name with tree_mask": self.is_part and self.tree_width > 0,
        }
        return super().features | {feature for feature, is_used in used.items() if is_used}

    def fold(self, size: int, operands: Any, axes: Any) -> None:
        return None  # the calls' new tokens would have to be packed anew

    def operand_axes(self, *, seqs: Any, kv_heads: Any, heads: Any) -> RaggedPageAttentionOperands:
        pool = self.pool_axes(kv_heads)
        return RaggedPageAttentionOperands(
            query=(None, heads, None),
            key_cache=pool,
            value_cache=None if self.fused or self.latent else pool,
            context_lens=(None,),
            block_tables=(None, None),
            cu_q_lens=(None,),
            attn_scale=(),
            sliding_window=((None,) if self.is_part else ()) if self.has_window else None,
            sinks=(heads,) if self.has_sinks else None,
            alibi_slopes=(heads,) if self.has_alibi else None,
            positions=(None,) if self.has_positions else None,
            tree_mask=(None, None) if self.tree_width else None,
            **self.scale_axes(kv_heads),
            row_lens=(None,) if self.is_part else None,
            page_distances=(None, None) if self.own_distances else None,
            **self.group_axes(None),
        )


def sane_bounds(problem: RaggedPageAttentionProblem, cu_q_lens: jax.Array) -> jax.Array:
    """Return where sequences begin and end, whatever the caller's bounds are."""
    return jax.lax.cummax(jnp.clip(cu_q_lens, 0, problem.total_tokens))


def sequences_of_rows(
    num_seqs: Size, total_tokens: Size, bounds: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Say of each row, by sane bounds, whether it is a new token, and of which sequence."""
    rows = jnp.arange(total_tokens, dtype=jnp.int32)
    seq = count_up_to(bounds[1:], rows)
    is_new = (rows >= bounds[0]) & (seq < num_seqs)
    return is_new, jnp.minimum(seq, num_seqs - 1)


class Items(NamedTuple):
    """Blocks of new tokens, each of one sequence: what a program takes at a time."""

    seq: jax.Array  # int32 [items]: whose they are
    begin: jax.Array  # int32 [items]: the first token, counted from its sequence's first new one
    row: jax.Array  # int32 [items]: that token's row of `query`
    num_tokens: jax.Array  # int32 [items]: 0 of an item that does not exist
    length: jax.Array  # int32 [items]: tokens of the sequence's context
    context: jax.Array  # int32 [items]: those before its new ones; negative where these are more


def number_items(
    problem: RaggedPageAttentionProblem,
    context_lens: jax.Array,
    bounds: jax.Array,
    counts: jax.Array,
    tokens: int,
    which: jax.Array,
) -> Items:
    """Find the items that `which` numbers, where sequences have `counts` of so many `tokens`.

    They are numbered sequence by sequence; the last of one may have fewer tokens.
    """
    ends = jnp.cumsum(counts, dtype=jnp.int32)
    seq = count_up_to(ends, which)
    exists, seq = seq < problem.num_seqs, jnp.minimum(seq, problem.num_seqs - 1)
    begin = (which - (ends - counts)[seq]) * tokens
    q_len = (bounds[1:] - bounds[:-1])[seq]
    num_tokens = jnp.where(exists, jnp.minimum(q_len - begin, tokens), 0)
    length = jnp.clip(context_lens, 0, problem.capacity)[seq]
    return Items(seq, begin, bounds[seq] + begin, num_tokens, length, length - q_len)


class RaggedPageAttentionBackend(Backend):
    """A way to run `ejk.ragged_page_attention`: subclass it to add your own.

    As `ejk.PageAttentionBackend`, of `RaggedPageAttentionProblem` and
    `RaggedPageAttentionOperands`.
    """

    problem_type = RaggedPageAttentionProblem
