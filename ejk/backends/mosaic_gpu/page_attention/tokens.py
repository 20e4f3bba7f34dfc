"""What a decode call is told whose sequences are blocks of new tokens of others."""

from typing import NamedTuple

import jax


class Tokens(NamedTuple):
    """Which table each sequence reads, and which rows of the queries it has."""

    tables: jax.Array | None = None  # int32 [num_seqs]: rows of `block_tables`; None: its own
    # int32 [num_seqs]: rows of the query are tokens, a sequence has the last ones before its end,
    # and the problem's heads are those of all of them. None: a row is a sequence.
    ends: jax.Array | None = None


OWN = Tokens()  # each sequence has a token and a table of its own
