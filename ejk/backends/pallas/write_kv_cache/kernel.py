"""Writes new tokens to their slots on a TPU: windows of a page are read, changed and written back.

Grid: blocks of `BLOCK_TOKENS` tokens, sorted by slot, one after the other.

A copy moves whole tiles, and a tile holds several slots of a head: 16 of 16 bits, 8 of 32. So a
token's window, the tile's worth of slots around its own, is read to VMEM with all its heads, the
token's row is put in, and the window goes back. Tokens of one window follow each other. Within a
block the first of them (`leader`) reads and writes for all; across blocks the second write begins
after the first one has ended.

In the layout "NHD" a slot's heads are whole tiles of their own, and a row is written at once.

Source: own. Single rows of packed tiles cannot be copied: Mosaic refuses the offset.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ejk.backends.pallas.write_kv_cache.sizes import WriteSizes

NOBODY = -1


def write_kv_cache_kernel(
    # Prefetched scalars
    slot_mapping_ref,  # int32 [blocks * block_tokens], sorted; -1: writes nothing
    # Inputs
    key_ref,  # [block_tokens, *row]
    value_ref,  # [block_tokens, *row], or None of latent pools
    # Outputs, in the place of the pools that were given
    key_cache_hbm_ref,  # the pool of keys in its own layout; of fused pools, the values' too
    value_cache_hbm_ref,  # the pool of values, or None
    # Scratch
    key_buf,  # [block_tokens, *window], or None where rows are written at once
    value_buf,  # the same of the values
    leader_ref,  # int32 [block_tokens] in SMEM: whose window a token's row goes to, or NOBODY
    sem,
    *,
    sizes: WriteSizes,
):
    """Write one block of tokens."""
    # Which work is mine: the windows of a block's tokens, each of its first.
    first = pl.program_id(0) * sizes.block_tokens
    problem = sizes.problem
    value_pool = key_cache_hbm_ref if problem.fused else value_cache_hbm_ref
    halves = [Half(key_ref, key_cache_hbm_ref, key_buf, 0, sizes)]
    if not problem.latent:
        halves.append(Half(value_ref, value_pool, value_buf, 1, sizes))

    def find_leader(i, state):
        last_window, leader = state
        slot = slot_mapping_ref[first + i]
        window = jnp.where(slot >= 0, lax.div(slot, sizes.window_slots), last_window)
        leader = jnp.where(window != last_window, i, leader)
        leader_ref[i] = jnp.where(slot >= 0, leader, NOBODY)
        return window, leader

    def for_leaders(act):
        """Act on each window and its leader, for keys and values."""

        @pl.loop(0, sizes.block_tokens)
        def _(i):
            @pl.when(leader_ref[i] == i)
            def _():
                for half in halves:
                    act(half, i, slot_mapping_ref[first + i])

    lax.fori_loop(0, sizes.block_tokens, find_leader, (jnp.int32(NOBODY), jnp.int32(NOBODY)))

    # Load once: the windows.
    if sizes.has_windows:
        for_leaders(lambda half, i, slot: half.read(i, slot, sem).start())
        for_leaders(lambda half, i, slot: half.read(i, slot, sem).wait())

        # Loop over the tokens: put their rows in.
        @pl.loop(0, sizes.block_tokens)
        def _(i):
            @pl.when(leader_ref[i] != NOBODY)
            def _():
                for half in halves:
                    half.change(i, leader_ref[i], slot_mapping_ref[first + i])

    # Write.
    for_leaders(lambda half, i, slot: half.write(i, slot, sem).start())
    for_leaders(lambda half, i, slot: half.write(i, slot, sem).wait())


@dataclasses.dataclass(frozen=True)
class Half:
    """The keys, or the values: rows, their pool, and windows of it in VMEM."""

    rows_ref: Any
    hbm_ref: Any
    buf: Any
    number: int  # of the half of a page that it is in fused pools
    sizes: WriteSizes

    def read(self, i, slot, sem):
        return pltpu.make_async_copy(self.window(slot), self.buf.at[i], sem)

    def change(self, i, leader, slot):
        """Put a row into its window, `[num_kv_heads, window_slots, head_dim]`."""
        window = self.buf[leader]
        slots = lax.broadcasted_iota(jnp.int32, window.shape, 1)
        row = jnp.broadcast_to(self.rows_ref[i], window.shape)
        self.buf[leader] = jnp.where(slots == lax.rem(slot, self.sizes.window_slots), row, window)

    def write(self, i, slot, sem):
        written = self.buf if self.sizes.has_windows else self.rows_ref
        return pltpu.make_async_copy(written.at[i], self.window(slot), sem)

    def window(self, slot):
        """The part of the pool that is read and written for a slot."""
        problem, window_slots = self.sizes.problem, self.sizes.window_slots
        page, offset = lax.div(slot, problem.page_size), lax.rem(slot, problem.page_size)
        half = (self.number,) if problem.fused else ()
        if problem.cache_layout == "NHD":
            return self.hbm_ref.at[(page, *half, offset)]
        slots = slice(None)
        if window_slots < problem.page_size:
            begin = lax.div(offset, window_slots) * window_slots
            slots = pl.ds(pl.multiple_of(begin, window_slots), window_slots)
        if problem.cache_layout == "HND":
            return self.hbm_ref.at[(page, *half, slice(None), slots)]
        return self.hbm_ref.at[(slice(None), page, *half, slots)]
