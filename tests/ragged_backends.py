"""The table of backends of `ejk.ragged_page_attention`, and its properties' decorators."""

import dataclasses
import os

import numpy as np
import pytest
from backends import Entry, counted

import ejk


@dataclasses.dataclass(frozen=True)
class RaggedEntry(Entry):
    """One backend under test."""

    def __call__(self, case, **overrides):
        """Run a case; return the output and the LSE as NumPy arrays."""
        with self.refusing():
            out, lse = ejk.ragged_page_attention(
                *case.arguments(), **{**case.semantics(), **overrides}, return_lse=True,
                backend=self.backend,
            )  # fmt: skip
        return np.asarray(out), np.asarray(lse)


def entries() -> list[RaggedEntry]:
    small = ejk.XlaRaggedPageAttention(block_q=4, block_kv=16)
    xla = RaggedEntry("ragged xla", ejk.XlaRaggedPageAttention(), examples=12)
    if os.environ.get("EJK_TEST_GPU"):
        return [xla]
    return [xla, RaggedEntry("ragged xla in small blocks", small, examples=6)]


RAGGED = entries()


def ragged_edge(body):
    """Make a test of a function of `entry` and fixtures: run on every backend, and counted."""
    return pytest.mark.parametrize("entry", RAGGED, ids=lambda entry: entry.name)(counted(body))
