"""Where a core's pages are, and their copies from the pools in HBM into VMEM.

An item is a sequence, or a block of new tokens of one, and sees a range of a row of the tables.
The visible blocks of a core's items, one item after the other, are one chain. A round is the next
few of them: those of one grid step, which has the queries they are for. The copies of a round are
started while the round before is computed, across grid steps too.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ejk.backends.pallas._sizes import PagedSizes

COPIES, FEW_COPIES = 32, 8
"""Pages whose copies a loop starts in one turn: those of a whole block, and of a part of one.

Predicted bundles of a v6e for 2,048 tokens in pages of 16: 3,500 with 16 pages, 3,430 with 32, and
3,370 with 64, for which the kernel is a tenth larger.
"""

ENDS, BAD = 1, 2

Scalar = jax.Array | int


class Cursor(NamedTuple):
    """A place in the chain. Past an item's last block, nothing is left."""

    item: Any
    base: Any  # the first place of a block
    left: Any  # places from there to the item's end


class Block(NamedTuple):
    """What is noted of a block whose copies were started. Nothing is left if there is none."""

    item: Any
    base: Any
    left: Any
    flaws: Any  # ENDS if a place of it may be invalid, BAD if an entry is


@dataclasses.dataclass(frozen=True, kw_only=True)
class Paging:
    """The chain of one core.

    Places count the tokens of a row of the table. Each item has a row, `table_row`, and sees what
    is from its `begin` on and before its `end`. Where it has several tokens, every one of them
    sees what is from `all_begin` on and before `all_end`.
    """

    end: Callable[[Any], Any]  # of an item
    begin: Callable[[Any, Any], Any] | None  # of an item and its end; None: 0
    table_row: Callable[[Any], Any] | None = None  # of an item; None: items are sequences
    all_begin: Callable[[Any], Any] | None = None  # of an item; None: `begin`
    all_end: Callable[[Any], Any] | None = None  # of an item; None: `end`
    begin_item: Any
    core: Any
    block_tables_ref: Any
    pools: list[tuple[Any, Any]]  # (hbm_ref, buf)
    value_buf: Any  # that of the values
    sem: Any
    chain_ref: Any
    blocks_ref: Any
    sizes: PagedSizes[Any]

    # The chain.

    def first_place(self, item: Scalar, end: Scalar) -> Scalar:
        return jnp.int32(0) if self.begin is None else self.begin(item, end)

    def first_block(self, item: Scalar) -> Cursor:
        """Return where an item begins; nothing is left there if it sees nothing."""
        item_or_last = jnp.minimum(item, self.begin_item + self.sizes.core_items - 1)
        end = self.end(item_or_last)
        first, page_size = self.first_place(item_or_last, end), self.sizes.problem.page_size
        base = first if self.begin is None else divide(first, page_size) * page_size
        return Cursor(item, base, jnp.where(first < end, end - base, 0))

    def num_blocks(self, item: Scalar) -> jax.Array:
        return divide_up(self.first_block(item).left, self.sizes.block_kv)

    def settle(self, cursor: Cursor) -> Cursor:
        """Return the next place of the chain that has a block, or its end."""
        end_item = self.begin_item + self.sizes.core_items

        def is_past(cursor: Cursor) -> jax.Array:
            return (cursor.item < end_item) & (cursor.left <= 0)

        return lax.while_loop(is_past, lambda cursor: self.first_block(cursor.item + 1), cursor)

    def entries(self, item: Scalar, base: Scalar, left: Scalar) -> tuple[Scalar, Scalar]:
        """Return where a block's entries are in the table, and how many are needed."""
        problem = self.sizes.problem
        row = item if self.table_row is None else 0
        entry = row * problem.max_blocks + divide(base, problem.page_size)
        count = jnp.minimum(divide_up(left, problem.page_size), self.sizes.block_pages)
        if self.table_row is not None:
            # Last: predicted, loading it first costs a v5e 16 bundles more in 11,376.
            entry += self.table_row(item) * problem.max_blocks
        return entry, count

    # Rounds.

    def start_chain(self) -> None:
        self.chain_ref[0] = 0
        self._move_to(self.first_block(self.begin_item))
        self.start_round(0)

    def _move_to(self, cursor: Cursor) -> None:
        for i, value in enumerate(cursor):
            self.chain_ref[1 + i] = value

    def start_round(self, slot: Scalar) -> None:
        """Start the copies of the next round, and note its blocks."""
        sizes = self.sizes
        cursor = self.settle(Cursor(*(self.chain_ref[1 + i] for i in range(3))))
        of_step = lax.rem(cursor.item - self.begin_item, sizes.step_items)
        end_step = cursor.item - of_step + sizes.step_items
        end_step = jnp.minimum(end_step, self.begin_item + sizes.core_items)

        def start(k: Scalar, cursor: Cursor) -> Cursor:
            taken = jnp.where(cursor.item < end_step, cursor.left, 0)
            item = jnp.minimum(cursor.item, end_step - 1)
            self.start_block(Cursor(item, cursor.base, taken), slot, k)
            step = jnp.where(taken > 0, sizes.block_kv, 0)
            return Cursor(cursor.item, cursor.base + step, cursor.left - step)

        if sizes.round_blocks == 1:
            return self._move_to(start(0, cursor))
        self._move_to(
            lax.fori_loop(0, sizes.round_blocks, lambda k, c: self.settle(start(k, c)), cursor)
        )

    def start_block(self, cursor: Cursor, slot: Scalar, k: Scalar) -> None:
        """Start the copies of a block, of what is left at most, and note it."""
        item, base, left = cursor
        num_pages, block_pages = self.sizes.problem.num_pages, self.sizes.block_pages
        entry, count = self.entries(item, base, left)

        def start_pages(begin: Scalar, flaws: Any, size: int) -> jax.Array:
            any_bad = False
            for j in range(size):
                page, is_bad = page_or_harmless(self.block_tables_ref[entry + begin + j], num_pages)
                any_bad |= is_bad
                for hbm_ref, buf in self.pools:
                    page_ref = page_of(hbm_ref, page, self.core, self.sizes)
                    page_buf = buf.at[slot, k, begin + j]
                    pltpu.make_async_copy(page_ref, page_buf, self.sem.at[slot]).start()
            return jnp.where(any_bad, flaws | BAD, flaws)

        def start_groups(
            begin: Scalar, end: Scalar, flaws: Any, size: int
        ) -> tuple[Scalar, jax.Array]:
            """Start whole groups of pages; return where they end."""
            groups = divide(end - begin, size)
            body = lambda i, flaws: start_pages(begin + i * size, flaws, size)  # noqa: E731
            return begin + groups * size, lax.fori_loop(0, groups, body, flaws)

        flaws = jnp.where(self.has_ends(cursor), ENDS, 0)

        @pl.when(count == block_pages)
        def _start_all():
            whole, found = block_pages // COPIES * COPIES, flaws
            if whole:
                _, found = start_groups(0, whole, found, COPIES)
            if whole < block_pages:
                found = start_pages(whole, found, block_pages - whole)
            self._note(slot, k, Block(item, base, left, found))

        @pl.when(count < block_pages)
        def _start_some():
            begin, found = start_groups(0, count, flaws, FEW_COPIES)
            _, found = start_groups(begin, count, found, 1)
            self._note(slot, k, Block(item, base, left, found))

    def _note(self, slot: Scalar, k: Scalar, block: Block) -> None:
        at = (slot * self.sizes.round_blocks + k) * len(block)
        for i, value in enumerate(block):
            self.blocks_ref[at + i] = value

    def noted(self, slot: Scalar, k: Scalar) -> Block:
        size = len(Block._fields)
        at = (slot * self.sizes.round_blocks + k) * size
        return Block(*(self.blocks_ref[at + i] for i in range(size)))

    def is_partial(self, slot: Scalar) -> jax.Array:
        """Whether there is something to mask in a round."""
        flaws = jnp.int32(0)
        for k in range(self.sizes.round_blocks):
            flaws |= self.noted(slot, k).flaws
        return flaws > 0

    def wait(self, slot: Scalar, whole: bool) -> None:
        """Wait for the pages of a round: a semaphore counts bytes, whichever came first."""
        if whole:
            for _, buf in self.pools:
                wait(buf.at[slot], self.sem.at[slot])
            return
        for k in range(self.sizes.round_blocks):
            block = self.noted(slot, k)
            _, count = self.entries(block.item, block.base, block.left)

            @pl.when(count > 0)
            def _wait_for_pages(k: int = k, count: Any = count) -> None:
                for _, buf in self.pools:
                    wait(buf.at[slot, k, pl.ds(0, count)], self.sem.at[slot])

    # What of a block may be seen.

    def has_ends(self, cursor: Cursor) -> jax.Array:
        """Whether a position of the block there may be invalid."""
        item, base, left = cursor
        ends = left < self.sizes.block_kv
        if self.all_end is not None:
            ends |= base + self.sizes.block_kv > self.all_end(item)
        if self.all_begin is not None:
            ends |= base < self.all_begin(item)
        elif self.begin is not None:
            ends |= base < self.first_place(item, base + left)
        return ends

    def is_first(self, block: Block) -> jax.Array:
        """Whether a block is its item's first."""
        return block.base <= self.first_place(block.item, block.base + block.left)

    def is_last(self, block: Block) -> jax.Array:
        return (block.left > 0) & (block.left <= self.sizes.block_kv)

    def visible(self, block: Block) -> tuple[Scalar, Scalar]:
        """Return where what may be seen of a block begins and ends, counted from its base."""
        return self.first_place(block.item, block.base + block.left) - block.base, block.left

    def hide_bad_pages(self, block: Block, slot: Scalar, k: int) -> jax.Array:
        """Zero the values behind bad entries, and return 1 for their tokens, `[1, block_kv]`."""
        problem, buf = self.sizes.problem, self.value_buf
        shape = (1, self.sizes.block_kv)
        page_of_token = lax.div(lax.broadcasted_iota(jnp.int32, shape, 1), problem.page_size)
        entry, count = self.entries(block.item, block.base, block.left)

        def hide(j: Scalar, hidden: jax.Array) -> jax.Array:
            _, bad = page_or_harmless(self.block_tables_ref[entry + j], problem.num_pages)

            @pl.when(bad)
            def _zero_values():
                buf[slot, k, j] = jnp.zeros(buf.shape[3:], buf.dtype)

            return jnp.where((page_of_token == j) & bad, 1, hidden)

        count = jnp.where(block.flaws >= BAD, count, 0)
        return lax.fori_loop(0, count, hide, jnp.zeros(shape, jnp.int32))


