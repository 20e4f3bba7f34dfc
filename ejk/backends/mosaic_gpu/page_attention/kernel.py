"""Decode attention to latent pages on Hopper: a program is three warpgroups, 64 heads, one piece.

A latent cache has one KV head, whose values are the first entries of its keys. So a block of
`BLOCK_KV` tokens is copied to shared memory once, for both products and for `ROWS` heads. There are
two slots for blocks, even ones and odd ones.

- Warpgroup 2 copies: one thread starts a TMA copy for each page of a block and each third of it,
  as soon as nobody needs what is there. An id that names no page copies page 0, whose tokens are
  masked.
- Warpgroups 0 and 1 take turns: one computes logits and weights of the even blocks, the other of
  the odd ones. Both weigh the values of all blocks, each its half of their entries, for the state
  of 64 heads does not fit in the registers of one. With `s_j` the logits of block `j`, in log2:

    m_j = max(s_j) if that exceeds m_(j-1) by `SLACK`, else m_(j-1)
    p_j = 2^(s_j - m_j);  alpha_j = 2^(m_(j-1) - m_j)
    acc = alpha_j * acc + p_j . v_j;  l = alpha_j * l + sum(p_j), own blocks only

  The maxima are a chain over both; `p_j` goes through shared memory, in the place of the entries of
  the keys that are not values: the logits are there, so nobody needs them.

While one warpgroup computes a softmax, the products of the other run.

Source: online softmax (Milakov and Gimelshein, 2018, arXiv:1805.02867); the two warpgroups that
take turns, after FlashMLA's "seesaw" (DeepSeek, 2025).
"""

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from ejk.backends.mosaic_gpu._arithmetic import LOG2E, SLACK, accumulator, added, fill, spread
from ejk.backends.mosaic_gpu._private import ROW, TILE
from ejk.backends.mosaic_gpu._private_softmax import rescaled
from ejk.backends.mosaic_gpu._tensor_cores import ROWS, SWIZZLED
from ejk.backends.mosaic_gpu.page_attention.copying import Copying
from ejk.backends.mosaic_gpu.page_attention.memory import Inputs, Outputs, Shared
from ejk.backends.mosaic_gpu.page_attention.piece import (
    Piece,
    is_before,
    is_partial,
    my_piece,
    visible,
)
from ejk.backends.mosaic_gpu.page_attention.sizes import BLOCK_KV, LatentSizes
from ejk.backends.mosaic_gpu.page_attention.writing import Writing

COPY = 2  # the warpgroup that does not compute
REGISTERS = 240  # of a thread; with `copying.REGISTERS` all there are


class State(NamedTuple):
    """A warpgroup's running state."""

    acc: Any  # float32 [ROWS, half]
    m: Any  # float32 [ROWS]
    l: Any  # float32 [ROWS]


def latent_attention_kernel(
    inputs: Inputs, outputs: Outputs, shared: Shared, sizes: LatentSizes
) -> None:
    is_mine, piece = my_piece(inputs, sizes)

    @pl.when(is_mine)
    def _() -> None:
        warpgroup = lax.axis_index("warpgroup")
        pl.when(warpgroup == COPY)(Copying(inputs, shared, sizes, piece).run)
        scale = inputs.attn_scale[0] * LOG2E
        for half in range(2):
            attending = Attending(inputs, outputs, shared, sizes, piece, scale, half)
            pl.when(warpgroup == half)(attending.run)


