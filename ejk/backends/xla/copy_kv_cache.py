"""`ejk.copy_kv_slots` and `ejk.copy_kv_pages` as an XLA program.

A gather and a scatter a pool: what is copied is read and written twice, by way of an array of all
rows. So every source is read before any target is written, and nothing has to be told apart.
"""

import dataclasses

import jax
import jax.numpy as jnp

from ejk.backends.copy_kv_cache import (
    CACHES,
    CopyKVCacheBackend,
    CopyKVCacheOperands,
    CopyKVCacheProblem,
    valid_targets,
)
from ejk.backends.layouts import POOLS
from ejk.backends.write_kv_cache import last_writes
from ejk.backends.xla._backend import XlaBackend
from ejk.backends.xla._pools import placed, read


@dataclasses.dataclass(frozen=True)
class XlaCopyKVCache(XlaBackend, CopyKVCacheBackend):
    """Run `ejk.copy_kv_slots` and `ejk.copy_kv_pages` as an XLA program: gather and scatter."""

    features = POOLS | CACHES

    def run(
        self, problem: CopyKVCacheProblem, operands: CopyKVCacheOperands, platform: str
    ) -> tuple[jax.Array, ...]:
        at, to = places(problem, operands)
        pools = problem.pools_of(operands)
        return placed(problem, ((x, to, read(problem, x, at, platform)) for x in pools), platform)


def places(
    problem: CopyKVCacheProblem, operands: CopyKVCacheOperands
) -> tuple[jax.Array, jax.Array]:
    """Return where copies are read and written, `[num_copies, axes]`; those that do nothing: none.

    So no two are written to one place.
    """
    targets = valid_targets(operands.sources, operands.targets, problem.num_units)
    stays = last_writes(targets, problem.num_units)
    of_page = problem.page_size if problem.unit == "slot" else 1

    def place(x: jax.Array) -> jax.Array:
        pages = jnp.where(stays, x // of_page, problem.num_pages)
        indices = [pages, x % of_page]
        return jnp.stack(indices[: len(problem.placed_axes)], axis=1)

    return place(operands.sources), place(targets)
