"""`ejk.write_kv_cache` on TPUs: which calls the Pallas kernel takes, and how it is launched."""

import dataclasses
from collections.abc import Hashable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from ejk.backends.pallas.page_attention import _callback_effects, _chip, _chip_version
from ejk.backends.pallas.page_attention_tuned import SMEM_LIMIT_BYTES, TOO_OLD
from ejk.backends.pallas.write_kv_cache_work import Work
from ejk.backends.write_kv_cache import (
    WriteKVCacheBackend,
    WriteKVCacheOperands,
    WriteKVCacheProblem,
)


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
        if problem.dtype not in (jnp.float32, jnp.bfloat16):
            reasons.append(f"dtype={problem.dtype}: the chip takes float32 and bfloat16")
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

        interpret = self.interpret
        if interpret is True:
            interpret = pltpu.InterpretParams(
                uninitialized_memory="nan", out_of_bounds_reads="raise"
            )
        limit = _chip().vmem_limit_bytes
        with jax.enable_x64(False):  # a kernel's integers have 32 bits, whatever the caller's have
            return _launch(Work.of(problem, limit), operands, limit, interpret)


def _launch(
    work: Work, operands: WriteKVCacheOperands, vmem_limit_bytes: int, interpret: Any
) -> tuple[jax.Array, ...]:
    """Sort the tokens by slot and launch the kernel."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    from ejk.backends.pallas.write_kv_cache_kernel import write_kv_cache_kernel

    problem = work.problem
    slots, order = _by_slot(operands.slot_mapping, problem.num_slots)
    pad = work.num_blocks * work.block_tokens - problem.num_tokens
    slots = jnp.pad(slots, (0, pad), constant_values=-1)
    order = jnp.pad(order, (0, pad))

    def rows(x, head_dim):
        return x[order].reshape(-1, *work.row_shape(head_dim))

    widths = {"key": problem.head_dim, "value": problem.value_head_dim}
    given = [name for name in widths if getattr(operands, name) is not None]
    inputs = {f"{name}_ref": rows(getattr(operands, name), widths[name]) for name in given}
    pools = {
        f"{name}_cache_hbm_ref": pool
        for name in given
        if (pool := getattr(operands, f"{name}_cache")) is not None
    }
    scratch = {
        f"{name}_buf": pltpu.VMEM(
            (work.block_tokens, *work.window_shape(widths[name])), problem.dtype
        )
        for name in given
        if work.has_windows
    }
    scratch |= {
        "leader_ref": pltpu.SMEM((work.block_tokens,), jnp.int32),
        "sem": pltpu.SemaphoreType.DMA,
    }
    absent = dict.fromkeys(OPTIONAL - {*inputs, *pools, *scratch})
    names = ["slots_ref", *inputs, *(None for _ in pools), *pools, *scratch]

    def kernel(*refs):
        # The pools as they are given are the pools that come out: only those are named.
        given = {name: ref for name, ref in zip(names, refs) if name is not None}
        write_kv_cache_kernel(**given, **absent, work=work)

    def block(x):
        return pl.BlockSpec(
            (work.block_tokens, *x.shape[1:]), lambda i, _: (i, *([0] * (x.ndim - 1)))
        )

    in_hbm = pl.BlockSpec(memory_space=pltpu.HBM)
    # `shard_map` asks over which mesh axes a result varies: as the operands do, all alike.
    varying = jax.typeof(operands.key).mat
    return tuple(
        pl.pallas_call(
            kernel,
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=1,
                grid=(work.num_blocks,),
                in_specs=[*(block(x) for x in inputs.values()), *(in_hbm for _ in pools)],
                out_specs=[in_hbm for _ in pools],
                scratch_shapes=list(scratch.values()),
            ),
            out_shape=[
                jax.ShapeDtypeStruct(x.shape, x.dtype, manual_axis_type=varying)
                for x in pools.values()
            ],
            input_output_aliases={1 + len(inputs) + i: i for i in range(len(pools))},
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("arbitrary",),
                vmem_limit_bytes=vmem_limit_bytes,
                disable_bounds_checks=True,  # slots are range-checked before the launch
            ),
            interpret=interpret,
            name="ejk_write_kv_cache",
        )(slots, *inputs.values(), *pools.values())
    )


OPTIONAL = {"value_ref", "value_cache_hbm_ref", "key_buf", "value_buf"}
"""The kernel's parameters that a call may lack."""


def _by_slot(slots: jax.Array, num_slots: int) -> tuple[jax.Array, jax.Array]:
    """Sort tokens by slot; return slots, -1 where nothing is written, and whose they are."""
    tokens = jnp.arange(slots.shape[0], dtype=jnp.int32)
    slots, order = lax.sort((slots, tokens), num_keys=1, is_stable=True)
    is_last = jnp.concatenate([slots[1:] != slots[:-1], jnp.ones(1, bool)])
    return jnp.where(is_last & (slots >= 0) & (slots < num_slots), slots, -1), order
