"""Reverse mode of `ejk.write_kv_cache`, the same for every backend.

A row's cotangent is its slot's, if it is there; what it replaced has none.
"""

import functools

import jax
import jax.numpy as jnp

from ejk import _backend, _dispatch, _partition
from ejk.backends.reverse_mode import with_pull_back
from ejk.backends.stored_rows import gather, halves_axis, stored
from ejk.backends.write_kv_cache import WriteKVCacheOperands, WriteKVCacheProblem
from ejk.backends.xla._pools import scatter
from ejk.backends.xla.write_kv_cache import places

Results = tuple[jax.Array, ...]


def _forward(
    problem: WriteKVCacheProblem, choice: _backend.Choice, operands: WriteKVCacheOperands
) -> tuple[Results, WriteKVCacheOperands]:
    # The caches' cotangents are like those of the results: what they held need not be kept.
    kept = operands._replace(key_cache=None, value_cache=None)
    return _dispatch.call(problem, choice, operands), kept


def _backward(
    problem: WriteKVCacheProblem, kept: WriteKVCacheOperands, cotangents: Results
) -> WriteKVCacheOperands:
    operands = kept._replace(**dict(zip(("key_cache", "value_cache"), cotangents)))
    pull = _partition.left_to_xla(functools.partial(_pull_back, problem), operands)
    return pull(kept, cotangents)


def _pull_back(
    problem: WriteKVCacheProblem, kept: WriteKVCacheOperands, cotangents: Results
) -> WriteKVCacheOperands:
    at = places(problem, kept.slot_mapping)
    rows = [gather(problem, pool, at) for pool in cotangents]
    pools = [scatter(problem, pool, at, jnp.zeros_like(x)) for pool, x in zip(cotangents, rows)]
    if problem.fused:
        rows = [rows[0].take(half, halves_axis(problem)) for half in (0, 1)]
    # What a row that is written nowhere holds changes no gradient of a scale.
    is_written = (at[:, 0] < problem.num_pages)[:, None, None]
    news = (x if x is None else jnp.where(is_written, x, 0) for x in (kept.key, kept.value))
    given = zip(news, (kept.key_scale, kept.value_scale))
    found = [
        _of_rows(problem, new, scale, d) for (new, scale), d in zip(given, rows) if new is not None
    ]
    (key, key_scale), (value, value_scale) = (*found, (None, None))[:2]
    key_cache, value_cache = (*pools, None)[:2]
    return WriteKVCacheOperands(key, value, key_cache, value_cache, None, key_scale, value_scale)


def _of_rows(
    problem: WriteKVCacheProblem, rows: jax.Array, scale: jax.Array | None, d: jax.Array
) -> tuple[jax.Array, jax.Array | None]:
    """Return the cotangents of new rows and their scales, of that of what the cache holds."""
    _, pull = jax.vjp(lambda rows, scale: stored(problem, rows, scale)[0], rows, scale)
    return pull(d)


differentiable = _dispatch.compiled(with_pull_back(_forward, _backward))
