"""Every wrong argument of `ejk.copy_kv_slots` and `ejk.copy_kv_pages`, and what is said of it."""

import dataclasses
import re

import numpy as np
import pytest
from test_errors import zeros

import ejk

pytestmark = pytest.mark.fast

INT8_POOL = zeros(8, 2, 16, 64, dtype=np.int8)
SCALES = zeros(8, 2, 16)


def arguments(**changes):
    """A right call of three copies, changed. `pool=` changes both caches."""
    pool, ids = changes.pop("pool", zeros(8, 2, 16, 64)), zeros(3, dtype=np.int32)
    return {"key_cache": pool, "value_cache": pool, "sources": ids, "targets": ids} | changes


def call(unit, sources, targets, **rest):
    operation = {"slot": ejk.copy_kv_slots, "page": ejk.copy_kv_pages}[unit]
    return operation(**{f"source_{unit}s": sources, f"target_{unit}s": targets}, **rest)


RANK_AND_KIND = {
    "a pool of rank 3": ({"key_cache": zeros(2, 16, 64)}, "key_cache=float32[2, 16, 64] must be"),
    "no pool": ({"key_cache": None}, "key_cache=None must be"),
    "sources of floats": (
        {"sources": zeros(3)},
        "source_{unit}s=float32[3] must be an integer array [num_copies]",
    ),
    "targets of booleans": ({"targets": zeros(3, dtype=bool)}, "target_{unit}s=bool[3] must be"),
    "targets as a list": ({"targets": [1, 2, 3]}, "target_{unit}s=[1, 2, 3] must be"),
    "a backend that is none": ({"backend": 3}, "backend=3 must be"),
}
MISFIT_AND_RANGE = {
    "an unknown layout": ({"cache_layout": "HDN"}, "cache_layout='HDN' must be one of 'HND',"),
    "other targets": (
        {"targets": zeros(4, dtype=np.int32)},
        "target_{unit}s.shape[0]=4 must be num_copies=3",
    ),
    "a pool of no type that a cache has": (
        {"pool": zeros(8, 2, 16, 64, dtype=np.int16)},
        "key_cache.dtype=int16 must be one of float32, bfloat16, float16, int8,",
    ),
    "values of another type": (
        {"value_cache": INT8_POOL},
        "value_cache.dtype=int8 must be key_cache.dtype=float32",
    ),
    "values of fewer pages": (
        {"value_cache": zeros(7, 2, 16, 64)},
        "value_cache.shape=(7, 2, 16, 64) must be key_cache.shape=(8, 2, 16, 64) but for the last",
    ),
    "values of no width": (
        {"value_cache": zeros(8, 2, 16, 0)},
        "value_cache.shape[3]=0 must be at least 1",
    ),
    "fused pools and another": (
        {"key_cache": zeros(8, 2, 2, 16, 64)},
        "value_cache[8, 2, 16, 64] must be None with a key_cache of five axes",
    ),
    "pages without slots": ({"pool": zeros(8, 2, 0, 64)}, "page_size=0 must be at least 1"),
    "codes without scales": (
        {"pool": INT8_POOL},
        "key_cache.dtype=int8 must come with key_scale and value_scale",
    ),
    "scales of the keys alone": (
        {"pool": INT8_POOL, "key_scale": SCALES},
        "value_scale=None must be a scale per token and head, [8, 2, 16]",
    ),
    "scales of 16 bits": (
        {"key_scale": SCALES.astype(np.float16), "value_scale": SCALES.astype(np.float16)},
        "key_scale.dtype=float16 must be float32 to be written in place",
    ),
    "scales of the values of latent pools": (
        {"value_cache": None, "key_scale": SCALES, "value_scale": SCALES},
        "value_scale=float32[8, 2, 16] must be None: the values are those of the keys",
    ),
    "slots of 64 bits": (
        {"pool": np.broadcast_to(np.float32(0), (2**27, 2, 16, 64))},
        "num_pages * page_size=2147483648 must be below 2**31: slots are 32-bit",
    ),
    "an unknown backend": ({"backend": "cuda"}, "backend='cuda' must be one of "),
}


@pytest.mark.parametrize("unit", ["slot", "page"])
@pytest.mark.parametrize("change, message", RANK_AND_KIND.values(), ids=RANK_AND_KIND)
def test_wrong_ranks_and_dtype_kinds_are_type_errors(change, message, unit):
    with pytest.raises(TypeError, match="^" + re.escape(message.replace("{unit}", unit))):
        call(unit, **arguments(**change))


@pytest.mark.parametrize("unit", ["slot", "page"])
@pytest.mark.parametrize("change, message", MISFIT_AND_RANGE.values(), ids=MISFIT_AND_RANGE)
def test_misfits_and_values_out_of_range_are_value_errors(change, message, unit):
    with pytest.raises(ValueError, match="^" + re.escape(message.replace("{unit}", unit))):
        call(unit, **arguments(**change))


def test_the_right_calls_are_right():
    """Or the tables above would prove nothing. Scales that do not move are not returned."""
    for unit in ("slot", "page"):
        assert len(call(unit, **arguments())) == 2
        assert len(call(unit, **arguments(pool=INT8_POOL, key_scale=0.5, value_scale=0.5))) == 2
        scales = {"key_scale": SCALES, "value_scale": SCALES}
        assert [x.ndim for x in call(unit, **arguments(pool=INT8_POOL, **scales))] == [4, 4, 3, 3]
        latent = call(unit, **arguments(value_cache=None, key_scale=SCALES))
        assert [x is None for x in latent] == [False, True, False, True]


@dataclasses.dataclass(frozen=True)
class Zeros(ejk.CopyKVCacheBackend):
    """A third party's: everything is as it was, of pages alone."""

    name = "zeros"
    features = frozenset({'cache_layout="HND"'})
    platforms = ("cpu",)

    def limits(self, problem, platform):
        return () if problem.unit == "page" else (f"copies pages, not {problem.unit}s",)

    def run(self, problem, operands, platform):
        return problem.pools_of(operands)


def test_a_third_party_runs_what_it_declares_and_is_refused_the_rest(restored_registry):
    call("page", **arguments(), backend=Zeros())
    with pytest.raises(ejk.UnsupportedError) as info:
        call("slot", **arguments(), backend=Zeros())
    assert str(info.value).splitlines() == [
        "no backend that was asked for can run this copy_kv_cache call:",
        "  zeros: copies pages, not slots",
    ]
    ejk.register_backend(Zeros())
    given = [*arguments().values()]
    for operation, chosen in ((ejk.copy_kv_pages, "zeros"), (ejk.copy_kv_slots, "xla")):
        assert ejk.backend_report(*given, operation=operation, platform="cpu").chosen == chosen


def test_a_backend_of_another_operation_is_refused():
    with pytest.raises(
        ejk.UnsupportedError, match="xla: is a backend of write_kv_cache, not of copy_kv_cache"
    ):
        call("page", **arguments(), backend=ejk.XlaWriteKVCache())
