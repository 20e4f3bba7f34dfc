"""`ejk.write_kv_cache` as a Triton kernel: what it refuses, how it is launched."""

import dataclasses
from typing import Any

import jax.numpy as jnp

from ejk.backends.gpu import MAX_GRID, Target
from ejk.backends.layouts import POOLS
from ejk.backends.triton._backend import Call, TritonBackend
from ejk.backends.triton.write_kv_cache.sizes import WriteSizes, is_compared
from ejk.backends.write_kv_cache import (
    WriteKVCacheBackend,
    WriteKVCacheOperands,
    WriteKVCacheProblem,
    last_writes,
)


@dataclasses.dataclass(frozen=True)
class TritonWriteKVCache(TritonBackend, WriteKVCacheBackend):
    """Run `ejk.write_kv_cache` as a Triton kernel, through jax-triton.

    Attributes:
        compute_capability: compile for it, 90 for sm_90; the device's own if None.
        interpret: run the kernel on the CPU with Triton's interpreter.
    """

    compute_capability: int | None = None
    interpret: bool = False

    features = POOLS | {"latent_pools"}

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
        pools = {"key_cache_ptr": operands.key_cache}
        if operands.value_cache is not None:
            pools["value_cache_ptr"] = operands.value_cache
        results = call(
            write_kv_cache_kernel,
            {"key_ptr": operands.key, "value_ptr": operands.value, "slot_mapping_ptr": slots},
            {} if "value_cache_ptr" in pools else {"value_cache_ptr": None},
            sizes.constants(problem),
            in_place=pools,
            grid=sizes.grid(problem),
            num_warps=sizes.num_warps,
            num_stages=1,
        )
        return tuple(x for x in results if x is not None)
