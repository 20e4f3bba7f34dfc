"""Every wrong argument of `ejk.write_kv_cache` and what is said of it."""

import dataclasses
import re

import jax.numpy as jnp
import numpy as np
import pytest
from test_errors import zeros

import ejk

pytestmark = pytest.mark.fast


def arguments(**changes):
    """A right call of three tokens, changed. `pool=` changes both caches, `rows=` both rows."""
    pool = changes.pop("pool", zeros(8, 2, 16, 64))
    rows = changes.pop("rows", zeros(3, 2, 64))
    right = {
        "key": rows,
        "value": rows,
        "key_cache": pool,
        "value_cache": pool,
        "slot_mapping": zeros(3, dtype=np.int32),
    }
    return right | changes


def fused(*shape, **changes):
    return arguments(key_cache=zeros(*shape), value_cache=None, **changes)


RANK_AND_KIND = {
    "keys of rank 2": (
        {"key": zeros(3, 64)},
        "key=float32[3, 64] must be a floating-point array [num_tokens, num_kv_heads, head_dim]",
    ),
    "keys of integers": ({"key": zeros(3, 2, 64, dtype=np.int8)}, "key=int8[3, 2, 64] must be"),
    "keys as a list": ({"key": [[[1.0]]]}, "key=[[[1.0]]] must be"),
    "no keys": ({"key": None}, "key=None must be"),
    "keys of float64": (
        {"key": zeros(3, 2, 64, dtype=np.float64)},
        "key.dtype=float64 must be one of float32, bfloat16, float16",
    ),
    "values of rank 4": ({"value": zeros(3, 1, 2, 64)}, "value=float32[3, 1, 2, 64] must be"),
    "a pool of rank 3": ({"key_cache": zeros(2, 16, 64)}, "key_cache=float32[2, 16, 64] must be"),
    "no pool": ({"key_cache": None}, "key_cache=None must be"),
    "a value pool of rank 3": ({"value_cache": zeros(2, 16, 64)}, "value_cache=float32[2, 16, 64]"),
    "slots of floats": (
        {"slot_mapping": zeros(3)},
        "slot_mapping=float32[3] must be an integer array [num_tokens]",
    ),
    "slots of booleans": ({"slot_mapping": zeros(3, dtype=bool)}, "slot_mapping=bool[3] must be"),
    "slots of rank 2": ({"slot_mapping": zeros(3, 1, dtype=int)}, "slot_mapping=int64[3, 1] must"),
    "slots as a list": ({"slot_mapping": [1, 2, 3]}, "slot_mapping=[1, 2, 3] must be"),
    "a backend that is none": ({"backend": 3}, "backend=3 must be"),
}

MISFIT_AND_RANGE = {
    "an unknown layout": (
        {"cache_layout": "HDN"},
        "cache_layout='HDN' must be one of 'HND', 'NHD', 'KV_HEADS_FIRST'",
    ),
    "another layout's axes": (
        {"cache_layout": "NHD"},
        "key.shape[1]=2 must be num_kv_heads=16 (key_cache[8, 2, 16, 64], cache_layout='NHD')",
    ),
    "other heads": (
        {"rows": zeros(3, 4, 64)},
        "key.shape[1]=4 must be num_kv_heads=2 (key_cache[8, 2, 16, 64], cache_layout='HND')",
    ),
    "keys of another width": (
        {"rows": zeros(3, 2, 32)},
        "key_cache.shape[3]=64 must be the keys' head_dim=32",
    ),
    "a pool of no type that a cache has": (
        {"pool": zeros(8, 2, 16, 64, dtype=np.int16)},
        "key_cache.dtype=int16 must be one of float32, bfloat16, float16, int8,",
    ),
    "a quantised pool of values": (
        {"value_cache": zeros(8, 2, 16, 64, dtype=np.int8)},
        "value_cache.dtype=int8 must be key_cache.dtype=float32",
    ),
    "values of another dtype": (
        {"value": zeros(3, 2, 64, dtype=np.float16)},
        "value.dtype=float16 must be the keys' dtype float32",
    ),
    "values of other tokens": (
        {"value": zeros(4, 2, 64)},
        "value.shape=(4, 2, 64) must be key.shape=(3, 2, 64) but for the last axis",
    ),
    "values of another width": (
        {"value": zeros(3, 2, 32)},
        "value_cache.shape[3]=64 must be the values' value_head_dim=32",
    ),
    "values of no width": (
        {"value": zeros(3, 2, 0), "value_cache": zeros(8, 2, 16, 0)},
        "value_cache.shape[3]=0 must be at least 1",
    ),
    "values of fewer pages": (
        {"value_cache": zeros(7, 2, 16, 64)},
        "value_cache.shape=(7, 2, 16, 64) must be key_cache.shape=(8, 2, 16, 64) but for the last",
    ),
    "no place for values": (
        {"value_cache": None},
        "value_cache=None must be an array, or value and value_cache both None: latent attention",
    ),
    "no values": ({"value": None}, "value=None must be an array, or value and value_cache both"),
    "fused pools and no values": (
        fused(8, 2, 2, 16, 64, value=None),
        "value=None must be an array with a key_cache of five axes",
    ),
    "fused pools and another": (
        {"key_cache": zeros(8, 2, 2, 16, 64)},
        "value_cache[8, 2, 16, 64] must be None with a key_cache of five axes",
    ),
    "fused pools of one half": (
        fused(8, 1, 2, 16, 64),
        "key_cache.shape[1]=1 must be 2, keys and values "
        "(key_cache[8, 1, 2, 16, 64], cache_layout='HND')",
    ),
    "fused pools and values of another width": (
        fused(8, 2, 2, 16, 64, value=zeros(3, 2, 32)),
        "key_cache.shape[4]=64 must be the values' value_head_dim=32",
    ),
    "slots of other tokens": (
        {"slot_mapping": zeros(4, dtype=np.int32)},
        "slot_mapping.shape[0]=4 must be num_tokens=3",
    ),
    "no KV heads": (
        {"pool": zeros(8, 0, 16, 64), "rows": zeros(3, 0, 64)},
        "num_kv_heads=0 must be at least 1 (key_cache[8, 0, 16, 64], cache_layout='HND')",
    ),
    "no head dimension": (
        {"pool": zeros(8, 2, 16, 0), "rows": zeros(3, 2, 0), "value": None, "value_cache": None},
        "head_dim=0 must be at least 1",
    ),
    "pages without slots": ({"pool": zeros(8, 2, 0, 64)}, "page_size=0 must be at least 1"),
    "slots of 64 bits": (
        # An array of one element, seen 2**27 times: the check is on shapes alone.
        {"pool": np.broadcast_to(np.float32(0), (2**27, 2, 16, 64))},
        "num_pages * page_size=2147483648 must be below 2**31: slots are 32-bit "
        "(key_cache[134217728, 2, 16, 64], cache_layout='HND')",
    ),
    "an unknown backend": ({"backend": "cuda"}, "backend='cuda' must be one of "),
}


@pytest.mark.parametrize("change, message", RANK_AND_KIND.values(), ids=RANK_AND_KIND)
def test_wrong_ranks_and_dtype_kinds_are_type_errors(change, message):
    with pytest.raises(TypeError, match="^" + re.escape(message)):
        ejk.write_kv_cache(**arguments(**change))


@pytest.mark.parametrize("change, message", MISFIT_AND_RANGE.values(), ids=MISFIT_AND_RANGE)
def test_misfits_and_values_out_of_range_are_value_errors(change, message):
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        ejk.write_kv_cache(**arguments(**change))


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
