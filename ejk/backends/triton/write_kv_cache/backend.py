"""`ejk.write_kv_cache` as a Triton kernel: what it refuses, how it is launched."""

import dataclasses
from typing import Any

import jax.numpy as jnp

from ejk.backends.gpu import MAX_GRID, Target
from ejk.backends.layouts import POOLS
from ejk.backends.triton._backend import Call, TritonBackend
from ejk.backends.triton.write_kv_cache.sizes import WriteSizes, is_compared
from ejk.backends.write_kv_cache import (
    CACHES,
    WriteKVCacheBackend,
    WriteKVCacheOperands,
    WriteKVCacheProblem,
    last_writes,
)

INPUTS = ("key", "value", "slot_mapping")
# Of each token and head scales are written, too. An absent one counts as an input.
IN_PLACE = ("value_scale", "key_scale", "key_cache", "value_cache")


@dataclasses.dataclass(frozen=True)
class TritonWriteKVCache(TritonBackend, WriteKVCacheBackend):
    """Run `ejk.write_kv_cache` as a Triton kernel, through jax-triton.

    Attributes:
        compute_capability: compile for it, 90 for sm_90; the device's own if None.
        interpret: run the kernel on the CPU with Triton's interpreter.
    """

    compute_capability: int | None = None
    interpret: bool = False

    features = POOLS | CACHES | {"latent_pools"}

    def limits_on(self, target: Target, problem: WriteKVCacheProblem) -> tuple[str, ...]:
        if (grid := WriteSizes.of(problem, target).grid(problem)) > MAX_GRID:
            return (f"its grid of {grid} programs exceeds {MAX_GRID}",)
        return ()

    def run_on(
        self,
        target: Target,
        problem: WriteKVCacheProblem,
        operands: WriteKVCacheOperands,
        call: Call,
    ) -> tuple[Any, ...]:
        from ejk.backends.triton.write_kv_cache.kernel import write_kv_cache_kernel

        slots, sizes = operands.slot_mapping, WriteSizes.of(problem, target)
        if not is_compared(problem):
            slots = jnp.where(last_writes(slots, problem.num_slots), slots, -1)
        arrays = operands._asdict() | {"slot_mapping": slots}
        written = IN_PLACE if problem.scales == "token" else IN_PLACE[2:]
        in_place = {f"{name}_ptr": arrays[name] for name in written if arrays[name] is not None}
        outputs = {} if "value_cache_ptr" in in_place else {"value_cache_ptr": None}
        inputs = {f"{name}_ptr": arrays[name] for name in (*INPUTS, *IN_PLACE)}
        results = call(
            write_kv_cache_kernel,
            {name: x for name, x in inputs.items() if name not in in_place | outputs},
            outputs,
            sizes.constants(problem, target),
            in_place=in_place,
            grid=sizes.grid(problem),
            num_warps=sizes.num_warps,
            num_stages=1,
        )
        found = dict(zip((*outputs, *in_place), results))
        return tuple(found[f"{name}_ptr"] for name in problem.pool_names)
