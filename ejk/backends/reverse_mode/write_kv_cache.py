"""Reverse mode of `ejk.write_kv_cache`, the same for every backend.

A row's cotangent is its slot's, if it is there; what it replaced has none.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from ejk import _backend, _dispatch, _partition
from ejk.backends.reverse_mode import with_pull_back
from ejk.backends.write_kv_cache import WriteKVCacheOperands, WriteKVCacheProblem
from ejk.backends.xla.write_kv_cache import halves_axis, places, scatter

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
    return pull(operands.slot_mapping, cotangents)


def _pull_back(
    problem: WriteKVCacheProblem, slots: jax.Array, cotangents: Results
) -> WriteKVCacheOperands:
    at = places(problem, slots)
    rows = [_gather(problem, pool, at) for pool in cotangents]
    kept = [scatter(problem, pool, at, jnp.zeros_like(x)) for pool, x in zip(cotangents, rows)]
    if problem.fused:
        rows = [rows[0].take(half, halves_axis(problem)) for half in (0, 1)]
    key, value = (*rows, None)[:2]
    key_cache, value_cache = (*kept, None)[:2]
    return WriteKVCacheOperands(key, value, key_cache, value_cache, slot_mapping=None)


def _gather(problem: WriteKVCacheProblem, pool: jax.Array, at: jax.Array) -> jax.Array:
    axes = (problem.layout.pages, problem.layout.slots)
    dimensions = lax.GatherDimensionNumbers(
        offset_dims=tuple(range(1, pool.ndim - 1)),
        collapsed_slice_dims=axes,
        start_index_map=axes,
    )
    sizes = tuple(1 if axis in axes else size for axis, size in enumerate(pool.shape))
    return lax.gather(
        pool, at, dimensions, sizes, mode=lax.GatherScatterMode.FILL_OR_DROP, fill_value=0
    )


differentiable = _dispatch.compiled(with_pull_back(_forward, _backward))
