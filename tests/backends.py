"""The one table of backends, and the decorators that run every property on each of its entries."""

import contextlib
import dataclasses
import functools
import os
import re
import zlib

import hypothesis
import jax
import numpy as np
import pytest
import tally
from strategies import THOROUGH, few_configurations

import ejk


class Refusal(Exception):  # noqa: N818
    """A backend refused a call for a reason that its entry allows."""


@dataclasses.dataclass(frozen=True)
class Entry:
    """One backend under test.

    Attributes:
        name: in test ids and in the summary.
        backend: what is passed as `backend=`.
        examples: drawn for a property that asks for its full share.
        invariant: for `num_splits >= 1` a sequence's bits depend on that sequence alone.
        may_refuse: regular expressions of the only reasons this backend may give for refusing.
    """

    name: str
    backend: ejk.Backend
    examples: int
    invariant: bool = True
    may_refuse: tuple[str, ...] = ()

    def __call__(self, case, **overrides):
        """Run a case; return the output and the LSE as NumPy arrays."""
        with self.refusing():
            keywords = {"num_splits": case.num_splits, **case.semantics(), **overrides}
            out, lse = ejk.page_attention(
                *case.arguments(), **keywords, return_lse=True, backend=self.backend
            )
        return np.asarray(out), np.asarray(lse)

    @contextlib.contextmanager
    def refusing(self):
        """Let a refusal pass only if every reason is one that the table allows."""
        try:
            yield
        except ejk.UnsupportedError as error:
            reasons = re.findall(rf"^  {self.backend.name}: (.*)$", str(error), re.MULTILINE)
            assert reasons, f"a refusal names the backend and a reason: {error}"
            for reason in reasons:
                if not any(re.search(allowed, reason) for allowed in self.may_refuse):
                    raise
            raise Refusal from error


@dataclasses.dataclass(frozen=True)
class Writer(Entry):
    """One backend of `ejk.write_kv_cache` under test."""

    def __call__(self, case):
        """Run a case; return the caches that there are as NumPy arrays."""
        with self.refusing():
            caches = ejk.write_kv_cache(
                *case.arguments(), cache_layout=case.cache_layout, backend=self.backend
            )
        return [np.asarray(cache) for cache in caches if cache is not None]


def entries() -> list[Entry]:
    if os.environ.get("EJK_TEST_GPU"):
        assert jax.default_backend() == "gpu", "the GPU tests were asked for, but there is no GPU"
        return [
            Entry("xla on gpu", ejk.XlaPageAttention(), examples=40, invariant=False),
            Entry("triton on gpu", ejk.TritonPageAttention(), examples=80),
        ]
    return [
        Entry("xla", ejk.XlaPageAttention(), examples=10, invariant=False),
        Entry(
            "xla in small blocks", ejk.XlaPageAttention(block_kv=16), examples=4, invariant=False
        ),
        Entry("triton interpreted", ejk.TritonPageAttention(interpret=True), examples=8),
        Entry(
            "pallas interpreted",
            ejk.PallasPageAttention(interpret=True),
            examples=4,
            may_refuse=(r"float16: the matrix unit takes float32 and bfloat16",),
        ),
    ]


def writers() -> list[Entry]:
    if os.environ.get("EJK_TEST_GPU"):
        return [
            Writer("xla on gpu, writing", ejk.XlaWriteKVCache(), examples=20),
            Writer("triton on gpu, writing", ejk.TritonWriteKVCache(), examples=80),
        ]
    return [
        Writer("xla, writing", ejk.XlaWriteKVCache(), examples=20),
        Writer("triton interpreted, writing", ejk.TritonWriteKVCache(interpret=True), examples=20),
        Writer(
            "pallas interpreted, writing",
            ejk.PallasWriteKVCache(interpret=True),
            examples=10,
            may_refuse=(r"float16: the chip takes float32 and bfloat16",),
        ),
    ]


ENTRIES = entries()
WRITERS = writers()

each_backend = pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)


def counted(body):
    """Count a test's example as passed, or as refused, by the entry it ran on."""

    @functools.wraps(body)
    def run(*args, entry, **kwargs):
        try:
            body(*args, entry=entry, **kwargs)
        except Refusal:
            tally.refused[entry.name] += 1
        else:
            tally.passed[entry.name] += 1

    return run


def edge(body):
    """Make a test of a function of `entry` and fixtures: run on every backend, and counted."""
    return each_backend(counted(body))


def writer_edge(body):
    """The same on every backend that writes."""
    return pytest.mark.parametrize("entry", WRITERS, ids=lambda entry: entry.name)(counted(body))


def each_case(strategy, share: float = 1.0, entries=ENTRIES):
    """Make a property of a function `(entry, case)`: run on every backend, and counted.

    Args:
        strategy: draws the case, or a tuple that the property takes apart.
        share: of the entry's number of examples.
        entries: the backends to run it on.
    """

    def decorate(body):
        @pytest.mark.parametrize("entry", entries, ids=lambda entry: entry.name)
        def test(entry):
            run = counted(body)

            def holds(case):
                run(entry=entry, case=case)

            examples = max(2, round(entry.examples * share * (20 if THOROUGH else 1)))
            prop = hypothesis.settings(max_examples=examples)(hypothesis.given(strategy)(holds))
            seed = zlib.crc32(f"{body.__name__} {entry.name}".encode())
            if not THOROUGH:
                prop = hypothesis.seed(seed)(prop)
            with few_configurations(seed, count=1 + examples // 3):
                prop()

        test.__name__, test.__doc__ = body.__name__, body.__doc__
        return test

    return decorate
