"""`ejk.page_attention`: the signature and its prose, once for every backend."""

from typing import Literal, overload

import jax

from ejk import _dispatch
from ejk._dispatch import Backend
from ejk._indices import as_int32
from ejk._page_attention_problem import problem_of, shared_operands
from ejk._typing import (
    Cache,
    Flag,
    Lengths,
    PerHead,
    Query,
    Scalar,
    ScalarInt,
    StaticFloat,
    StaticInt,
    Tables,
    typed,
)
from ejk.backends.page_attention import (
    CacheLayout,
    PageAttentionOperands,
    PageAttentionProblem,
)
from ejk.backends.page_attention_plan import PageAttentionPlan
from ejk.backends.pallas.page_attention import PallasPageAttention
from ejk.backends.reverse_mode.page_attention import differentiable
from ejk.backends.triton.page_attention import TritonPageAttention
from ejk.backends.xla.page_attention import XlaPageAttention, finish, nothing_seen

BACKENDS = (TritonPageAttention(), PallasPageAttention(), XlaPageAttention())
"""Best first: each platform's own kernel, then XLA, which runs everything."""


@overload
def page_attention(
    query: Query,
    key_cache: Cache,
    value_cache: Cache | None,
    context_lens: Lengths,
    block_tables: Tables,
    attn_scale: Scalar | None = None,
    max_context_len: StaticInt | None = None,
    num_splits: StaticInt = 0,
    *,
    cache_layout: CacheLayout = "HND",
    sliding_window: ScalarInt | None = None,
    attn_logits_soft_cap: StaticFloat | None = None,
    sinks: PerHead | None = None,
    alibi_slopes: PerHead | None = None,
    value_head_dim: StaticInt | None = None,
    plan: PageAttentionPlan | None = None,
    return_lse: Literal[False] = False,
    backend: str | Backend | None = None,
) -> jax.Array: ...
@overload
def page_attention(
    query: Query,
    key_cache: Cache,
    value_cache: Cache | None,
    context_lens: Lengths,
    block_tables: Tables,
    attn_scale: Scalar | None = None,
    max_context_len: StaticInt | None = None,
    num_splits: StaticInt = 0,
    *,
    cache_layout: CacheLayout = "HND",
    sliding_window: ScalarInt | None = None,
    attn_logits_soft_cap: StaticFloat | None = None,
    sinks: PerHead | None = None,
    alibi_slopes: PerHead | None = None,
    value_head_dim: StaticInt | None = None,
    plan: PageAttentionPlan | None = None,
    return_lse: Literal[True],
    backend: str | Backend | None = None,
) -> tuple[jax.Array, jax.Array]: ...
@overload
def page_attention(
    query: Query,
    key_cache: Cache,
    value_cache: Cache | None,
    context_lens: Lengths,
    block_tables: Tables,
    attn_scale: Scalar | None = None,
    max_context_len: StaticInt | None = None,
    num_splits: StaticInt = 0,
    *,
    cache_layout: CacheLayout = "HND",
    sliding_window: ScalarInt | None = None,
    attn_logits_soft_cap: StaticFloat | None = None,
    sinks: PerHead | None = None,
    alibi_slopes: PerHead | None = None,
    value_head_dim: StaticInt | None = None,
    plan: PageAttentionPlan | None = None,
    return_lse: Flag,
    backend: str | Backend | None = None,
) -> jax.Array | tuple[jax.Array, jax.Array]: ...
@typed
def page_attention(
    query: Query,
    key_cache: Cache,
    value_cache: Cache | None,
    context_lens: Lengths,
    block_tables: Tables,
    attn_scale: Scalar | None = None,
    max_context_len: StaticInt | None = None,
    num_splits: StaticInt = 0,
    *,
    cache_layout: CacheLayout = "HND",
    sliding_window: ScalarInt | None = None,
    attn_logits_soft_cap: StaticFloat | None = None,
    sinks: PerHead | None = None,
    alibi_slopes: PerHead | None = None,
    value_head_dim: StaticInt | None = None,
    plan: PageAttentionPlan | None = None,
    return_lse: Flag = False,
    backend: str | Backend | None = None,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Attend from one query token a sequence to keys and values that lie in pages.

    With `n = clip(context_lens[s], 0, max_blocks * page_size)`, KV head `h // group`, and
    `k_j`, `v_j` the token in slot `j % page_size` of page `block_tables[s, j // page_size]`:

        l_j = attn_scale * (q . k_j)                                    for 0 <= j < n
        l_j = attn_logits_soft_cap * tanh(l_j / attn_logits_soft_cap)   if given
        l_j = l_j + alibi_slopes[h] * (j - (n - 1))                     if given
        j is visible if n - sliding_window <= j and its table entry is in [0, num_pages)
        lse = log(sum over visible j of exp(l_j)  +  exp(sinks[h]))
        out = sum over visible j of exp(l_j - lse) * v_j

    A row that sees no token is exactly 0, its LSE the sink or -inf. A table entry outside
    `[0, num_pages)` hides its tokens: it neither wraps nor clamps. Memory that no visible token
    owns may hold anything, NaN included, and changes no bit of the result. Products and sums
    accumulate in float32. Differentiable once in every float argument (reverse mode); batches
    under `vmap`.

    Args:
        query: one token a sequence, at position `n - 1`. float32, bfloat16 or float16.
        key_cache: the pool of pages in the query's dtype, its axes as `cache_layout` says. With
            one more axis, of 2, right after that of the pages, it holds the keys and the values.
        value_cache: the same; its last axis may differ and is then the output's. None for such
            fused pools, and for latent attention: there the values are the first
            `value_head_dim` entries of the keys.
        context_lens: tokens of each sequence, the current one included. Any integer dtype.
        block_tables: the page that holds tokens `[p * page_size, (p + 1) * page_size)`. Any
            integer dtype. Entries that no visible token needs may be anything.
        attn_scale: multiplies the logits; `head_dim ** -0.5` if None. May be traced.
        max_context_len: a bound on the lengths, used to size work; the table's width if None. Too
            small a bound may be slow, never wrong. It is rounded up, so that each step's longest
            context compiles a few programs, not one a value.
        num_splits: cut each sequence's visible range in this many parts of whole blocks that are
            computed apart, then combined. 0: automatic. With 1 or more, the kernels' result for a
            sequence has the same bits whatever else is in the batch.
        cache_layout: `"HND"` `[num_pages, num_kv_heads, page_size, head_dim]`, `"NHD"`
            `[num_pages, page_size, num_kv_heads, head_dim]` or `"KV_HEADS_FIRST"`
            `[num_kv_heads, num_pages, page_size, head_dim]`; of fused pools `[num_pages, 2, ...]`
            and `[num_kv_heads, num_pages, 2, ...]`. Read in place, never transposed.
        sliding_window: only the last so many positions are visible, the current one included. At
            least 1. May be traced: one that exceeds every length is no window, one below 1 shows
            nothing.
        attn_logits_soft_cap: above 0.
        sinks: float32, one more logit a head in the denominator, neither scaled nor capped; -inf
            is none.
        alibi_slopes: float32, a slope a head.
        value_head_dim: for latent attention only.
        plan: from `ejk.plan_page_attention` for the same lengths: how to deal out the work. Saves
            each of a model's layers the making of its own.
        return_lse: also return the natural-log LSE, float32 `[num_seqs, num_heads]`.
        backend: None for the best backend of the platform that the computation is lowered for;
            `"triton"`, `"pallas"`, `"xla"` or a backend object to run that one or be refused.

    Returns:
        `[num_seqs, num_heads, value_head_dim]` in the query's dtype; with `return_lse`, a pair.

    Raises:
        TypeError: an argument of the wrong rank or dtype kind.
        ValueError: arguments that do not fit each other, or a value out of range.
        UnsupportedError: no backend that was asked for can run the call; every reason is named.

    Examples:
        >>> import jax.numpy as jnp, ejk
        >>> pool = jnp.ones((8, 2, 16, 64))  # 8 pages of 16 tokens, 2 KV heads
        >>> tables = jnp.array([[3, 5], [1, 0]])
        >>> ejk.page_attention(jnp.ones((2, 4, 64)), pool, pool, jnp.array([20, 1]), tables).shape
        (2, 4, 64)

    Source:
        vLLM's PagedAttention (Kwon et al., 2023, arXiv:2309.06180); splits after Flash-Decoding
        (Dao et al., 2023); argument order of ejkernel's `page_attention`.
    """
    problem = problem_of(
        query,
        key_cache,
        value_cache,
        context_lens,
        block_tables,
        max_context_len=max_context_len,
        num_splits=num_splits,
        cache_layout=cache_layout,
        sliding_window=sliding_window,
        soft_cap=attn_logits_soft_cap,
        sinks=sinks,
        alibi_slopes=alibi_slopes,
        value_head_dim=value_head_dim,
        plan=plan,
        return_lse=return_lse,
    )
    choice = _dispatch.choose(backend, PageAttentionProblem, BACKENDS)
    operands = PageAttentionOperands(
        **shared_operands(query, key_cache, value_cache, attn_scale, sinks, alibi_slopes),
        context_lens=as_int32(context_lens, problem.capacity),
        block_tables=as_int32(block_tables, problem.num_pages),
        sliding_window=None if sliding_window is None else as_int32(sliding_window, 2**31 - 1),
        plan=None if plan is None else plan.work,
    )
    if 0 in (problem.num_seqs, problem.capacity, problem.num_pages):
        results = _dispatch.answer(problem, _nothing_visible, operands)
    else:
        results = differentiable(problem, choice, operands)
    return (results[0], results[1]) if return_lse else results[0]


def _nothing_visible(problem: PageAttentionProblem, operands: PageAttentionOperands):
    """Answer a call whose static facts leave no token to see."""
    rows = (problem.num_seqs, problem.num_heads)
    sinks = None if operands.sinks is None else operands.sinks[None]
    out, lse = finish(nothing_seen(rows, problem.value_head_dim), sinks)
    return (out.astype(problem.out_dtype), lse)[: len(problem.results)]
