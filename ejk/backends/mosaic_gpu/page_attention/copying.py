"""The warpgroup that copies: queries, then block after block, as soon as there is room."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from ejk.backends.mosaic_gpu._pages import exists, page_bits
from ejk.backends.mosaic_gpu.page_attention.memory import Inputs, Shared
from ejk.backends.mosaic_gpu.page_attention.piece import Piece, pages_of
from ejk.backends.mosaic_gpu.page_attention.sizes import BLOCK_KV, LatentSizes

REGISTERS = 24  # of a thread


@dataclasses.dataclass(frozen=True)
class Copying:
    """Blocks `j` are counted from the first of the piece."""

    inputs: Inputs
    shared: Shared
    sizes: LatentSizes
    piece: Piece

    def run(self) -> None:
        """Copy the queries, then block after block, by one thread."""
        plgpu.set_max_registers(REGISTERS, action="decrease")

        @plgpu.warp_map
        def _(warp: Any) -> None:
            pl.when(warp == 0)(self._copy)

    def _copy(self) -> None:
        shared, sizes = self.shared, self.sizes
        first = self.piece.token * sizes.heads + self.piece.head
        thirds = (shared.query.at[0], shared.query.at[1], shared.query_rest)
        for third, into in enumerate(thirds):
            for begin, row, count in sizes.query_copies:
                plgpu.copy_gmem_to_smem(
                    self.inputs.query.at[pl.ds(first + begin, count), sizes.third(third)],
                    into.at[pl.ds(row, count)],
                    shared.query_there,
                )

        def copy_block(j: Any, pages: tuple[Any, ...]) -> tuple[Any, ...]:
            ahead = pages_of(j + 1, self.piece, self.inputs, sizes)
            self._copy_block(j, lax.rem(j, 2), pages)
            return ahead

        first = pages_of(0, self.piece, self.inputs, sizes)
        lax.fori_loop(0, self.piece.blocks, copy_block, first)
        for index in range(4):  # whatever arrives at a barrier is waited for
            plgpu.barrier_wait(shared.half_free.at[index])

    def _copy_block(self, j: Any, slot: Any, pages: tuple[Any, ...]) -> None:
        """Copy a block, a third after the other, as soon as there is room."""
        shared, sizes = self.shared, self.sizes
        copied = sizes.copied_rows
        first = lax.rem((self.piece.first_block + j) * BLOCK_KV, sizes.problem.page_size)
        exist = [exists(page, sizes.problem.num_pages) for page in pages]
        for third in range(3):
            if third < 2:
                plgpu.barrier_wait(shared.half_free.at[2 * slot + third])
                into = shared.keys.at[slot, third]
            else:
                into = shared.rest.at[slot]
                shared.exist[slot] = page_bits(exist)
            for i, page in enumerate(pages):
                page = jnp.where(exist[i], page, 0)
                plgpu.copy_gmem_to_smem(
                    self.inputs.pool.at[page, pl.ds(first, copied), sizes.third(third)],
                    into.at[pl.ds(i * copied, copied)],
                    shared.third_there.at[3 * slot + third],
                )
