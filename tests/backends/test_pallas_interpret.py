"""The TPU kernel, interpreted: no race, no stray read, no block that was not waited for.

Every slot that no visible token owns is poisoned, and so is memory next to the core.
"""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import tpu_interpreter

import ejk
from ejk.backends.pallas.page_attention import backend as adapter
from ejk.testing.bounds import assert_close
from ejk.testing.configurations import FEATURES, LAYOUTS, Configuration
from ejk.testing.page_attention import build
from ejk.testing.shapes import Shape

F32, BF16 = np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16)
INT32 = np.iinfo(np.int32)
SHAPE = Shape("four pages", 4, 2, 128, page_size=8, max_blocks=4, num_pages=14)
ALL = frozenset(FEATURES)

LENGTHS = {
    "ordinary": (32, 7, 19),
    "first is empty": (0, 9, 32),
    "last is empty": (17, 3, 0),
    "only the middle": (0, 25, 0),
    "all are empty": (0, 0, 0),
    "one token": (1, 1, 1),
    "edges of pages": (8, 24, 16),
    "next to edges": (15, 17, 31),
    "hostile": (INT32.min, INT32.max, -1),
}


@pytest.fixture(autouse=True)
def _fresh_interpreter():
    yield
    tpu_interpreter.reset()


def check(case, backend=None, **options):
    out, lse = tpu_interpreter.run(case, backend or tpu_interpreter.backend(), **options)
    assert_close(case, out, lse)


each_round = pytest.mark.parametrize(
    "blocks_per_round", [3, pytest.param(1, marks=pytest.mark.thorough)]
)


@each_round
@pytest.mark.parametrize("dma_execution_mode", ["on_wait", "eager"])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_lengths(lengths, dma_execution_mode, blocks_per_round):
    case = build(Configuration(SHAPE, F32, "HND"), np.array(lengths, np.int32))
    check(case, tpu_interpreter.backend(dma_execution_mode, blocks_per_round=blocks_per_round))


