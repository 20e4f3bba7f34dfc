"""`ejk.write_kv_cache` on TPUs: which calls the Pallas kernel takes, and how it is launched."""

import dataclasses
from collections.abc import Hashable
from typing import Any

import jax
import jax.numpy as jnp

from ejk.backends._fields import check_interpret
from ejk.backends.pallas.page_attention import _callback_effects, _chip, _chip_version
from ejk.backends.pallas.page_attention_tuned import SMEM_LIMIT_BYTES, TOO_OLD
from ejk.backends.pallas.write_kv_cache_work import Work
from ejk.backends.write_kv_cache import WriteKVCacheBackend, WriteKVCacheProblem


@dataclasses.dataclass(frozen=True)
class PallasWriteKVCache(WriteKVCacheBackend):
    """Run `ejk.write_kv_cache` as a Pallas kernel on a TPU.

    Attributes:
        interpret: run the kernel on the CPU instead, in Pallas' interpreter of TPU kernels, in
            which memory that was not written reads as NaN and a read out of bounds raises. May
            be `pltpu.InterpretParams`, to detect races or choose when copies happen.
    """

    interpret: bool | Hashable = False

    name = "pallas"
    features = frozenset(
        {
            "fused_pools",
            "latent_pools",
            'cache_layout="HND"',
            'cache_layout="NHD"',
            'cache_layout="KV_HEADS_FIRST"',
        }
    )

    def __post_init__(self):
        check_interpret(self, of_pallas=True)

    @property
    def platforms(self) -> tuple[str, ...]:
        return ("cpu",) if self.interpret else ("tpu",)

    @property
    def effects(self) -> frozenset[Any]:
        """The interpreter's callbacks run in order."""
        return _callback_effects() if self.interpret else frozenset()

    def limits(self, problem: WriteKVCacheProblem, platform: str) -> tuple[str, ...]:
        reasons = []
        if (version := _chip_version()) in TOO_OLD:
            reasons.append(f"TPU {version}: the kernel needs a v4 or later")
        if problem.cache_dtype not in (jnp.float32, jnp.bfloat16):
            reasons.append(f"dtype={problem.cache_dtype}: the chip takes float32 and bfloat16")
        if 4 * problem.num_tokens > SMEM_LIMIT_BYTES:
            reasons.append(
                f"num_tokens={problem.num_tokens}: their slots must fit in {SMEM_LIMIT_BYTES} "
                "bytes of scalar memory"
            )
        limit = _chip().vmem_limit_bytes
        work = Work.of(problem, limit)
        if (total := sum(work.vmem().values())) > limit:
            parts = ", ".join(f"{name} {size}" for name, size in work.vmem().items())
            reasons.append(
                f"one token's window of {work.window_slots} slots needs {total} bytes of VMEM, of "
                f"{limit}: {parts}"
            )
        return tuple(reasons)

    def run(self, problem, operands, platform):
        from jax.experimental.pallas import tpu as pltpu

        from ejk.backends.pallas.write_kv_cache_launch import launch

        interpret = self.interpret
        if interpret is True:
            interpret = pltpu.InterpretParams(
                uninitialized_memory="nan", out_of_bounds_reads="raise"
            )
        limit = _chip().vmem_limit_bytes
        with jax.enable_x64(False):  # a kernel's integers have 32 bits, whatever the caller's have
            return launch(Work.of(problem, limit), operands, limit, interpret)
