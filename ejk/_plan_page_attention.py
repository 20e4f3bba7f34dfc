"""`ejk.plan_page_attention`: a batch's work dealt out once, for the calls of all layers."""

from typing import Any

import jax
import jax.numpy as jnp

from ejk import _dispatch, _registry
from ejk._arguments import check_window
from ejk._backend import Backend, Choice
from ejk._dtypes import check_cache_dtype
from ejk._indices import as_int32, exceeds, static_size
from ejk._page_attention import BACKENDS
from ejk._prefix_groups import num_prefix_groups, prefix_operands
from ejk._typing import (
    Array,
    Lengths,
    PrefixGroups,
    ScalarInt,
    StaticInt,
    StaticSize,
    Tables,
    typed,
)
from ejk.backends.page_attention import PageAttentionBackend, PageAttentionProblem
from ejk.backends.page_attention_plan import (
    PageAttentionPlan,
    PlanFacts,
    PlanOperands,
    PlanProblem,
    window_fact,
)
from ejk.backends.xla.page_attention_plan import XlaPlan


@typed
def plan_page_attention(
    context_lens: Lengths,
    *,
    num_heads: StaticInt,
    num_kv_heads: StaticInt,
    head_dim: StaticInt,
    page_size: StaticInt,
    max_blocks: StaticSize,
    sliding_window: ScalarInt | None = None,
    value_head_dim: StaticInt | None = None,
    cache_dtype: Any = None,
    prefix_groups: PrefixGroups | None = None,
    block_tables: Tables | None = None,
    backend: str | Backend | None = None,
) -> PageAttentionPlan:
    """Deal out the work of `ejk.page_attention` over a batch of contexts, on the device.

    The Triton kernels cut contexts in pieces, so that all multiprocessors end at about the same
    time: the contexts of the batch, one after the other, are cut in even shares, as many as run at
    a time, and the longest pieces start first. Which pieces there are follows from the lengths: a
    call without a plan makes its own. A model calls once a layer with the same lengths: make one
    plan a step, one for each distinct window, and hand it to every layer's call.

    A plan is a hint. Other backends do without, as do calls with `num_splits >= 1`, with
    `split_tokens`, of one sequence, or of short contexts. A plan made for other lengths or tables,
    another GPU, or another window that only the device knows, is slow, never wrong: calls attend to
    what their own lengths and window show.

    Args:
        context_lens: those of the calls.
        num_heads: query heads.
        num_kv_heads: KV heads.
        head_dim: of queries and keys.
        page_size: slots of a page.
        max_blocks: the width of the calls' block tables.
        sliding_window: that of the calls.
        value_head_dim: of the values; `head_dim` if None.
        cache_dtype: of the pools, such as `key_cache.dtype`: on quantised and float32 ones more
            programs run on a multiprocessor, and fewer sequences of `prefix_groups` are read
            together. 16-bit floats if None. As the lengths, it may be wrong: calls are slower.
        prefix_groups: those of the calls, as in `ejk.page_attention`, so that layers need not each
            find out which groups agree and pay. Must come with `block_tables`.
        block_tables: those of the calls, or of one of their layers. Looked at for `prefix_groups`
            alone. As the lengths, they may be others: a call shares no page that its own do not.
        backend: that of the calls: an `ejk.TritonPageAttention` says for which GPU to plan where
            none is present.

    Returns:
        A pytree that goes through `jit` and may be an argument or a carry.

    Raises:
        TypeError: an argument of the wrong rank or dtype kind.
        ValueError: arguments that do not fit each other, or a value out of range.

    Examples:
        >>> import jax.numpy as jnp, ejk
        >>> pool, tables = jnp.ones((8, 2, 16, 64)), jnp.array([[3, 5], [1, 0]])
        >>> lens = jnp.array([20, 1])
        >>> plan = ejk.plan_page_attention(
        ...     lens, num_heads=4, num_kv_heads=2, head_dim=64, page_size=16, max_blocks=2
        ... )
        >>> ejk.page_attention(jnp.ones((2, 4, 64)), pool, pool, lens, tables, plan=plan).shape
        (2, 4, 64)

    Source:
        Work lists made once a step: FlashInfer (Ye et al., 2025, arXiv:2501.01005). Even shares of
        all work: Stream-K (Osama et al., 2023, arXiv:2301.03598). Longest first: Graham (1969).
    """
    facts = PlanFacts(
        num_seqs=context_lens.shape[0],
        num_heads=static_size("num_heads", num_heads, at_least=1),
        num_kv_heads=static_size("num_kv_heads", num_kv_heads, at_least=1),
        head_dim=static_size("head_dim", head_dim, at_least=1),
        page_size=static_size("page_size", page_size, at_least=1),
        max_blocks=static_size("max_blocks", max_blocks, at_least=0),
        sliding_window=window_fact(sliding_window),
    )
    width = head_dim if value_head_dim is None else value_head_dim
    width = static_size("value_head_dim", width, at_least=1)
    check_window(sliding_window)
    if facts.num_heads % facts.num_kv_heads:
        raise ValueError(
            f"num_heads={facts.num_heads} must be a multiple of num_kv_heads={facts.num_kv_heads}"
        )
    if exceeds(facts.capacity, 2**31 - 1):
        raise ValueError(f"max_blocks * page_size={facts.capacity} must be below 2**31")
    groups = num_prefix_groups(prefix_groups, facts.num_seqs)
    _check_tables(facts, prefix_groups, block_tables)

    candidates = _registry.choose(backend, PageAttentionProblem, BACKENDS).backends
    own = (b.planner for b in candidates if isinstance(b, PageAttentionBackend))
    planners = (*filter(None, own), XlaPlan())
    dtype = jnp.dtype(jnp.bfloat16 if cache_dtype is None else cache_dtype)
    check_cache_dtype("cache_dtype", dtype)
    problem = planners[0].plan_problem(facts, width, dtype, groups)
    if 0 in (facts.num_seqs, facts.capacity):
        return PageAttentionPlan(jnp.zeros(problem.results[0].shape, jnp.int32), problem, facts)
    operands = PlanOperands(
        context_lens=as_int32(context_lens, facts.capacity),
        sliding_window=None if sliding_window is None else as_int32(sliding_window, 2**31 - 1),
        **prefix_operands(prefix_groups, facts.max_blocks),
        block_tables=as_int32(block_tables, 2**31 - 1) if groups else None,
    )
    [work] = _dealt_out(problem, _registry.choose(None, PlanProblem, planners), operands)
    return PageAttentionPlan(work, problem, facts)


def _check_tables(
    facts: PlanFacts, prefix_groups: PrefixGroups | None, block_tables: Array | None
) -> None:
    if block_tables is None:
        if prefix_groups is not None:
            raise ValueError(
                "block_tables=None must be given with prefix_groups: pass those of the calls, "
                "whose first pages are compared"
            )
        return
    shape = (facts.num_seqs, facts.max_blocks)
    if block_tables.shape != shape:
        raise ValueError(
            f"block_tables.shape={block_tables.shape} must be [num_seqs, max_blocks]={list(shape)}"
        )


@_dispatch.compiled
def _dealt_out(
    problem: PlanProblem, choice: Choice, operands: PlanOperands
) -> tuple[jax.Array, ...]:
    return _dispatch.call(problem, choice, operands)
