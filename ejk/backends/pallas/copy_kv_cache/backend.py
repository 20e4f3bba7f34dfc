"""`ejk.copy_kv_slots` and `ejk.copy_kv_pages` on TPUs: what is refused, how they are launched."""

import dataclasses
from collections.abc import Hashable

import jax

from ejk.backends._fields import check_interpret
from ejk.backends.copy_kv_cache import (
    CACHES,
    CopyKVCacheBackend,
    CopyKVCacheOperands,
    CopyKVCacheProblem,
)
from ejk.backends.layouts import POOLS
from ejk.backends.pallas._backend import INT4, PallasBackend
from ejk.backends.pallas._chip import SMEM_LIMIT_BYTES
from ejk.backends.pallas.write_kv_cache.sizes import WriteSizes
from ejk.backends.write_kv_cache import WriteKVCacheProblem


@dataclasses.dataclass(frozen=True)
class PallasCopyKVCache(PallasBackend, CopyKVCacheBackend):
    """Run `ejk.copy_kv_slots` and `ejk.copy_kv_pages` as Pallas kernels on a TPU.

    Attributes:
        interpret: as of `ejk.PallasPageAttention`.
    """

    interpret: bool | Hashable = False

    features = POOLS | CACHES - INT4

    def __post_init__(self):
        check_interpret(self, of_pallas=True)

    def limits(self, problem: CopyKVCacheProblem, platform: str) -> tuple[str, ...]:
        reasons = self.first_refusals("the chip", problem.cache_dtype)
        scalars = 1 if problem.unit == "slot" else 3  # of a copy: slots, or pages and the route
        if 4 * scalars * problem.num_copies > SMEM_LIMIT_BYTES:
            reasons.append(
                f"num_copies={problem.num_copies}: their {problem.unit}s must fit in "
                f"{SMEM_LIMIT_BYTES} bytes of scalar memory"
            )
        if problem.unit == "slot":
            sizes = WriteSizes.of(as_write(problem), self.vmem_limit)
            needing = f"one token's window of {sizes.window_slots} slots needs"
            reasons += self.vmem_refusals(needing, sizes.vmem())
        return tuple(reasons)

    def launch(
        self, problem: CopyKVCacheProblem, operands: CopyKVCacheOperands
    ) -> tuple[jax.Array, ...]:
        from ejk.backends.pallas.copy_kv_cache import call

        if problem.unit == "page":
            return call.copy_pages(problem, operands, self.vmem_limit, self.interpreter)
        sizes = WriteSizes.of(as_write(problem), self.vmem_limit)
        return call.copy_slots(sizes, problem, operands, self.vmem_limit, self.interpreter)


def as_write(problem: CopyKVCacheProblem) -> WriteKVCacheProblem:
    """Return the write that puts the rows of all sources in their targets."""
    return WriteKVCacheProblem(
        num_tokens=problem.num_copies,
        key_shape=problem.key_shape,
        value_shape=problem.value_shape,
        row_dtype=problem.cache_dtype,
        cache_dtype=problem.cache_dtype,
        cache_layout=problem.cache_layout,
        scales=problem.scales,
    )
