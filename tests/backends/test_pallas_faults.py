"""Faults put into the TPU kernel one at a time: the interpreter, poison or the oracle catch each.

In blocks that are computed alone and in rounds of two, whichever way copies are carried out.
"""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest
import tpu_interpreter
from test_pallas_interpret import F32, SHAPE

from ejk.backends.pallas import _paging as paging
from ejk.backends.pallas.page_attention import kernel
from ejk.testing.bounds import assert_close
from ejk.testing.configurations import Configuration
from ejk.testing.page_attention import build

page_or_harmless, entries, is_first, first_block, visible, first_place, heads_of = (
    paging.page_or_harmless, paging.Paging.entries, paging.Paging.is_first,
    paging.Paging.first_block, paging.Paging.visible, paging.Paging.first_place, kernel.heads_of,
)  # fmt: skip


def without_waiting(self, slot, whole):
    pass


def same_slot(slot):
    return slot


def unmasked_values(values, *_):
    return values


def unmasked_logits(s, *_):
    return s


def one_page_on(entry, num_pages):
    page, bad = page_or_harmless(entry, num_pages)
    return (page + 1) % num_pages, bad


def out_of_the_pool(entry, num_pages):
    return entry, entry != entry


def every_entry_good(entry, num_pages):
    page, bad = page_or_harmless(entry, num_pages)
    return page, bad & False


def entries_of_another_sequence(self, item, base, left):
    entry, count = entries(self, item, base, left)
    return entry ^ SHAPE.max_blocks, count


def never_first(self, block):
    return is_first(self, block) & False


def one_sequence_on(self, item):
    return first_block(self, item)._replace(item=item + 1)


def last_token_hidden(self, block):
    begin, end = visible(self, block)
    return begin, end - 1


def window_one_too_long(self, item, end):
    return jnp.maximum(first_place(self, item, end) - 1, 0)


def heads_in_reverse(*args):
    yield from reversed(list(heads_of(*args)))


FAULTS = {
    "no wait": (paging.Paging, "wait", without_waiting),
    "copies into the slot that is read": (kernel, "other_slot", same_slot),
    "values unmasked": (kernel, "hide_values", unmasked_values),
    "logits unmasked": (kernel, "hide_logits", unmasked_logits),
    "one page on": (paging, "page_or_harmless", one_page_on),
    "out of the pool": (paging, "page_or_harmless", out_of_the_pool),
    "bad entries taken for good ones": (paging, "page_or_harmless", every_entry_good),
    "another sequence's pages": (paging.Paging, "entries", entries_of_another_sequence),
    "the sequence before goes on": (paging.Paging, "is_first", never_first),
    "the next sequence's first block": (paging.Paging, "first_block", one_sequence_on),
    "the last token is hidden": (paging.Paging, "visible", last_token_hidden),
    "the window is one too long": (paging.Paging, "first_place", window_one_too_long),
    "heads in reverse": (kernel, "heads_of", heads_in_reverse),
}


def check(blocks_per_round, dma_execution_mode, fused, **fields):
    config = Configuration(SHAPE, F32, "HND", frozenset({"sliding_window"}), fused=fused)
    lengths = np.array((32, 9, 21), np.int32)
    case = build(config, lengths, window=np.asarray(18), invalid=0.2, seed=1)
    needed = case.block_tables[case.needed]
    assert ((needed < 0) | (needed >= SHAPE.num_pages)).any()
    backend = tpu_interpreter.backend(
        dma_execution_mode, blocks_per_round=blocks_per_round, **fields
    )
    assert_close(case, *tpu_interpreter.run(case, backend))


# Blocks in a round, the way of copies, fused pools: fused ones have all that split ones have.
WAYS = [*itertools.product((1, 2), ("on_wait", "eager"), (True, False))]
thorough = pytest.mark.thorough
pytestmark = pytest.mark.timeout(60)


@pytest.fixture(autouse=True)
def _fresh_interpreter():
    yield
    tpu_interpreter.reset()


@pytest.mark.parametrize(
    "way", [w if w[2] else pytest.param(w, marks=thorough) for w in WAYS], ids=str
)
def test_the_sound_kernel_is_not_accused(way):
    check(*way)


@pytest.mark.fault("page_attention", "pallas")
# Each in one way, and each way its share of them; a thorough run takes all.
@pytest.mark.fast(6)
@pytest.mark.parametrize(
    ("bug", "way"),
    [
        pytest.param(bug, way, marks=() if way == WAYS[2 * i % len(WAYS)] else thorough)
        for i, bug in enumerate(FAULTS)
        for way in WAYS
    ],
    ids=str,
)
def test_a_fault_is_caught(bug, way, monkeypatch):
    monkeypatch.setattr(*FAULTS[bug])
    # A field of its own, so that no program of the sound kernel is used again.
    number = 2**28 + list(FAULTS).index(bug)
    with pytest.raises((AssertionError, IndexError, RuntimeError, tpu_interpreter.RaceError)):
        check(*way, vmem_limit_bytes=number)
