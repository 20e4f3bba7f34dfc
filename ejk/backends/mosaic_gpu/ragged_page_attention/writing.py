"""How results leave: through shared memory, by copies that take whole rows."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from ejk.backends.mosaic_gpu._private import TILE
from ejk.backends.mosaic_gpu._tensor_cores import ROWS
from ejk.backends.mosaic_gpu.ragged_page_attention.memory import Inputs, Outputs, Shared, views_of
from ejk.backends.mosaic_gpu.ragged_page_attention.sizes import PrefillSizes
from ejk.backends.mosaic_gpu.ragged_page_attention.tiles import Tile


@dataclasses.dataclass(frozen=True)
class Writing:
    """A warpgroup's writing. The rows lie where its queries were, in their slot."""

    inputs: Inputs
    outputs: Outputs
    shared: Shared
    sizes: PrefillSizes
    warpgroup: Any

    def write(self, tile: Tile, slot: Any, out: Any, lse: Any) -> None:
        """Write the rows of those tokens that there are; they are read when all copies are."""
        views = views_of(self.shared.query, self.sizes)
        first, count = self._tokens(tile)
        rows = self.outputs.out.at[pl.ds(tile.token + first, self.sizes.own_tokens), tile.kv_head]
        width = views.tiles.shape[-1]
        for chunk in range(self.sizes.chunks):
            columns = out[:, chunk * width : (chunk + 1) * width]
            views.tiles.at[slot, self.warpgroup, chunk][...] = columns
        plgpu.commit_smem()
        is_full = (count == self.sizes.own_tokens) & self.sizes.in_one_box
        if self.sizes.in_one_box:

            @pl.when(is_full)
            def _() -> None:
                for chunk in range(self.sizes.chunks):
                    box = views.box(slot, self.warpgroup, chunk, self.sizes)
                    columns = pl.ds(chunk * width, width)
                    plgpu.copy_smem_to_gmem(box, rows.at[:, :, columns])

        def copy_token(i: Any, _: Any) -> None:
            for chunk in range(self.sizes.chunks):
                own = views.token(slot, self.warpgroup, chunk, i, self.sizes)
                row = self.outputs.out.at[tile.token + first + i, tile.kv_head]
                plgpu.copy_smem_to_gmem(own, row.at[:, pl.ds(chunk * width, width)])

        lax.fori_loop(0, jnp.where(is_full, 0, count), copy_token, None)
        if self.sizes.problem.return_lse:
            self._write_lse(self.outputs.lse, tile, tile.token + first, count, lse)

    def write_part(self, tile: Tile, slot: Any, out: Any, lse: Any) -> None:
        """Write the rows of a part: half of them at a time, as they are twice as wide."""
        views = views_of(self.shared.query, self.sizes, of_parts=True)
        first, count = self._tokens(tile)
        group, width = self.sizes.group, views.tiles.shape[-1]
        row = tile.part + first * group
        for half in range(2):
            for chunk in range(self.sizes.chunks):
                begin = (half * self.sizes.chunks + chunk) * width
                columns = out[:, begin : begin + width]
                views.tiles.at[slot, self.warpgroup, chunk][...] = columns
            plgpu.commit_smem()

            def copy_token(i: Any, _: Any, half: int = half) -> None:
                rows = self.outputs.part_out.at[pl.ds(row + i * group, group), tile.kv_head]
                for chunk in range(self.sizes.chunks):
                    begin = (half * self.sizes.chunks + chunk) * width
                    own = views.token(slot, self.warpgroup, chunk, i, self.sizes)
                    plgpu.copy_smem_to_gmem(own, rows.at[:, pl.ds(begin, width)])

            lax.fori_loop(0, count, copy_token, None)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        by_row = self.shared.by_row.at[self.warpgroup]
        by_row[...] = lse
        plgpu.commit_smem()

        def write_row(i: Any, _: Any) -> None:
            self.outputs.part_lse[row + i, tile.kv_head] = by_row[i]

        lax.fori_loop(0, count * group, write_row, None)

    def clear(self) -> None:
        """Write the rows of tokens of no sequence: 0, their LSE -inf."""
        problem, sizes = self.sizes.problem, self.sizes
        views = views_of(self.shared.query, sizes)
        first, last = self.inputs.work[0, 4], self.inputs.work[0, 5]
        count = first + problem.total_tokens - last
        width = views.tiles.shape[-1]

        @pl.when((count > 0) & (self.warpgroup == 0))
        def _() -> None:
            zeros = plgpu.layout_cast(jnp.zeros((ROWS, width), problem.query_dtype), TILE)
            views.tiles.at[0, 0, 0][...] = zeros
            plgpu.commit_smem()

            def clear_token(i: Any, _: Any) -> None:
                i = lax.axis_index("program") + i * sizes.num_programs
                token = jnp.where(i < first, i, last + i - first)

                def clear_head(head: Any, _: Any) -> None:
                    row = self.outputs.out.at[token, head]
                    for chunk in range(sizes.chunks):
                        columns = pl.ds(chunk * width, width)
                        plgpu.copy_smem_to_gmem(views.token(0, 0, 0, 0, sizes), row.at[:, columns])
                    for i in range(sizes.group if problem.return_lse else 0):
                        self.outputs.lse[token, head, i] = jnp.float32(-jnp.inf)

                lax.fori_loop(0, problem.num_kv_heads, clear_head, None)

            mine = count - lax.axis_index("program") + (sizes.num_programs - 1)
            lax.fori_loop(0, lax.div(mine, sizes.num_programs), clear_token, None)
            plgpu.wait_smem_to_gmem(0)

    def _tokens(self, tile: Tile) -> tuple[Any, Any]:
        """Return which of a tile's tokens is the warpgroup's first, and how many it has."""
        first = self.warpgroup * self.sizes.own_tokens
        return first, jnp.clip(tile.count - first, 0, self.sizes.own_tokens)

    def _write_lse(self, lse_ref: Any, tile: Tile, token: Any, count: Any, lse: Any) -> None:
        by_row = self.shared.by_row.at[self.warpgroup]
        by_row[...] = lse
        plgpu.commit_smem()

        def write_token(i: Any, _: Any = None) -> None:
            for head in range(self.sizes.group):
                lse_ref[token + i, tile.kv_head, head] = by_row[i * self.sizes.group + head]

        is_full = count == self.sizes.own_tokens

        @pl.when(is_full)
        def _() -> None:  # a loop would wait for each row
            for i in range(self.sizes.own_tokens):
                write_token(i)

        lax.fori_loop(0, jnp.where(is_full, 0, count), write_token, None)
