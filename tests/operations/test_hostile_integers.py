"""10,000 calls of hostile integers, over all operations: what `hostile` says holds of each."""

import pathlib
import re
import subprocess
import sys

import hostile
import jax.numpy as jnp
import numpy as np
import pytest
import tally
from gpu_interpreter import ON_GPU

import ejk

pytestmark = pytest.mark.slow


def test_10_000_calls():
    """In a process of its own: the import hook of the tests would take more time than the calls."""
    command = [sys.executable, pathlib.Path(hostile.__file__)]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-5000:]
    for calls, name in re.findall(r"^(\d+) calls of (.*)$", run.stdout, re.MULTILINE):
        tally.hostile[name] += int(calls)
    assert sum(n for name, n in tally.hostile.items() if name.endswith("on xla")) == 10_000
    assert {name.rpartition(" on ")[0] for name in tally.hostile} == set(hostile.FAMILIES)


class Clamped(ejk.XlaPageAttention):
    """Takes the nearest page where an entry names none."""

    def run(self, problem, operands, platform):
        tables = jnp.clip(operands.block_tables, 0, problem.num_pages - 1)
        return super().run(problem, operands._replace(block_tables=tables), platform)


class Peeking(ejk.XlaPageAttention):
    """Multiplies what it must not read by 0."""

    def run(self, problem, operands, platform):
        out, *lse = super().run(problem, operands, platform)
        return [out + 0 * operands.key_cache.sum(), *lse]


class Wraps:
    """Writes to the pool's end what is written nowhere."""

    def run(self, problem, operands, platform):
        slots = jnp.where(operands.slot_mapping < 0, problem.num_slots - 1, operands.slot_mapping)
        return super().run(problem, operands._replace(slot_mapping=slots), platform)


class Wrapped(Wraps, ejk.XlaWriteKVCache):
    pass


class WrappedInPallas(Wraps, ejk.PallasWriteKVCache):
    pass


@pytest.mark.parametrize(
    ("name", "backend"),
    [
        ("page_attention", Clamped()),
        ("page_attention", Peeking()),
        ("write_kv_cache", Wrapped()),
        pytest.param("write_kv_cache", WrappedInPallas(interpret=True), marks=pytest.mark.cpu),
    ],
)
def test_what_reaches_further_is_found(name, backend):
    with pytest.raises(AssertionError) as info:
        hostile.check(name, backend, 40)
    assert "hostile.check(" in info.value.__notes__[0]


def test_a_window_of_nothing_shows_nothing_wherever_positions_lie():
    rng = np.random.default_rng(0)
    query, pool = rng.standard_normal((5, 2, 8)), rng.standard_normal((4, 1, 4, 8))
    for backend in ("xla", ejk.TritonRaggedPageAttention(interpret=not ON_GPU)):
        out = ejk.ragged_page_attention(
            query.astype(np.float32), *[pool.astype(np.float32)] * 2, np.array([8, 7]),
            np.array([[0, 1], [0, 2]]), np.array([0, 3, 5]), positions=np.array([9, 0, 3, 1, 7]),
            sliding_window=jnp.int32(0), backend=backend,
        )  # fmt: skip
        assert not np.asarray(out).any()
