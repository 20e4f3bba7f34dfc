"""`ejk.write_kv_cache` on TPUs: which calls the Pallas kernel takes, and how it is launched."""

import dataclasses
from collections.abc import Hashable

import jax

from ejk.backends._fields import check_interpret
from ejk.backends.layouts import POOLS
from ejk.backends.pallas._backend import INT4, PallasBackend
from ejk.backends.pallas._chip import SMEM_LIMIT_BYTES
from ejk.backends.pallas.write_kv_cache.sizes import WriteSizes
from ejk.backends.write_kv_cache import (
    CACHES,
    WriteKVCacheBackend,
    WriteKVCacheOperands,
    WriteKVCacheProblem,
)


@dataclasses.dataclass(frozen=True)
class PallasWriteKVCache(PallasBackend, WriteKVCacheBackend):
    """Run `ejk.write_kv_cache` as a Pallas kernel on a TPU.

    Attributes:
        interpret: as of `ejk.PallasPageAttention`.
    """

    interpret: bool | Hashable = False

    features = POOLS | CACHES - INT4 | {"latent_pools"}

    def __post_init__(self):
        check_interpret(self, of_pallas=True)

    def limits(self, problem: WriteKVCacheProblem, platform: str) -> tuple[str, ...]:
        reasons = self.first_refusals("the chip", problem.row_dtype, problem.cache_dtype)
        if 4 * problem.num_tokens > SMEM_LIMIT_BYTES:
            reasons.append(
                f"num_tokens={problem.num_tokens}: their slots must fit in {SMEM_LIMIT_BYTES} "
                "bytes of scalar memory"
            )
        sizes = WriteSizes.of(problem, self.vmem_limit)
        needing = f"one token's window of {sizes.window_slots} slots needs"
        reasons += self.vmem_refusals(needing, sizes.vmem())
        return tuple(reasons)

    def launch(
        self, problem: WriteKVCacheProblem, operands: WriteKVCacheOperands
    ) -> tuple[jax.Array, ...]:
        from ejk.backends.pallas.write_kv_cache.call import write

        sizes = WriteSizes.of(problem, self.vmem_limit)
        return write(sizes, operands, self.vmem_limit, self.interpreter)
