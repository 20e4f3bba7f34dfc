"""Sequences: a row of arrays for each, and the handles by which a caller names them."""

import numpy as np
import numpy.typing as npt

from ejk.paging._arguments import Integers
from ejk.paging._errors import OutOfSequencesError

Rows = npt.NDArray[np.int64]


class Sequences:
    """What is known of each sequence. A handle is a row and how often that row was used before.

    So a handle of a sequence that has ended is told from that of the next one in its row.
    """

    def __init__(self, max_seqs: int, max_blocks: int):
        self.tables = np.full((max_seqs, max_blocks), -1, np.int32)
        self.lens = np.zeros(max_seqs, np.int64)
        """Tokens that have slots."""
        self.computed = np.zeros(max_seqs, np.int64)
        """Tokens at the beginning whose keys and values are known to be written."""
        self.first_block = np.zeros(max_seqs, np.int64)
        """The first column of the table that is not behind the window."""
        self.copy_from = np.full(max_seqs, -1, np.int32)
        """The page to copy to the one that the next token is computed in; it is held until then."""
        self.copy_in_batch = np.zeros(max_seqs, np.bool_)
        """Whether a batch has named that copy: one made before the copy was needed has not."""
        self.batch = np.zeros(max_seqs, np.int64)
        """The number of the newest batch that has the sequence; 0 if that was committed."""
        self.batch_end = np.zeros(max_seqs, np.int64)
        """Tokens that will be computed once that batch is committed."""
        self.chains = [list[bytes]() for _ in range(max_seqs)]
        """The digest of the salt, and those of the first full pages."""
        self.behind: dict[int, list[npt.NDArray[np.int32]]] = {}
        """The tokens of the pages behind the window."""
        self.num_live = 0
        self._max_seqs = max_seqs
        self._handles = np.full(max_seqs, -1, np.int64)  # -1: nobody's row
        self._next_handles = np.arange(max_seqs)
        self._free_rows = list(range(max_seqs - 1, -1, -1))
        self._seen = np.zeros(max_seqs, np.int64)

    def check_room(self) -> None:
        """Raise unless a sequence can be opened."""
        if not self._free_rows:
            raise OutOfSequencesError(
                f"max_seqs={self._max_seqs} sequences live: free one, or make max_seqs larger"
            )

    def open(self) -> int:
        """Return the row of a new sequence of no tokens."""
        row = self._free_rows.pop()
        self._handles[row] = self._next_handles[row]
        self._next_handles[row] += self._max_seqs
        self.num_live += 1
        return row

    def close(self, row: int) -> None:
        """Forget a sequence that holds no pages any more."""
        self.tables[row] = -1
        self.lens[row] = self.computed[row] = self.first_block[row] = 0
        self.copy_from[row], self.batch[row], self.batch_end[row] = -1, 0, 0
        self.chains[row] = []
        self.behind.pop(row, None)
        self._handles[row] = -1
        self._free_rows.append(row)
        self.num_live -= 1

    def handles(self, rows: Rows) -> npt.NDArray[np.int64]:
        """Return the handles of rows."""
        return self._handles[rows]

    def still(self, handles: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        """Say which handles are of sequences that live."""
        return (handles >= 0) & (self._handles[handles % self._max_seqs] == handles)

    def living(self, handles: npt.NDArray[np.int64]) -> Rows:
        """Return the rows of those that live."""
        return handles[self.still(handles)] % self._max_seqs

    def handle(self, row: int) -> int:
        return int(self._handles[row])

    def row(self, seq: int) -> int:
        """Return the row of one live sequence."""
        if np.ndim(seq):
            raise TypeError(f"seq={seq!r:.80} must be one sequence, not a list")
        return int(self.rows(seq)[0])

    def rows(self, seqs: Integers) -> Rows:
        """Return the rows of live sequences, each named once."""
        handles = np.asarray(seqs)
        if handles.ndim > 1:
            raise TypeError(f"seqs has {handles.ndim} axes, and must be a sequence or a list")
        if handles.dtype.kind not in "iu" and handles.size:
            raise TypeError(f"seqs={seqs!r:.80} must be the integers that allocate and fork return")
        whose = "seqs[{}]={}" if handles.ndim else "seq={1}"
        handles = handles.reshape(-1).astype(np.int64)
        wrong = np.flatnonzero(~self.still(handles))
        if wrong.size:
            raise ValueError(
                f"{whose.format(wrong[0], handles[wrong[0]])} must be a live sequence, and was "
                "freed, preempted or never allocated: name it by what allocate or fork returned"
            )
        rows = handles % self._max_seqs
        order = np.arange(rows.size)
        self._seen[rows] = order
        twice = np.flatnonzero(self._seen[rows] != order)
        if twice.size:
            raise ValueError(f"{whose.format(twice[0], handles[twice[0]])} must be named once")
        return rows
