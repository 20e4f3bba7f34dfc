"""What `wrong_calls` does not hold of copies: third parties, and what is returned."""

import dataclasses

import pytest
from wrong_calls import INT8_POOL, RIGHT, SCALES

import ejk

pytestmark = pytest.mark.fast


def call(unit, backend=None, **changes):
    given = RIGHT[f"copy_kv_{unit}s"](**changes)
    return getattr(ejk, f"copy_kv_{unit}s")(**given, backend=backend)


def test_the_right_calls_are_right():
    """Or the tables above would prove nothing. Scales that do not move are not returned."""
    for unit in ("slot", "page"):
        assert len(call(unit)) == 2
        assert len(call(unit, pool=INT8_POOL, key_scale=0.5, value_scale=0.5)) == 2
        scales = {"key_scale": SCALES, "value_scale": SCALES}
        assert [x.ndim for x in call(unit, pool=INT8_POOL, **scales)] == [4, 4, 3, 3]
        latent = call(unit, value_cache=None, key_scale=SCALES)
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
    call("page", backend=Zeros())
    with pytest.raises(ejk.UnsupportedError) as info:
        call("slot", backend=Zeros())
    assert str(info.value).splitlines() == [
        "no backend that was asked for can run this copy_kv_cache call:",
        "  zeros: copies pages, not slots",
    ]
    ejk.register_backend(Zeros())
    given = [*RIGHT["copy_kv_pages"]().values()]
    for operation, chosen in ((ejk.copy_kv_pages, "zeros"), (ejk.copy_kv_slots, "xla")):
        assert ejk.backend_report(*given, operation=operation, platform="cpu").chosen == chosen


def test_a_backend_of_another_operation_is_refused():
    with pytest.raises(
        ejk.UnsupportedError, match="xla: is a backend of write_kv_cache, not of copy_kv_cache"
    ):
        call("page", backend=ejk.XlaWriteKVCache())
