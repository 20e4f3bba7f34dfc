"""`ejk.ragged_page_attention`: the signature and its prose, once for every backend."""

from collections.abc import Sequence
from typing import Literal, overload

import jax
import jax.numpy as jnp

from ejk import _registry
from ejk._answer import attend_or_answer
from ejk._arguments import Arguments, shared_operands
from ejk._backend import Backend, Choice
from ejk._context_parallel import all_pages, check_axis, merged, own_ragged_part
from ejk._indices import as_int32
from ejk._problems import ragged_page_attention_problem
from ejk._typing import (
    Array,
    AxisName,
    Bounds,
    Cache,
    Flag,
    Lengths,
    PerHead,
    PerToken,
    PrefixGroups,
    Scalar,
    ScalarInt,
    ScaleArgument,
    StaticFloat,
    StaticInt,
    Tables,
    Tokens,
    TreeMask,
    typed,
)
from ejk.backends.layouts import CacheLayout
from ejk.backends.mosaic_gpu.ragged_page_attention.backend import MosaicGpuRaggedPageAttention
from ejk.backends.pallas.ragged_page_attention.backend import PallasRaggedPageAttention
from ejk.backends.ragged_page_attention import (
    RaggedPageAttentionOperands,
    RaggedPageAttentionProblem,
)
from ejk.backends.reverse_mode.ragged_page_attention import differentiable
from ejk.backends.triton.ragged_page_attention.backend import TritonRaggedPageAttention
from ejk.backends.xla.ragged_page_attention import XlaRaggedPageAttention

BACKENDS = (
    MosaicGpuRaggedPageAttention(), TritonRaggedPageAttention(), PallasRaggedPageAttention(),
    XlaRaggedPageAttention(),
)  # fmt: skip


