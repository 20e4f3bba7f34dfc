"""The `pallas_call` of the write: tokens in the order of their slots, blocks and scratch."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ejk.backends.pallas._call import Blocked, call
from ejk.backends.pallas.write_kv_cache.kernel import write_kv_cache_kernel
from ejk.backends.pallas.write_kv_cache.sizes import WriteSizes
from ejk.backends.write_kv_cache import WriteKVCacheOperands, by_slot


def write(
    sizes: WriteSizes, operands: WriteKVCacheOperands, vmem_limit_bytes: int, interpret: Any
) -> tuple[jax.Array, ...]:
    """Launch the kernel once; returns the results of `sizes.problem`."""
    problem = sizes.problem
    slots, order = by_slot(operands.slot_mapping, problem.num_slots)
    pad = sizes.num_blocks * sizes.block_tokens - problem.num_tokens
    slots, order = jnp.pad(slots, (0, pad), constant_values=-1), jnp.pad(order, (0, pad))

    def rows(x: jax.Array | None, width: int) -> Blocked | None:
        """Give each step a block of tokens."""
        if x is None:
            return None
        shape = sizes.row_shape(width)
        spec = pl.BlockSpec((sizes.block_tokens, *shape), lambda i, _: (i, *(0 for _ in shape)))
        return x[order].reshape(-1, *shape), spec

    def windows(width: int) -> Any:
        if not (width and sizes.has_windows):
            return None
        shape = (sizes.block_tokens, *sizes.window_shape(width))
        return pltpu.VMEM(shape, problem.cache_dtype)

    return tuple(
        call(
            write_kv_cache_kernel,
            scalars=dict(slot_mapping_ref=slots),
            inputs=dict(
                key_ref=rows(operands.key, problem.head_dim),
                value_ref=rows(operands.value, problem.value_head_dim),
            ),
            outputs={},
            in_place=dict(
                key_cache_hbm_ref=operands.key_cache,
                value_cache_hbm_ref=operands.value_cache,
            ),
            scratch=dict(
                key_buf=windows(problem.head_dim),
                value_buf=windows(problem.value_head_dim),
                leader_ref=pltpu.SMEM((sizes.block_tokens,), jnp.int32),
                sem=pltpu.SemaphoreType.DMA,
            ),
            sizes=sizes,
            grid=(sizes.num_blocks,),
            dimension_semantics=("arbitrary",),  # a window may go on in the next block
            cost=cost_of_write(sizes),
            vmem_limit_bytes=vmem_limit_bytes,
            interpret=interpret,
        )
    )


def cost_of_write(sizes: WriteSizes) -> pl.CostEstimate:
    """What the launch would cost if every token had a window of its own."""
    problem = sizes.problem
    slots = 1 + (2 * sizes.window_slots if sizes.has_windows else 1)
    row_bytes = problem.num_kv_heads * sum(sizes.widths.values()) * problem.cache_dtype.itemsize
    return pl.CostEstimate(
        flops=0, bytes_accessed=problem.num_tokens * slots * row_bytes, transcendentals=0
    )
