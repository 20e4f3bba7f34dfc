"""`ejk.copy_kv_slots` and `ejk.copy_kv_pages`: signatures, checks and prose, for every backend."""

from typing import Any

import jax
import jax.numpy as jnp

from ejk import _dispatch, _registry
from ejk._arguments import check_sizes
from ejk._backend import Backend
from ejk._dtypes import check_cache_dtype
from ejk._indices import as_int32
from ejk._pools import check_pool, check_slots, check_value_cache, holds_both
from ejk._scales import GivenScales
from ejk._shards import POOL_NAMES
from ejk._typing import Array, Cache, Copies, ScaleArgument, typed
from ejk.backends.copy_kv_cache import CopyKVCacheOperands, CopyKVCacheProblem, Unit
from ejk.backends.layouts import CacheLayout
from ejk.backends.pallas.copy_kv_cache.backend import PallasCopyKVCache
from ejk.backends.reverse_mode.copy_kv_cache import differentiable
from ejk.backends.triton.copy_kv_cache.backend import TritonCopyKVCache
from ejk.backends.xla.copy_kv_cache import XlaCopyKVCache

BACKENDS = (TritonCopyKVCache(), PallasCopyKVCache(), XlaCopyKVCache())
"""Best first: each platform's own kernel, then XLA, which runs everything."""


@typed
def copy_kv_slots(
    key_cache: Cache,
    value_cache: Cache | None,
    source_slots: Copies,
    target_slots: Copies,
    *,
    cache_layout: CacheLayout = "HND",
    key_scale: ScaleArgument | None = None,
    value_scale: ScaleArgument | None = None,
    backend: str | Backend | None = None,
) -> tuple[Any, ...]:
    """Copy the keys and values of tokens from slots to slots of the same pools.

    For each copy `i` in turn, with `old` the pools as they were before the call:

        slot target_slots[i] of a pool = slot source_slots[i] of old
        nothing, if either is outside [0, num_pages * page_size)

    So slots may change places, and of two copies to one target the later one stays, of those that
    do anything. A slot is that of `ejk.write_kv_cache`, `page * page_size + offset`. Bits are
    copied: of every type of cache, NaN included; scales a token and head move with their codes.
    All other slots keep their bits. Where the pools are donated, under `jit`, the copy is in place;
    else JAX copies them first. Under `vmap` it is in place where the pools' batched axis comes
    right before that of the pages. Differentiable in reverse mode in pools that are not quantised.

    Speculative decoding moves the accepted tokens of a draft tree to where a sequence goes on:
    `ejk.accepted_slots` says from where and to where.

    Args:
        key_cache: the pool of pages as `ejk.page_attention` reads it, its axes as `cache_layout`
            says. With five axes, or interleaved, it holds the keys and the values.
        value_cache: the pool of the values; None if `key_cache` has them, or for latent
            attention.
        source_slots: where tokens are. Any integer dtype.
        target_slots: where they are to be. Any integer dtype.
        cache_layout: `"HND"`, `"NHD"`, `"KV_HEADS_FIRST"` or `"INTERLEAVED"`, as of
            `ejk.page_attention`.
        key_scale: as in `ejk.page_attention`. Of a number, or one a KV head, nothing is copied; the
            float32 pool of the scales of tokens is a pool like the others.
        value_scale: the same for the values.
        backend: None for the best backend of the platform that the computation is lowered for;
            `"triton"`, `"pallas"`, `"xla"` or a backend object to run that one or be refused.

    Returns:
        The caches, `(key_cache, value_cache)`; with scales a token and head also these,
        `(key_cache, value_cache, key_scale, value_scale)`. What is None stays None.

    Raises:
        TypeError: an argument of the wrong rank or dtype kind.
        ValueError: arguments that do not fit each other.
        UnsupportedError: no backend that was asked for can run the call; every reason is named.

    Examples:
        >>> import jax.numpy as jnp, ejk
        >>> pool = jnp.arange(8.0).reshape(2, 1, 4, 1)  # two pages of four slots
        >>> swap = jnp.array([1, 6, -1]), jnp.array([6, 1, 0])
        >>> keys, _ = ejk.copy_kv_slots(pool, None, *swap)
        >>> print(keys.reshape(-1))
        [0. 6. 2. 3. 4. 5. 1. 7.]

    Source:
        Accepted paths of draft trees: SpecInfer (Miao et al., 2023, arXiv:2305.09781), EAGLE (Li et
        al., 2024, arXiv:2401.15077).
    """
    scales = _given_scales(key_scale, value_scale, key_cache, value_cache, cache_layout)
    check_sizes(target_slots=(target_slots, "num_copies", source_slots.shape[0]))
    return _copy(
        "slot", key_cache, value_cache, source_slots, target_slots, cache_layout, scales, backend
    )


