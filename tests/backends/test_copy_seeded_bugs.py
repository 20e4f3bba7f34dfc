"""Bugs put into the copies of XLA and Pallas, and into the gradient: each one is caught."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_copy_transformations as transformations
import tpu_interpreter
from entries import Entry

import ejk
import ejk._copy_kv_cache as public
import ejk.backends.copy_kv_cache as shared
import ejk.backends.reverse_mode.copy_kv_cache as reverse
import ejk.backends.xla._pools as xla_pools
import ejk.backends.xla.copy_kv_cache as xla
from ejk.backends.pallas.copy_kv_cache import call, kernel
from ejk.testing.configurations import F32, INT8
from ejk.testing.copy_kv_cache import SHAPES, CopyConfiguration, build, num_units


@dataclasses.dataclass(frozen=True)
class Mutant(ejk.XlaCopyKVCache):
    """A backend of its own to JAX: no compiled program of the sound one is reused."""

    bug: str = ""


@dataclasses.dataclass(frozen=True)
class PallasMutant(ejk.PallasCopyKVCache):
    bug: str = ""


def holds_forward(entry):
    for unit in ("slot", "page"):
        config = CopyConfiguration(SHAPES[1], unit, INT8, "HND", "token")
        last = num_units(config) - 1
        sources = np.array([1, 2, 3, 3, -1, 5, last, 2**32 + 1, 4])
        targets = np.array([0, 1, 2, 5, 5, 6, 3, 4, last + 1])
        for ends in ((sources, targets), (np.resize([0, 1, 2], 9), np.resize([last, 4], 9))):
            case = build(config, *ends, as_jax=False)
            case.check(entry(case))


places, last_writes, valid_targets = xla.places, xla.last_writes, xla.valid_targets


def each_place(problem, operands, change):
    at, to = places(problem, operands)
    return change(at, to)


def all_but_the_scales(problem, pools, platform):
    pools = [*pools]
    return *sound_placed(problem, pools[:1], platform), *(pool for pool, *_ in pools[1:])


def read_after_writes(problem, pools, platform):
    """One copy after the other, each reading what the one before has written."""
    results = []
    for pool, to, _rows in pools:
        for i in range(to.shape[0]):
            rows = xla_pools.gather(problem, pool, reading[-1][i : i + 1])
            pool = xla_pools.scatter(problem, pool, to[i : i + 1], rows)
        results.append(pool)
    return tuple(results)


sound_placed, sound_gather, reading = xla.placed, xla_pools.gather, []


def places_read(problem, operands):
    reading.append(places(problem, operands)[0])
    return places(problem, operands)


FORWARD = {
    "a source is read after it was overwritten": {
        (xla, "placed"): read_after_writes, (xla, "places"): places_read,
    },
    "the first of several stays": {
        (xla, "last_writes"): lambda targets, n: last_writes(targets[::-1], n)[::-1],
    },
    "a copy that does nothing overwrites": {
        (xla, "valid_targets"): lambda sources, targets, n: targets,
    },
    "scales are left behind": {(xla, "placed"): all_but_the_scales},
    "the last slot of a page is missing": {
        (xla_pools, "gather"): lambda problem, pool, at: (
            sound_gather(problem, pool, at)
            if problem.unit == "slot"
            else sound_gather(problem, pool, at).at[:, :, :, -1].set(0)
        ),
    },
    "sources and targets change places": {
        (xla, "places"): lambda *call: each_place(*call, lambda at, to: (to, at)),
    },
    "the unit past the end is the last": {
        (xla, "valid_targets"): lambda sources, targets, n: valid_targets(
            sources, jnp.minimum(targets, n - 1), n
        ),
    },
    "64-bit ids are narrowed first": {
        (public, "as_int32"): lambda x, bound: jnp.asarray(np.asarray(x).astype(np.int32)),
    },
}  # fmt: skip

BACKWARD = {
    "sources get nothing": {
        (reverse, "scatter"): lambda problem, pool, at, rows, adds=False: (
            pool if adds else xla_pools.scatter(problem, pool, at, rows)
        ),
    },
    "what was replaced has a gradient": {
        (reverse, "scatter"): lambda problem, pool, at, rows, adds=False: (
            xla_pools.scatter(problem, pool, at, rows, adds=True) if adds else pool
        ),
    },
    "of several that have one source one counts": {
        (reverse, "scatter"): lambda problem, pool, at, rows, adds=False: xla_pools.scatter(
            problem, pool, at, rows
        ),
    },
}  # fmt: skip


def put(bugs, monkeypatch):
    for (module, name), bug in bugs.items():
        monkeypatch.setattr(module, name, bug)


@pytest.mark.fault("copy_kv_cache", "xla")
@pytest.mark.fast(9)
@pytest.mark.parametrize("bug", FORWARD)
def test_bugs_of_copies_are_caught(bug, monkeypatch):
    put(FORWARD[bug], monkeypatch)
    with pytest.raises(AssertionError):
        holds_forward(Entry(bug, Mutant(bug=bug), examples=0))


@pytest.mark.fault("copy_kv_cache", "reverse_mode")
@pytest.mark.fast(9)
@pytest.mark.parametrize("bug", BACKWARD)
def test_bugs_of_the_gradient_are_caught(bug, monkeypatch):
    put(BACKWARD[bug], monkeypatch)
    entry = Entry(bug, Mutant(bug=f"sound copies: {bug}"), examples=0)
    with pytest.raises(AssertionError):
        transformations.test_gradients.__wrapped__(entry=entry, kind="split", unit="slot")


def test_the_sound_program_is_not_accused():
    entry = Entry("none", Mutant(bug="none"), examples=0)
    holds_forward(entry)
    transformations.test_gradients.__wrapped__(entry=entry, kind="split", unit="slot")


# Pallas: two blocks of pages, and conflicts across them.
def holds_on_a_tpu(bug=""):
    config = CopyConfiguration(SHAPES[1], "page", F32, "HND")
    ends = np.array([[1, 0, 3, 3, -1, 5], [0, 1, 2, 6, 4, 6]], np.int32)
    backend = PallasMutant(interpret=tpu_interpreter.params(), bug=bug)
    with tpu_interpreter.races_raise():
        case = build(config, *ends)
        pools = Entry(bug, backend, examples=0)(case)
    case.check(pools)


@pytest.fixture
def _small_blocks(monkeypatch):
    monkeypatch.setattr(call, "MAX_BLOCK_COPIES", 3)
    yield
    tpu_interpreter.reset()


def all_direct(*ends):
    return jnp.minimum(shared.routes(*ends), shared.DIRECT)


class Unwaited:
    """A copy that is begun and never waited for."""

    def __init__(self, copy):
        self.start = copy.start

    def wait(self):
        pass


MAKE_COPY = kernel.pltpu.make_async_copy
TPU = {
    "nothing is staged": (call, "routes", all_direct),
    "the first of several stays": (
        call, "routes", lambda sources, targets, n: shared.routes(
            sources[::-1], targets[::-1], n
        )[::-1],
    ),
    "copies are not waited for": (
        kernel.pltpu, "make_async_copy", lambda *refs: Unwaited(MAKE_COPY(*refs)),
    ),
    "what was staged is not taken": (kernel, "STAGED", 2),
}  # fmt: skip


@pytest.mark.fault("copy_kv_cache", "pallas")
@pytest.mark.fast(20)
@pytest.mark.usefixtures("_small_blocks")
@pytest.mark.parametrize("bug", TPU)
def test_a_seeded_fault_is_caught(bug, monkeypatch):
    monkeypatch.setattr(*TPU[bug])
    with pytest.raises((AssertionError, RuntimeError, tpu_interpreter.RaceError)):
        holds_on_a_tpu(bug)


@pytest.mark.usefixtures("_small_blocks")
def test_the_sound_kernel_passes_where_faults_are_caught():
    holds_on_a_tpu()


def test_routes_are_those_of_the_definition():
    rng = np.random.default_rng(0)
    for units in (3, 9, 60):
        sources, targets = rng.integers(-2, units + 2, (2, 17)).astype(np.int32)
        found = np.asarray(jax.jit(shared.routes, static_argnums=2)(sources, targets, units))
        inside = [0 <= s < units and 0 <= t < units for s, t in zip(sources, targets)]
        written = {t for t, does in zip(targets, inside) if does}
        for i, (source, target) in enumerate(zip(sources, targets)):
            is_last = inside[i] and not any(
                does and t == target for t, does in zip(targets[i + 1 :], inside[i + 1 :])
            )
            does = is_last and source != target
            expected = (shared.STAGED if source in written else shared.DIRECT) if does else -1
            assert found[i] == expected