def paging_scratch(sizes: PagedSizes[Any]) -> dict[str, Any]:
    """Return the memory of a chain."""
    problem = sizes.problem

    def pages(head_dim: int) -> Any:
        return pltpu.VMEM(sizes.blocks_shape(head_dim), problem.cache_dtype)

    of_scales = pltpu.VMEM(sizes.blocks_shape(1)[:-1], jnp.float32)
    return dict(
        k_buf=pages(problem.head_dim),
        v_buf=pages(problem.value_head_dim) if sizes.has_two_pools else None,
        key_scale_buf=of_scales if sizes.scale_pools else None,
        value_scale_buf=of_scales if sizes.scale_pools > 1 else None,
        sem=pltpu.SemaphoreType.DMA((2,)),
        chain_ref=pltpu.SMEM((1 + len(Cursor._fields),), jnp.int32),
        blocks_ref=pltpu.SMEM((2 * sizes.round_blocks * len(Block._fields),), jnp.int32),
    )


def other_slot(slot: Scalar) -> Scalar:
    return 1 - slot


def wait(target: Any, sem: Any) -> None:
    pltpu.make_async_copy(target, target, sem).wait()


def page_or_harmless(entry: jax.Array, num_pages: int) -> tuple[jax.Array, jax.Array]:
    """Return an entry's page, and whether it is bad: then the page is one that may be read."""
    bad = entry.astype(jnp.uint32) >= jnp.uint32(num_pages)
    return jnp.where(bad, 0, entry), bad


def page_of(hbm_ref: Any, page: Scalar, core: Scalar, sizes: PagedSizes[Any]) -> Any:
    """The part of a page that a core reads, for all its heads."""
    layout = sizes.problem.layout
    index: list[Any] = [slice(None)] * len(hbm_ref.shape)
    index[layout.pages] = page
    if sizes.shared == "kv_head":
        index[layout.kv_heads] = pl.ds(core * sizes.kv_heads, sizes.kv_heads)
    return hbm_ref.at[tuple(index)]


def divide(n: Any, d: int) -> Any:
    """Divide, rounding down; nothing is negative here, and a shift is a fourth of a division."""
    if isinstance(n, int):
        return n // d
    if d & (d - 1) == 0:
        return lax.shift_right_logical(n, d.bit_length() - 1)
    return lax.div(n, d)


def divide_up(n: Any, d: int) -> jax.Array:
    """Divide, rounding up; 0 for 0, and no sum that could exceed 32 bits."""
    return jnp.where(n > 0, divide(n - 1, d) + 1, 0)
