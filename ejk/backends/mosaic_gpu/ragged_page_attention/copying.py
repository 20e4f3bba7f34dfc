"""The warpgroup that copies: tile after tile, block after block, as soon as there is room.

Its warps, a thread each, copy by TMA, one copy a page. Warp 0 also takes the tiles' queries.
"""

import dataclasses
import functools
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from ejk.backends.mosaic_gpu._pages import exists
from ejk.backends.mosaic_gpu._tensor_cores import SWIZZLED
from ejk.backends.mosaic_gpu.ragged_page_attention.memory import (
    Inputs,
    Shared,
    rows_of_page,
    scales_of_block,
    views_of,
)
from ejk.backends.mosaic_gpu.ragged_page_attention.sizes import PrefillSizes
from ejk.backends.mosaic_gpu.ragged_page_attention.tiles import Tile, my_tile, my_tiles

# Registers of a thread that copies, by warpgroups that compute. All threads start with an even
# share, 168 or 128.
REGISTERS = {2: 24, 3: 32}
# Warps for the keys, and as many for the values, which share the pages of a block: with pages of 16
# two of each are 4 % faster than one (8 x 4,096 tokens).
SHARES = 2


@dataclasses.dataclass(frozen=True)
class Copying:
    """Slots are taken in turn: block `n`, counted over all tiles, goes to slot `n % stages`."""

    inputs: Inputs
    shared: Shared
    sizes: PrefillSizes

    def run(self) -> None:
        plgpu.set_max_registers(REGISTERS[self.sizes.warpgroups], action="decrease")
        shares = min(SHARES, self.sizes.copies)

        @plgpu.warp_map
        def _(warp: Any) -> None:
            for share in range(shares):
                for half in range(2):
                    take = functools.partial(self._copy_tiles, half, share, shares)
                    pl.when(warp == 2 * share + half)(take)

    def _copy_tiles(self, half: int, share: int, shares: int) -> None:
        """Copy a share of the pages of all keys (`half` 0) or values (1), by one thread."""
        with_queries = half == 0 and share == 0

        def copy_tile(r: Any, n: Any) -> Any:
            tile = my_tile(r, self.inputs, self.sizes)
            if with_queries:
                self._copy_queries(tile, lax.rem(r, self.sizes.q_slots))
            return self._copy_blocks(tile, n, half, share, shares)

        lax.fori_loop(0, my_tiles(self.inputs, self.sizes), copy_tile, jnp.int32(0))
        # Whatever arrives at a barrier is waited for.
        for slot in range(self.sizes.stages):
            plgpu.barrier_wait(self._free(half).at[slot])
        if with_queries:
            for slot in range(self.sizes.q_slots):
                plgpu.barrier_wait(self.shared.query_free.at[slot])

    def _copy_queries(self, tile: Tile, slot: Any) -> None:
        """Copy what a tile is, and its queries: rows of other tokens come along."""
        shared, sizes = self.shared, self.sizes
        plgpu.barrier_wait(shared.query_free.at[slot])
        for i, field in enumerate(tile):
            shared.tile[slot, i] = field
        views = views_of(shared.query, sizes)
        there = shared.query_there.at[slot]
        for warpgroup in range(sizes.warpgroups):
            token = tile.token + warpgroup * sizes.own_tokens
            for chunk in range(sizes.chunks):
                columns = pl.ds(chunk * SWIZZLED, SWIZZLED)
                if sizes.in_one_box:  # rows past the last are zeros
                    rows = self.inputs.query.at[pl.ds(token, sizes.own_tokens), tile.kv_head]
                    box = views.box(slot, warpgroup, chunk, sizes)
                    plgpu.copy_gmem_to_smem(rows.at[:, :, columns], box, there)
                    continue
                for i in range(sizes.own_tokens):
                    row = jnp.minimum(token + i, sizes.problem.total_tokens - 1)
                    rows = self.inputs.query.at[row, tile.kv_head, :, columns]
                    own = views.token(slot, warpgroup, chunk, i, sizes)
                    plgpu.copy_gmem_to_smem(rows, own, there)

    def _copy_blocks(self, tile: Tile, n: Any, half: int, share: int, shares: int) -> Any:
        """Copy a share of each block of a tile; page ids are read a block ahead."""
        sizes = self.sizes
        copies = range(share * sizes.copies // shares, (share + 1) * sizes.copies // shares)
        ahead = functools.partial(self._pages, tile, copies)

        def copy_block(j: Any, carry: tuple[Any, ...]) -> tuple[Any, ...]:
            n, *pages = carry
            later = ahead(j + 1)
            self._copy_pages(tile, j, lax.rem(n, sizes.stages), half, zip(copies, pages))
            if sizes.problem.scales == "token" and half == 0 and share == 0:
                self._copy_scales(tile, j, n)
            return n + 1, *later

        carry = n, *ahead(jnp.int32(0))
        return lax.fori_loop(0, tile.blocks(sizes), copy_block, carry)[0]

    def _pages(self, tile: Tile, copies: range, j: Any) -> list[Any]:
        """Return the ids of a block's pages, 0 instead of one that names none."""
        problem, sizes = self.sizes.problem, self.sizes
        first = lax.div((tile.first_block(sizes) + j) * sizes.block_kv, problem.page_size)
        places = (jnp.minimum(first + i, problem.max_blocks - 1) for i in copies)
        pages = (self.inputs.block_tables[tile.seq, place] for place in places)
        return [jnp.where(exists(page, problem.num_pages), page, 0) for page in pages]

    def _copy_pages(self, tile: Tile, j: Any, slot: Any, half: int, pages: Any) -> None:
        inputs, shared, sizes = self.inputs, self.shared, self.sizes
        pool = inputs.key if half == 0 or inputs.value is None else inputs.value
        into, there = (
            (shared.keys, shared.keys_there) if half == 0 else (shared.values, shared.values_there)
        )
        first = (tile.first_block(sizes) + j) * sizes.block_kv
        first = lax.rem(first, sizes.problem.page_size) if sizes.copies == 1 else 0
        plgpu.barrier_wait(self._free(half).at[slot])
        for i, page in pages:
            plgpu.copy_gmem_to_smem(
                rows_of_page(pool, page, tile.kv_head, first, half, sizes),
                into.at[slot, pl.ds(i * sizes.copied_rows, sizes.copied_rows)],
                there.at[slot],
            )

    def _copy_scales(self, tile: Tile, j: Any, n: Any) -> None:
        """Copy the scales of a block's tokens, for which there is room once there is for keys."""
        shared, sizes = self.shared, self.sizes
        block = tile.seq * sizes.scaled_blocks + tile.first_block(sizes) + j
        plgpu.copy_gmem_to_smem(
            self.inputs.token_scales.at[tile.kv_head, block],
            scales_of_block(shared, n, sizes),
            shared.keys_there.at[lax.rem(n, sizes.stages)],
        )

    def _free(self, half: int) -> Any:
        return self.shared.keys_free if half == 0 else self.shared.values_free
