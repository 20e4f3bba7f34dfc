"""The latent kernel for Hopper, lowered and compiled on a machine without a GPU."""

import functools

import jax
import jax.numpy as jnp
import mosaic_offline
import pytest

import ejk

HOPPER = {"compute_capability": 90, "num_sms": 132}
MOSAIC, TRITON = ejk.MosaicGpuPageAttention(**HOPPER), ejk.TritonPageAttention(**HOPPER)
pytestmark = pytest.mark.skipif(
    jax.__version_info__ < (0, 11, 2), reason="its Pallas Mosaic GPU is older"
)


def shapes(heads, page_size=16):
    shape, dtype = jax.ShapeDtypeStruct, jnp.bfloat16
    return (
        shape((8, heads, 576), dtype), shape((512, 1, page_size, 576), dtype), None,
        shape((8,), jnp.int32), shape((8, 2048 // page_size), jnp.int32),
    )  # fmt: skip


@pytest.fixture
def hopper():
    """Calls are lowered as on a machine with such a GPU."""
    for backend in (TRITON, MOSAIC):
        ejk.register_backend(backend)
    yield
    for backend in (TRITON, MOSAIC):
        ejk.unregister_backend(backend)


CHOICES = {
    "1 head": (1, {}, "mosaic_gpu"),
    "16 heads": (16, {}, "mosaic_gpu"),
    "16 heads on few tokens": (16, {"max_context_len": 1024}, "triton"),
    "17 heads on few tokens": (17, {"max_context_len": 1024}, "mosaic_gpu"),
    "64 heads": (64, {}, "mosaic_gpu"),
    "128 heads and a window": (128, {"sliding_window": 100}, "mosaic_gpu"),
    "a soft cap": (64, {"attn_logits_soft_cap": 50.0}, "triton"),
}


@pytest.mark.parametrize("heads, options, chosen", CHOICES.values(), ids=CHOICES)
def test_automatic_choice_on_hopper(heads, options, chosen, hopper, jax_triton):
    report = ejk.backend_report(*shapes(heads), value_head_dim=512, platform="cuda", **options)
    assert report.chosen == chosen, str(report)


@pytest.mark.parametrize("x64", [False, True])
def test_a_call_is_exported(x64, jax_triton):
    call = functools.partial(ejk.page_attention, value_head_dim=512, backend=MOSAIC)
    with jax.enable_x64(x64):
        exported = jax.export.export(
            jax.jit(call), platforms=["cuda"], disabled_checks=ejk.export_disabled_checks()
        )(*shapes(64))
    assert "mosaic_gpu_v2" in exported.mlir_module()


@pytest.mark.skipif(bool(mosaic_offline.missing()), reason=str(mosaic_offline.missing()))
@pytest.mark.one_in(2)
@pytest.mark.parametrize("heads, page_size", [(16, 64), (64, 64), (128, 16), (128, 256)])
def test_products_overlap_and_no_register_spills(heads, page_size, jax_triton):
    program = mosaic_offline.compile_call(
        "page_attention", *shapes(heads, page_size), value_head_dim=512, backend=MOSAIC
    )
    assert not program.serialised
    assert program.registers == 168  # an even share of all of the three warpgroups
    assert program.spilled == 0
    assert "wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16" in program.ptx
    assert "cp.async.bulk.tensor" in program.ptx
    assert 223_232 < program.shared_memory <= 227 * 1024
    assert len(program.loops) == 2  # of each half of the values


@pytest.mark.skipif(bool(mosaic_offline.missing()), reason=str(mosaic_offline.missing()))
@pytest.mark.parametrize("heads", [8, 16, 32])
def test_tokens_of_few_heads_that_share_a_program_cost_no_more(heads, jax_triton):
    query, *cache, lens, tables = shapes(heads, 64)
    bounds = jax.ShapeDtypeStruct((9,), jnp.int32)
    program = mosaic_offline.compile_call(
        "ragged_page_attention", query, *cache, lens, tables, bounds, value_head_dim=512,
        backend=ejk.MosaicGpuRaggedPageAttention(**HOPPER),
    )  # fmt: skip
    assert not program.serialised
    assert program.spilled == 0
    assert len(program.loops) == 2
