"""The work list of a ragged batch: how a GPU's kernels are told what each of them attends to.

The query rows of a sequence and a KV head are its new tokens times the heads of the group. They are
cut in blocks: narrow ones where one holds them all, wide ones else. An item is one piece of what a
block sees. The list is made on the device, once for all layers. Each kind of block has launches of
its own, whose programs take the items of that kind and combine those that are pieces of one block;
or the programs of one launch take the items of both.
"""

import dataclasses

import jax
import jax.numpy as jnp

from ejk._indices import Size
from ejk.backends.ragged_page_attention import RaggedPageAttentionProblem

ITEM = 8  # integers of a row of the list


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of block, and how many items it has at most."""

    rows: int  # query rows of a block
    max_blocks: Size
    cuts: int  # pieces to cut contexts in, about; 0: none is cut
    whole_chunks: int = 2  # blocks that see no more of these are not cut

    @property
    def max_parts(self) -> int:
        """Pieces of blocks that are cut: they have more than so many chunks, and pieces of one."""
        return self.cuts * (self.whole_chunks + 1) // self.whole_chunks

    @property
    def max_items(self) -> Size:
        return self.max_blocks + self.max_parts

    @property
    def max_splits(self) -> Size:
        """Blocks in several pieces: only what is above so many cuts' share is."""
        return min(self.max_blocks, self.cuts // self.whole_chunks)


@dataclasses.dataclass(frozen=True)
class RaggedPlan:
    """Which rows the list has.

    It is one array, `[num_rows, ITEM]` of int32:

    - row 0: items and splits of narrow blocks, then of wide ones; where the first sequence's rows
      begin, and where the last one's end;
    - the narrow items, then the wide ones: sequence, its first token and how many it has, block of
      rows, piece, pieces, part or -1, and the sequence's length;
    - the narrow splits, then the wide ones: first token, tokens, block, first part, parts.

    Pieces of a block are whole multiples of `granule` tokens, but for the last. What lies beyond
    the counts is not initialised.
    """

    narrow: Kind
    wide: Kind | None
    granule: int
    resident: int = 0
    """Programs that run at a time and take items of all kinds; 0: each kind has its own.

    Triton's have narrow items alone: where it has wide blocks, `resident` is 0.
    """

    @classmethod
    def of(
        cls,
        problem: RaggedPageAttentionProblem,
        narrow_rows: int,
        wide_rows: int | None,
        cuts: int,
        granule: int,
        resident: int = 0,
    ) -> "RaggedPlan":
        """Return the list for blocks of so many rows; without wide ones narrow ones take all."""
        rows = problem.total_tokens * problem.group
        seqs = min(problem.num_seqs, problem.total_tokens)  # that have new tokens
        whole_chunks = 1 if resident else 2
        if wide_rows is None:
            blocks = seqs + rows // narrow_rows
            narrow = Kind(narrow_rows, blocks, cuts, whole_chunks)
            return cls(narrow, None, granule, resident)
        max_wide = rows // wide_rows + min(seqs, rows // (narrow_rows + 1))
        wide = Kind(wide_rows, max(max_wide, 1), cuts, whole_chunks)
        return cls(Kind(narrow_rows, seqs, cuts, whole_chunks), wide, granule, resident)

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """Narrow items, then wide ones if there are any."""
        return (self.narrow,) if self.wide is None else (self.narrow, self.wide)

    @property
    def first_rows(self) -> tuple[Size, Size, Size, Size, Size]:
        """Where narrow and wide items begin, narrow and wide splits, and the list's end."""
        wide = self.wide or Kind(0, 0, 0)
        items = 1 + self.narrow.max_items
        splits = items + wide.max_items
        wide_splits = splits + self.narrow.max_splits
        return 1, items, splits, wide_splits, wide_splits + wide.max_splits

    @property
    def first_wide_part(self) -> int:
        """The first wide part: where one launch takes both kinds, narrow ones come before it."""
        if self.wide is None or not self.resident:
            return 0
        return -(-self.narrow.max_parts * self.narrow.rows // self.wide.rows)

    @property
    def part_rows(self) -> int:
        """Query rows of all parts that are there at a time."""
        rows = self.narrow.max_parts * self.narrow.rows
        if self.wide is not None:
            rows = max(rows, (self.first_wide_part + self.wide.max_parts) * self.wide.rows)
        return rows

    @property
    def type(self) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((self.first_rows[-1], ITEM), jnp.int32)
