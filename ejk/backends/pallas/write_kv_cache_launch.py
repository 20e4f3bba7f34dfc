"""The `pallas_call` of the write: tokens in the order of their slots, blocks, scratch, options."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ejk.backends.pallas.write_kv_cache_kernel import write_kv_cache_kernel
from ejk.backends.pallas.write_kv_cache_work import Work
from ejk.backends.write_kv_cache import WriteKVCacheOperands


def launch(
    work: Work, operands: WriteKVCacheOperands, vmem_limit_bytes: int, interpret: Any
) -> tuple[jax.Array, ...]:
    """Launch the kernel once; returns the results of `work.problem`."""
    slots, order = by_slot(operands.slot_mapping, work.problem.num_slots)
    pad = work.num_blocks * work.block_tokens - work.problem.num_tokens
    slots, order = jnp.pad(slots, (0, pad), constant_values=-1), jnp.pad(order, (0, pad))
    widths = work.widths
    inputs = {
        f"{name}_ref": getattr(operands, name)[order].reshape(-1, *work.row_shape(width))
        for name, width in widths.items()
    }
    pools = {
        "key_cache_hbm_ref": operands.key_cache,
        "value_cache_hbm_ref": operands.value_cache,
    }
    pools = {name: pool for name, pool in pools.items() if pool is not None}
    scratch = _scratch(work)
    absent = dict.fromkeys(OPTIONAL - {*inputs, *pools, *scratch})
    # The pools as they are given are the pools that come out: the kernel is told of those alone.
    names = ["slots_ref", *inputs, *(None for _ in pools), *pools, *scratch]

    def kernel(*refs):
        named = {name: ref for name, ref in zip(names, refs) if name is not None}
        write_kv_cache_kernel(**named, **absent, work=work)

    def block(x):
        shape = (work.block_tokens, *x.shape[1:])
        return pl.BlockSpec(shape, lambda i, _: (i, *(0 for _ in shape[1:])))

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
                dimension_semantics=("arbitrary",),  # a window may go on in the next block
                vmem_limit_bytes=vmem_limit_bytes,
                disable_bounds_checks=True,  # slots are range-checked before the launch
            ),
            cost_estimate=_cost(work),
            interpret=interpret,
            name="ejk_write_kv_cache",
        )(slots, *inputs.values(), *pools.values())
    )


OPTIONAL = {"value_ref", "value_cache_hbm_ref", "key_buf", "value_buf"}
"""The kernel's parameters that a call may lack."""


def by_slot(slots: jax.Array, num_slots: int) -> tuple[jax.Array, jax.Array]:
    """Sort tokens by slot; return slots, -1 where nothing is written, and whose they are."""
    tokens = jnp.arange(slots.shape[0], dtype=jnp.int32)
    slots, order = lax.sort((slots, tokens), num_keys=1, is_stable=True)
    is_last = jnp.concatenate([slots[1:] != slots[:-1], jnp.ones(1, bool)])
    return jnp.where(is_last & (slots >= 0) & (slots < num_slots), slots, -1), order


def _scratch(work: Work) -> dict[str, Any]:
    windows = {
        f"{name}_buf": pltpu.VMEM(
            (work.block_tokens, *work.window_shape(width)), work.problem.cache_dtype
        )
        for name, width in work.widths.items()
        if work.has_windows
    }
    return windows | {
        "leader_ref": pltpu.SMEM((work.block_tokens,), jnp.int32),
        "sem": pltpu.SemaphoreType.DMA,
    }


def _cost(work: Work) -> pl.CostEstimate:
    """What the launch would cost if every token had a window of its own."""
    problem = work.problem
    slots = 1 + (2 * work.window_slots if work.has_windows else 1)
    row_bytes = problem.num_kv_heads * sum(work.widths.values()) * problem.cache_dtype.itemsize
    return pl.CostEstimate(
        flops=0, bytes_accessed=problem.num_tokens * slots * row_bytes, transcendentals=0
    )