@typed
def copy_kv_pages(
    key_cache: Cache,
    value_cache: Cache | None,
    source_pages: Copies,
    target_pages: Copies,
    *,
    cache_layout: CacheLayout = "HND",
    key_scale: ScaleArgument | None = None,
    value_scale: ScaleArgument | None = None,
    backend: str | Backend | None = None,
) -> tuple[Any, ...]:
    """Copy pages inside of pools: `ejk.copy_kv_slots` of all slots of a page.

    For each copy `i` in turn, with `old` the pools as they were before the call:

        page target_pages[i] of a pool = page source_pages[i] of old
        nothing, if either is outside [0, num_pages)

    Copies on write of `ejk.paging` are such copies: `batch.copies` holds sources and targets.

    Args:
        key_cache: the pool of pages as `ejk.page_attention` reads it, its axes as `cache_layout`
            says. With five axes, or interleaved, it holds the keys and the values.
        value_cache: the pool of the values; None if `key_cache` has them, or for latent
            attention.
        source_pages: the pages that are copied. Any integer dtype.
        target_pages: the pages that they are copied to. Any integer dtype.
        cache_layout: `"HND"`, `"NHD"`, `"KV_HEADS_FIRST"` or `"INTERLEAVED"`, as of
            `ejk.page_attention`.
        key_scale: as of `ejk.copy_kv_slots`.
        value_scale: the same for the values.
        backend: as of `ejk.copy_kv_slots`.

    Returns:
        What `ejk.copy_kv_slots` does.

    Raises:
        TypeError: an argument of the wrong rank or dtype kind.
        ValueError: arguments that do not fit each other.
        UnsupportedError: no backend that was asked for can run the call; every reason is named.

    Examples:
        >>> import jax.numpy as jnp, ejk
        >>> pool = jnp.arange(8.0).reshape(4, 1, 2, 1)  # four pages of two slots
        >>> keys, _ = ejk.copy_kv_pages(pool, None, jnp.array([0, 1]), jnp.array([3, -1]))
        >>> print(keys.reshape(-1))
        [0. 1. 2. 3. 4. 5. 0. 1.]

    Source:
        Copies on write of vLLM (Kwon et al., 2023, arXiv:2309.06180).
    """
    scales = _given_scales(key_scale, value_scale, key_cache, value_cache, cache_layout)
    check_sizes(target_pages=(target_pages, "num_copies", source_pages.shape[0]))
    return _copy(
        "page", key_cache, value_cache, source_pages, target_pages, cache_layout, scales, backend
    )


def _given_scales(
    key_scale: ScaleArgument | None,
    value_scale: ScaleArgument | None,
    key_cache: Array,
    value_cache: Array | None,
    cache_layout: Any,
) -> GivenScales:
    fused = holds_both(key_cache, cache_layout)
    latent = value_cache is None and not fused
    return GivenScales(key_scale, value_scale, key_cache, latent, fused)


def _copy(
    unit: Unit,
    key_cache: Array,
    value_cache: Array | None,
    sources: Array,
    targets: Array,
    cache_layout: Any,
    scales: GivenScales,
    backend: str | Backend | None,
) -> tuple[Any, ...]:
    """Check the pools, collect the static facts of the call and run it."""
    num_pages, num_kv_heads, page_size = check_pool(
        key_cache, cache_layout, head_dim=key_cache.shape[-1]
    )
    check_cache_dtype("key_cache.dtype", key_cache.dtype)
    check_value_cache(key_cache, value_cache, cache_layout)
    check_slots(key_cache, cache_layout, num_pages, page_size)
    of_tokens = scales.kind(num_kv_heads) == "token"
    if of_tokens:
        scales.check_in_place()
    problem = CopyKVCacheProblem(
        num_copies=sources.shape[0],
        unit=unit,
        key_shape=tuple(key_cache.shape),
        value_shape=None if value_cache is None else tuple(value_cache.shape),
        cache_dtype=key_cache.dtype,
        # A copy moves a token's keys and values alike: interleaved, they are so many more heads.
        cache_layout="NHD" if cache_layout == "INTERLEAVED" else cache_layout,
        scales="token" if of_tokens else "none",
    )
    choice = _registry.choose(backend, CopyKVCacheProblem, BACKENDS)
    operands = CopyKVCacheOperands(
        key_cache=key_cache,
        value_cache=value_cache,
        sources=as_int32(sources, problem.num_units),
        targets=as_int32(targets, problem.num_units),
        **scales.operands(problem.scales, num_kv_heads),
    )
    names = POOL_NAMES if of_tokens else POOL_NAMES[:2]
    if 0 in (problem.num_copies, num_pages):
        operands = _dispatch.vary_together(jax.tree.map(jnp.asarray, operands))
        return tuple(getattr(operands, name) for name in names)
    results = dict(zip(problem.pool_names, differentiable(problem, choice, operands)))
    return tuple(results.get(name) for name in names)
