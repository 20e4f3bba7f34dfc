"""The TPU write, interpreted: no race, no stray access, no copy that was not waited for."""

import dataclasses

import jax
import ml_dtypes
import numpy as np
import pytest
import tpu_interpreter

import ejk
from ejk.backends.pallas.write_kv_cache import call as caller
from ejk.backends.pallas.write_kv_cache import kernel, sizes
from ejk.testing.configurations import LAYOUTS
from ejk.testing.write_kv_cache import WriteShape, assert_written, build

F32, BF16 = np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16)
SHAPE = WriteShape("two windows a page", 0, 2, 32, 16, page_size=32, num_pages=5)
FUSED = WriteShape("fused", 0, 2, 32, None, page_size=32, num_pages=5)

SLOTS = {
    "one window": (5, 3, 4, 15, 0),
    "windows of one page": (5, 17, 31, 16, 0),
    "a prompt over several windows and blocks": tuple(range(40, 79)),
    "a prompt backwards": tuple(range(78, 39, -1)),
    "several tokens to a slot": (7, 7, 40, 7, 40, 100, 99, 100, 7),
    "nobody writes": (-1, -1, 160, 2**31 - 1, -(2**31)),
    "some write": (-1, 159, 160, 3, -7, 4, 2**31 - 1, 3, 158),
    "one token": (77,),
}


@pytest.fixture(autouse=True)
def _fresh_interpreter(monkeypatch):
    monkeypatch.setattr(sizes, "MAX_BLOCK_TOKENS", 4)  # several blocks to a call
    yield
    tpu_interpreter.reset()


@dataclasses.dataclass(frozen=True)
class Mutant(ejk.PallasWriteKVCache):
    """A backend of its own to JAX: no compiled program of the sound one is reused."""

    bug: str = ""


def check(case, dma_execution_mode="on_wait", bug=""):
    backend = Mutant(interpret=tpu_interpreter.params(dma_execution_mode), bug=bug)
    write = jax.jit(ejk.write_kv_cache, static_argnames=("cache_layout", "backend"))
    with tpu_interpreter.races_raise():
        caches = write(*case.arguments(), **case.keywords(), backend=backend)
        caches = [np.asarray(x) for x in caches if x is not None]
    assert_written(case, caches)


def case_of(slots, layout="HND", dtype=BF16, shape=SHAPE):
    return build(shape, dtype, layout, np.array(slots, np.int32))


@pytest.mark.parametrize("dma_execution_mode", ["on_wait", "eager"])
@pytest.mark.parametrize("slots", SLOTS.values(), ids=SLOTS)
def test_slots(slots, dma_execution_mode):
    check(case_of(slots), dma_execution_mode)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("shape", [SHAPE, FUSED], ids=lambda shape: shape.name)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, shape, dtype):
    check(case_of(SLOTS["some write"], layout, dtype, shape))


@pytest.mark.parametrize("page_size", [1, 3, 8, 24, 48])
def test_pages_that_are_no_whole_tiles(page_size):
    shape = WriteShape("", 0, 2, 32, 16, page_size=page_size, num_pages=5)
    check(
        case_of((0, 2 * page_size, 2 * page_size, page_size - 1, 5 * page_size - 1, 1), shape=shape)
    )


class Unwaited:
    """A copy that is begun and never waited for."""

    def __init__(self, copy):
        self.start = copy.start

    def wait(self):
        pass


READ, WRITE, CHANGE = kernel.Half.read, kernel.Half.write, kernel.Half.change
FAULTS = {
    "reads are not waited for": (kernel.Half, "read", lambda *args: Unwaited(READ(*args))),
    "writes are not waited for": (kernel.Half, "write", lambda *args: Unwaited(WRITE(*args))),
    "windows are not read": (
        kernel.Half, "read", lambda half, i, slot, sem: WRITE(half, i, slot, sem),
    ),
    "one slot on": (
        kernel.Half, "write", lambda half, i, slot, sem: WRITE(half, i, slot ^ 16, sem),
    ),
    "rows are put one slot on": (
        kernel.Half, "change", lambda half, i, to, slot: CHANGE(half, i, to, slot ^ 1),
    ),
    "a window has its first token's rows": (
        kernel.Half, "change", lambda half, i, to, slot: CHANGE(half, to, to, slot),
    ),
    "the first of several stays": (
        caller, "by_slot", lambda slots, n: _first_stays(*SOUND_BY_SLOT(slots[::-1], n)),
    ),
    "slots outside the pool are written": (
        caller, "by_slot", lambda slots, n: SOUND_BY_SLOT(slots, 2**31 - 1),
    ),
}  # fmt: skip
SOUND_BY_SLOT = caller.by_slot


def _first_stays(slots, order):
    return slots, order.max() - order


def case_that_shows_faults():
    return case_of((*SLOTS["several tokens to a slot"], 161, 5, 6, 8, 9, 10))


@pytest.mark.parametrize("dma_execution_mode", ["on_wait", "eager"])
def test_the_sound_kernel_passes_where_faults_are_caught(dma_execution_mode):
    check(case_that_shows_faults(), dma_execution_mode)


@pytest.mark.fault("write_kv_cache", "pallas")
@pytest.mark.fast(20)
@pytest.mark.parametrize("dma_execution_mode", ["on_wait", "eager"])
@pytest.mark.parametrize("bug", FAULTS)
def test_a_seeded_fault_is_caught(bug, dma_execution_mode, monkeypatch):
    monkeypatch.setattr(*FAULTS[bug])
    with pytest.raises((AssertionError, IndexError, RuntimeError, tpu_interpreter.RaceError)):
        check(case_that_shows_faults(), dma_execution_mode, bug)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("shape", [SHAPE, FUSED], ids=lambda shape: shape.name)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("cache", ["int8", "float8_e4m3fn"])
def test_scales_of_tokens(cache, layout, shape):
    check(quantised_case(cache, layout, shape))


def quantised_case(cache="int8", layout="HND", shape=SHAPE):
    """Two tokens in one window, two in one page, and untouched codes of every bit."""
    slots = np.array((-1, 100, 37, 3, -7, 4, 2**31 - 1, 3, 98, 5, 36, 101), np.int32)
    dtype = np.dtype(getattr(ml_dtypes, cache, cache))
    return build(shape, BF16, layout, slots, cache_dtype=dtype, scales="token")


SCALE_CHANGE = kernel.ScaleHalf.change
SCALE_FAULTS = {
    "scales are put one slot on": (
        kernel.ScaleHalf, "change", lambda half, i, to, slot: SCALE_CHANGE(half, i, to, slot ^ 1),
    ),
    "a page has its first token's scales": (
        kernel.ScaleHalf, "change", lambda half, i, to, slot: SCALE_CHANGE(half, to, to, slot),
    ),
    "scales are not written": (kernel.ScaleHalf, "change", lambda *_: None),
    "scales are those of other tokens": (
        caller, "stored", lambda problem, x, scale: _turned(*STORED(problem, x, scale)),
    ),
}  # fmt: skip
STORED = caller.stored


def _turned(codes, scales):
    return codes, scales[::-1]


@pytest.mark.fault("write_kv_cache", "pallas")
@pytest.mark.fast(20)
@pytest.mark.parametrize("bug", SCALE_FAULTS)
def test_a_seeded_fault_of_scales_is_caught(bug, monkeypatch):
    monkeypatch.setattr(*SCALE_FAULTS[bug])
    with pytest.raises((AssertionError, tpu_interpreter.RaceError)):
        check(quantised_case(), bug=bug)
