"""Bugs put into the XLA write and its gradient one at a time: the properties catch each of them."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
import test_write_transformations as transformations
from entries import Entry

import ejk
import ejk._write_kv_cache as public
import ejk.backends.reverse_mode.write_kv_cache as reverse
import ejk.backends.xla.write_kv_cache as xla
from ejk.testing.write_kv_cache import SHAPES, assert_written, build

F32 = np.dtype(np.float32)


@dataclasses.dataclass(frozen=True)
class Mutant(ejk.XlaWriteKVCache):
    bug: str = ""


def mutant(bug: str) -> Entry:
    return Entry(bug, Mutant(bug=bug), examples=0)


def holds_forward(entry):
    rng = np.random.default_rng(0)
    for shape in SHAPES:
        for layout in ("HND", "NHD", "KV_HEADS_FIRST"):
            few = rng.integers(0, min(9, shape.num_slots), shape.num_tokens)
            far = rng.choice([-1, -shape.num_slots, shape.num_slots, 2**32 + 1], shape.num_tokens)
            slots = np.where(rng.random(shape.num_tokens) < 0.3, far, few)
            case = build(shape, F32, layout, slots, as_jax=False)
            assert_written(case, entry(case))


def holds_backward(entry):
    for kind in ("split", "fused"):
        transformations.test_gradients.__wrapped__(entry=entry, kind=kind, layout="HND")


last_writes, places, gather, pools_and_rows = (
    xla.last_writes, xla.places, reverse.gather, xla._pools_and_rows
)  # fmt: skip


def places_of_all(problem, slots):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(xla, "last_writes", lambda slots, n: (slots >= 0) & (slots < n))
        return places(problem, slots)


def first_writes(slots, num_slots):
    return last_writes(slots[::-1], num_slots)[::-1]


def lonely_writes(slots, num_slots):
    return first_writes(slots, num_slots) & last_writes(slots, num_slots)


def slots_changed(change):
    return lambda problem, slots: places(problem, change(slots, problem.num_slots))


def values_first(problem, operands):
    if not problem.fused:
        return pools_and_rows(problem, operands)
    return pools_and_rows(problem, operands._replace(key=operands.value, value=operands.key))


def every_second_writes(slots, num_slots):
    return last_writes(slots, num_slots) & (jnp.arange(slots.shape[0]) % 2 == 0)


def one_slot_on(problem, slots):
    return places(problem, slots).at[:, 1].add(1)


FORWARD = {
    "the first of several stays": (xla, "last_writes", first_writes),
    "of several none stays": (xla, "last_writes", lonely_writes),
    "every second token writes": (xla, "last_writes", every_second_writes),
    "page and offset change places": (
        xla, "places", lambda problem, slots: places(problem, slots)[:, ::-1],
    ),
    "slots wrap": (xla, "places", slots_changed(lambda slots, n: slots % n)),
    "slots are clamped": (xla, "places", slots_changed(lambda slots, n: slots.clip(0, n - 1))),
    "slots past the end go to the last": (
        xla, "places", slots_changed(lambda slots, n: jnp.minimum(slots, n - 1)),
    ),
    "values come first": (xla, "_pools_and_rows", values_first),
    "one slot on": (xla, "places", one_slot_on),
    "64-bit slots are narrowed first": (
        public, "as_int32", lambda x, bound: jnp.asarray(np.asarray(x).astype(np.int32)),
    ),
}  # fmt: skip


def other_half(problem, pool, to):
    rows = gather(problem, pool, to)
    return jnp.flip(rows, reverse.halves_axis(problem)) if problem.fused else rows


BACKWARD = {
    "what was overwritten has a gradient": ("places", places_of_all),
    "what was replaced has a gradient": ("scatter", lambda problem, pool, to, rows: pool),
    "rows have their neighbours' gradient": ("places", one_slot_on),
    "keys have the values' gradient": ("gather", other_half),
}


@pytest.mark.fault("write_kv_cache", "xla")
@pytest.mark.fast(9)
@pytest.mark.parametrize("bug", FORWARD)
def test_bugs_of_the_write_are_caught(bug, monkeypatch):
    monkeypatch.setattr(*FORWARD[bug])
    with pytest.raises(AssertionError):
        holds_forward(mutant(bug))


@pytest.mark.fault("write_kv_cache", "reverse_mode")
@pytest.mark.fast(9)
@pytest.mark.parametrize("bug", BACKWARD)
def test_bugs_of_the_gradient_are_caught(bug, monkeypatch):
    monkeypatch.setattr(reverse, *BACKWARD[bug])
    with pytest.raises(AssertionError):
        holds_backward(mutant(f"sound write: {bug}"))


def test_the_sound_backend_is_not_accused():
    holds_forward(mutant("none"))
    holds_backward(mutant("none"))
