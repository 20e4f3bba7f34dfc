"""A warpgroup's rows of a tile: blocks of keys and values, one after the other."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from ejk.backends.mosaic_gpu import _private as private
from ejk.backends.mosaic_gpu._arithmetic import LOG2E, accumulator, added, fill, spread
from ejk.backends.mosaic_gpu._private import COLUMN, ROW, TILE
from ejk.backends.mosaic_gpu._private_mask import Seen, kept
from ejk.backends.mosaic_gpu._private_softmax import capped, in_log2, of_rows, rescaled
from ejk.backends.mosaic_gpu._tensor_cores import ROWS, SWIZZLED
from ejk.backends.mosaic_gpu.ragged_page_attention import mask
from ejk.backends.mosaic_gpu.ragged_page_attention.memory import (
    Inputs,
    Shared,
    scales_of_block,
    views_of,
)
from ejk.backends.mosaic_gpu.ragged_page_attention.sizes import PrefillSizes
from ejk.backends.mosaic_gpu.ragged_page_attention.softmax import (
    State,
    empty,
    weigh,
)
from ejk.backends.mosaic_gpu.ragged_page_attention.tiles import Tile, tile_in


@dataclasses.dataclass(frozen=True)
class Turn:
    """Warpgroups issue their products in turn: one computes while products of others run."""

    barriers: Any  # None: the hardware's own
    warpgroup: Any
    warpgroups: int

    def take(self) -> None:
        private.take_turn(self.barriers, self.warpgroup)

    def hand_on(self) -> None:
        private.pass_turn(self.barriers, lax.rem(self.warpgroup + 1, self.warpgroups))


@dataclasses.dataclass(frozen=True)
class Rows:
    """A warpgroup's rows of a tile.

    Blocks `j` are counted from the first of the tile, blocks `n` from the first of all tiles.
    """

    inputs: Inputs
    shared: Shared
    sizes: PrefillSizes
    warpgroup: Any
    q_slot: Any
    scale: Any  # of the products of queries and keys
    turn: Turn

    @property
    def tile(self) -> Tile:
        """Read anew where it is used: between uses it would take registers."""
        return tile_in(self.shared, self.q_slot)

    def attend(self, n: Any, then: Callable[[], None]) -> tuple[State, Any]:
        """Attend to all blocks, from block `n` on; `then` runs after the first one's softmax.

        Also returns the number of the next tile's first block.
        """
        tile, sizes = self.tile, self.sizes
        if sizes.problem.soft_cap is not None:
            self._clear_queries()
        start, stop = mask.unmasked(tile, self.warpgroup, self.scale, self.inputs, sizes)
        blocks = tile.blocks(sizes)
        is_whole = (start == 0) & (stop > 0)
        state, p = self._first_block(n, is_whole)
        start, stop = jnp.maximum(start, 1), jnp.maximum(stop, 1)
        then()
        masked, whole = (functools.partial(self._step, masked=x) for x in (True, False))
        carry = n, state, p
        if self.inputs.sliding_window is not None:
            carry = lax.fori_loop(1, start, masked, carry)
        carry = lax.fori_loop(start, stop, whole, carry)
        n, state, p = lax.fori_loop(stop, blocks, masked, carry)
        return self._last_values(blocks - 1, n, state, p), n + 1

    def _first_block(self, n: Any, is_whole: Any) -> tuple[State, Any]:
        """Find the first block's weights."""
        sizes = self.sizes
        slot = lax.rem(n, sizes.stages)
        plgpu.barrier_wait(self.shared.keys_there.at[slot])

        self.turn.take()

        def run(s_ref: Any = None) -> Any:
            issued = self._issue_logits(s_ref, slot)
            self.turn.hand_on()
            return private.logits(sizes.plain, s_ref, issued, 0)

        s = pl.run_scoped(run, *self._accumulators)
        plgpu.barrier_arrive(self.shared.keys_free.at[slot])
        first = jnp.int32(0)
        s = in_log2(*self._logits(s, self._scales(n, 0), first, masked=True))
        s = lax.cond(is_whole, lambda: s, lambda: self._masked(s, first))
        units = (of_rows(1.0, ROWS),)
        state, p, _ = weigh(sizes.plain, s, units, empty(sizes.problem.head_dim))
        p = _scaled(p, self._scales(n, 1))
        return state, p.astype(sizes.problem.query_dtype)

    def _step(self, j: Any, carry: Any, masked: bool) -> Any:
        """Find the weights of block `j` while the values of the block before it are weighed."""
        n, state, p = carry
        shared, sizes = self.shared, self.sizes
        before, slot = lax.rem(n, sizes.stages), lax.rem(n + 1, sizes.stages)
        plgpu.barrier_wait(shared.keys_there.at[slot])
        plgpu.barrier_wait(shared.values_there.at[before])
        if masked:
            self._clear(j - 1, before)
        self.turn.take()

        def run(acc_ref: Any, s_ref: Any = None) -> Any:
            fill(sizes.interpret, acc_ref, state.acc)
            issued = self._issue_logits(s_ref, slot)
            self._issue_values(acc_ref, p, before)
            self.turn.hand_on()
            # Under the product: after the wait 8 x 4,096 tokens took 2,183 us for 1,934.
            scales = self._scales(n + 1, 0)
            s = private.logits(sizes.plain, s_ref, issued, 1)
            plgpu.barrier_arrive(shared.keys_free.at[slot])
            s, units = self._logits(s, scales, j, masked)
            if masked:
                s, units = self._masked(in_log2(s, units), j), (of_rows(1.0, ROWS),)
            value_scales = self._scales(n + 1, 1)
            new, new_p, alpha = weigh(sizes.plain, s, units, state)
            found = lax.optimization_barrier((new, _scaled(new_p, value_scales), alpha))
            new, new_p, alpha = found
            private.hold(sizes.plain, new.l)  # the softmax, while that product runs
            acc = added(sizes.interpret, acc_ref, state.acc)
            plgpu.barrier_arrive(shared.values_free.at[before])
            # The product read the old weights from registers until now: had the new ones been
            # rounded to such registers before, ptxas would let all products wait for one another.
            new_p = lax.optimization_barrier(new_p).astype(p.dtype)
            acc = rescaled(sizes.plain, acc, alpha)
            return n + 1, new._replace(acc=acc), new_p

        acc = accumulator(ROWS, sizes.problem.head_dim)
        return pl.run_scoped(run, acc, *self._accumulators)

    def _last_values(self, j: Any, n: Any, state: State, p: Any) -> State:
        """Weigh the last block's values."""
        shared, sizes = self.shared, self.sizes
        slot = lax.rem(n, sizes.stages)
        plgpu.barrier_wait(shared.values_there.at[slot])
        self._clear(j, slot)

        def run(acc_ref: Any) -> Any:
            fill(sizes.interpret, acc_ref, state.acc)
            self._issue_values(acc_ref, p, slot)
            return added(sizes.interpret, acc_ref, state.acc)

        acc = pl.run_scoped(run, accumulator(ROWS, sizes.problem.head_dim))
        plgpu.barrier_arrive(shared.values_free.at[slot])
        return state._replace(acc=acc)

    @property
    def _accumulators(self) -> list[Any]:
        sizes = self.sizes
        return [accumulator(ROWS, sizes.block_kv)] if sizes.plain else []

    def _issue_logits(self, s_ref: Any, slot: Any) -> Any:
        views = views_of(self.shared.query, self.sizes)
        q = views.tiles.at[self.q_slot, self.warpgroup]
        return private.issue_logits(self.sizes.plain, s_ref, q, self.shared.keys.at[slot])

    def _issue_values(self, acc_ref: Any, p: Any, slot: Any) -> None:
        if self.sizes.interpret:  # which takes no operand from registers
            weights = self.shared.weights.at[self.warpgroup]
            weights[...] = p
            plgpu.commit_smem()
            p = weights
        plgpu.wgmma(acc_ref, p, self.shared.values.at[slot])

    def _logits(self, s: Any, scales: Any, j: Any, masked: bool) -> tuple[Any, tuple[Any, ...]]:
        """Return numbers and units of the logits of block `j`: see `in_log2`."""
        problem = self.sizes.problem
        s = _scaled(s, scales)
        if problem.soft_cap is None:
            units = (of_rows(self.scale * LOG2E, ROWS),)
        else:
            seen = self._seen(j) if masked else None
            s, units = capped(self.sizes.plain, s, self.scale, problem.soft_cap, seen)
        if problem.has_alibi:
            return in_log2(s, units) + self._biases(s.shape, j), (of_rows(1.0, ROWS),)
        return s, units

    def _masked(self, s: Any, j: Any) -> Any:
        """Return logits of block `j` in log2 units, -inf for tokens that a row does not see."""
        return kept(self.sizes.plain, s, self._seen(j))

    def _seen(self, j: Any) -> Seen:
        exist = mask.existing(self.tile, j, self.inputs, self.sizes)
        position = mask.positions(self.tile, self.warpgroup, self.sizes)
        limits = mask.limits(self.tile, j, position, self.inputs, self.sizes)
        return Seen(*limits, exist, self.sizes.copies)

    def _scales(self, n: Any, half: int) -> Any:
        """Return the scales of block `n`'s keys (`half` 0) or values (1), or None."""
        if self.sizes.problem.scales != "token":
            return None
        own = scales_of_block(self.shared, n, self.sizes).at[half]
        return plgpu.load(own, layout=COLUMN, optimized=False)

    def _biases(self, shape: tuple[int, ...], j: Any) -> Any:
        """Return ALiBi's biases in log2 units."""
        sizes = self.sizes
        key = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=TILE)
        position = mask.positions(self.tile, self.warpgroup, sizes)
        position = position - (self.tile.first_block(sizes) + j) * sizes.block_kv
        ahead = key - lax.broadcast_in_dim(position, shape, [0])
        slopes = plgpu.load(
            self.inputs.alibi_slopes.at[self.tile.kv_head], layout=ROW, optimized=False
        )
        return spread(slopes * LOG2E, shape[1]) * ahead.astype(jnp.float32)

    def _clear_queries(self) -> None:
        """Clear rows of no token, so that their logits have no say in `capped`."""
        tile, sizes = self.tile, self.sizes

        @pl.when(mask.some_see_nothing(tile, self.warpgroup, sizes))
        def _() -> None:
            chunks = views_of(self.shared.query, sizes).tiles.at[self.q_slot, self.warpgroup]
            for chunk in range(sizes.chunks):
                own = chunks.at[chunk]
                queries = plgpu.load(own, layout=TILE)
                see = mask.rows_that_see(tile, self.warpgroup, queries.shape, sizes)
                own[...] = jnp.where(see, queries, jnp.zeros_like(queries))
            plgpu.commit_smem()

    def _clear(self, j: Any, slot: Any) -> None:
        """Clear values that no row sees: they may be anything, and 0 * nan is nan."""
        sizes = self.sizes
        exist = mask.existing(self.tile, j, self.inputs, sizes)

        @pl.when(mask.is_partial(self.tile, j, exist, sizes))
        def _() -> None:
            head_dim = sizes.problem.head_dim
            for part in range(sizes.block_kv // ROWS):

                @pl.when(lax.rem(jnp.int32(part), sizes.warpgroups) == self.warpgroup)
                def _(first: int = part * ROWS) -> None:
                    ref = self.shared.values.at[slot, pl.ds(first, ROWS)]
                    for column in range(0, head_dim, SWIZZLED):
                        own = ref.at[:, pl.ds(column, SWIZZLED)]
                        values = plgpu.load(own, layout=TILE)
                        seen = mask.visible_to_some(self.tile, j, exist, first, values.shape, sizes)
                        own[...] = jnp.where(seen, values, jnp.zeros_like(values))

            plgpu.commit_smem()
            plgpu.barrier_arrive(self.shared.cleared)
            plgpu.barrier_wait(self.shared.cleared)


def _scaled(x: Any, scales: Any) -> Any:
    """Multiply `x [ROWS, block_kv]` by the scale of each token, if tokens have scales."""
    return x if scales is None else x * lax.broadcast_in_dim(scales, x.shape, [1])
