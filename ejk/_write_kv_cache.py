"""`ejk.write_kv_cache`: the signature, its checks and its prose, once for every backend."""

from typing import Any, overload

import jax
import jax.numpy as jnp

from ejk import _dispatch, _registry
from ejk._arguments import check_sizes
from ejk._backend import Backend
from ejk._cache_types import CacheType, cache_type_of
from ejk._describe import describe
from ejk._dtypes import check_cache_dtype, check_rows, check_width
from ejk._indices import as_int32
from ejk._pools import both_in, check_pool, check_slots, check_value_cache, holds_both
from ejk._scales import GivenScales
from ejk._shards import POOL_NAMES
from ejk._typing import Array, Cache, ScaleArgument, Slots, StaticFloat, TokenRows, typed
from ejk.backends.layouts import CacheLayout
from ejk.backends.pallas.write_kv_cache.backend import PallasWriteKVCache
from ejk.backends.reverse_mode.write_kv_cache import differentiable
from ejk.backends.triton.write_kv_cache.backend import TritonWriteKVCache
from ejk.backends.write_kv_cache import WriteKVCacheOperands, WriteKVCacheProblem
from ejk.backends.xla.write_kv_cache import XlaWriteKVCache

BACKENDS = (TritonWriteKVCache(), PallasWriteKVCache(), XlaWriteKVCache())
"""Best first: each platform's own kernel, then XLA, which runs everything."""


