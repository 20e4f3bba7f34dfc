"""`ejk.write_kv_cache` as an XLA program, and reverse mode for every backend.

One scatter a pool, in place where the pool is donated. What it leaves unsaid, which of two rows for
one slot stays, is settled before it: only the last goes anywhere.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax

from ejk import _dispatch, _partition
from ejk._reverse_mode import reverse_mode_alone
from ejk.backends.write_kv_cache import (
    WriteKVCacheBackend,
    WriteKVCacheOperands,
    WriteKVCacheProblem,
    last_writes,
)


@dataclasses.dataclass(frozen=True)
class XlaWriteKVCache(WriteKVCacheBackend):
    """Run `ejk.write_kv_cache` as an XLA program: a scatter."""

    name = "xla"
    is_opaque = False
    features = frozenset(
        {
            "fused_pools",
            "latent_pools",
            'cache_layout="HND"',
            'cache_layout="NHD"',
            'cache_layout="KV_HEADS_FIRST"',
        }
    )

    @property
    def platforms(self):
        return _dispatch.PLATFORMS

    def limits(self, problem, platform):
        return ()

    def run(self, problem, operands, platform):
        places = _places(problem, operands.slot_mapping)
        pools = tuple(
            _scatter(problem, pool, places, rows)
            for pool, rows in _pools_and_rows(problem, operands)
        )
        # On a CPU a write of one row would be fused into what reads the pool, which would be copied
        # for it.
        return lax.optimization_barrier(pools)


def _places(problem: WriteKVCacheProblem, slots: jax.Array) -> jax.Array:
    """Return page and offset of each token, `[num_tokens, 2]`; no page for one to be dropped."""
    stays = last_writes(slots, problem.num_slots)
    pages = jnp.where(stays, slots // problem.page_size, problem.num_pages)
    return jnp.stack([pages, slots % problem.page_size], axis=1)


def _pools_and_rows(problem, operands):
    """Yield each pool and what a token writes to it, in the order of the pool's axes."""
    if problem.fused:
        yield operands.key_cache, jnp.stack([operands.key, operands.value], _halves_axis(problem))
        return
    yield operands.key_cache, operands.key
    if not problem.latent:
        yield operands.value_cache, operands.value


def _halves_axis(problem) -> int:
    """Return which axis of a fused pool's rows has keys and values: its slots go, tokens come."""
    return 2 if problem.cache_layout == "KV_HEADS_FIRST" else 1


def _scatter(problem, pool, places, rows):
    axes = (problem.layout.pages, problem.layout.slots)
    dimensions = lax.ScatterDimensionNumbers(
        update_window_dims=tuple(range(1, rows.ndim)),
        inserted_window_dims=axes,
        scatter_dims_to_operand_dims=axes,
    )
    return lax.scatter(
        pool, places, rows, dimensions, mode=lax.GatherScatterMode.FILL_OR_DROP, unique_indices=True
    )


def _gather(problem, pool, places):
    axes = (problem.layout.pages, problem.layout.slots)
    dimensions = lax.GatherDimensionNumbers(
        offset_dims=tuple(range(1, pool.ndim - 1)),
        collapsed_slice_dims=axes,
        start_index_map=axes,
    )
    sizes = tuple(1 if axis in axes else size for axis, size in enumerate(pool.shape))
    return lax.gather(
        pool, places, dimensions, sizes, mode=lax.GatherScatterMode.FILL_OR_DROP, fill_value=0
    )


@_dispatch.compiled
def differentiable(
    problem: WriteKVCacheProblem, choice: _dispatch.Choice, operands: WriteKVCacheOperands
) -> tuple[jax.Array, ...]:
    """Run `problem` on one of the backends of `choice`, with a reverse-mode rule."""
    return _pulled_back(problem, choice, reverse_mode_alone(problem.operation, operands))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _pulled_back(problem, choice, operands):
    return _dispatch.call(problem, choice, operands)


def _forward(problem, choice, operands):
    # The caches' cotangents are like those of the results: what they held need not be kept.
    kept = operands._replace(key_cache=None, value_cache=None)
    return _dispatch.call(problem, choice, operands), kept


def _backward(problem, choice, kept, cotangents):
    operands = kept._replace(**dict(zip(("key_cache", "value_cache"), cotangents)))
    operands = jax.tree.map(jnp.asarray, operands)  # constants are NumPy's
    pull = _partition.left_to_xla(functools.partial(_pull_back, problem), operands)
    return (pull(operands.slot_mapping, cotangents),)


def _pull_back(problem, slots, cotangents):
    """A row's cotangent is its slot's, if it is there; what it replaced has none."""
    places = _places(problem, slots)
    rows = [_gather(problem, pool, places) for pool in cotangents]
    kept = [_scatter(problem, pool, places, jnp.zeros_like(x)) for pool, x in zip(cotangents, rows)]
    if problem.fused:
        rows = [rows[0].take(half, _halves_axis(problem)) for half in (0, 1)]
    key, value = (*rows, None)[:2]
    key_cache, value_cache = (*kept, None)[:2]
    return WriteKVCacheOperands(key, value, key_cache, value_cache, slot_mapping=None)


_pulled_back.defvjp(_forward, _backward)
