"""`ejk.page_attention`: the signature and its prose, once for every backend."""

from typing import Literal, overload

import jax

from ejk import _registry
from ejk._answer import attend_or_answer
from ejk._arguments import Arguments, shared_operands
from ejk._backend import Backend
from ejk._context_parallel import all_pages, check_axis, merged, own_part
from ejk._problems import page_attention_problem
from ejk._typing import (
    AxisName,
    Cache,
    Flag,
    Lengths,
    PerHead,
    PrefixGroups,
    Query,
    Scalar,
    ScalarInt,
    ScaleArgument,
    StaticFloat,
    StaticInt,
    Tables,
    typed,
)
from ejk.backends.layouts import CacheLayout
from ejk.backends.mosaic_gpu.page_attention.backend import MosaicGpuPageAttention
from ejk.backends.page_attention import PageAttentionOperands, PageAttentionProblem
from ejk.backends.page_attention_plan import PageAttentionPlan
from ejk.backends.pallas.page_attention.backend import PallasPageAttention
from ejk.backends.reverse_mode.page_attention import differentiable
from ejk.backends.triton.page_attention.backend import TritonPageAttention
from ejk.backends.xla.page_attention import XlaPageAttention

BACKENDS = (
    MosaicGpuPageAttention(), TritonPageAttention(), PallasPageAttention(), XlaPageAttention(),
)  # fmt: skip
"""Best first: each platform's own kernels, then XLA, which runs everything."""


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
    key_scale: ScaleArgument | None = None,
    value_scale: ScaleArgument | None = None,
    value_head_dim: StaticInt | None = None,
    plan: PageAttentionPlan | None = None,
    prefix_groups: PrefixGroups | None = None,
    axis_name: AxisName | None = None,
    page_offset: ScalarInt = 0,
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
    key_scale: ScaleArgument | None = None,
    value_scale: ScaleArgument | None = None,
    value_head_dim: StaticInt | None = None,
    plan: PageAttentionPlan | None = None,
    prefix_groups: PrefixGroups | None = None,
    axis_name: AxisName | None = None,
    page_offset: ScalarInt = 0,
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
    key_scale: ScaleArgument | None = None,
    value_scale: ScaleArgument | None = None,
    value_head_dim: StaticInt | None = None,
    plan: PageAttentionPlan | None = None,
    prefix_groups: PrefixGroups | None = None,
    axis_name: AxisName | None = None,
    page_offset: ScalarInt = 0,
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
    key_scale: ScaleArgument | None = None,
    value_scale: ScaleArgument | None = None,
    value_head_dim: StaticInt | None = None,
    plan: PageAttentionPlan | None = None,
    prefix_groups: PrefixGroups | None = None,
    axis_name: AxisName | None = None,
    page_offset: ScalarInt = 0,
    return_lse: Flag = False,
    backend: str | Backend | None = None,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Attend from one query token a sequence to keys and values that lie in pages.

    With `n = clip(context_lens[s], 0, max_blocks * page_size)`, KV head `h // group`, and
    `k_j`, `v_j` the token in slot `j % page_size` of page `block_tables[s, j // page_size]`, times
    its `key_scale` and `value_scale`:

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

    With `axis_name`, inside `jax.shard_map`, the pages are split over the devices along that mesh
    axis. Each holds `local_pages` of them, and the table names them all: page `i` of the device
    with index `d` has the id `d * local_pages + i`, which is what it is in a pool that is sharded
    on its axis of pages. Devices may hold any pages of any sequence, in any order; a page that none
    holds, outside `[0, devices * local_pages)`, hides its tokens. Each device attends to its own
    pages, and one `all_gather` of `num_seqs * num_heads * (value_head_dim + 1)` float32 a device,
    the outputs and the LSEs, goes between them: its bytes do not depend on the contexts. All
    arguments but the pools must be the same on every device along the axis. So is the result,
    which under `check_vma` does not vary over the axis; gradients are those outside `shard_map`,
    or under `check_vma`.

    Args:
        query: one token a sequence, at position `n - 1`. float32, bfloat16 or float16.
        key_cache: the pool of pages, its axes as `cache_layout` says. With one more axis, of 2,
            right after that of the pages, it holds the keys and the values. float32, bfloat16 or
            float16, whichever the query has; or quantised: int8, float8_e4m3fn, float8_e5m2, or
            int4, held as uint8 `[..., head_dim // 2]`: the low four bits of byte `i` are entry
            `2 * i`, the high four the next one, in two's complement.
        value_cache: the same; its last axis may differ and is then the output's. None for such
            and interleaved pools, and for latent attention: there the values are the first
            `value_head_dim` entries of the keys. With `axis_name`, pools are those of this device.
        context_lens: tokens of each sequence, the current one included. Any integer dtype.
        block_tables: the page that holds tokens `[p * page_size, (p + 1) * page_size)`. Any
            integer dtype. Entries that no visible token needs may be anything.
        attn_scale: multiplies the logits; `head_dim ** -0.5` if None. May be traced.
        max_context_len: a bound on the lengths, used to size work; the table's width if None. Too
            small a bound may be slow, never wrong. It is rounded up, so that eager calls with each
            step's longest context compile a few programs. A `jit` around the call compiles one for
            each value: round it up yourself there.
        num_splits: cut each sequence's visible range in this many parts of whole blocks that are
            computed apart, then combined. 0: automatic. With 1 or more, the kernels' result for a
            sequence has the same bits whatever else is in the batch. With `axis_name`, each device
            cuts what it has of a sequence.
        cache_layout: `"HND"` `[num_pages, num_kv_heads, page_size, head_dim]`, `"NHD"`
            `[num_pages, page_size, num_kv_heads, head_dim]` or `"KV_HEADS_FIRST"`
            `[num_kv_heads, num_pages, page_size, head_dim]`; of fused pools `[num_pages, 2, ...]`
            and `[num_kv_heads, num_pages, 2, ...]`. `"INTERLEAVED"` `[num_pages, page_size,
            2 * num_kv_heads, head_dim]`, of each head a key, then a value. Read in place.
        sliding_window: only the last so many positions are visible, the current one included. At
            least 1. May be traced: above every length it is no window, below 1 it shows nothing.
        attn_logits_soft_cap: above 0.
        sinks: float32, one more logit a head in the denominator, not scaled or capped; -inf: none.
        alibi_slopes: float32, a slope a head.
        key_scale: multiplies the keys. A number, one a KV head `[num_kv_heads]`, or one a token
            and head: `key_cache`'s shape without the last axis. int8 must come with scales, int4
            with those of tokens. None is 1. Fused or interleaved pools: scales of tokens
            are those of both.
        value_scale: the same for the values, if keys have one of each token then these, too. None
            for latent attention, whose values are the keys, scaled.
        value_head_dim: for latent attention only.
        plan: from `ejk.plan_page_attention` for the same lengths: how to deal out the work. Saves
            each of a model's layers the making of its own. Refused with `axis_name`.
        prefix_groups: sequences whose tables begin with the same pages, such as those of an
            `ejk.paging.PrefixGroups`: `groups[s]` is the group of sequence `s`, -1 or another
            number outside `[0, num_groups)` for none, and `num_pages[g]` how many first pages its
            sequences share. These may then be read once for the group. A hint: it changes speed
            and the last bits, nothing else. Pages that a sequence of the group does not fill are
            cut off, and a group whose tables differ in the others is read sequence by sequence, as
            is one that would not pay. A sequence has one group: what some of them share beyond it
            is read for each. Left out of account with `axis_name` and under `vmap`.
        axis_name: the mesh axis, or axes, of the `jax.shard_map` around the call that the pages
            are split over. None: all are on this device. `docs/scaling.md` has an example.
        page_offset: with `axis_name`, added to a page's place on its device, after it was found.
            Where each device's pool holds those of all layers, one layer after the other, and the
            table names pages of the first, it is `layer * pages_of_a_layer`: the table of a
            device's own pages is then made once for all layers that one compilation sees. May be
            traced; at least 0.
        return_lse: also return the natural-log LSE, float32 `[num_seqs, num_heads]`.
        backend: None for the best backend of the platform that the computation is lowered for;
            `"triton"` or another name, or a backend object, to run that one or be refused.

    Returns:
        `[num_seqs, num_heads, value_head_dim]` in the query's dtype; with `return_lse`, a pair.

    Raises:
        TypeError: an argument of the wrong rank or dtype kind.
        ValueError: arguments that do not fit each other, a value out of range, no such axis, or
            an argument that varies over `axis_name` but must not.
        UnsupportedError: no backend that was asked for can run the call; every reason is named.

    Examples:
        >>> import jax.numpy as jnp, ejk
        >>> pool = jnp.ones((8, 2, 16, 64))  # 8 pages of 16 tokens, 2 KV heads
        >>> tables = jnp.array([[3, 5], [1, 0]])
        >>> ejk.page_attention(jnp.ones((2, 4, 64)), pool, pool, jnp.array([20, 1]), tables).shape
        (2, 4, 64)

    Source:
        vLLM's PagedAttention (Kwon et al., 2023, arXiv:2309.06180); splits after Flash-Decoding
        (Dao et al., 2023), merging over devices after it and Tree Attention (Shyam et al., 2024,
        arXiv:2408.04093); argument order of ejkernel's `page_attention`.
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
    check_axis(axis_name, page_offset, given)
    problem = page_attention_problem(given, num_splits, plan)
    choice = _registry.choose(backend, PageAttentionProblem, BACKENDS)
    num_pages = all_pages(axis_name, problem.num_pages)
    operands = PageAttentionOperands(
        **shared_operands(given, problem, num_pages), plan=None if plan is None else plan.work
    )
    if axis_name is None:
        results = _attend(problem, choice, operands)
    else:
        part, own = own_part(problem, operands, choice, axis_name, page_offset)
        results = merged(problem, _attend(part, choice, own), operands.sinks, axis_name)
    return (results[0], results[1]) if return_lse else results[0]


def _sinks(problem: PageAttentionProblem, operands: PageAttentionOperands) -> jax.Array | None:
    """Return the sinks of each row: those of all."""
    return None if operands.sinks is None else operands.sinks[None]


_attend = attend_or_answer(differentiable, _sinks)
