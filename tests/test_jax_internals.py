"""JAX still has what `ejk._jax` uses of its internals; what it would miss in silence raises."""

import dataclasses
import re

import jax
import numpy as np
import pytest
from jax.interpreters import mlir

import ejk
from ejk import _jax

pytestmark = pytest.mark.fast

POOL = np.ones((8, 2, 16, 128), np.float32)
ARGS = (np.ones((2, 4, 128), np.float32), POOL, POOL,
        np.array([20, 1], np.int32), np.array([[3, 5], [1, 0]], np.int32))  # fmt: skip
SAYS_VERSION = f"^jax {re.escape(jax.__version__)} has "


@dataclasses.dataclass
class Renamed:
    """An axis context whose attributes have other names."""

    assignment: tuple = (0, 1)
    manual: frozenset = frozenset({"x"})


def lower():
    jax.jit(lambda *args: ejk.page_attention(*args)).lower(*ARGS)


@pytest.fixture
def ctx(monkeypatch):
    """The context of a lowering whose axis context is `Renamed`."""
    seen = []
    is_partitioned = _jax.is_partitioned
    with monkeypatch.context() as patch:
        patch.setattr(_jax, "is_partitioned", lambda ctx: seen.append(ctx) or is_partitioned(ctx))
        lower()
    module = seen[0].module_context.replace(axis_context=Renamed())
    return seen[0].replace(module_context=module)


@pytest.mark.parametrize("name", ["is_partitioned", "axes_left_to_xla"])
def test_an_unknown_axis_context_is_no_answer(name, ctx):
    with pytest.raises(RuntimeError, match=SAYS_VERSION + "an axis context Renamed"):
        getattr(_jax, name)(ctx)


@pytest.mark.parametrize(
    "name, kind, lacks",
    [
        ("is_partitioned", "ShardingContext", "device_assignment"),
        ("axes_left_to_xla", "SPMDAxisContext", "manual_axes"),
    ],
)
def test_a_renamed_attribute_is_no_answer(name, kind, lacks, ctx, monkeypatch):
    monkeypatch.setattr(mlir, kind, Renamed)
    with pytest.raises(RuntimeError, match=SAYS_VERSION + f"no Renamed.{lacks}"):
        getattr(_jax, name)(ctx)


def test_a_call_raises_where_its_devices_are_unknown(monkeypatch):
    lower()
    monkeypatch.setattr(mlir, "ShardingContext", Renamed)
    with pytest.raises(RuntimeError, match=SAYS_VERSION + "an axis context ShardingContext"):
        lower()
