"""The `pallas_call` of copies: of pages their own kernel, of slots that of the write."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ejk.backends.copy_kv_cache import (
    NOTHING,
    STAGES,
    CopyKVCacheOperands,
    CopyKVCacheProblem,
    routes,
    valid_targets,
)
from ejk.backends.pallas._call import Blocked, call
from ejk.backends.pallas.copy_kv_cache.kernel import CopySizes, copy_pages_kernel
from ejk.backends.pallas.write_kv_cache.call import put
from ejk.backends.pallas.write_kv_cache.sizes import WriteSizes
from ejk.backends.stored_rows import gather, halves_axis
from ejk.backends.write_kv_cache import by_slot

MAX_BLOCK_COPIES = 64  # under way at a time; not measured


def copy_pages(
    problem: CopyKVCacheProblem,
    operands: CopyKVCacheOperands,
    vmem_limit_bytes: int,
    interpret: Any,
) -> tuple[jax.Array, ...]:
    """Launch the kernel of pages once; returns the results of `problem`."""
    block = min(MAX_BLOCK_COPIES, problem.num_copies)
    sizes = CopySizes(problem, block, -(-problem.num_copies // block))
    pad = (0, sizes.num_blocks * block - problem.num_copies)
    route = routes(operands.sources, operands.targets, problem.num_units)
    stages = {name: _stage(problem, getattr(operands, pool)) for name, pool in STAGES.items()}
    results = call(
        copy_pages_kernel,
        scalars=dict(
            source_ref=jnp.pad(operands.sources, pad),
            target_ref=jnp.pad(operands.targets, pad),
            route_ref=jnp.pad(route, pad, constant_values=NOTHING),
        ),
        inputs={},
        outputs={f"{name}_stage_hbm_ref": stage for name, stage in stages.items()},
        in_place={f"{pool}_hbm_ref": getattr(operands, pool) for pool in STAGES.values()},
        scratch=dict(sem=pltpu.SemaphoreType.DMA),
        sizes=sizes,
        grid=(2, sizes.num_blocks),
        dimension_semantics=("arbitrary", "arbitrary"),  # all is staged before any is copied
        cost=_cost(problem),
        vmem_limit_bytes=vmem_limit_bytes,
        interpret=interpret,
    )
    return tuple(results[-len(problem.pool_names) :])


def _stage(problem: CopyKVCacheProblem, pool: jax.Array | None) -> Blocked | None:
    """Return memory for what conflicts of a pool: room for every copy, as a pool of pages."""
    if pool is None:
        return None
    pages = problem.layout.pages
    shape = (*pool.shape[:pages], problem.num_copies, *pool.shape[pages + 1 :])
    return jax.ShapeDtypeStruct(shape, pool.dtype), pl.BlockSpec(memory_space=pltpu.HBM)


def _cost(problem: CopyKVCacheProblem) -> pl.CostEstimate:
    """What the launch would cost without conflicts."""
    sizes = zip(problem.views, problem.results)
    page_bytes = sum(view.elements * of.dtype.itemsize for view, of in sizes)
    return pl.CostEstimate(
        flops=0, bytes_accessed=2 * problem.num_copies * page_bytes, transcendentals=0
    )


def copy_slots(
    sizes: WriteSizes,
    problem: CopyKVCacheProblem,
    operands: CopyKVCacheOperands,
    vmem_limit_bytes: int,
    interpret: Any,
) -> tuple[jax.Array, ...]:
    """Read all sources, then launch the write; returns the results of `problem`.

    A slot is a part of a tile, and the write reads, changes and writes back the tiles around it.
    Beside these bytes it counts little that XLA gathers the sources first; then none is in
    conflict.
    """
    targets = valid_targets(operands.sources, operands.targets, problem.num_units)
    slots, order = by_slot(targets, problem.num_units)
    pad = (0, sizes.num_blocks * sizes.block_tokens - problem.num_copies)
    slots, order = jnp.pad(slots, pad, constant_values=-1), jnp.pad(order, pad)
    sources = operands.sources[order]
    at = jnp.stack([sources // problem.page_size, sources % problem.page_size], axis=1)

    # To gather single slots of 8 bits, or their scales, XLA would first turn the whole pool. Pages
    # it takes as they are.
    of_pages, slots_axis = dataclasses.replace(problem, unit="page"), problem.layout.slots

    def rows(pool: jax.Array | None, half: int) -> jax.Array | None:
        if pool is None:
            return None
        is_narrow = pool.dtype.itemsize == 1 or pool.ndim < len(problem.key_shape)
        if sizes.has_windows and is_narrow:
            found = gather(of_pages, pool, at[:, :1])
            offset = at[:, 1].reshape(-1, *[1] * (found.ndim - 1))
            found = jnp.take_along_axis(found, offset, slots_axis).squeeze(slots_axis)
        else:
            found = gather(problem, pool, at)
        return found.take(half, halves_axis(problem)) if problem.fused else found

    cache, scale = operands.key_cache, operands.key_scale
    key = rows(cache, 0), rows(scale, 0)
    if not problem.fused:
        cache, scale = operands.value_cache, operands.value_scale
    value = rows(cache, 1), rows(scale, 1)
    return put(sizes, operands, slots, key, value, vmem_limit_bytes, interpret)
