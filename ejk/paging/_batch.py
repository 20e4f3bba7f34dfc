"""A batch: the arrays of one step of sequences that have new tokens, in padded shapes."""

import dataclasses
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ejk.paging._ledger import Int32s, Int64s, Ledger
from ejk.paging._prefix_groups import PrefixGroups, find_groups
from ejk.paging._sequences import Rows
from ejk.paging._sizes import at_least


class BatchInputs(NamedTuple):
    """What a step takes: integer arrays, and a pytree that goes through `jax.jit` as it is.

    `S` sequences have `T` new tokens, packed sequence after sequence. Both numbers and the width of
    the table are rounded up (`bucket`). Rows of padding have length 0, slot, position and table
    entries -1, and token 0.
    """

    tokens: Int32s
    """The new tokens, `[T]`."""
    positions: Int32s
    """Where in its sequence each of them is, `[T]`."""
    slot_mapping: Int32s
    """`page * page_size + offset` of each, `[T]`, for `ejk.write_kv_cache`."""
    cu_q_lens: Int32s
    """The new tokens of sequence `s` are the rows from `cu_q_lens[s]` to `cu_q_lens[s + 1]`."""
    context_lens: Int32s
    """Tokens of each sequence up to its last new one, `[S]`."""
    block_tables: Int32s
    """The pages of each sequence, `[S, blocks]`; -1 behind the window and past the end."""


@dataclasses.dataclass(frozen=True, eq=False)
class Batch:
    """One step of some sequences: `PageManager.batch` makes it, `PageManager.commit` takes it.

    Before the step writes, the caller copies the pages that `copies` names, in every layer; and
    before that it may overwrite those that `freed` names.
    """

    inputs: BatchInputs
    """The arrays of the step."""
    copies: Int32s
    """Pages `(from, to)` to copy before the step writes, `[copies, 2]`; rows of padding are -1.

    By `ejk.copy_kv_pages(..., copies[:, 0], copies[:, 1])`, which takes -1 for none.
    """
    freed: Int32s
    """Pages whose content was lost since the last batch, if the manager records it."""
    seqs: Int64s
    """The sequences, without padding."""
    q_lens: Int64s
    """How many new tokens each of them has."""
    max_q_len: int
    """The largest of `q_lens`. As the hint of that name, round it up: each value is a program."""
    max_context_len: int
    """The longest context. As a hint it adds nothing to the table's width, which is rounded up."""
    number: int
    """Counts the manager's batches."""
    manager: str
    """The manager that made the batch: a name that each draws at random."""
    page_size: int

    def prefix_groups(self, min_pages: int = 1) -> PrefixGroups:
        """Find which sequences of the batch share their first pages.

        A group reads what all of it share once. A sequence is in one group or none, in the one that
        saves more reads of pages where it could be in several.

        Args:
            min_pages: groups that share fewer pages are left out.

        Returns:
            A group for each row of the batch, -1 for none, and how many first pages each shares.
        """
        min_pages = at_least("min_pages", min_pages, 1)
        num_seqs, inputs = self.seqs.size, self.inputs
        shareable = (inputs.context_lens[:num_seqs] - self.q_lens) // self.page_size
        tables = inputs.block_tables[:num_seqs]
        return find_groups(tables, shareable, inputs.context_lens.size, min_pages)


def build(ledger: Ledger, rows: Rows, q_lens: Int64s, number: int, least: "Least") -> Batch:
    """Make the batch in which each row computes its next `q_lens` tokens."""
    s, size = ledger.seqs, ledger.page_size
    begin = s.computed[rows]
    end = begin + q_lens
    total, max_q_len = int(q_lens.sum()), int(q_lens.max(initial=0))
    longest = int(end.max(initial=0))
    num_rows, num_tokens = bucket(max(rows.size, least.seqs)), bucket(max(total, least.tokens))
    if max_q_len <= 1:  # for `ejk.page_attention`: a token is a sequence
        num_rows = num_tokens = max(num_rows, num_tokens)
    width = min(bucket(max(-(-longest // size), least.blocks)), s.tables.shape[1])
    tables = s.tables[rows, :width]
    if (s.lens[rows] > end).any():  # pages of tokens that later batches compute
        tables[np.arange(width) >= ledger.blocks(end)[:, None]] = -1
    positions, slots = ledger.positions_and_slots(rows, begin, q_lens)
    copying = rows[s.copy_from[rows] >= 0]
    to = s.tables[copying, s.computed[copying] // size]
    copies = np.stack([s.copy_from[copying], to], axis=1)
    s.copy_in_batch[copying] = True
    s.batch[rows], s.batch_end[rows] = number, end
    return Batch(
        inputs=BatchInputs(
            tokens=padded(ledger.page_tokens.reshape(-1)[slots], num_tokens, 0),
            positions=padded(positions, num_tokens, -1),
            slot_mapping=padded(slots, num_tokens, -1),
            cu_q_lens=padded(np.append(0, np.cumsum(q_lens)), num_rows + 1, total),
            context_lens=padded(end, num_rows, 0),
            block_tables=padded(tables, num_rows, -1),
        ),
        copies=padded(copies, bucket(len(copies)) if len(copies) else 0, -1),
        freed=ledger.pages.take_freed(),
        seqs=s.handles(rows),
        q_lens=q_lens,
        max_q_len=max_q_len,
        max_context_len=longest,
        number=number,
        manager=ledger.name,
        page_size=size,
    )


def seqs_of(batch: Batch, ledger: Ledger) -> Int64s:
    """Return the sequences of a manager's own batch, and refuse what is none, such as its inputs.

    Handles and numbers of another manager's may be the same, and its pages hold something else.
    """
    if not isinstance(batch, Batch):
        raise TypeError(f"batch={type(batch).__name__} must be a Batch, which batch() returns")
    if batch.manager != ledger.name:
        raise ValueError(
            f"batch.number={batch.number} must be a batch of this manager, and is another's: "
            "commit it to the one whose batch() returned it"
        )
    return batch.seqs


class Least(NamedTuple):
    """The smallest shapes of a batch."""

    seqs: int
    tokens: int
    blocks: int


def bucket(size: int) -> int:
    """Round up to 1, 2, 3, 4, 6, 8, 12, 16, ...: two sizes for each doubling.

    A step compiles for few shapes then, and at most half as many rows as are needed are padding.
    """
    if size <= 2:
        return max(size, 1)
    power = 1 << (size - 1).bit_length()  # the least one that is not below
    return power * 3 // 4 if size <= power * 3 // 4 else power


def padded(x: npt.NDArray[np.integer], size: int, fill: int) -> Int32s:
    """Append `fill` along the first axis up to `size`."""
    out = np.full((size, *x.shape[1:]), fill, np.int32)
    out[: len(x)] = x
    return out
