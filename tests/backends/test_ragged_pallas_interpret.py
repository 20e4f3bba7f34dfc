"""The ragged TPU kernel, interpreted: no race, no stray read, and faults put in are caught."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tpu_interpreter
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from test_pallas_interpret import BF16, F32, SHAPE

import ejk
from ejk.backends.pallas import _paging as paging
from ejk.backends.pallas.ragged_page_attention import kernel
from ejk.testing.bounds import assert_close
from ejk.testing.configurations import FEATURES, Configuration
from ejk.testing.ragged_page_attention import EXTRAS, build_ragged

ALL = frozenset(FEATURES)
STATIC = ("cache_layout", "attn_logits_soft_cap", "value_head_dim", "return_lse", "backend")
thorough = pytest.mark.thorough

BATCHES = {
    "mixed": ((32, 7, 19), (0, 9, 10, 13)),
    "nothing but padding": ((32, 7, 19), (4, 4, 4, 4)),
    "the last is empty": ((17, 25, 0), (0, 6, 13, 13)),
    "more new tokens than tokens": ((3, 32, 9), (1, 7, 9, 12)),
}


@pytest.fixture(autouse=True)
def _fresh_interpreter():
    yield
    tpu_interpreter.reset()


def check(case, dma_execution_mode="on_wait", cores=1, **fields):
    interpret = tpu_interpreter.params(dma_execution_mode, num_cores_or_threads=cores)
    fields = dict(block_q=3, pages_per_block=2, interpret=interpret) | fields
    call = jax.jit(ejk.ragged_page_attention, static_argnames=STATIC)
    backend = ejk.PallasRaggedPageAttention(**fields)
    with tpu_interpreter.races_raise():
        out, lse = call(*case.arguments(), **case.semantics(), return_lse=True, backend=backend)
        out, lse = np.asarray(out), np.asarray(lse)
    assert_close(case, out, lse)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("dma_execution_mode", ["on_wait", "eager"])
@pytest.mark.parametrize("name", BATCHES)
def test_batches(name, dma_execution_mode):
    lens, bounds = (np.array(x, np.int32) for x in BATCHES[name])
    check(build_ragged(Configuration(SHAPE, F32, "HND"), lens, bounds), dma_execution_mode)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("dma_execution_mode", ["on_wait", "eager"])
@pytest.mark.parametrize("layout", ["HND", pytest.param("NHD", marks=thorough)])
def test_everything_at_once(layout, dma_execution_mode):
    config = Configuration(SHAPE, BF16, layout, ALL, fused=True)
    lens, bounds = (np.array(x, np.int32) for x in BATCHES["mixed"])
    case = build_ragged(config, lens, bounds, window=np.asarray(11), invalid=0.2, seed=2)
    check(case, dma_execution_mode)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("fitting", [2, pytest.param(1, marks=thorough)])
def test_tables_that_do_not_fit_in_scalar_memory_are_run_in_parts(fitting, monkeypatch):
    monkeypatch.setattr(ejk.PallasRaggedPageAttention, "_seqs_per_launch", lambda *_: fitting)
    lens, bounds = (np.array(x, np.int32) for x in BATCHES["mixed"])
    config = Configuration(SHAPE, F32, "HND", ALL)
    case = build_ragged(config, lens, bounds, window=np.asarray(11), extras=EXTRAS)
    check(case, vmem_limit_bytes=2**26 + fitting)


@pytest.mark.parametrize("first", [-700, -1, 0, 1, 127, 128, 300, 512])
def test_lanes_are_taken_from_anywhere(first):
    x = np.arange(8 * 384, dtype=np.float32).reshape(8, 384)

    def body(x_ref, out_ref):
        out_ref[...] = kernel.from_lane(x_ref[...], jnp.int32(first), 256)

    shape = jax.ShapeDtypeStruct((8, 256), jnp.float32)
    lanes = pl.pallas_call(body, out_shape=shape, interpret=pltpu.InterpretParams())(x)
    np.testing.assert_array_equal(lanes, np.roll(x, -first, axis=1)[:, :256])


def without_waiting(self, slot, whole):
    pass


def entries_of_another_sequence(self, item, base, left):
    entry, count = entries(self, item, base, left)
    return entry ^ SHAPE.max_blocks, count


def never_masked(self, cursor):
    return has_ends(self, cursor) & (cursor.left < 0)


def one_token_on(work):
    return tokens_of_rows(work) + 1


def one_lane_on(x, first, width):
    return from_lane(x, first + 1, width)


def every_entry_good(entry, num_pages):
    page, bad = page_or_harmless(entry, num_pages)
    return page, bad & False


def heads_in_reverse(*args):
    yield from reversed(list(heads_of(*args)))


def one_place_on(self, item, end):
    return first_place(self, item, end) + 1


Paging = paging.Paging
entries, has_ends, first_place = Paging.entries, Paging.has_ends, Paging.first_place
tokens_of_rows, from_lane, heads_of = kernel.tokens_of_rows, kernel.from_lane, kernel.heads_of
page_or_harmless = paging.page_or_harmless

FAULTS = {
    "no wait": (Paging, "wait", without_waiting),
    "copies into the slot that is read": (kernel, "other_slot", lambda slot: slot),
    "values unmasked": (kernel, "seen_by_some", lambda *_: jnp.bool_(True)),
    "logits unmasked": (kernel, "hide_logits", lambda s, _: s),
    "another sequence's pages": (Paging, "entries", entries_of_another_sequence),
    "no block is masked": (Paging, "has_ends", never_masked),
    "tokens see those after them": (kernel, "tokens_of_rows", one_token_on),
    "columns of new tokens are off by one": (kernel, "from_lane", one_lane_on),
    "bad entries taken for good ones": (paging, "page_or_harmless", every_entry_good),
    "heads in reverse": (kernel, "heads_of", heads_in_reverse),
    "items begin one place on": (Paging, "first_place", one_place_on),
}


def faulty(dma_execution_mode, extras=(), **fields):
    config = Configuration(SHAPE, F32, "HND", frozenset({"sliding_window"}), fused=True)
    lens, bounds = (np.array(x, np.int32) for x in BATCHES["mixed"])
    case = build_ragged(
        config, lens, bounds, window=np.asarray(25), invalid=0.2, seed=1, extras=extras
    )
    needed = case.block_tables[case.needed]
    assert ((needed < 0) | (needed >= SHAPE.num_pages)).any()
    check(case, dma_execution_mode, **fields)


modes = pytest.mark.parametrize(
    "dma_execution_mode", ["on_wait", pytest.param("eager", marks=thorough)]
)


@pytest.mark.timeout(60)
@modes
@pytest.mark.parametrize("extras", [(), EXTRAS], ids=["plain", "tree"])
def test_the_sound_kernel_is_not_accused(extras, dma_execution_mode):
    faulty(dma_execution_mode, extras)


@pytest.mark.fault("ragged_page_attention", "pallas")
@pytest.mark.fast(20)
@pytest.mark.timeout(60)
@modes
@pytest.mark.parametrize("bug", FAULTS)
def test_a_fault_is_caught(bug, dma_execution_mode, monkeypatch):
    monkeypatch.setattr(*FAULTS[bug])
    # A field of its own, so that no program of the sound kernel is used again.
    number = 2**28 + list(FAULTS).index(bug)
    with pytest.raises((AssertionError, IndexError, RuntimeError, tpu_interpreter.RaceError)):
        faulty(dma_execution_mode, EXTRAS if "columns" in bug else (), vmem_limit_bytes=number)
