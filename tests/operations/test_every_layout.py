"""One call of every operation on every backend in every layout, of two pools and of one.

But for the prefill kernel for Hopper, which takes no float32: `test_mosaic_gpu_ragged` has its.
"""

import itertools

import numpy as np
import pytest
from entries import COPIERS, ENTRIES, RAGGED, WRITERS, counted

from ejk.testing.bounds import assert_close
from ejk.testing.configurations import LAYOUTS, Configuration
from ejk.testing.copy_kv_cache import CopyConfiguration
from ejk.testing.copy_kv_cache import build as build_copy
from ejk.testing.page_attention import build
from ejk.testing.ragged_page_attention import build_ragged
from ejk.testing.shapes import Shape
from ejk.testing.write_kv_cache import WriteShape, assert_written
from ejk.testing.write_kv_cache import build as build_write

F32 = np.dtype(np.float32)
SHAPE = Shape("of every layout", 4, 2, 32, page_size=8, num_pages=9)
LENS = np.array([20, 0, 24], np.int32)
FEATURES = frozenset({"sinks"})


def page_attention(layout, fused):
    return build(Configuration(SHAPE, F32, layout, FEATURES, fused=fused), LENS, invalid=0.2)


def ragged_page_attention(layout, fused):
    bounds = np.array([1, 6, 6, 12], np.int32)
    config = Configuration(SHAPE, F32, layout, FEATURES, fused=fused)
    return build_ragged(config, LENS, bounds, invalid=0.2)


def write_kv_cache(layout, fused):
    shape = WriteShape("of every layout", 6, 2, 32, None if fused else 32, page_size=8)
    return build_write(shape, F32, layout, np.array([3, 17, 3, -1, 48, 40], np.int32))


def copy_kv_cache(layout, fused):
    shape = WriteShape("of every layout", 6, 2, 32, None if fused else 32, page_size=8)
    ends = np.array([[3, 17, 3, -1, 48, 40], [17, 40, 3, 2, 1, 9]], np.int32)
    return build_copy(CopyConfiguration(shape, "slot", F32, layout), *ends)


OPERATIONS = {
    page_attention: ENTRIES,
    ragged_page_attention: RAGGED,
    write_kv_cache: WRITERS,
    copy_kv_cache: COPIERS,
}
CASES = {
    f"{operation.__name__}-{entry.name}-{layout}-{'fused' if fused else 'separate'}": (
        entry, operation(layout, fused),
    )
    for operation, entries in OPERATIONS.items()
    for entry in entries
    if "blocks" not in entry.name and entry.suits is None
    for layout, fused in [*itertools.product(LAYOUTS, (False, True)), ("INTERLEAVED", True)]
}  # fmt: skip


@pytest.mark.fast
@pytest.mark.parametrize(("entry", "case"), CASES.values(), ids=CASES)
@counted
def test_a_call(entry, case):
    if entry in WRITERS:
        assert_written(case, entry(case))
    elif entry in COPIERS:
        case.check(entry(case))
    else:
        assert_close(case, *entry(case))
