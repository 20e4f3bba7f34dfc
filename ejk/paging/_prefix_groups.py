"""Which sequences of a batch share their first pages."""

import dataclasses
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Int32s = npt.NDArray[np.int32]


class PrefixGroups(NamedTuple):
    """Sequences that share their first pages, in groups."""

    groups: Int32s
    """The group of each sequence, `[S]`; -1 for none."""
    num_pages: Int32s
    """How many first pages each group shares, `[S]`; 0 past the last group."""


@dataclasses.dataclass
class _Group:
    """Rows that share so many first pages."""

    num_pages: int
    rows: list[int]

    @property
    def saved(self) -> int:
        """Count the reads of pages that the group saves."""
        return self.num_pages * (len(self.rows) - 1)


@dataclasses.dataclass
class _Prefix:
    """Rows that begin with the same pages, some of them in groups that share more."""

    num_pages: int
    alone: list[int] = dataclasses.field(default_factory=list[int])
    groups: list[_Group] = dataclasses.field(default_factory=list[_Group])

    def close(self) -> None:
        """Make a group of the rows that are alone, and of groups that save less than to join it."""
        joining, staying = list[_Group](), list[_Group]()
        for group in self.groups:
            joins = self.num_pages * len(group.rows) > group.saved
            (joining if joins else staying).append(group)
        rows = [row for group in joining for row in group.rows]
        group = _Group(self.num_pages, self.alone + rows)
        if group.saved > sum(g.saved for g in joining):
            self.groups = [*staying, group]
            self.alone = []


def find_groups(
    tables: Int32s, shareable: npt.NDArray[np.integer], num_rows: int, min_pages: int
) -> PrefixGroups:
    """Group the rows of `tables` by their first pages, of which `shareable` counts each row's.

    Rows with equal beginnings are neighbours once the tables are sorted. Those that share so many
    pages or more are an interval, and intervals lie in each other. From the inside out, each makes
    a group of its rows where that saves reads.

    Source: the intervals of suffix arrays (Abouelhoda, Kurtz and Ohlebusch, 2004).
    """
    groups, num_pages = np.full(num_rows, -1, np.int32), np.zeros(num_rows, np.int32)
    order = _sorted(tables)
    found = _groups(_shared_with_next(tables[order], shareable[order]))
    for number, group in enumerate(g for g in found if g.num_pages >= min_pages):
        groups[order[group.rows]] = number
        num_pages[number] = group.num_pages
    return PrefixGroups(groups, num_pages)


def _sorted(tables: Int32s) -> npt.NDArray[np.int64]:
    width = tables.shape[1] * tables.itemsize
    raw = tables.astype(">i4").tobytes()
    keys = [raw[begin : begin + width] for begin in range(0, len(raw), width)]
    return np.array(sorted(range(len(keys)), key=keys.__getitem__), np.int64)


def _shared_with_next(tables: Int32s, shareable: npt.NDArray[np.integer]) -> list[int]:
    """Count the first pages that each row shares with the next one; the last one none."""
    unequal = (tables[1:] != tables[:-1]) | (tables[1:] < 0)
    equal = np.where(unequal.any(1), unequal.argmax(1), tables.shape[1])
    shared = np.minimum(equal, np.minimum(shareable[1:], shareable[:-1])).tolist()
    return [*shared, 0][: len(tables)]


def _groups(shared_with_next: list[int]) -> list[_Group]:
    """Choose the groups; `stack` has the prefixes of the current row, the longest last."""
    stack = [_Prefix(0)]
    for row, shared in enumerate(shared_with_next):
        if shared > stack[-1].num_pages:
            stack.append(_Prefix(shared))
        stack[-1].alone.append(row)
        while shared < stack[-1].num_pages:
            inner = stack.pop()
            inner.close()
            if shared > stack[-1].num_pages:
                stack.append(_Prefix(shared))
            stack[-1].alone += inner.alone
            stack[-1].groups += inner.groups
    return stack[0].groups
