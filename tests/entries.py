"""The tables of backends, one for each operation, and what runs a property on every entry."""

import dataclasses
import functools
import os
import zlib
from collections.abc import Callable, Collection, Sequence

import gpu_interpreter
import hypothesis
import jax
import ml_dtypes
import numpy as np
import pytest
import tally
from tiers import THOROUGH

import ejk
from ejk.testing import Refusal, Subject
from ejk.testing.configurations import Configuration, Few

F32, BF16 = np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16)


@dataclasses.dataclass(frozen=True)
class Entry(Subject):
    """One backend under test.

    Attributes:
        name: in test ids and in the summary.
        backend: what is passed as `backend=`.
        examples: drawn for a property that asks for its full share.
        batch_invariant: for `num_splits >= 1` a sequence's bits depend on that sequence alone.
        may_refuse: regular expressions of the only reasons this backend may give for refusing.
        suits: says which configurations it is given, where some of them do.
        dtype: of the edges.
        marks: of its tests.
        slow: it runs one in eight of the edges, and of properties those that have their share.
    """

    name: str
    backend: ejk.Backend
    examples: int
    batch_invariant: bool = True
    may_refuse: Collection[str] = ()
    suits: Callable[[Configuration], bool] | None = None
    dtype: np.dtype = F32
    marks: Sequence[pytest.MarkDecorator] = ()
    slow: bool = False


@dataclasses.dataclass(frozen=True)
class RaggedEntry(Entry):
    """One backend of `ejk.ragged_page_attention` under test.

    Attributes:
        decode: the backend of `ejk.page_attention` that takes single tokens in the same blocks.
    """

    decode: ejk.Backend | None = None


def interpreted(backends) -> dict[str, ejk.Backend]:
    """Name backends as they run on a CPU: kernels by their interpreter."""
    return {
        backend.name: dataclasses.replace(backend, interpret=True)
        if hasattr(backend, "interpret")
        else backend
        for backend in backends
    }


# Small blocks, so that a few tokens are wide ones, and blocks of keys that need no mask occur.
RAGGED_TRITON = ejk.TritonRaggedPageAttention(
    block_rows=16, block_kv=32, few_block_kv=16, num_sms=6, interpret=True
)
RAGGED_PALLAS = ejk.PallasRaggedPageAttention(block_q=3, pages_per_block=2, interpret=True)
# What no kernel does yet.
NO_QUANTISED = (r"does not support key_(cache|scale)",)
NO_FLOAT16 = (
    r"does not support key_cache\.dtype=uint8 \(int4\)",
    r"float16: the (matrix unit|chip) takes float32 and bfloat16",
)


def suits_mosaic(config: Configuration) -> bool:
    """Say whether the prefill kernel for Hopper takes a configuration."""
    shape = config.shape
    pages = 64 if shape.head_dim == 256 else 128
    return (
        not shape.latent
        and (config.holds == config.dtype or config.holds.itemsize == 1)
        and (config.scales != "token" or config.dtype == BF16)
        and config.dtype.itemsize == 2
        and shape.head_dim == shape.width in (64, 128, 256)
        and shape.page_size % 8 == 0
        and (pages % shape.page_size == 0 or shape.page_size % pages == 0)
        and not config.features & {"positions", "tree_mask", "causal=False"}
    )


def ragged_mosaic(name: str, examples: int, **fields) -> RaggedEntry:
    """Return the entry of the prefill kernel."""
    return RaggedEntry(
        name,
        ejk.MosaicGpuRaggedPageAttention(**fields),
        examples,
        may_refuse=(
            "head_dim=.* must be ", "at most 64", "dtype=.*: it takes bfloat16 and float16",
            "query.dtype=float16 has no room", "does not support key_cache.dtype other than",
            "page_size=.* must be ", "does not support (positions|tree_mask|causal=False)",
            "with value_head_dim", "num_heads=.* must be at least 33", "num_kv_heads=.* must be 1",
        ),
        suits=suits_mosaic,
        dtype=BF16,
        marks=gpu_interpreter.marks,
        slow=fields.get("interpret", False),
    )  # fmt: skip


if os.environ.get("EJK_TEST_GPU"):
    assert jax.default_backend() == "gpu", "the GPU tests were asked for, but there is no GPU"
    ENTRIES = [
        Entry("xla on gpu", ejk.XlaPageAttention(), 40, batch_invariant=False),
        Entry("triton on gpu", ejk.TritonPageAttention(), 80),
    ]
    RAGGED = [
        RaggedEntry("ragged xla on gpu", ejk.XlaRaggedPageAttention(), 20),
        RaggedEntry(
            "ragged triton on gpu",
            ejk.TritonRaggedPageAttention(),
            40,
            decode=ejk.TritonPageAttention(),
        ),
        # 192 query rows fill it: of 16 bits they are taken in the blocks of a large batch.
        RaggedEntry(
            "ragged triton on a small gpu",
            ejk.TritonRaggedPageAttention(num_sms=1),
            8,
        ),
        RaggedEntry(
            "ragged triton on a small gpu, in blocks of 256",
            ejk.TritonRaggedPageAttention(num_sms=1, block_rows=256),
            8,
            may_refuse=(r"blocks of 256 query rows .* shared memory", "no rocm device is here"),
        ),
        ragged_mosaic("ragged mosaic_gpu on gpu", 12),  # each configuration compiles for 8 s
        ragged_mosaic("ragged mosaic_gpu on a small gpu", 8, num_sms=3),
    ]
    WRITERS = [
        Entry("xla on gpu, writing", ejk.XlaWriteKVCache(), 20),
        Entry("triton on gpu, writing", ejk.TritonWriteKVCache(), 80),
    ]
    COPIERS = [
        Entry("xla on gpu, copying", ejk.XlaCopyKVCache(), 20),
        Entry("triton on gpu, copying", ejk.TritonCopyKVCache(), 80),
    ]
