"""`ejk.copy_kv_slots` and `ejk.copy_kv_pages` as Triton kernels: refusals and launches."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from ejk.backends.copy_kv_cache import (
    CACHES,
    STAGES,
    CopyKVCacheBackend,
    CopyKVCacheOperands,
    CopyKVCacheProblem,
    routes,
)
from ejk.backends.gpu import MAX_GRID, Target
from ejk.backends.layouts import POOLS
from ejk.backends.triton._backend import Call, TritonBackend
from ejk.backends.triton.copy_kv_cache.sizes import (
    MAX_UNIT,
    CopySizes,
    is_compared,
    is_marked,
    unit_of,
)

# Of the kernels' parameters. An absent one counts as an input, and if it is the last as an output.
POOL_ORDER = ("value_scale", "key_scale", "key_cache", "value_cache")


@dataclasses.dataclass(frozen=True)
class TritonCopyKVCache(TritonBackend, CopyKVCacheBackend):
    """Run `ejk.copy_kv_slots` and `ejk.copy_kv_pages` as Triton kernels, through jax-triton.

    Attributes:
        compute_capability: compile for it, 90 for sm_90; the device's own if None.
        interpret: run the kernels on the CPU with Triton's interpreter.
    """

    compute_capability: int | None = None
    interpret: bool = False

    features = POOLS | CACHES

    def limits_on(self, target: Target, problem: CopyKVCacheProblem) -> tuple[str, ...]:
        if (unit := unit_of(problem)) > MAX_UNIT:
            return (f"a {problem.unit} of {unit} elements has more than {MAX_UNIT}",)
        if (grid := CopySizes.of(problem, target).grid(problem)) > MAX_GRID:
            return (f"its grid of {grid} programs exceeds {MAX_GRID}",)
        return ()

    def run_on(
        self,
        target: Target,
        problem: CopyKVCacheProblem,
        operands: CopyKVCacheOperands,
        call: Call,
    ) -> tuple[Any, ...]:
        from ejk.backends.triton.copy_kv_cache.kernel import copy_kv_cache_kernel

        sizes = CopySizes.of(problem, target)
        ids = {"source_ptr": operands.sources, "target_ptr": operands.targets}
        pools = {name: getattr(operands, name) for name in POOL_ORDER}
        told = _told(problem, operands, sizes, call, pools)
        in_place = {f"{name}_ptr": x for name, x in pools.items() if x is not None}
        absent = {f"{name}_ptr": None for name, x in pools.items() if x is None}
        outputs = {name: absent.pop(name) for name in ("value_cache_ptr",) if name in absent}
        results = call(
            copy_kv_cache_kernel,
            {**ids, **told, **absent},
            outputs,
            sizes.copying(problem),
            in_place=in_place,
            grid=sizes.grid(problem),
            num_warps=sizes.num_warps,
            num_stages=1,
        )
        found = dict(zip((*outputs, *in_place), results))
        return tuple(found[f"{name}_ptr"] for name in problem.pool_names)


def _told(
    problem: CopyKVCacheProblem,
    operands: CopyKVCacheOperands,
    sizes: CopySizes,
    call: Call,
    pools: dict[str, Any],
) -> dict[str, Any]:
    """Launch what tells how each copy goes; return what the copies are given of it."""
    from ejk.backends.triton.copy_kv_cache.mark_kernel import mark_kernel
    from ejk.backends.triton.copy_kv_cache.stage_kernel import stage_kernel

    sources, targets = operands.sources, operands.targets
    inputs = {"source_ptr": sources, "target_ptr": targets}
    in_pools = {f"{name}_ptr": x for name, x in pools.items()}
    outputs = dict.fromkeys(
        ("wins_ptr", "staged_ptr"), jax.ShapeDtypeStruct(sources.shape, jnp.int32)
    ) | {f"{name}_stage_ptr": _stage_of(problem, pools[pool]) for name, pool in STAGES.items()}
    if is_marked(problem):
        lists = jax.ShapeDtypeStruct((sizes.marking_programs, sizes.ids), jnp.int32)
        table = jax.ShapeDtypeStruct((problem.num_units,), jnp.int32)
        results = call(
            mark_kernel,
            {**inputs, **in_pools},
            {**outputs, "table_ptr": table, "list_ptr": lists},
            sizes.marking(problem),
            grid=sizes.marking_programs,
            num_warps=sizes.marking_warps,
            num_stages=1,
        )
    else:
        given = None if is_compared(problem) else routes(sources, targets, problem.num_units)
        results = call(
            stage_kernel,
            {**inputs, "given_route_ptr": given, **in_pools},
            outputs,
            sizes.staging(problem),
            grid=sizes.staging_grid(problem),
            num_warps=sizes.num_warps,
            num_stages=1,
        )
    return dict(zip(outputs, results))


def _stage_of(problem: CopyKVCacheProblem, pool: Any) -> jax.ShapeDtypeStruct | None:
    """Return the type of the memory for what conflicts of a pool: room for every copy."""
    if pool is None:
        return None
    view = problem.view(pool.shape)
    return jax.ShapeDtypeStruct((problem.num_copies, view.elements), pool.dtype)
