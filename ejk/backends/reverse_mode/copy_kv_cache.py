"""Reverse mode of `ejk.copy_kv_slots` and `ejk.copy_kv_pages`, the same for every backend.

A copy is linear: what was copied adds its target's cotangent to its source's, and what it replaced
has none.
"""

import functools

import jax
import jax.numpy as jnp

from ejk import _backend, _dispatch, _partition
from ejk.backends.copy_kv_cache import CopyKVCacheOperands, CopyKVCacheProblem
from ejk.backends.reverse_mode import with_pull_back
from ejk.backends.stored_rows import gather
from ejk.backends.xla._pools import scatter
from ejk.backends.xla.copy_kv_cache import places

Results = tuple[jax.Array, ...]


def _forward(
    problem: CopyKVCacheProblem, choice: _backend.Choice, operands: CopyKVCacheOperands
) -> tuple[Results, CopyKVCacheOperands]:
    # The pools' cotangents are like those of the results: what they held need not be kept.
    kept = operands._replace(**dict.fromkeys(problem.pool_names))
    return _dispatch.call(problem, choice, operands), kept


def _backward(
    problem: CopyKVCacheProblem, kept: CopyKVCacheOperands, cotangents: Results
) -> CopyKVCacheOperands:
    operands = kept._replace(**dict(zip(problem.pool_names, cotangents)))
    pull = _partition.left_to_xla(functools.partial(_pull_back, problem), operands)
    return pull(kept, cotangents)


def _pull_back(
    problem: CopyKVCacheProblem, kept: CopyKVCacheOperands, cotangents: Results
) -> CopyKVCacheOperands:
    at, to = places(problem, kept)

    def of_pool(d: jax.Array) -> jax.Array:
        rows = gather(problem, d, to)
        left = scatter(problem, d, to, jnp.zeros_like(rows))
        return scatter(problem, left, at, rows, adds=True)  # several copies may have one source

    pools = dict(zip(problem.pool_names, map(of_pool, cotangents)))
    return CopyKVCacheOperands(None, None, None, None)._replace(**pools)


differentiable = _dispatch.compiled(with_pull_back(_forward, _backward))
