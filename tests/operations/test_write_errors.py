"""What `wrong_calls` does not hold of `ejk.write_kv_cache`: third parties, and what is returned."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from wrong_calls import fused, zeros
from wrong_calls import write as arguments

import ejk

pytestmark = pytest.mark.fast


def test_the_right_calls_are_right():
    """Or the tables above would prove nothing."""
    key_cache, value_cache = ejk.write_kv_cache(**arguments())
    assert key_cache.shape == value_cache.shape == (8, 2, 16, 64)
    key_cache, value_cache = ejk.write_kv_cache(**fused(8, 2, 2, 16, 64))
    assert key_cache.shape == (8, 2, 2, 16, 64) and value_cache is None
    key_cache, value_cache = ejk.write_kv_cache(**arguments(value=None, value_cache=None))
    assert key_cache.shape == (8, 2, 16, 64) and value_cache is None


def test_the_layout_is_by_keyword_only():
    with pytest.raises(TypeError, match="by position, not 6 arguments; by keyword: cache_layout"):
        ejk.write_kv_cache(*arguments().values(), "HND")


@dataclasses.dataclass(frozen=True)
class Threes(ejk.WriteKVCacheBackend):
    """A third party's: everything is 3."""

    name = "threes"
    features = frozenset({'cache_layout="HND"'})
    platforms = ("cpu",)

    def limits(self, problem, platform):
        return () if problem.num_tokens == 3 else (f"num_tokens={problem.num_tokens} is not 3",)

    def run(self, problem, operands, platform):
        return [jnp.full(x.shape, 3, x.dtype) for x in problem.results]


def test_a_third_party_runs_what_it_declares_and_is_refused_the_rest(restored_registry):
    key_cache, value_cache = ejk.write_kv_cache(**arguments(), backend=Threes())
    assert (key_cache == 3).all() and (value_cache == 3).all()
    with pytest.raises(ejk.UnsupportedError) as info:
        ejk.write_kv_cache(**fused(8, 2, 2, 16, 64), backend=Threes())
    assert str(info.value).splitlines() == [
        "no backend that was asked for can run this write_kv_cache call:",
        "  threes: does not support fused_pools",
    ]
    ejk.register_backend(Threes())
    two = arguments(rows=zeros(2, 2, 64), slot_mapping=zeros(2, dtype=np.int32))
    for call, chosen in ((arguments(), "threes"), (two, "xla")):
        report = ejk.backend_report(**call, operation=ejk.write_kv_cache, platform="cpu")
        assert report.chosen == chosen
    assert report.refusals["threes"] == ("num_tokens=2 is not 3",)


def test_a_backend_of_another_operation_is_refused():
    with pytest.raises(
        ejk.UnsupportedError,
        match="xla: is a backend of page_attention, not of write_kv_cache",
    ):
        ejk.write_kv_cache(**arguments(), backend=ejk.XlaPageAttention())


def test_the_report_of_a_call_without_tokens():
    none = arguments(rows=zeros(0, 2, 64), slot_mapping=zeros(0, dtype=np.int32))
    report = ejk.backend_report(**none, operation=ejk.write_kv_cache, platform="cpu")
    assert report.chosen is None and "without a backend" in str(report)


@pytest.mark.fast
@pytest.mark.parametrize("name", ["key_scale", "value_scale"])
def test_a_scale_of_zero_is_refused(name):
    rows, pool = np.ones((1, 2, 16), np.float32), np.zeros((4, 2, 16, 16), np.int8)
    scales = {"key_scale": 0.5, "value_scale": 0.5, name: 0}
    with pytest.raises(ValueError, match=f"^{name}=0 must not be 0: rows are divided by it"):
        ejk.write_kv_cache(rows, rows, pool, pool, np.zeros(1, np.int32), **scales)
