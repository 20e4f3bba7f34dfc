"""Attention of any number of new tokens a sequence to paged keys and values, on Hopper.

A grid of as many programs as there are multiprocessors, which take tiles until none is left: see
`tiles.py`. A tile is a block of a sequence's new tokens and a KV head: its rows are these tokens
times the heads of the group, 64 for each warpgroup, and it sees blocks of `block_kv` tokens.
A program is two or three warpgroups that compute, and one that copies:

- The last one copies. Threads of four warps start a TMA copy for each page of a block, as soon as
  there is room; of these, one takes a tile's queries, too: see `copying.py`. An id that names no
  page copies page 0, whose tokens are masked.
- The others compute, each for its rows. With block `j` of keys `Kj` and values `Vj`, in log2 units:

    S = Q K0';  P = softmax(S)
    for j = 1 ..:  issue S = Q Kj';  issue acc += P V(j-1);  wait for S;  P' = softmax(S)
                   wait for acc;  acc *= alpha;  P = P'
    acc += P Vn;  out = acc / l

  They issue in turn. So the softmax of one runs under its own product with the values, and under
  both products of the others.

Barriers, all in shared memory but for those of the turn: of each slot for queries, keys and values,
`there` has as many arrivals as copies, `free` one of each warpgroup. `cleared` is for values that
no row sees: they may be anything, so the warpgroups clear them together before anyone weighs them.
A block without a mask has neither such values nor such keys: which ones these are follows from
positions, and from how many first pages of a sequence all exist.

Parts of contexts that are cut leave in float32, to be combined by another kernel. All that leaves
goes through the place of the queries, by copies of whole rows. Rows of no sequence are cleared.

Source: FlashAttention-3 (Shah et al., 2024, arXiv:2407.08608), the products' order and the turns;
a maximum that is raised late after FlashAttention-4 (Dao et al., 2026); heads packed with tokens
after Ragged Paged Attention (arXiv:2604.15464).
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from ejk.backends.mosaic_gpu._arithmetic import LN2, rounded, spread
from ejk.backends.mosaic_gpu._private import ROW
from ejk.backends.mosaic_gpu.ragged_page_attention.copying import Copying
from ejk.backends.mosaic_gpu.ragged_page_attention.memory import Inputs, Outputs, Shared
from ejk.backends.mosaic_gpu.ragged_page_attention.rows import Rows, Turn
from ejk.backends.mosaic_gpu.ragged_page_attention.sizes import PrefillSizes
from ejk.backends.mosaic_gpu.ragged_page_attention.softmax import (
    State,
    result,
    result_of_part,
)
from ejk.backends.mosaic_gpu.ragged_page_attention.tiles import Tile, my_tiles, tile_in
from ejk.backends.mosaic_gpu.ragged_page_attention.writing import Writing

# Registers of a thread that computes, by warpgroups that do: see `copying.REGISTERS`.
REGISTERS = {2: 240, 3: 160}


def ragged_attention_kernel(
    inputs: Inputs, outputs: Outputs, shared: Shared, sizes: PrefillSizes
) -> None:
    warpgroup = lax.axis_index("warpgroup")
    pl.when(warpgroup == sizes.warpgroups)(Copying(inputs, shared, sizes).run)
    attending = Attending(inputs, outputs, shared, sizes, warpgroup)
    pl.when(warpgroup < sizes.warpgroups)(attending.run)


@dataclasses.dataclass(frozen=True)
class Attending:
    """A warpgroup that computes."""

    inputs: Inputs
    outputs: Outputs
    shared: Shared
    sizes: PrefillSizes
    warpgroup: Any

    def run(self) -> None:
        """Attend to this program's tiles, one after the other."""
        plgpu.set_max_registers(REGISTERS[self.sizes.warpgroups], action="increase")
        shared, sizes = self.shared, self.sizes
        self._writing.clear()
        for slot in range(sizes.q_slots):
            plgpu.barrier_arrive(shared.query_free.at[slot])
        for slot in range(sizes.stages):
            plgpu.barrier_arrive(shared.keys_free.at[slot])
            plgpu.barrier_arrive(shared.values_free.at[slot])
        pl.when(self.warpgroup == sizes.warpgroups - 1)(self._turn.hand_on)  # the first one begins
        tiles = my_tiles(self.inputs, sizes)
        lax.fori_loop(0, tiles, self._attend, jnp.int32(0))
        if self._releases_late:
            pl.when(tiles > 0)(lambda: self._release(tiles - 1))
        pl.when(self.warpgroup == 0)(self._turn.take)  # whatever arrives is waited for
        plgpu.wait_smem_to_gmem(0)

    def _attend(self, r: Any, n: Any) -> Any:
        """Attend to tile `r`, whose first block is block `n` of all; return the next one's."""
        shared, slot = self.shared, lax.rem(r, self.sizes.q_slots)
        plgpu.barrier_wait(shared.query_there.at[slot])
        by_head = self.sizes.problem.scales == "head"
        scale = self.inputs.attn_scale[tile_in(shared, slot).kv_head if by_head else 0]
        rows = Rows(self.inputs, shared, self.sizes, self.warpgroup, slot, scale, self._turn)

        def release_before() -> None:
            if self._releases_late:
                pl.when(r > 0)(lambda: self._release(r - 1))

        state, n = rows.attend(n, release_before)
        self._write(rows.tile, slot, state)
        if not self._releases_late:
            self._release(r)
        return n

    @property
    def _turn(self) -> Turn:
        return Turn(self.shared.turn, self.warpgroup, self.sizes.warpgroups)

    @property
    def _writing(self) -> Writing:
        return Writing(self.inputs, self.outputs, self.shared, self.sizes, self.warpgroup)

    @property
    def _releases_late(self) -> bool:
        """A result leaves while the next tile is begun, if that has room: 2 % faster."""
        return self.sizes.q_slots > 1

    def _release(self, r: Any) -> None:
        """Let the place of tile `r` be taken, once its result has left."""
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        plgpu.barrier_arrive(self.shared.query_free.at[lax.rem(r, self.sizes.q_slots)])

    def _write(self, tile: Tile, slot: Any, state: State) -> None:
        """Write what the rows come to, or the tile's part of it."""
        problem, writing = self.sizes.problem, self._writing
        l = state.l.sum(axis=1)
        if self.sizes.has_parts:

            @pl.when(tile.part >= 0)
            def _() -> None:
                factor, lse = result_of_part(state.m, l)
                factor = self._scaled(factor, l, tile)
                out = state.acc * spread(factor, problem.head_dim)
                writing.write_part(tile, slot, out, lse)

        @pl.when(tile.part < 0)
        def _() -> None:
            if problem.has_sinks:
                sinks = plgpu.load(self.inputs.sinks.at[tile.kv_head], layout=ROW, optimized=False)
                factor, lse = result(state.m, l, sinks)
            else:
                factor, lse = result_of_part(state.m, l)
                lse = lse * LN2
            factor = self._scaled(factor, l, tile)
            out = rounded(state.acc * spread(factor, problem.head_dim), problem.query_dtype)
            writing.write(tile, slot, out, lse)

    def _scaled(self, factor: Any, l: Any, tile: Tile) -> Any:
        """Multiply rows' factors by the scale of values, but for rows that saw no value."""
        if self.sizes.problem.scales != "head":
            return factor
        return jnp.where(l == 0, factor, factor * self.inputs.value_scale[tile.kv_head])