@overload
def ragged_page_attention(
    query: Tokens,
    key_cache: Cache,
    value_cache: Cache | None,
    context_lens: Lengths,
    block_tables: Tables,
    cu_q_lens: Bounds,
    attn_scale: Scalar | None = None,
    *,
    max_q_len: StaticInt | None = None,
    max_context_len: StaticInt | None = None,
    causal: Flag = True,
    cache_layout: CacheLayout = "HND",
    sliding_window: ScalarInt | None = None,
    attn_logits_soft_cap: StaticFloat | None = None,
    sinks: PerHead | None = None,
    alibi_slopes: PerHead | None = None,
    key_scale: ScaleArgument | None = None,
    value_scale: ScaleArgument | None = None,
    value_head_dim: StaticInt | None = None,
    positions: PerToken | None = None,
    tree_mask: TreeMask | None = None,
    prefix_groups: PrefixGroups | None = None,
    axis_name: AxisName | None = None,
    page_offset: ScalarInt = 0,
    return_lse: Literal[False] = False,
    backend: str | Backend | None = None,
) -> jax.Array: ...
@overload
def ragged_page_attention(
    query: Tokens,
    key_cache: Cache,
    value_cache: Cache | None,
    context_lens: Lengths,
    block_tables: Tables,
    cu_q_lens: Bounds,
    attn_scale: Scalar | None = None,
    *,
    max_q_len: StaticInt | None = None,
    max_context_len: StaticInt | None = None,
    causal: Flag = True,
    cache_layout: CacheLayout = "HND",
    sliding_window: ScalarInt | None = None,
    attn_logits_soft_cap: StaticFloat | None = None,
    sinks: PerHead | None = None,
    alibi_slopes: PerHead | None = None,
    key_scale: ScaleArgument | None = None,
    value_scale: ScaleArgument | None = None,
    value_head_dim: StaticInt | None = None,
    positions: PerToken | None = None,
    tree_mask: TreeMask | None = None,
    prefix_groups: PrefixGroups | None = None,
    axis_name: AxisName | None = None,
    page_offset: ScalarInt = 0,
    return_lse: Literal[True],
    backend: str | Backend | None = None,
) -> tuple[jax.Array, jax.Array]: ...
@overload
def ragged_page_attention(
    query: Tokens,
    key_cache: Cache,
    value_cache: Cache | None,
    context_lens: Lengths,
    block_tables: Tables,
    cu_q_lens: Bounds,
    attn_scale: Scalar | None = None,
    *,
    max_q_len: StaticInt | None = None,
    max_context_len: StaticInt | None = None,
    causal: Flag = True,
    cache_layout: CacheLayout = "HND",
    sliding_window: ScalarInt | None = None,
    attn_logits_soft_cap: StaticFloat | None = None,
    sinks: PerHead | None = None,
    alibi_slopes: PerHead | None = None,
    key_scale: ScaleArgument | None = None,
    value_scale: ScaleArgument | None = None,
    value_head_dim: StaticInt | None = None,
    positions: PerToken | None = None,
    tree_mask: TreeMask | None = None,
    prefix_groups: PrefixGroups | None = None,
    axis_name: AxisName | None = None,
    page_offset: ScalarInt = 0,
    return_lse: Flag,
    backend: str | Backend | None = None,
) -> jax.Array | tuple[jax.Array, jax.Array]: ...
@typed
def ragged_page_attention(
    query: Tokens,
    key_cache: Cache,
    value_cache: Cache | None,
    context_lens: Lengths,
    block_tables: Tables,
    cu_q_lens: Bounds,
    attn_scale: Scalar | None = None,
    *,
    max_q_len: StaticInt | None = None,
    max_context_len: StaticInt | None = None,
    causal: Flag = True,
    cache_layout: CacheLayout = "HND",
    sliding_window: ScalarInt | None = None,
    attn_logits_soft_cap: StaticFloat | None = None,
    sinks: PerHead | None = None,
    alibi_slopes: PerHead | None = None,
    key_scale: ScaleArgument | None = None,
    value_scale: ScaleArgument | None = None,
    value_head_dim: StaticInt | None = None,
    positions: PerToken | None = None,
    tree_mask: TreeMask | None = None,
    prefix_groups: PrefixGroups | None = None,
    axis_name: AxisName | None = None,
    page_offset: ScalarInt = 0,
    return_lse: Flag = False,
    backend: str | Backend | None = None,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Attend from the new tokens of each sequence, any number of them, to keys and values in pages.

    Decode steps, chunks of prefills, whole prefills and verified drafts in one call: the queries
    are packed, sequence after sequence, and their keys and values are in the pages already. With
    `c` the running maximum of `cu_q_lens` clipped to `[0, total_tokens]`, sequence `s` has the
    `q_len = c[s + 1] - c[s]` query rows from `c[s]` on, and `n = clip(context_lens[s], 0,
    max_blocks * page_size)` tokens in all. Its new token `i`, row `c[s] + i`, is token
    `t = n - q_len + i` of the sequence. As in `ejk.page_attention`,

        l_j = attn_scale * (q . k_j)                                    for 0 <= j <= t
        l_j = attn_logits_soft_cap * tanh(l_j / attn_logits_soft_cap)   if given
        l_j = l_j + alibi_slopes[h] * (pos_j - pos_t)                   if given
        j is visible if pos_t - pos_j < sliding_window and its table entry is in [0, num_pages)
        lse = log(sum over visible j of exp(l_j)  +  exp(sinks[h]))
        out = sum over visible j of exp(l_j - lse) * v_j

    where `pos_j = j`, but for new tokens with `positions` given: `pos_t = max(positions[row], 0)`.
    With a `tree_mask`, `t` sees all tokens before the new ones. It sees a new token `j`, a later
    one too, exactly where `tree_mask[row, j - (n - q_len)]`. A row with `t < 0`, of more new tokens
    than tokens, sees nothing, whatever its mask says.

    With `causal=False`, each new token sees all tokens `0 <= j < n` that its window leaves, also
    those after itself, and with `t < 0`, too: as the queries of an encoder, or of another sequence
    whose keys and values the pages hold. `positions` are then those of queries alone: `pos_j = j`.

    A row that sees no token, such as one with `t < 0`, is exactly 0, its LSE the sink or -inf. A
    row of no sequence is 0, its LSE -inf. What is said of bad table entries, of memory that no
    visible token owns and of accumulation in float32 is that of `ejk.page_attention`. Among new
    tokens of one sequence, or of a group that shares its first pages, a value that is not finite
    may reach rows that do not see it. Has first derivatives in reverse mode, as
    `ejk.page_attention` has. Batches under `vmap`, one call after another.

    With `axis_name` the pages are split over devices as `ejk.page_attention` says; the one
    `all_gather` is of `total_tokens * num_heads * (value_head_dim + 1)` float32 a device. Queries
    are not split: each device attends from all new tokens to the pages that it holds. `positions`
    that window or slopes count from, and tree masks, are refused.

    Args:
        query: the new tokens of all sequences. float32, bfloat16 or float16.
        key_cache: as in `ejk.page_attention`.
        value_cache: as in `ejk.page_attention`.
        context_lens: tokens of each sequence, the new ones included. Any integer dtype.
        block_tables: as in `ejk.page_attention`.
        cu_q_lens: where each sequence's rows begin, and where the last one's end. Any integer
            dtype.
        attn_scale: multiplies the logits; `head_dim ** -0.5` if None. May be traced.
        max_q_len: a bound on the new tokens of a sequence, used to size work; `total_tokens` if
            None. Too small a bound may be slow, never wrong. With 1, or as many as a draft has,
            what prefills need is left out.
        max_context_len: a bound on the lengths, used to size work; the table's width if None. Too
            small a bound may be slow, never wrong. Both bounds are rounded up, so that eager calls
            with values that follow each other compile a few programs. A `jit` around the call
            compiles one for each pair: round them up yourself there.
        causal: a token sees no later ones. False: it sees them, too, and `tree_mask` is None.
        cache_layout: as in `ejk.page_attention`.
        sliding_window: only positions less than so many behind are visible. At least 1. May be
            traced: one that exceeds every length is no window.
        attn_logits_soft_cap: above 0.
        sinks: float32, one more logit a head in the denominator, neither scaled nor capped; -inf
            is none.
        alibi_slopes: float32, a slope a head.
        key_scale: as in `ejk.page_attention`.
        value_scale: as in `ejk.page_attention`.
        value_head_dim: for latent attention only.
        positions: of the new tokens, as queries and as keys, for window and slopes alone: depths
            in a tree. Negative ones act as 0. Any integer dtype.
        tree_mask: which new tokens of its own sequence a new token sees; column `j` is the
            sequence's `j`-th, and those past the last column are not seen. Usually `positions` are
            given, too.
        prefix_groups: as in `ejk.page_attention`. New tokens never lie in what is shared. Left
            out of account with `axis_name`.
        axis_name: as in `ejk.page_attention`.
        page_offset: as in `ejk.page_attention`.
        return_lse: also return the natural-log LSE, float32 `[total_tokens, num_heads]`.
        backend: None for the best backend of the platform that the computation is lowered for;
            `"triton"` or another name, or a backend object, to run that one or be refused.

    Returns:
        `[total_tokens, num_heads, value_head_dim]` in the query's dtype; with `return_lse`, a pair.

    Raises:
        TypeError: an argument of the wrong rank or dtype kind.
        ValueError: arguments that do not fit each other, a value out of range, no such axis, or
            an argument that varies over `axis_name` but must not.
        UnsupportedError: no backend that was asked for can run the call; every reason is named.

    Examples:
        >>> import jax.numpy as jnp, ejk
        >>> pool, tables = jnp.ones((8, 2, 16, 64)), jnp.array([[3, 5], [1, 0]])
        >>> lens, bounds = jnp.array([20, 7]), jnp.array([0, 1, 8])  # a decode and a prefill of 7
        >>> ejk.ragged_page_attention(jnp.ones((8, 4, 64)), pool, pool, lens, tables, bounds).shape
        (8, 4, 64)

    Source:
        chunked prefill: Sarathi (Agrawal et al., 2024, arXiv:2403.02310); tree masks: SpecInfer
        (Miao et al., 2023, arXiv:2305.09781); one call for mixed batches after Ragged Paged
        Attention (arXiv:2604.15464).
    """
    given = Arguments(
        query=query,
        key_cache=key_cache,
        value_cache=value_cache,
        context_lens=context_lens,
        block_tables=block_tables,
        attn_scale=attn_scale,
        max_context_len=max_context_len,
        cache_layout=cache_layout,
        sliding_window=sliding_window,
        soft_cap=attn_logits_soft_cap,
        sinks=sinks,
        alibi_slopes=alibi_slopes,
        value_head_dim=value_head_dim,
        return_lse=return_lse,
        key_scale=key_scale,
        value_scale=value_scale,
        prefix_groups=prefix_groups,
    )
    check_axis(axis_name, page_offset, given, cu_q_lens=cu_q_lens)
    problem = ragged_page_attention_problem(
        given, cu_q_lens, max_q_len, positions, tree_mask, causal
    )
    choice = _registry.choose(backend, RaggedPageAttentionProblem, BACKENDS)
    operands = RaggedPageAttentionOperands(
        **shared_operands(given, problem, all_pages(axis_name, problem.num_pages)),
        cu_q_lens=as_int32(cu_q_lens, problem.total_tokens),
        positions=as_int32(positions, 2**31 - 1) if problem.has_positions else None,
        tree_mask=_without_empty_axis(tree_mask),
    )
    results = _attend_along(axis_name, page_offset, problem, choice, operands)
    return (results[0], results[1]) if return_lse else results[0]


def _attend_along(
    axis_name: AxisName | None,
    page_offset: ScalarInt,
    problem: RaggedPageAttentionProblem,
    choice: Choice,
    operands: RaggedPageAttentionOperands,
) -> Sequence[jax.Array]:
    """Attend to all pages, or to a device's own and merge what those along the axis found."""
    if axis_name is None:
        return _attend(problem, choice, operands)
    part, own = own_ragged_part(problem, operands, choice, axis_name, page_offset)
    found = _attend(part, choice, own)
    return merged(problem, found, _row_sinks(problem, operands), axis_name)


def _without_empty_axis(tree_mask: Array | None) -> jax.Array | None:
    """Return the mask; one without columns as one of which no token sees the first."""
    if tree_mask is None or tree_mask.shape[1]:
        return None if tree_mask is None else jnp.asarray(tree_mask)
    return jnp.zeros((tree_mask.shape[0], 1), bool)


def _row_sinks(
    problem: RaggedPageAttentionProblem, operands: RaggedPageAttentionOperands
) -> jax.Array | None:
    """Return the sinks of each row: none in rows of no sequence."""
    if operands.sinks is None:
        return None
    bounds = jnp.clip(operands.cu_q_lens, 0, problem.total_tokens)
    rows = jnp.arange(problem.total_tokens, dtype=jnp.int32)
    is_new = (rows >= bounds[0]) & (rows < bounds.max())
    return jnp.where(is_new[:, None], operands.sinks[None], -jnp.inf)


_attend = attend_or_answer(differentiable, _row_sinks)