@pytest.mark.one_in(2)
@each_round
@pytest.mark.parametrize("dma_execution_mode", ["on_wait", "eager"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_fused_pools(layout, dma_execution_mode, blocks_per_round):
    config = Configuration(SHAPE, BF16, layout, ALL, fused=True)
    case = build(config, np.array((32, 0, 21)), window=np.asarray(27), invalid=0.2)
    check(case, tpu_interpreter.backend(dma_execution_mode, blocks_per_round=blocks_per_round))


@each_round
@pytest.mark.parametrize("window", [1, 7, 8, 9, 16, 30, INT32.max])
def test_windows(window, blocks_per_round):
    config = Configuration(SHAPE, F32, "HND", frozenset({"sliding_window"}))
    lengths = np.array((32, 8, 21), np.int32)
    case = build(config, lengths, window=np.asarray(window, np.int32))
    check(case, tpu_interpreter.backend(blocks_per_round=blocks_per_round))


@pytest.mark.one_in(2)
@pytest.mark.parametrize("invalid", [0.3, 0.7, 1.0])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_entries_that_name_no_page(layout, invalid):
    config = Configuration(SHAPE, F32, layout, ALL)
    lengths = np.array((32, 21, 32), np.int32)
    check(build(config, lengths, invalid=invalid, window=np.asarray(27), seed=3))


@pytest.mark.one_in(5)
@pytest.mark.parametrize("group", [1, 3, 4, 8])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_groups(dtype, group):
    shape = Shape("group", 2 * group, 2, 64, page_size=16, max_blocks=3, num_pages=12)
    check(build(Configuration(shape, dtype, "HND", ALL), np.array((47, 0, 16)), window=40))


@pytest.mark.one_in(5)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "shape",
    [
        Shape("narrow values", 6, 3, 24, page_size=3, value_head_dim=9, num_pages=20),
        Shape("latent", 5, 1, 24, page_size=3, value_head_dim=16, latent=True, max_blocks=5),
        Shape("one slot a page", 2, 1, 8, page_size=1, max_blocks=21, num_pages=80),
    ],
    ids=lambda shape: shape.name,
)
def test_shapes(shape, layout):
    lengths = np.array((shape.capacity, 2, shape.capacity - 1))
    config = Configuration(shape, F32, layout, frozenset({"sinks", "sliding_window"}))
    check(build(config, lengths, window=shape.capacity - 2, invalid=0.1, share=True))


@pytest.mark.one_in(5)
@each_round
@pytest.mark.parametrize("fused", [False, True], ids=["split", "fused"])
@pytest.mark.parametrize("megacore_mode", ["batch", "kv_head"])
@pytest.mark.parametrize("dma_execution_mode", ["on_wait", "eager"])
def test_two_cores(megacore_mode, dma_execution_mode, fused, blocks_per_round):
    backend = tpu_interpreter.backend(
        dma_execution_mode, cores=2, megacore_mode=megacore_mode, blocks_per_round=blocks_per_round
    )
    config = Configuration(SHAPE, F32, "HND", ALL, fused=fused)
    for lengths in ((9, 32, 0), (0, 0, 5), (17, 0, 0)):
        check(build(config, np.array(lengths), window=np.asarray(20)), backend)


@pytest.mark.parametrize("fitting", [1, 2])
def test_tables_that_do_not_fit_in_scalar_memory_are_run_in_parts(fitting, monkeypatch):
    monkeypatch.setattr(adapter, "SMEM_LIMIT_BYTES", 4 * (5 * 128 + fitting * 5))
    config = Configuration(SHAPE, F32, "HND", ALL)
    case = build(config, np.array((32, 0, 21)), window=np.asarray(20))
    check(case, tpu_interpreter.backend(vmem_limit_bytes=2**26 + fitting))


def test_new_lengths_do_not_compile_again(monkeypatch):
    backend = tpu_interpreter.backend(vmem_limit_bytes=2**27)
    config = Configuration(SHAPE, F32, "HND")
    launches = []
    run = type(backend).run
    monkeypatch.setattr(
        type(backend), "run", lambda self, *args: launches.append(args) or run(self, *args)
    )
    for seed, lengths in enumerate(((32, 0, 21), (1, 2, 3), (0, 0, 0))):
        check(build(config, np.array(lengths), seed=seed), backend)
    assert len(launches) == 1


@each_round
def test_a_sequence_has_the_same_bits_in_any_batch(blocks_per_round):
    """And in rounds of any size, beside blocks that are masked and blocks that are not."""
    config = Configuration(SHAPE, BF16, "HND", ALL, num_splits=1)
    case = build(config, np.array((32, 5, 21)), window=np.asarray(20), seed=5)
    out, lse = tpu_interpreter.run(case, tpu_interpreter.backend())
    backend = tpu_interpreter.backend(blocks_per_round=blocks_per_round)
    for order in ((0, 1, 2), (1,), (2, 0, 1), (0, 0)):
        again = tpu_interpreter.run(case.rows(order, more_blocks=3), backend)
        np.testing.assert_array_equal(again[0], out[list(order)])
        np.testing.assert_array_equal(again[1], lse[list(order)])


def test_runs_eagerly_under_vmap_and_in_reverse_mode():
    config = Configuration(SHAPE, F32, "HND", frozenset({"sinks"}))
    case = build(config, np.array((32, 0, 21)), seed=7)
    query, *others = (jnp.asarray(x) for x in case.arguments())

    def attend(query, backend):
        return ejk.page_attention(query, *others, **case.semantics(), backend=backend)

    interpreted, xla = ejk.PallasPageAttention(interpret=True), "xla"
    out = attend(query, interpreted)
    np.testing.assert_allclose(out, attend(query, xla), atol=1e-5)
    twice = jax.vmap(lambda q: attend(q, interpreted))(jnp.stack([query, query]))
    np.testing.assert_allclose(twice, jnp.stack([out, out]), atol=1e-5)
    grads = [jax.grad(lambda q, b=b: attend(q, b).sum())(query) for b in (interpreted, xla)]
    np.testing.assert_allclose(*grads, atol=1e-5)
