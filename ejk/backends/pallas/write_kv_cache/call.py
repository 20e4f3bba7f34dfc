"""The `pallas_call` of the write: tokens in the order of their slots, blocks and scratch."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ejk.backends.pallas._call import Blocked, call
from ejk.backends.pallas.write_kv_cache.kernel import write_kv_cache_kernel
from ejk.backends.pallas.write_kv_cache.sizes import WriteSizes
from ejk.backends.stored_rows import stored
from ejk.backends.write_kv_cache import WriteKVCacheOperands, by_slot


def write(
    sizes: WriteSizes, operands: WriteKVCacheOperands, vmem_limit_bytes: int, interpret: Any
) -> tuple[jax.Array, ...]:
    """Launch the kernel once; returns the results of `sizes.problem`."""
    problem = sizes.problem
    slots, order = by_slot(operands.slot_mapping, problem.num_slots)
    pad = sizes.num_blocks * sizes.block_tokens - problem.num_tokens
    slots, order = jnp.pad(slots, (0, pad), constant_values=-1), jnp.pad(order, (0, pad))

    def held(rows: jax.Array | None, scale: jax.Array | None) -> Held:
        return (None, None) if rows is None else stored(problem, rows[order], scale)

    key = held(operands.key, operands.key_scale)
    value = held(operands.value, operands.value_scale)
    return put(sizes, operands, slots, key, value, vmem_limit_bytes, interpret)


Held = tuple[jax.Array | None, jax.Array | None]
"""What the pools get of tokens in the order of their slots: codes, and scales of their own."""


def put(
    sizes: WriteSizes,
    pools: Any,
    slots: jax.Array,
    key: Held,
    value: Held,
    vmem_limit_bytes: int,
    interpret: Any,
) -> tuple[jax.Array, ...]:
    """Put rows, as `pools` hold them, in slots that ascend; -1 is none."""
    of_tokens = sizes.problem.scales == "token"
    key_rows, key_scales = blocks(sizes, *key)
    value_rows, value_scales = blocks(sizes, *value)
    return tuple(
        call(
            write_kv_cache_kernel,
            scalars=dict(slot_mapping_ref=slots),
            inputs=dict(
                key_ref=key_rows,
                value_ref=value_rows,
                key_scale_ref=key_scales,
                value_scale_ref=value_scales,
            ),
            outputs={},
            in_place=dict(
                key_cache_hbm_ref=pools.key_cache,
                value_cache_hbm_ref=pools.value_cache,
                key_scale_hbm_ref=pools.key_scale if of_tokens else None,
                value_scale_hbm_ref=pools.value_scale if of_tokens else None,
            ),
            scratch=scratch(sizes),
            sizes=sizes,
            grid=(sizes.num_blocks,),
            dimension_semantics=("arbitrary",),  # a window may go on in the next block
            cost=cost_of_write(sizes),
            vmem_limit_bytes=vmem_limit_bytes,
            interpret=interpret,
        )
    )


def blocks(
    sizes: WriteSizes, codes: jax.Array | None, scale: jax.Array | None
) -> tuple[Blocked | None, Blocked | None]:
    """Return the blocks of a step: rows of tokens, and their scales if they have their own."""
    if codes is None:
        return None, None
    problem = sizes.problem

    def block(x: jax.Array, shape: tuple[int, ...]) -> Blocked:
        """Give each step a block of tokens."""
        spec = pl.BlockSpec((sizes.block_tokens, *shape), lambda i, _: (i, *(0 for _ in shape)))
        return x.reshape(-1, *shape), spec

    shape = sizes.row_shape(codes.shape[-1])
    if sizes.row_dtype != problem.cache_dtype:
        codes = jax.lax.bitcast_convert_type(codes, jnp.int8).astype(sizes.row_dtype)
    if problem.scales != "token":
        return block(codes, shape), None
    assert scale is not None
    return block(codes, shape), block(scale, sizes.scale_row_shape)


def scratch(sizes: WriteSizes) -> dict[str, Any]:
    """Return the windows in VMEM, and what is known of them."""
    problem, of_tokens = sizes.problem, sizes.problem.scales == "token"

    def windows(width: int) -> Any:
        if not (width and sizes.has_windows):
            return None
        shape = (sizes.block_tokens, *sizes.window_shape(width))
        return pltpu.VMEM(shape, problem.cache_dtype)

    pages = pltpu.VMEM((sizes.block_tokens, *sizes.scale_window_shape), jnp.float32)
    leaders = pltpu.SMEM((sizes.block_tokens,), jnp.int32)
    return dict(
        key_buf=windows(problem.head_dim),
        value_buf=windows(problem.value_head_dim),
        key_scale_buf=pages if of_tokens else None,
        value_scale_buf=pages if of_tokens and not problem.latent else None,
        leader_ref=leaders,
        page_leader_ref=leaders if of_tokens else None,
        sem=pltpu.SemaphoreType.DMA,
    )


def cost_of_write(sizes: WriteSizes) -> pl.CostEstimate:
    """What the launch would cost if every token had a window of its own."""
    problem = sizes.problem
    slots = 1 + (2 * sizes.window_slots if sizes.has_windows else 1)
    row_bytes = problem.num_kv_heads * sum(sizes.widths.values()) * problem.cache_dtype.itemsize
    return pl.CostEstimate(
        flops=0, bytes_accessed=problem.num_tokens * slots * row_bytes, transcendentals=0
    )
