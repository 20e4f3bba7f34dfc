"""What a decode call is told whose sequences are blocks of new tokens of others."""

from typing import NamedTuple

import jax


class Tokens(NamedTuple):
    """Which table each sequence reads, and which rows of the query and the output it has."""

    tables: jax.Array | None = None  # int32 [num_seqs]: rows of `block_tables`; None: its own
    # int32 [num_seqs, 2]: the tokens `[begin, end)`, rows of query and output, that are a
    # sequence's. It reads the last ones before the end, as many as the problem has heads for, and
    # writes its own. None: a row is a sequence.
    spans: jax.Array | None = None


OWN = Tokens()  # each sequence has a token and a table of its own
