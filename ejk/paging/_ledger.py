"""The ledger: which sequence holds which pages, and what becomes of both. Arguments are checked."""

import os
from typing import Any

import numpy as np
import numpy.typing as npt

from ejk.paging import _content
from ejk.paging._allocator import PageAllocator, Pages
from ejk.paging._sequences import Rows, Sequences
from ejk.paging._sizes import Sizes

Int64s = npt.NDArray[np.int64]
Int32s = npt.NDArray[np.int32]


class Ledger:
    """Rows of sequences, the pages that they hold, and the tokens that those are for."""

    def __init__(self, sizes: Sizes, *, prefix_caching: bool, record_freed: bool):
        self.name = os.urandom(8).hex()
        """Tells batches of this manager, and of copies of it, from those of any other."""
        self.page_size = sizes.page_size
        self.sliding_window = sizes.sliding_window
        self.prefix_caching = prefix_caching
        self.seqs = Sequences(sizes.max_seqs, sizes.max_blocks)
        self.pages = PageAllocator(sizes.num_pages, record_freed=record_freed)
        self.page_tokens = np.zeros((sizes.num_pages, sizes.page_size), np.int32)
        """The tokens of every held or published page: what its slots are for."""
        self.epoch = 0
        self.forks = self.copies = self.queried_tokens = self.hit_tokens = 0

    def open(self, tokens: Int32s, num_new_tokens: int, most: int, root: bytes) -> int:
        """Begin a sequence: reuse known pages, of `most` tokens; take others for those after."""
        size, s = self.page_size, self.seqs
        chain = _content.chain(root, tokens if self.prefix_caching else tokens[:0], size)
        known = self._known(chain[1 : min(tokens.size - 1, most) // size + 1])
        begin = known.size * size
        end = min(begin + num_new_tokens, tokens.size)
        first = int(self.first_seen(begin))
        blocks = -(-end // size)
        fresh = self.pages.take(blocks - known.size, known[first:])

        row = s.open()
        s.tables[row, first:blocks] = np.append(known[first:], fresh)
        s.lens[row], s.computed[row], s.first_block[row] = end, begin, first
        if first:
            s.behind[row] = [tokens[: first * size]]
        s.chains[row] = chain[: end // size + 1]
        self.page_tokens.reshape(-1)[self._slots(row, begin, end)] = tokens[begin:end]
        self.queried_tokens += tokens.size
        self.hit_tokens += begin
        return row

    def fork(self, row: int) -> int:
        """Begin a sequence with all that a row has, whose tokens are all computed."""
        s = self.seqs
        new = s.open()
        self.pages.hold(self.held(row))
        for of_rows in (s.tables, s.lens, s.computed, s.first_block):
            of_rows[new] = of_rows[row]
        s.chains[new] = s.chains[row].copy()
        if row in s.behind:
            s.behind[new] = s.behind[row].copy()
        self.forks += 1
        return new

    def close(self, row: int) -> None:
        """End a sequence. Of its published pages the last ones are to be evicted first."""
        source = self.seqs.copy_from[row : row + 1]
        self.pages.release(np.append(self.held(row)[::-1], source[source >= 0]))
        self.seqs.close(row)

    def grow(self, rows: Rows, counts: Int64s, tokens: Int32s) -> None:
        """Append packed tokens to sequences: take pages, and copies of those that others hold."""
        s = self.seqs
        begin = s.lens[rows]
        blocks = self.blocks(begin)
        added = self.blocks(begin + counts) - blocks
        copying, kept = self._written_to(rows[counts > 0])
        fresh = self.pages.take(int(added.sum()) + copying.size)

        self.pages.unpublish(kept)
        if copying.size:
            self._copy_on_write(copying, fresh[: copying.size])
        s.tables[np.repeat(rows, added), np.repeat(blocks, added) + ranges(added)] = fresh[
            copying.size :
        ]
        s.lens[rows] += counts
        self.page_tokens.reshape(-1)[self.positions_and_slots(rows, begin, counts)[1]] = tokens

    def cut(self, rows: Rows, ends: Int64s) -> None:
        """Drop all tokens of each sequence from its end on."""
        s = self.seqs
        undone = (s.copy_from[rows] >= 0) & (ends <= s.computed[rows])
        if undone.any():  # nothing is left to write: no copy is needed
            self._take_back_copies(rows[undone])
        blocks = self.blocks(ends)
        dropped = self.blocks(s.lens[rows]) - blocks
        at = np.repeat(rows, dropped), np.repeat(blocks, dropped) + ranges(dropped)
        pages = s.tables[at]
        s.tables[at] = -1
        self.pages.release(pages[::-1])  # later ones are to be evicted first
        for of_rows in (s.lens, s.computed, s.batch_end):
            of_rows[rows] = np.minimum(of_rows[rows], ends)
        for row, full in zip(rows.tolist(), (ends // self.page_size).tolist()):
            del s.chains[row][full + 1 :]

    def advance(self, rows: Rows) -> None:
        """Take as computed what the newest batch of each row computes, as far as it is not cut."""
        s = self.seqs
        rows = rows[s.batch_end[rows] > s.computed[rows]]
        before = s.computed[rows]
        s.computed[rows] = s.batch_end[rows]
        copied = rows[(s.copy_from[rows] >= 0) & s.copy_in_batch[rows]]
        if copied.size:
            self.pages.release(s.copy_from[copied])
            s.copy_from[copied] = -1
        if self.prefix_caching:
            self._publish(rows, before // self.page_size)
        if self.sliding_window is not None:
            self._pass_window(rows)

    def forget(self) -> None:
        """Reuse nothing that was computed until now, nor what live sequences compute after it."""
        self.pages.forget()
        self.epoch += 1

    def blocks(self, num_tokens: Int64s) -> Int64s:
        """Count the pages that so many tokens of a sequence have, those behind the window too."""
        return -(-num_tokens // self.page_size)

    def num_blocks(self, row: int) -> int:
        return -(-int(self.seqs.lens[row]) // self.page_size)

    def held(self, row: int) -> Pages:
        """Return the pages of a row, in order, from the first one that is not behind the window."""
        return self.seqs.tables[row, self.seqs.first_block[row] : self.num_blocks(row)]

    def tokens(self, row: int) -> Int32s:
        """Return all tokens of a row."""
        held = self.page_tokens[self.held(row)].reshape(-1)
        return np.concatenate([*self.seqs.behind.get(row, []), held])[: self.seqs.lens[row]]

    def first_seen(self, num_tokens: int | Int64s) -> Any:
        """Return the first column of the table that the token after so many sees."""
        if self.sliding_window is None:
            return 0 * num_tokens
        return np.maximum(num_tokens + 1 - self.sliding_window, 0) // self.page_size

    def positions_and_slots(
        self, rows: Rows, begin: Int64s, counts: Int64s
    ) -> tuple[Int64s, Int64s]:
        """Find the slots of `counts` tokens of each row, from position `begin` on, packed."""
        positions = np.repeat(begin, counts) + ranges(counts)
        pages = self.seqs.tables[np.repeat(rows, counts), positions // self.page_size]
        return positions, pages.astype(np.int64) * self.page_size + positions % self.page_size

    def _slots(self, row: int, begin: int, end: int) -> Int64s:
        one = np.array([row]), np.array([begin]), np.array([end - begin])
        return self.positions_and_slots(*one)[1]

    def _known(self, digests: list[bytes]) -> Pages:
        """Return the pages of the longest beginning that may be reused.

        What the token after it sees must be known; of pages behind its window nothing is asked.
        """
        pages = self.pages.find(digests)
        columns = np.arange(pages.size)
        last_gap = np.maximum.accumulate(np.where(pages < 0, columns, -1))
        enough = np.flatnonzero(last_gap < self.first_seen((columns + 1) * self.page_size))
        return pages[: enough[-1] + 1 if enough.size else 0]

    def _written_to(self, rows: Rows) -> tuple[Rows, list[int]]:
        """Say which rows need a copy of their last page to append to it, and what they overwrite.

        If all who hold a page append to it at once, the one with most tokens in it keeps it: what
        it writes lies behind all that the copies are made for.

        Returns:
            The rows that copy, and the published pages that the others write to.
        """
        s, references = self.seqs, self.pages.references
        rows = rows[s.lens[rows] % self.page_size > 0]
        pages = s.tables[rows, s.lens[rows] // self.page_size]
        shared = references[pages] > 1
        own = pages[~shared]
        if not shared.any():
            return rows[:0], own[self.pages.published[own]].tolist()
        rows, pages = rows[shared], pages[shared]
        order = np.lexsort((-s.lens[rows], pages))
        rows, pages = rows[order], pages[order]
        _, first, writers = np.unique(pages, return_index=True, return_counts=True)
        keeps = first[references[pages[first]] == writers]
        own = np.append(own, pages[keeps])
        return np.delete(rows, keeps), own[self.pages.published[own]].tolist()

    def _copy_on_write(self, rows: Rows, fresh: Pages) -> None:
        """Give rows copies of their last pages, which they hold until the copies are made."""
        s = self.seqs
        columns = s.lens[rows] // self.page_size
        s.copy_from[rows], s.copy_in_batch[rows] = s.tables[rows, columns], False
        s.tables[rows, columns] = fresh
        self.page_tokens[fresh] = self.page_tokens[s.copy_from[rows]]
        self.copies += rows.size

    def _take_back_copies(self, rows: Rows) -> None:
        """Share the copied pages again. Who kept one may write to it, behind all that rows have."""
        s = self.seqs
        at = rows, s.computed[rows] // self.page_size
        self.pages.release(s.tables[at])
        s.tables[at] = s.copy_from[rows]
        s.copy_from[rows] = -1
        self.copies -= rows.size

    def _publish(self, rows: Rows, first: Int64s) -> None:
        """Make the full computed pages of rows known, from column `first` on."""
        s, step = self.seqs, self.page_size * self.page_tokens.itemsize
        counts = s.computed[rows] // self.page_size - first
        columns = np.repeat(first, counts) + ranges(counts)
        rows = np.repeat(rows, counts)
        pages = s.tables[rows, columns]
        raw = self.page_tokens[pages].tobytes()
        digests = list[bytes]()
        end = 0
        for row, column in zip(rows.tolist(), columns.tolist()):
            chain, begin, end = s.chains[row], end, end + step
            if len(chain) == column + 1:
                chain.append(_content.digest(chain[-1], raw[begin:end]))
            digests.append(chain[column + 1])
        self.pages.publish(pages.tolist(), digests)

    def _pass_window(self, rows: Rows) -> None:
        """Give up the pages that no later token of these rows sees."""
        s = self.seqs
        counts = self.first_seen(s.computed[rows]) - s.first_block[rows]
        rows, counts = rows[counts > 0], counts[counts > 0]
        columns = np.repeat(s.first_block[rows], counts) + ranges(counts)
        at = np.repeat(rows, counts), columns
        pages = s.tables[at]
        ends = np.cumsum(counts)
        for row, end, count in zip(rows.tolist(), ends.tolist(), counts.tolist()):
            behind = self.page_tokens[pages[end - count : end]].reshape(-1)
            s.behind.setdefault(row, []).append(behind)
        s.tables[at] = -1
        s.first_block[rows] += counts
        self.pages.release(pages)


def ranges(counts: Int64s) -> Int64s:
    """Count up from 0 anew for each of `counts`: 2 and 3 give 0, 1, 0, 1, 2."""
    ends = np.cumsum(counts)
    return np.arange(counts.sum()) - np.repeat(ends - counts, counts)
