"""`ejk.write_kv_cache` as an XLA program.

One scatter a pool, in place where the pool is donated. What it leaves unsaid, which of two rows for
one slot stays, is settled before it: only the last goes anywhere. Rows become codes before it, and
pools stay what they are.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from ejk.backends.layouts import POOLS
from ejk.backends.stored_rows import halves_axis, stored
from ejk.backends.write_kv_cache import (
    CACHES,
    WriteKVCacheBackend,
    WriteKVCacheOperands,
    WriteKVCacheProblem,
    last_writes,
)
from ejk.backends.xla._backend import XlaBackend
from ejk.backends.xla._pools import placed


@dataclasses.dataclass(frozen=True)
class XlaWriteKVCache(XlaBackend, WriteKVCacheBackend):
    """Run `ejk.write_kv_cache` as an XLA program: a scatter."""

    features = POOLS | CACHES | {"latent_pools"}

    def run(
        self, problem: WriteKVCacheProblem, operands: WriteKVCacheOperands, platform: str
    ) -> tuple[jax.Array, ...]:
        at = places(problem, operands.slot_mapping)
        pools = _pools_and_rows(problem, operands)
        return placed(problem, ((pool, at, rows) for pool, rows in pools), platform)


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
    kinds = [*zip(*written)][: 1 + (problem.scales == "token")]  # codes, and scales of tokens
    if problem.fused:
        kinds = [[jnp.stack(halves, halves_axis(problem))] for halves in kinds]
    pools = (operands.key_cache, operands.value_cache), (operands.key_scale, operands.value_scale)
    for kind, rows in zip(pools, kinds):
        yield from zip(kind, rows)
