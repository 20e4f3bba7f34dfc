"""Where a core's pages are, and their copies from the pools in HBM into VMEM.

The visible blocks of a core's sequences, one sequence after the other, are one chain. A round is
the next few of them: those of one grid step, which has the queries they are for. The copies of a
round are started while the round before is computed, across grid steps too.
"""

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ejk.backends.pallas.page_attention_work import Work

COPIES, FEW_COPIES = 32, 8
"""Of a whole block and of a part of one, started between two branches of the loop that starts them.

Predicted, pages of 16 tokens, bundles of a v6e for 2,048 tokens: 3,500 with 16, 3,430 with 32,
3,370 with 64, for a kernel that is a tenth larger.
"""


ENDS, BAD = 1, 2


class Cursor(NamedTuple):
    """A place in the chain. Past a sequence's last block, nothing is left."""

    seq: Any
    base: Any  # the first position of a block
    left: Any  # positions from there to the sequence's end


class Block(NamedTuple):
    """What is noted of a block whose copies were started. Nothing is left if there is none."""

    seq: Any
    base: Any
    left: Any
    flaws: Any  # ENDS if a position of it may be invalid, BAD if an entry is


@dataclasses.dataclass(frozen=True)
class Paging:
    """The chain of one core."""

    lengths_ref: Any
    tables_ref: Any
    window_ref: Any
    chain_ref: Any
    blocks_ref: Any
    pools: Any  # [(hbm_ref, buf)]
    sem: Any
    core: Any
    begin_seq: Any
    work: Work

    # The chain.

    def first_position(self, seq, length):
        if self.window_ref is None:
            return jnp.int32(0)
        window = self.window_ref[seq if self.work.problem.own_windows else 0]
        return jnp.maximum(length - jnp.maximum(window, 0), 0)

    def first_block(self, seq) -> Cursor:
        """Return where a sequence begins; nothing is left there if it sees nothing."""
        seq_or_last = jnp.minimum(seq, self.begin_seq + self.work.core_seqs - 1)
        length = jnp.clip(self.lengths_ref[seq_or_last], 0, self.work.problem.capacity)
        first, page_size = self.first_position(seq_or_last, length), self.work.problem.page_size
        base = first if self.window_ref is None else divide(first, page_size) * page_size
        return Cursor(seq, base, jnp.where(first < length, length - base, 0))

    def num_blocks(self, seq):
        return divide_up(self.first_block(seq).left, self.work.block_kv)

    def settle(self, cursor: Cursor) -> Cursor:
        """Return the next place of the chain that has a block, or its end."""
        end_seq = self.begin_seq + self.work.core_seqs

        def is_past(cursor):
            return (cursor.seq < end_seq) & (cursor.left <= 0)

        return lax.while_loop(is_past, lambda cursor: self.first_block(cursor.seq + 1), cursor)

    def entries(self, seq, base, left):
        """Return where a block's entries are in the table, and how many are needed."""
        problem = self.work.problem
        entry = seq * problem.max_blocks + divide(base, problem.page_size)
        return entry, jnp.minimum(divide_up(left, problem.page_size), self.work.block_pages)

    # Rounds.

    def start_chain(self):
        self.chain_ref[0] = 0
        self._move_to(self.first_block(self.begin_seq))
        self.start_round(0)

    def _move_to(self, cursor):
        for i, value in enumerate(cursor):
            self.chain_ref[1 + i] = value

    def start_round(self, slot):
        """Start the copies of the next round, and note its blocks."""
        work = self.work
        cursor = self.settle(Cursor(*(self.chain_ref[1 + i] for i in range(3))))
        of_step = lax.rem(cursor.seq - self.begin_seq, work.step_seqs)
        end_step = cursor.seq - of_step + work.step_seqs
        end_step = jnp.minimum(end_step, self.begin_seq + work.core_seqs)

        def start(k, cursor):
            taken = jnp.where(cursor.seq < end_step, cursor.left, 0)
            seq = jnp.minimum(cursor.seq, end_step - 1)
            self.start_block(Cursor(seq, cursor.base, taken), slot, k)
            step = jnp.where(taken > 0, work.block_kv, 0)
            return Cursor(cursor.seq, cursor.base + step, cursor.left - step)

        if work.round_blocks == 1:
            return self._move_to(start(0, cursor))
        self._move_to(
            lax.fori_loop(0, work.round_blocks, lambda k, c: self.settle(start(k, c)), cursor)
        )

    def start_block(self, cursor: Cursor, slot, k):
        """Start the copies of a block, of what is left at most, and note it."""
        seq, base, left = cursor
        num_pages, block_pages = self.work.problem.num_pages, self.work.block_pages
        entry, count = self.entries(seq, base, left)

        def start_pages(begin, flaws, size):
            any_bad = False
            for j in range(size):
                page, is_bad = page_or_harmless(self.tables_ref[entry + begin + j], num_pages)
                any_bad |= is_bad
                for hbm_ref, buf in self.pools:
                    page_ref = page_of(hbm_ref, page, self.core, self.work)
                    page_buf = buf.at[slot, k, begin + j]
                    pltpu.make_async_copy(page_ref, page_buf, self.sem.at[slot]).start()
            return jnp.where(any_bad, flaws | BAD, flaws)

        def start_groups(begin, end, flaws, size):
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
            self._note(slot, k, Block(seq, base, left, found))

        @pl.when(count < block_pages)
        def _start_some():
            begin, found = start_groups(0, count, flaws, FEW_COPIES)
            _, found = start_groups(begin, count, found, 1)
            self._note(slot, k, Block(seq, base, left, found))

    def _note(self, slot, k, block: Block):
        at = (slot * self.work.round_blocks + k) * len(block)
        for i, value in enumerate(block):
            self.blocks_ref[at + i] = value

    def noted(self, slot, k) -> Block:
        size = len(Block._fields)
        at = (slot * self.work.round_blocks + k) * size
        return Block(*(self.blocks_ref[at + i] for i in range(size)))

    def is_partial(self, slot):
        """Whether there is something to mask in a round."""
        flaws = jnp.int32(0)
        for k in range(self.work.round_blocks):
            flaws |= self.noted(slot, k).flaws
        return flaws > 0

    def wait(self, slot, whole):
        """Wait for the pages of a round: a semaphore counts bytes, whichever came first."""
        if whole:
            for _, buf in self.pools:
                wait(buf.at[slot], self.sem.at[slot])
            return
        for k in range(self.work.round_blocks):
            block = self.noted(slot, k)
            _, count = self.entries(block.seq, block.base, block.left)

            @pl.when(count > 0)
            def _wait_for_pages(k=k, count=count):
                for _, buf in self.pools:
                    wait(buf.at[slot, k, pl.ds(0, count)], self.sem.at[slot])

    # What of a block may be seen.

    def has_ends(self, cursor: Cursor):
        """Whether a position of the block there may be invalid."""
        ends = cursor.left < self.work.block_kv
        if self.window_ref is not None:
            ends |= cursor.base < self.first_position(cursor.seq, cursor.base + cursor.left)
        return ends

    def is_first(self, block: Block):
        """Whether a block is its sequence's first."""
        return block.base <= self.first_position(block.seq, block.base + block.left)

    def is_last(self, block: Block):
        return (block.left > 0) & (block.left <= self.work.block_kv)

    def visible(self, block: Block):
        """Return where what may be seen of a block begins and ends, counted from its base."""
        return self.first_position(block.seq, block.base + block.left) - block.base, block.left

    def hide_bad_pages(self, block: Block, slot, k):
        """Zero the values behind bad entries, and return 1 for their tokens, `[1, block_kv]`."""
        problem, (_, buf) = self.work.problem, self.pools[-1]
        shape = (1, self.work.block_kv)
        page_of_token = lax.div(lax.broadcasted_iota(jnp.int32, shape, 1), problem.page_size)
        entry, count = self.entries(block.seq, block.base, block.left)

        def hide(j, hidden):
            _, bad = page_or_harmless(self.tables_ref[entry + j], problem.num_pages)

            @pl.when(bad)
            def _zero_values():
                buf[slot, k, j] = jnp.zeros(buf.shape[3:], buf.dtype)

            return jnp.where((page_of_token == j) & bad, 1, hidden)

        count = jnp.where(block.flaws >= BAD, count, 0)
        return lax.fori_loop(0, count, hide, jnp.zeros(shape, jnp.int32))


def wait(target, sem):
    pltpu.make_async_copy(target, target, sem).wait()


def page_or_harmless(entry, num_pages):
    """Return an entry's page, and whether it is bad: then the page is one that may be read."""
    bad = entry.astype(jnp.uint32) >= jnp.uint32(num_pages)
    return jnp.where(bad, 0, entry), bad


def page_of(hbm_ref, page, core, work):
    """The part of a page that a core reads, for all its heads."""
    layout = work.problem.layout
    index: list[Any] = [slice(None)] * len(hbm_ref.shape)
    index[layout.pages] = page
    if work.shared == "kv_head":
        index[layout.kv_heads] = pl.ds(core * work.kv_heads, work.kv_heads)
    return hbm_ref.at[tuple(index)]


def divide(n, d):
    """Divide, rounding down; nothing is negative here, and a shift is a fourth of a division."""
    if isinstance(n, int):
        return n // d
    if d & (d - 1) == 0:
        return lax.shift_right_logical(n, d.bit_length() - 1)
    return lax.div(n, d)


def divide_up(n, d):
    """Divide, rounding up; 0 for 0, and no sum that could exceed 32 bits."""
    return jnp.where(n > 0, divide(n - 1, d) + 1, 0)
