"""Copies pages inside of pools on a TPU, in place: from memory to memory, past the core.

Grid: twice all blocks of `block_copies` copies, one after the other. A copy whose source is some
copy's target is in conflict. The first time round the sources in conflict go to memory of their own
(`stage`); the second time every target is written, from the pool or from there. The copies of a
step are under way together, and have arrived before the next begins.

Slots are none of this kernel's: a copy moves whole tiles, and a tile holds several of them.

Source: own.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ejk.backends.copy_kv_cache import DIRECT, STAGED, CopyKVCacheProblem


@dataclasses.dataclass(frozen=True)
class CopySizes:
    """The static shape of one launch."""

    problem: CopyKVCacheProblem
    block_copies: int
    num_blocks: int


def copy_pages_kernel(
    # Prefetched scalars
    source_ref,  # int32 [blocks * block_copies]
    target_ref,  # int32 [blocks * block_copies]
    route_ref,  # int32 [blocks * block_copies]: NOTHING, DIRECT or STAGED
    # Outputs
    key_stage_hbm_ref,  # [num_copies, *page], or heads first; written where a copy is staged
    value_stage_hbm_ref,  # the same of values, or None
    key_scale_stage_hbm_ref,  # the same of scales of tokens, or None
    value_scale_stage_hbm_ref,
    # Outputs, in the place of the pools that were given
    key_cache_hbm_ref,  # the pool of keys in its own layout; of fused pools, the values' too
    value_cache_hbm_ref,  # the pool of values, or None
    key_scale_hbm_ref,  # the pools of tokens' scales, or None
    value_scale_hbm_ref,
    # Scratch
    sem,
    *,
    sizes: CopySizes,
):
    """Copy one block, or stage it."""
    # Which work is mine.
    is_copying = pl.program_id(0) == 1
    first = pl.program_id(1) * sizes.block_copies
    pools = [
        (pool, stage)
        for pool, stage in (
            (key_cache_hbm_ref, key_stage_hbm_ref),
            (value_cache_hbm_ref, value_stage_hbm_ref),
            (key_scale_hbm_ref, key_scale_stage_hbm_ref),
            (value_scale_hbm_ref, value_scale_stage_hbm_ref),
        )
        if pool is not None
    ]

    def page(ref: Any, number: Any) -> Any:
        return ref.at[(*[slice(None)] * sizes.problem.layout.pages, number)]

    def for_copies(act: Callable[[Any], None]) -> None:
        """Act on each copy of memory that the step makes."""

        @pl.loop(0, sizes.block_copies)
        def _(j):
            i = first + j
            source, target, route = source_ref[i], target_ref[i], route_ref[i]
            for pool, stage in pools:

                @pl.when(~is_copying & (route == STAGED))
                def _stage(pool=pool, stage=stage):
                    act(pltpu.make_async_copy(page(pool, source), page(stage, i), sem))

                @pl.when(is_copying & (route == STAGED))
                def _unstage(pool=pool, stage=stage):
                    act(pltpu.make_async_copy(page(stage, i), page(pool, target), sem))

                @pl.when(is_copying & (route == DIRECT))
                def _copy(pool=pool):
                    act(pltpu.make_async_copy(page(pool, source), page(pool, target), sem))

    # Write: all copies of the block at once.
    for_copies(lambda copy: copy.start())
    for_copies(lambda copy: copy.wait())
