"""The table of backends of `ejk.ragged_page_attention`, and its properties' decorators."""

import dataclasses
import os

import numpy as np
import pytest
from backends import Entry, counted

import ejk


@dataclasses.dataclass(frozen=True)
class RaggedEntry(Entry):
    """One backend under test.

    Attributes:
        decode: the backend of `ejk.page_attention` that takes single tokens in the same blocks.
    """

    decode: ejk.Backend | None = None

    def __call__(self, case, **overrides):
        """Run a case; return the output and the LSE as NumPy arrays."""
        with self.refusing():
            out, lse = ejk.ragged_page_attention(
                *case.arguments(), **{**case.semantics(), **overrides}, return_lse=True,
                backend=self.backend,
            )  # fmt: skip
        return np.asarray(out), np.asarray(lse)


def entries() -> list[RaggedEntry]:
    if os.environ.get("EJK_TEST_GPU"):
        return [
            RaggedEntry("ragged xla on gpu", ejk.XlaRaggedPageAttention(), examples=20),
            RaggedEntry(
                "ragged triton on gpu",
                ejk.TritonRaggedPageAttention(),
                examples=40,
                decode=ejk.TritonPageAttention(),
            ),
            # 192 query rows fill it: of 16 bits they are taken in the blocks of a large batch.
            RaggedEntry(
                "ragged triton on a small gpu", ejk.TritonRaggedPageAttention(num_sms=1), examples=8
            ),
            RaggedEntry(
                "ragged triton on a small gpu, in blocks of 256",
                ejk.TritonRaggedPageAttention(num_sms=1, block_rows=256),
                examples=8,
                may_refuse=(r"blocks of 256 query rows .* shared memory", "no rocm device is here"),
            ),
        ]
    small = ejk.XlaRaggedPageAttention(block_q=4, block_kv=16)
    return [
        RaggedEntry("ragged xla", ejk.XlaRaggedPageAttention(), examples=6),
        RaggedEntry("ragged xla in small blocks", small, examples=4),
        RaggedEntry("ragged triton interpreted", TRITON, examples=8, decode=DECODE),
        RaggedEntry(
            "ragged pallas interpreted",
            PALLAS,
            examples=4,
            may_refuse=(r"float16: the matrix unit takes float32 and bfloat16",),
        ),
    ]


# Small blocks, so that a few tokens are wide ones, and blocks of keys that need no mask occur.
TRITON = ejk.TritonRaggedPageAttention(
    block_rows=16, block_kv=32, few_block_kv=16, num_sms=6, interpret=True
)
DECODE = ejk.TritonPageAttention(block_kv=16, num_sms=6, interpret=True)
PALLAS = ejk.PallasRaggedPageAttention(block_q=3, pages_per_block=2, interpret=True)
RAGGED = entries()


def ragged_edge(body):
    """Make a test of a function of `entry` and fixtures: run on every backend, and counted."""
    return pytest.mark.parametrize("entry", RAGGED, ids=lambda entry: entry.name)(counted(body))