@overload
def write_kv_cache(
    key: TokenRows,
    value: TokenRows | None,
    key_cache: Cache,
    value_cache: Cache | None,
    slot_mapping: Slots,
    *,
    cache_layout: CacheLayout = "HND",
    key_scale: StaticFloat | None = None,
    value_scale: StaticFloat | None = None,
    backend: str | Backend | None = None,
) -> tuple[jax.Array, jax.Array | None]: ...
@overload
def write_kv_cache(
    key: TokenRows,
    value: TokenRows | None,
    key_cache: Cache,
    value_cache: Cache | None,
    slot_mapping: Slots,
    *,
    cache_layout: CacheLayout = "HND",
    key_scale: ScaleArgument | None = None,
    value_scale: ScaleArgument | None = None,
    backend: str | Backend | None = None,
) -> tuple[Any, ...]: ...
@typed
def write_kv_cache(
    key: TokenRows,
    value: TokenRows | None,
    key_cache: Cache,
    value_cache: Cache | None,
    slot_mapping: Slots,
    *,
    cache_layout: CacheLayout = "HND",
    key_scale: ScaleArgument | None = None,
    value_scale: ScaleArgument | None = None,
    backend: str | Backend | None = None,
) -> tuple[Any, ...]:
    """Write the keys and values of new tokens to their slots in pools of pages.

    For each token `i` in turn, with `page, offset = divmod(slot_mapping[i], page_size)`:

        key_cache[page, :, offset] = key[i]          in the layout "HND"
        value_cache[page, :, offset] = value[i]
        nothing, if slot_mapping[i] is outside [0, num_pages * page_size)

    Quantised caches get codes: each key times the reciprocal of its scale, rounded to nearest even,
    saturated. A scale a token and head is the largest magnitude of the row over the largest code
    (127 of int8, 7 of int4, 448 of float8_e4m3fn, 57,344 of float8_e5m2), 1 of a row of zeros. It
    is computed here and written to the same slot of `key_scale` or `value_scale`. NaN stays NaN: as
    a code of float8, else as a scale computed here; with given scales an integer is 0 instead.

    Of two tokens with one slot the later one stays. A slot of -1 writes nothing: slots neither wrap
    nor clamp. All that is not written keeps its bits. Where the caches are donated,
    under `jit`, the write is in place; else JAX copies them first. Under `vmap` it is in place
    where the caches' batched axis comes right before that of the pages: `in_axes` and `out_axes` of
    0, or of 1 for "KV_HEADS_FIRST". Another axis is moved there and back, which copies the caches.
    Differentiable in reverse mode in `key`, `value`, given scales and the caches, where these are
    not quantised.

    Args:
        key: the new tokens' keys, `[num_tokens, num_kv_heads, head_dim]`, float32, bfloat16 or
            float16. A float cache of another dtype gets them rounded to nearest even.
        value: their values, `[num_tokens, num_kv_heads, value_head_dim]`; None for latent
            attention, whose values are read out of the keys.
        key_cache: the pool of pages as `ejk.page_attention` reads it, its axes as `cache_layout`
            says. With five axes, or interleaved, it holds the keys and the values.
        value_cache: the pool of the values; None if `key_cache` has them or `value` is None.
        slot_mapping: `page * page_size + offset` of each token. Any integer dtype.
        cache_layout: `"HND"`, `"NHD"`, `"KV_HEADS_FIRST"` or `"INTERLEAVED"`, as of
            `ejk.page_attention`.
        key_scale: as in `ejk.page_attention`: a number or one a KV head, which keys are divided by;
            or the float32 pool that the scales of tokens are written to, of quantised caches.
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
        >>> pool, rows = jnp.zeros((8, 2, 16, 64)), jnp.ones((3, 2, 64))
        >>> slots = jnp.array([5 * 16 + 2, -1, 0])  # slot 2 of page 5, nowhere, slot 0 of page 0
        >>> key_cache, value_cache = ejk.write_kv_cache(rows, 2 * rows, pool, pool, slots)
        >>> print(key_cache[5, 0, :4, 0], value_cache[0, 1, :4, 0])
        [0. 0. 1. 0.] [2. 0. 0. 0.]
        >>> codes, scales = jnp.zeros((8, 2, 16, 64), jnp.int8), jnp.ones((8, 2, 16))
        >>> caches = ejk.write_kv_cache(
        ...     rows, 2 * rows, codes, codes, slots, key_scale=scales, value_scale=scales
        ... )
        >>> print(caches[1][0, 1, 0, :3], round(127 * float(caches[3][0, 1, 0]), 4))
        [127 127 127] 2.0

    Source:
        vLLM's `reshape_and_cache` (Kwon et al., 2023, arXiv:2309.06180), and its slot mapping;
        scales a token and head: KVQuant (Hooper et al., 2024, arXiv:2401.18079), KIVI (Liu et al.,
        2024, arXiv:2402.02750).
    """
    fused = holds_both(key_cache, cache_layout)
    scales = GivenScales(key_scale, value_scale, key_cache, value is None, fused)
    problem = _problem_of(key, value, key_cache, value_cache, slot_mapping, cache_layout, scales)
    choice = _registry.choose(backend, WriteKVCacheProblem, BACKENDS)
    operands = WriteKVCacheOperands(
        key=key,
        value=value,
        key_cache=key_cache,
        value_cache=value_cache,
        slot_mapping=as_int32(slot_mapping, problem.num_slots),
        **scales.operands(problem.scales, key.shape[1]),
    )
    if cache_layout == "INTERLEAVED":
        operands = _side_by_side(problem, operands)
    names = POOL_NAMES if problem.scales == "token" else POOL_NAMES[:2]
    if 0 in (problem.num_tokens, problem.num_slots):
        operands = _dispatch.vary_together(jax.tree.map(jnp.asarray, operands))
        return tuple(getattr(operands, name) for name in names)
    results = dict(zip(problem.pool_names, differentiable(problem, choice, operands)))
    return tuple(results.get(name) for name in names)


def _side_by_side(
    problem: WriteKVCacheProblem, operands: WriteKVCacheOperands
) -> WriteKVCacheOperands:
    """Put a key and a value of each head side by side: rows of twice as many heads, as they lie."""

    def both(key: Any, value: Any) -> jax.Array:
        return jnp.stack([key, value], axis=-1 if key.ndim == 1 else 2).reshape(
            *key.shape[:-2], problem.num_kv_heads, *key.shape[2:]
        )

    if problem.scales == "head":
        scale = both(operands.key_scale, operands.value_scale)
        operands = operands._replace(key_scale=scale, value_scale=None)
    return operands._replace(key=both(operands.key, operands.value), value=None)