else:
    ENTRIES = [
        Entry("xla", ejk.XlaPageAttention(), 10, batch_invariant=False),
        Entry("xla in small blocks", ejk.XlaPageAttention(block_kv=16), 4, batch_invariant=False),
        Entry("triton interpreted", ejk.TritonPageAttention(interpret=True), 8),
        Entry(
            "pallas interpreted", ejk.PallasPageAttention(interpret=True), 4, may_refuse=NO_FLOAT16
        ),
    ]
    RAGGED = [
        RaggedEntry("ragged xla", ejk.XlaRaggedPageAttention(), 6),
        RaggedEntry(
            "ragged xla in small blocks", ejk.XlaRaggedPageAttention(block_q=4, block_kv=16), 4
        ),
        RaggedEntry(
            "ragged triton interpreted",
            RAGGED_TRITON,
            8,
            decode=ejk.TritonPageAttention(block_kv=16, num_sms=6, interpret=True),
        ),
        RaggedEntry("ragged pallas interpreted", RAGGED_PALLAS, 4, may_refuse=NO_FLOAT16),
        ragged_mosaic("ragged mosaic_gpu interpreted", 2, num_sms=2, interpret=True),
    ]
    WRITERS = [
        Entry("xla, writing", ejk.XlaWriteKVCache(), 20),
        Entry("triton interpreted, writing", ejk.TritonWriteKVCache(interpret=True), 20),
        Entry(
            "pallas interpreted, writing", ejk.PallasWriteKVCache(interpret=True), 10,
            may_refuse=NO_FLOAT16,
        ),
    ]  # fmt: skip
    COPIERS = [
        Entry("xla, copying", ejk.XlaCopyKVCache(), 12),
        Entry("triton interpreted, copying", ejk.TritonCopyKVCache(interpret=True), 12),
        Entry(
            "pallas interpreted, copying", ejk.PallasCopyKVCache(interpret=True), 6,
            may_refuse=NO_FLOAT16,
        ),
    ]  # fmt: skip


def each_of(entries, of_slow=()):
    """Run a test of `entry` on each of these; a slow one's has the marks `of_slow`, too."""
    cases = [
        pytest.param(entry, marks=[*entry.marks, *(of_slow if entry.slow else ())], id=entry.name)
        for entry in entries
    ]
    return pytest.mark.parametrize("entry", cases)


def counted(body):
    """Count a test's example as passed, or as refused, by the entry it ran on."""

    @functools.wraps(body)
    def run(entry, *args, **kwargs):
        try:
            body(entry, *args, **kwargs)
        except Refusal:
            tally.refused[entry.name] += 1
        else:
            tally.passed[entry.name] += 1

    return run


def edge(body):
    """Make a test of a function of `entry` and fixtures: run on every backend, and counted."""
    return each_of(ENTRIES)(counted(body))


def ragged_edge(body):
    """The same on every backend of ragged batches."""
    return each_of(RAGGED, [pytest.mark.one_in(8)])(counted(body))


def writer_edge(body):
    """The same on every backend that writes."""
    return each_of(WRITERS)(counted(body))


def copier_edge(body):
    """The same on every backend that copies."""
    return each_of(COPIERS)(counted(body))


def each_case(strategy, share: float = 1.0, entries=ENTRIES):
    """Make a property of a function `(entry, case)`: run on every backend, and counted.

    Args:
        strategy: makes, of the `few` configurations to draw from, what draws the case, or a tuple
            that the property takes apart.
        share: of the entry's number of examples.
        entries: the backends to run it on.
    """

    def decorate(body):
        @each_of(entries, [pytest.mark.thorough] if share < 0.5 else ())
        def test(entry):
            run = counted(body)

            def holds(case):
                run(entry, case)

            least = 1 if entry.slow else 2
            examples = max(least, round(entry.examples * share * (20 if THOROUGH else 1)))
            seed = zlib.crc32(f"{body.__name__} {entry.name}".encode())
            # Properties and backends have different ones, and many calls of each.
            few = Few(seed, None if THOROUGH else 1 + examples // 3, entry.suits)
            prop = hypothesis.given(strategy(few=few))(holds)
            prop = hypothesis.settings(max_examples=examples)(prop)
            if not THOROUGH:
                prop = hypothesis.seed(seed)(prop)
            prop()

        test.__name__, test.__doc__ = body.__name__, body.__doc__
        return test

    return decorate
