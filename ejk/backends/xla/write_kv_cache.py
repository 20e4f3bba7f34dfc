"""`ejk.write_kv_cache` as an XLA program.

One scatter a pool, in place where the pool is donated. What it leaves unsaid, which of two rows for
one slot stays, is settled before it: only the last goes anywhere.
"""

import dataclasses
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jax import lax

from ejk.backends.page_attention import POOLS
from ejk.backends.write_kv_cache import (
    WriteKVCacheBackend,
    WriteKVCacheOperands,
    WriteKVCacheProblem,
    last_writes,
)
from ejk.backends.xla._backend import XlaBackend


@dataclasses.dataclass(frozen=True)
class XlaWriteKVCache(XlaBackend, WriteKVCacheBackend):
    """Run `ejk.write_kv_cache` as an XLA program: a scatter."""

    features = POOLS | {"latent_pools"}

    def run(
        self, problem: WriteKVCacheProblem, operands: WriteKVCacheOperands, platform: str
    ) -> tuple[jax.Array, ...]:
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


def _pools_and_rows(
    problem: WriteKVCacheProblem, operands: WriteKVCacheOperands
) -> Iterator[tuple[jax.Array, jax.Array]]:
    """Yield each pool and what a token writes to it, in the order of the pool's axes."""
    if problem.fused:
        yield operands.key_cache, jnp.stack([operands.key, operands.value], halves_axis(problem))
        return
    yield operands.key_cache, operands.key
    if not problem.latent:
        yield operands.value_cache, operands.value


def halves_axis(problem: WriteKVCacheProblem) -> int:
    """Return which axis of a fused pool's rows has keys and values: its slots go, tokens come."""
    return 2 if problem.cache_layout == "KV_HEADS_FIRST" else 1


def scatter(
    problem: WriteKVCacheProblem, pool: jax.Array, at: jax.Array, rows: jax.Array
) -> jax.Array:
    axes = (problem.layout.pages, problem.layout.slots)
    dimensions = lax.ScatterDimensionNumbers(
        update_window_dims=tuple(range(1, rows.ndim)),
        inserted_window_dims=axes,
        scatter_dims_to_operand_dims=axes,
    )
    return lax.scatter(
        pool, at, rows, dimensions, mode=lax.GatherScatterMode.FILL_OR_DROP, unique_indices=True
    )