def _problem_of(
    key: Array,
    value: Array | None,
    key_cache: Array,
    value_cache: Array | None,
    slot_mapping: Array,
    cache_layout: Any,
    scales: GivenScales,
) -> WriteKVCacheProblem:
    """Check the arguments and collect the static facts of the call."""
    num_tokens, _, head_dim = key.shape
    check_rows("key", key, key_cache)
    num_pages, num_kv_heads, page_size = check_pool(key_cache, cache_layout, head_dim=head_dim)
    pool = f"(key_cache{list(key_cache.shape)}, cache_layout={cache_layout!r})"
    if holds_both(key_cache, cache_layout):  # first: it may be a pool of keys with an axis too many
        check_value_cache(key_cache, value_cache, cache_layout)
    if key.shape[1] != num_kv_heads:
        turned = ": of [heads, tokens, dim] pass key.swapaxes(0, 1), and value"
        raise ValueError(
            f"key.shape[1]={key.shape[1]} must be num_kv_heads={num_kv_heads} {pool}"
            + turned * (key.shape[0] == num_kv_heads)
        )
    cache_type = check_cache_dtype("key_cache.dtype", key_cache.dtype)
    check_width(key_cache, head_dim, "the keys'")
    _check_values(key, value, key_cache, value_cache, cache_layout)
    check_sizes(slot_mapping=(slot_mapping, "num_tokens", num_tokens))
    check_slots(key_cache, cache_layout, num_pages, page_size)
    kind = scales.kind(num_kv_heads)
    if kind == "token":
        _check_computed(scales, cache_type)
    _check_divisors(scales)
    return WriteKVCacheProblem(
        num_tokens=num_tokens,
        key_shape=tuple(key_cache.shape),
        value_shape=None if value_cache is None else tuple(value_cache.shape),
        row_dtype=key.dtype,
        cache_dtype=key_cache.dtype,
        cache_layout="NHD" if cache_layout == "INTERLEAVED" else cache_layout,
        scales=kind,
    )


def _check_divisors(scales: GivenScales) -> None:
    """Check that scales that are known do not make infinities of rows."""
    for name in ("key_scale", "value_scale"):
        scale = getattr(scales, name)
        if isinstance(scale, float | int) and scale == 0:
            raise ValueError(f"{name}={scale} must not be 0: rows are divided by it; 1 is no scale")


def _check_computed(scales: GivenScales, cache_type: CacheType) -> None:
    """Check that scales per token can be computed, and written where they lie."""
    if not cache_type.is_quantised:
        raise ValueError(
            f"key_scale={describe(scales.key_scale)} must be a number or one per KV head with "
            f"key_cache.dtype={cache_type.name}: scales per token are computed for quantised caches"
        )
    scales.check_in_place()


def _check_values(
    key: Array, value: Array | None, key_cache: Array, value_cache: Array | None, cache_layout: Any
) -> None:
    """Check that there are values exactly where there is room for them, and that they fit."""
    check_value_cache(key_cache, value_cache, cache_layout)
    if holds_both(key_cache, cache_layout):
        both = both_in(key_cache)
        if value is None:
            raise ValueError(f"value=None must be an array with {both}, which holds values")
    elif (value is None) != (value_cache is None):
        name = "value" if value is None else "value_cache"
        raise ValueError(
            f"{name}=None must be an array, or value and value_cache both None: latent attention "
            "reads the values out of the keys"
        )
    if value is None:
        return
    if value.dtype != key.dtype:
        raise ValueError(
            f"value.dtype={value.dtype} must be the keys' dtype {key.dtype}: "
            "pass value.astype(key.dtype)"
        )
    if value.shape[:2] != key.shape[:2]:
        raise ValueError(
            f"value.shape={value.shape} must be key.shape={key.shape} but for the last axis"
        )
    cache, name = (key_cache, "key_cache") if value_cache is None else (value_cache, "value_cache")
    per_element, width = cache_type_of(cache.dtype).per_element, value.shape[-1]
    if cache.shape[-1] * per_element != width:
        half = " half of" * (per_element == 2)
        raise ValueError(
            f"{name}.shape[{cache.ndim - 1}]={cache.shape[-1]} must be{half} the values' "
            f"value_head_dim={width}"
        )