@dataclasses.dataclass(frozen=True)
class Attending:
    """A warpgroup that computes. Blocks `j` are counted from the first of the piece."""

    inputs: Inputs
    outputs: Outputs
    shared: Shared
    sizes: LatentSizes
    piece: Piece
    scale: Any  # of logits in log2 units
    half: int  # which one of the values, and which of every two blocks, is its own

    def run(self) -> None:
        """Attend to the piece: logits of every second block, and one half of all values."""
        plgpu.set_max_registers(REGISTERS, action="increase")
        shared, blocks = self.shared, self.piece.blocks
        for slot in range(2):
            self._release(slot)
        plgpu.barrier_wait(shared.query_there)
        acc = plgpu.layout_cast(jnp.zeros((ROWS, self.sizes.half), jnp.float32), TILE)
        m = plgpu.layout_cast(jnp.full((ROWS,), -jnp.inf, jnp.float32), ROW)
        l = plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), ROW)
        state = State(acc, m, l)
        if self.half == 0:  # before whose first block there is none
            state, alpha = self._softmax(self._logits(0), 0, 0, state)
            state = self._weigh(0, 0, alpha, state)

        def two_blocks(i: Any, carry: tuple[Any, State]) -> tuple[Any, State]:
            return self._two_blocks(2 - self.half + 2 * i, *carry)

        pairs = lax.div(blocks - 1 + self.half, 2)
        _, state = lax.fori_loop(0, pairs, two_blocks, (jnp.int32(self.half), state))

        def last_of_other(_: Any, state: State) -> State:
            return self._others(blocks - 1, 1 - self.half, state)

        state = lax.fori_loop(0, lax.rem(blocks + 1 - self.half, 2), last_of_other, state)
        self._write(state)

    def _two_blocks(self, j: Any, slot: Any, state: State) -> tuple[Any, State]:
        """Take block `j - 1`, of the other warpgroup, and block `j`, which is its own."""
        if self.half == 0:
            state = self._others(j - 1, 1 - slot, state)
            state, alpha = self._softmax(self._logits(slot), j, slot, state)
        else:
            state, alpha = self._own_and_other(j, slot, state)
        state = self._weigh(j, slot, alpha, state)
        return slot + self._zero(), state

    def _zero(self) -> Any:
        """Return 0, but so that the compiler does not know.

        It would else compute the descriptors of all operands before the loop, keep none of them in
        the uniform registers, where the tensor cores take them from, and spill them: with that,
        and with loops of their own for blocks that are not masked, 64 x 4,096 tokens took 64 heads
        on an H200 110 us in place of 87.
        """
        length = self.inputs.context_lens[self.piece.seq]
        return (length == jnp.iinfo(jnp.int32).min).astype(jnp.int32)  # then there is no loop

    def _others(self, j: Any, slot: Any, state: State) -> State:
        """Weigh the values of a block of the other warpgroup."""
        state, alpha = self._weights_of_other(slot, state)
        return self._weigh(j, slot, alpha, state)

    def _own_and_other(self, j: Any, slot: Any, state: State) -> tuple[State, Any]:
        """Weigh block `j - 1`, of the other warpgroup; find the weights of block `j`."""

        def run(acc_ref: Any, s_ref: Any) -> tuple[State, Any]:
            self._issue_logits(s_ref, slot)
            after, alpha = self._weights_of_other(1 - slot, state)
            self._clear(j - 1, 1 - slot)
            acc = rescaled(self.sizes.interpret, after.acc, alpha)
            self._issue_weighing(acc_ref, acc, 1 - slot)
            if self.sizes.interpret:
                s = s_ref[...]
            else:  # of the products under way only the last may go on
                s = lax.optimization_barrier(plgpu.wgmma_accumulator_load(s_ref, wait_n=1))
            after, alpha = self._softmax(s, j, slot, after)
            acc = added(self.sizes.interpret, acc_ref, acc)
            self._release(1 - slot)
            return after._replace(acc=acc), alpha

        accumulators = accumulator(ROWS, self.sizes.half), accumulator(ROWS, BLOCK_KV)
        return pl.run_scoped(run, *accumulators)

    def _weigh(self, j: Any, slot: Any, alpha: Any, state: State) -> State:
        """Add a block's weighted values; its place is then free."""
        self._clear(j, slot)
        acc = rescaled(self.sizes.interpret, state.acc, alpha)

        def run(acc_ref: Any) -> Any:
            self._issue_weighing(acc_ref, acc, slot)
            return added(self.sizes.interpret, acc_ref, acc)

        new = pl.run_scoped(run, accumulator(ROWS, self.sizes.half))
        self._release(slot)
        return state._replace(acc=new)

    def _issue_weighing(self, acc_ref: Any, acc: Any, slot: Any) -> None:
        fill(self.sizes.interpret, acc_ref, acc)
        plgpu.wgmma(acc_ref, self.shared.rest.at[slot], self.shared.keys.at[slot, self.half])

    def _logits(self, slot: Any) -> Any:
        def run(s_ref: Any) -> Any:
            self._issue_logits(s_ref, slot)
            return s_ref[...]

        return pl.run_scoped(run, accumulator(ROWS, BLOCK_KV))

    def _issue_logits(self, s_ref: Any, slot: Any) -> None:
        """Start the products of queries and keys, each third of them as soon as it is there."""
        shared = self.shared
        zero = slot - self.half  # see `_zero`: the slot of own blocks is their warpgroup's number
        query = (shared.query.at[zero], shared.query.at[1 + zero], shared.query_rest)
        keys = (shared.keys.at[slot, 0], shared.keys.at[slot, 1], shared.rest.at[slot])
        for third in range(3):
            plgpu.barrier_wait(shared.third_there.at[3 * slot + third])
            plgpu.wgmma(s_ref, query[third], keys[third].T)

    def _softmax(self, s: Any, j: Any, slot: Any, state: State) -> tuple[State, Any]:
        """Find a block's weights and share them; `alpha` is what came before is to be scaled by."""
        shared = self.shared
        s = s * self.scale
        s = lax.cond(self._is_partial(j, slot), lambda s: self._masked(s, j, slot), lambda s: s, s)
        top = s.max(axis=1)
        m = jnp.where(top > state.m + SLACK, top, state.m)
        finite = jnp.where(m == -jnp.inf, 0.0, m)
        p, alpha = jnp.exp2(s - spread(finite, BLOCK_KV)), jnp.exp2(state.m - finite)
        shared.maxima.at[slot][...] = m
        shared.rescale.at[slot][...] = alpha
        shared.rest.at[slot][...] = p.astype(shared.rest.dtype)
        plgpu.commit_smem()
        plgpu.barrier_arrive(shared.weights_there.at[slot])
        return State(state.acc, m, state.l * alpha + p.sum(axis=1)), alpha

    def _masked(self, s: Any, j: Any, slot: Any) -> Any:
        """Take the logits of what a row does not see for -inf."""
        seen = self._visible(j, slot, s.shape, 1)
        if self.inputs.spans is not None:
            row, token = (_places(s.shape, axis) for axis in range(2))
            seen &= is_before(row, token, j, self.piece, self.sizes)
        return jnp.where(seen, s, -jnp.inf)

    def _weights_of_other(self, slot: Any, state: State) -> tuple[State, Any]:
        """Wait for the weights that the other warpgroup has found; see `_softmax`."""
        plgpu.barrier_wait(self.shared.weights_there.at[slot])
        m, alpha = (
            plgpu.load(ref.at[slot], layout=ROW)
            for ref in (self.shared.maxima, self.shared.rescale)
        )
        return State(state.acc, m, state.l * alpha), alpha

    def _clear(self, j: Any, slot: Any) -> None:
        """Clear values that are not visible: they may be anything, and 0 * nan is nan."""

        @pl.when(self._is_partial(j, slot))
        def _() -> None:
            for entry in range(0, self.sizes.half, SWIZZLED):
                ref = self.shared.keys.at[slot, self.half, :, pl.ds(entry, SWIZZLED)]
                values = plgpu.load(ref, layout=TILE)
                seen = self._visible(j, slot, values.shape, 0)
                ref[...] = jnp.where(seen, values, jnp.zeros_like(values))
            plgpu.commit_smem()

    def _is_partial(self, j: Any, slot: Any) -> Any:
        return is_partial(j, self.shared.exist[slot], self.piece, self.sizes)

    def _visible(self, j: Any, slot: Any, shape: tuple[int, ...], axis: int) -> Any:
        """Say which of a block's tokens are visible, along `axis` of a tile."""
        token = _places(shape, axis)
        return visible(token, j, self.shared.exist[slot], self.piece, self.sizes)

    def _release(self, slot: Any) -> None:
        plgpu.barrier_arrive(self.shared.half_free.at[2 * slot + self.half])

    def _write(self, state: State) -> None:
        """Write one half of the output, and the LSE, once no warpgroup reads keys any more."""
        shared, sizes = self.shared, self.sizes
        shared.sums.at[self.half][...] = state.l
        plgpu.barrier_arrive(shared.sums_there)
        plgpu.barrier_wait(shared.sums_there)
        l = state.l + plgpu.load(shared.sums.at[1 - self.half], layout=ROW)
        out = state.acc * spread(1 / jnp.where(l == 0, 1.0, l), sizes.half)
        lse = jnp.where(l == 0, -jnp.inf, state.m + jnp.log2(l))
        writing = Writing(self.inputs, self.outputs, shared, sizes, self.piece, self.half)
        writing.write(out, lse)


def _places(shape: tuple[int, ...], axis: int) -> Any:
    """Return the place of each element of a tile along an axis."""
    return plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=TILE)
