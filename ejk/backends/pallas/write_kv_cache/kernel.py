"""Writes new tokens to their slots on a TPU: windows of a page are read, changed and written back.

Grid: blocks of `block_tokens` tokens, sorted by slot, one after the other.

A copy moves whole tiles, and a tile holds several slots of a head: 16 of 16 bits, 8 of 32. So a
token's window, the tile's worth of slots around its own, is read to VMEM with all its heads, the
token's row is put in, and the window goes back. Tokens of one window follow each other. Within a
block the first of them (`leader`) reads and writes for all; across blocks the second write begins
after the first one has ended.

In the layout "NHD" a slot's heads are whole tiles of their own, and a row is written at once.

Rows come as the cache has them: XLA, which puts them in the order of their slots, makes them codes,
too. Scales of tokens have windows of a whole page, in every layout, and leaders of their own.

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
    key_scale_ref,  # float32 [block_tokens, num_kv_heads, 1], or [..., 1, num_kv_heads]; or None
    value_scale_ref,  # the same of the values
    # Outputs, in the place of the pools that were given
    key_cache_hbm_ref,  # the pool of keys in its own layout; of fused pools, the values' too
    value_cache_hbm_ref,  # the pool of values, or None
    key_scale_hbm_ref,  # the pools of tokens' scales, or None: as those of keys and values
    value_scale_hbm_ref,
    # Scratch
    key_buf,  # [block_tokens, *window], or None where rows are written at once
    value_buf,  # the same of the values
    key_scale_buf,  # float32 [block_tokens, *page of scales], or None
    value_scale_buf,  # the same of the values
    leader_ref,  # int32 [block_tokens] in SMEM: whose window a token's row goes to, or NOBODY
    page_leader_ref,  # the same of scales, or None
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
    groups: list[Any] = [(leader_ref, sizes.window_slots, halves)]
    if problem.scales == "token":
        value_scale_pool = key_scale_hbm_ref if problem.fused else value_scale_hbm_ref
        scales = [ScaleHalf(key_scale_ref, key_scale_hbm_ref, key_scale_buf, 0, sizes)]
        if not problem.latent:
            scales.append(ScaleHalf(value_scale_ref, value_scale_pool, value_scale_buf, 1, sizes))
        groups.append((page_leader_ref, problem.page_size, scales))

    def find_leaders(leaders, window_slots):
        def find_leader(i, state):
            last_window, leader = state
            slot = slot_mapping_ref[first + i]
            window = jnp.where(slot >= 0, lax.div(slot, window_slots), last_window)
            leader = jnp.where(window != last_window, i, leader)
            leaders[i] = jnp.where(slot >= 0, leader, NOBODY)
            return window, leader

        lax.fori_loop(0, sizes.block_tokens, find_leader, (jnp.int32(NOBODY), jnp.int32(NOBODY)))

    def for_leaders(act, groups):
        """Act on each window and its leader, for keys and values."""

        @pl.loop(0, sizes.block_tokens)
        def _(i):
            for leaders, _window, halves in groups:

                @pl.when(leaders[i] == i)
                def _act(halves=halves):
                    for half in halves:
                        act(half, i, slot_mapping_ref[first + i])

    for leaders, window_slots, _halves in groups:
        find_leaders(leaders, window_slots)

    # Load once: the windows.
    if windowed := groups if sizes.has_windows else groups[1:]:
        for_leaders(lambda half, i, slot: half.read(i, slot, sem).start(), windowed)
        for_leaders(lambda half, i, slot: half.read(i, slot, sem).wait(), windowed)

        # Loop over the tokens: put their rows in.
        @pl.loop(0, sizes.block_tokens)
        def _(i):
            for leaders, _window, halves in windowed:

                @pl.when(leaders[i] != NOBODY)
                def _change(leaders=leaders, halves=halves):
                    for half in halves:
                        half.change(i, leaders[i], slot_mapping_ref[first + i])

    # Write.
    for_leaders(lambda half, i, slot: half.write(i, slot, sem).start(), groups)
    for_leaders(lambda half, i, slot: half.write(i, slot, sem).wait(), groups)


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
        window, dtype = self.buf[leader], self.buf.dtype
        slots = lax.broadcasted_iota(jnp.int32, window.shape, 1)
        row = jnp.broadcast_to(self.rows_ref[i], window.shape)
        is_row = slots == lax.rem(slot, self.sizes.window_slots)
        if dtype.itemsize > 1:
            self.buf[leader] = jnp.where(is_row, row, window)
        else:  # a vector of 8 bits selects nothing: bytes do as integers of 32
            bytes_ = pltpu.bitcast(window, jnp.int8).astype(jnp.int32)
            bytes_ = jnp.where(is_row, row, bytes_).astype(jnp.int8)
            self.buf[leader] = pltpu.bitcast(bytes_, dtype)

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


class ScaleHalf(Half):
    """The scales of keys, or of values: their windows are pages."""

    def change(self, i, leader, slot):
        """Put the scales of a token into its page, `[num_kv_heads, page_size]` or transposed."""
        page = self.buf[leader]
        axis = 0 if self.sizes.problem.cache_layout == "NHD" else 1
        slots = lax.broadcasted_iota(jnp.int32, page.shape, axis)
        scales = jnp.broadcast_to(self.rows_ref[i], page.shape)
        is_token = slots == lax.rem(slot, self.sizes.problem.page_size)
        self.buf[leader] = jnp.where(is_token, scales, page)

    def write(self, i, slot, sem):
        return pltpu.make_async_copy(self.buf.at[i], self.window(slot), sem)

    def window(self, slot):
        problem = self.sizes.problem
        page, half = lax.div(slot, problem.page_size), (self.number,) if problem.fused else ()
        if problem.cache_layout == "KV_HEADS_FIRST":
            return self.hbm_ref.at[(slice(None), page, *half)]
        return self.hbm_ref.at[(page, *half)]
