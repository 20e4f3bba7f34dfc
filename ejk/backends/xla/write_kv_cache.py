"""`ejk.write_kv_cache` as an XLA program.

One scatter a pool, in place where the pool is donated. What it leaves unsaid, which of two rows for
one slot stays, is settled before it: only the last goes anywhere.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from ejk import _dispatch
from ejk.backends.write_kv_cache import (
    WriteKVCacheBackend,
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
        at = places(problem, operands.slot_mapping)
        pools = tuple(
            scatter(problem, pool, at, rows) for pool, rows in _pools_and_rows(problem, operands)
        )
        # On a CPU a write of one row would be fused into what reads the pool, which would be copied
        # for it.
        return lax.optimization_barrier(pools)


def places(problem: WriteKVCacheProblem, slots: jax.Array) -> jax.Array:
    """Return page and offset of each token, `[num_tokens, 2]`; no page for one to be dropped."""
    stays = last_writes(slots, problem.num_slots)
    pages = jnp.where(stays, slots // problem.page_size, problem.num_pages)
    return jnp.stack([pages, slots % problem.page_size], axis=1)


def _pools_and_rows(problem, operands):
    """Yield each pool and what a token writes to it, in the order of the pool's axes."""
    if problem.fused:
        yield operands.key_cache, jnp.stack([operands.key, operands.value], halves_axis(problem))
        return
    yield operands.key_cache, operands.key
    if not problem.latent:
        yield operands.value_cache, operands.value


def halves_axis(problem) -> int:
    """Return which axis of a fused pool's rows has keys and values: its slots go, tokens come."""
    return 2 if problem.cache_layout == "KV_HEADS_FIRST" else 1


def scatter(problem, pool, places, rows):
    axes = (problem.layout.pages, problem.layout.slots)
    dimensions = lax.ScatterDimensionNumbers(
        update_window_dims=tuple(range(1, rows.ndim)),
        inserted_window_dims=axes,
        scatter_dims_to_operand_dims=axes,
    )
    return lax.scatter(
        pool, places, rows, dimensions, mode=lax.GatherScatterMode.FILL_OR_DROP, unique_indices=True
    )
