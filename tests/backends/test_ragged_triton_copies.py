"""Prefills on Triton over copies of a quantised cache: poison, hidden pages, what is not copied."""

import dataclasses

import ml_dtypes
import numpy as np
import pytest
from entries import RaggedEntry

import ejk
from ejk.backends.triton.ragged_page_attention import backend, widening
from ejk.testing.bounds import assert_close
from ejk.testing.configurations import E4M3, INT4, INT8, Configuration
from ejk.testing.ragged_page_attention import build_ragged
from ejk.testing.shapes import Shape

BF16, F16 = np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16)
ATTEND = RaggedEntry("triton", ejk.TritonRaggedPageAttention(interpret=True), examples=0)
SHAPE = Shape("groups of 4", 8, 2, 64, page_size=16, max_blocks=10, num_pages=50, num_seqs=4)
LENS, BOUNDS, TOTAL = np.array((150, 60, 0, 7)), np.array((1, 34, 35, 35, 38)), 39
CACHE_FIELDS = "dtype, cache, scales, layout, fused, features"
COPIED = {
    "int8, fused": (BF16, INT8, "token", "HND", True, ()),
    "int4": (BF16, INT4, "token", "INTERLEAVED", False, ()),
    "a window": (BF16, E4M3, "head", "NHD", False, ("sliding_window",)),
    "heads first, options": (
        F16, INT8, "token", "KV_HEADS_FIRST", False, ("sliding_window", "alibi_slopes"),
    ),
    "no scales": (F16, E4M3, "none", "HND", True, ("positions",)),
}  # fmt: skip
IN_PLACE = {
    "few rows": ({}, 512),
    "queries of 32 bits": ({"dtype": np.dtype(np.float32)}, 4),
    "a window from positions": ({"features": frozenset({"sliding_window", "positions"})}, 4),
}


@pytest.fixture
def copies(monkeypatch):
    """Count copies, which are made for few rows here."""
    made = []

    def widened(*args):
        made.append(args)
        return sound(*args)

    sound = backend.widened
    monkeypatch.setattr(backend, "widened", widened)
    monkeypatch.setattr(widening, "FEW_ROWS_OF_COPIES", 4)
    return made


def check(config):
    case = build_ragged(config, LENS, BOUNDS, total=TOTAL, invalid=0.05, seed=2)
    assert_close(case, *ATTEND(case))


@pytest.mark.fast(2)
@pytest.mark.parametrize(CACHE_FIELDS, COPIED.values(), ids=COPIED)
def test_pages_are_copied(dtype, cache, scales, layout, fused, features, copies):
    check(
        Configuration(
            SHAPE, dtype, layout, frozenset(features), fused=fused, cache_dtype=cache, scales=scales
        )
    )
    assert len(copies) == 1


def test_rows_that_words_do_not_fit_are_copied(copies):
    shape = dataclasses.replace(SHAPE, head_dim=5, value_head_dim=3)
    check(Configuration(shape, BF16, "NHD", cache_dtype=INT8, scales="token"))
    assert len(copies) == 1


@pytest.mark.fast(1)
@pytest.mark.parametrize("fields, few", IN_PLACE.values(), ids=IN_PLACE)
def test_pages_are_read_in_place(fields, few, copies, monkeypatch):
    monkeypatch.setattr(widening, "FEW_ROWS_OF_COPIES", few)
    fields = {"dtype": BF16, "features": frozenset()} | fields
    check(Configuration(SHAPE, cache_layout="HND", cache_dtype=INT8, scales="token", **fields))
    assert not copies
