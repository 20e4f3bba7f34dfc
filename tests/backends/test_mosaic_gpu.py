"""The latent kernel for Hopper: interpreted, or on the GPU with `--gpu`.

The interpreter sees races, stray reads and barriers out of step. Every slot that no visible token
owns is poisoned, and so is its shared memory.
"""

import dataclasses

import gpu_interpreter
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import ejk
from ejk.testing.bounds import assert_close
from ejk.testing.configurations import Configuration
from ejk.testing.page_attention import build
from ejk.testing.shapes import Shape

pytestmark = gpu_interpreter.marks

BF16, F16 = np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16)
INT32 = np.iinfo(np.int32)
# Three blocks and a half of 64 tokens.
SHAPE = Shape("deepseek-v3, a half", 64, 1, 576, 16, 14, 50, value_head_dim=512, latent=True)
BACKEND = ejk.MosaicGpuPageAttention(num_sms=5, interpret=not gpu_interpreter.ON_GPU)
WINDOW = frozenset({"sliding_window"})

LENGTHS = {
    "ordinary": (224, 7, 150),
    "one is empty": (0, 65, 0),
    "edges of blocks": (64, 128, 192),
    "next to edges": (63, 129, 1),
    "hostile": (INT32.min, INT32.max, -1),
}


@pytest.fixture(autouse=True)
def _fresh_interpreter():
    yield
    gpu_interpreter.reset()


def check(config, lengths, **options):
    case = build(config, np.array(lengths, np.int32), **options)
    assert_close(case, *gpu_interpreter.run(case, BACKEND))
    return case


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_lengths(lengths):
    check(Configuration(SHAPE, BF16, "HND"), lengths)


@pytest.mark.parametrize("page_size", [8, 16, 32, 64, 128])
def test_pages_that_are_hidden(page_size):
    shape = dataclasses.replace(SHAPE, page_size=page_size, max_blocks=-(-224 // page_size))
    case = check(Configuration(shape, BF16, "NHD"), (220, 100, 65), invalid=0.4, seed=page_size)
    ids = case.block_tables[case.needed]
    assert ((ids < 0) | (ids >= shape.num_pages)).any() and (ids < shape.num_pages).any()


@pytest.mark.one_in(4)
@pytest.mark.parametrize("num_splits", [0, 1, 3])
@pytest.mark.parametrize("window", [1, 70, 128, 1000])
def test_windows(window, num_splits):
    config = Configuration(SHAPE, BF16, "KV_HEADS_FIRST", WINDOW, num_splits)
    check(config, (221, 60, 130), window=np.int32(window), invalid=0.1)


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_maxima_that_rise(dtype):
    """Sums are rescaled where a maximum rises by more than the slack, block after block."""
    case = build(Configuration(SHAPE, dtype, "HND"), np.array([224, 130, 60]))
    case = dataclasses.replace(case, query=(case.query * 16).astype(dtype))
    assert_close(case, *gpu_interpreter.run(case, BACKEND))


def test_float16_and_a_scale():
    features = frozenset({"attn_scale"})
    check(Configuration(SHAPE, F16, "HND", features, num_splits=2), (200, 64, 3))


@pytest.mark.parametrize("num_heads", [3, 16, 20, 33, 96])
def test_heads_that_fill_no_program(num_heads):
    shape = dataclasses.replace(SHAPE, num_heads=num_heads)
    check(Configuration(shape, BF16, "HND"), (220, 100, 0))


def test_a_plan_for_other_lengths():
    case = build(Configuration(SHAPE, BF16, "HND"), np.array([220, 3, 130]))
    plan = ejk.plan_page_attention(
        jnp.array([1, 224, 64]), num_heads=64, num_kv_heads=1, head_dim=576, page_size=16,
        max_blocks=14, value_head_dim=512, backend=BACKEND,
    )  # fmt: skip
    assert_close(case, *gpu_interpreter.run(case, BACKEND, plan=plan))


def test_a_plan_that_knows_of_prefixes_alone_is_left_out():
    """It was not told that the values are in the keys, of which there are no packs."""
    shape = dataclasses.replace(
        SHAPE, num_heads=8, page_size=64, max_blocks=16, num_pages=70, num_seqs=4
    )
    case = build(Configuration(shape, BF16, "HND"), np.array([600, 1000, 560, 700]))
    case.block_tables[:, :8] = case.block_tables[0, :8]
    groups = np.zeros(4, np.int32), np.full(1, 8, np.int32)
    planner = ejk.TritonPageAttention(interpret=True, num_sms=4, least_saved_bytes=0)
    plan = case.plan(planner, prefix_groups=groups, block_tables=case.block_tables)
    assert plan.problem.packs is not None
    assert_close(case, *gpu_interpreter.run(case, BACKEND, plan=plan))


@pytest.mark.parametrize("num_splits", [1, 2])
def test_bits_do_not_depend_on_the_batch(num_splits):
    config = Configuration(SHAPE, BF16, "HND", num_splits=num_splits)
    case = build(config, np.array([190, 3, 130]))
    out, lse = gpu_interpreter.run(case, BACKEND)
    query, pool, values, lens, tables = case.arguments()
    alone = ejk.page_attention(
        query[:1], pool, values, lens[:1], tables[:1], value_head_dim=512, return_lse=True,
        num_splits=num_splits, backend=BACKEND,
    )  # fmt: skip
    np.testing.assert_array_equal(np.asarray(alone[0])[0], out[0])
    np.testing.assert_array_equal(np.asarray(alone[1])[0], lse[0])


@pytest.mark.parametrize("where", ["query", "key"])
def test_what_is_not_finite_and_seen_is_not_lost(where):
    case = build(Configuration(SHAPE, BF16, "HND"), np.array([190, 3, 130]))
    query, keys = case.query.copy(), case.keys.copy()
    if where == "query":
        query[0, 5, 570] = np.nan
    else:
        keys[case.block_tables[2, 3], 1, 0, 575] = np.nan
    case = dataclasses.replace(case, query=query, keys=keys)
    assert_close(case, *gpu_interpreter.run(case, BACKEND))


REFUSALS = {
    "separate values": ({"latent": False}, BF16, "it takes latent caches"),
    "wide": ({"head_dim": 512, "value_head_dim": 448}, BF16, "must be 576 and 512"),
    "float32": ({}, np.dtype(np.float32), "dtype=float32: it takes bfloat16 and float16"),
    "pages of 12": ({"page_size": 12}, BF16, "page_size=12 must be 8, 16, 32 or a multiple of 64"),
    "KV heads": ({"num_kv_heads": 2}, BF16, "num_kv_heads=2 must be 1"),
}


@pytest.mark.parametrize("fields, dtype, reason", REFUSALS.values(), ids=REFUSALS)
def test_what_is_refused_is_refused_by_name(fields, dtype, reason):
    shape = dataclasses.replace(SHAPE, **fields)
    case = build(Configuration(shape, dtype, "HND"), np.array([20, 3, 1]))
    with pytest.raises(ejk.UnsupportedError, match=rf"\n  mosaic_gpu: .*{reason}"):
        gpu_interpreter.run(case, BACKEND)


def test_another_generation_is_refused():
    case = build(Configuration(SHAPE, BF16, "HND"), np.array([20, 3, 1]))
    backend = ejk.MosaicGpuPageAttention(compute_capability=100, num_sms=148)
    with pytest.raises(ejk.UnsupportedError, match="compute_capability=100 must be 90"):
        gpu_interpreter.run(case, backend)
