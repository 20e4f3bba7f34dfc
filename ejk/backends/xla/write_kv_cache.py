"""`ejk.write_kv_cache` as an XLA program.

One scatter a pool, in place where the pool is donated. What it leaves unsaid, which of two rows for
one slot stays, is settled before it: only the last goes anywhere.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from ejk._cache_types import quantise, scales_of
from ejk.backends.layouts import POOLS
from ejk.backends.write_kv_cache import (
    CACHES,
    WriteKVCacheBackend,
    WriteKVCacheOperands,
    WriteKVCacheProblem,
    last_writes,
)
from ejk.backends.xla._backend import XlaBackend


@dataclasses.dataclass(frozen=True)
class XlaWriteKVCache(XlaBackend, WriteKVCacheBackend):
    """Run `ejk.write_kv_cache` as an XLA program: a scatter."""

    features = POOLS | CACHES | {"latent_pools"}

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
) -> Iterator[tuple[Any, Any]]:
    """Yield each pool and what a token writes to it, in the order of the results."""
    written = [stored(problem, operands.key, operands.key_scale)]
    if not problem.latent:
        assert operands.value is not None
        written.append(stored(problem, operands.value, operands.value_scale))
    codes, scales = zip(*written)
    if problem.fused:
        codes, scales = ([_stacked(problem, halves)] for halves in (codes, scales))
    yield from zip((operands.key_cache, operands.value_cache), codes)
    if problem.scales == "token":
        yield from zip((operands.key_scale, operands.value_scale), scales)


def stored(
    problem: WriteKVCacheProblem, rows: jax.Array, scale: jax.Array | None
) -> tuple[jax.Array, jax.Array | None]:
    """Return what the cache holds of `rows [num_tokens, num_kv_heads, width]`, and their scales.

    `scale` is that of each KV head; those of tokens are computed.
    """
    if problem.scales == "none" and not problem.cache_type.is_quantised:
        return rows.astype(problem.cache_dtype), None
    rows = rows.astype(jnp.float32)
    if problem.scales == "token":
        scale = scales_of(rows, problem.cache_type)
    return quantise(rows, scale, problem.cache_dtype), scale


def _stacked(problem: WriteKVCacheProblem, halves: Sequence[Any]) -> jax.Array | None:
    return None if halves[0] is None else jnp.stack(halves, halves_axis(problem))


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
