"""`ejk.write_kv_cache` lowered for machines that are not here: one kernel, in place."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_dispatch import kernels
from test_write_programs import NUM_PAGES, pool_shapes, row_shapes, step, struct

import ejk
from ejk.testing.configurations import LAYOUTS
from ejk.testing.write_kv_cache import SHAPES, assert_written, build

F32 = np.dtype(np.float32)
KINDS = ("split", "fused", "latent")
PLATFORMS = ("cpu", "cuda", "tpu")


@pytest.fixture
def for_an_h100(restored_registry, jax_triton):
    ejk.register_backend(ejk.TritonWriteKVCache(compute_capability=90))
    ejk.register_backend(ejk.TritonPageAttention(compute_capability=90, num_sms=132))


def lower_write(platform, layout, kind, num_tokens=64, **keywords):
    function = functools.partial(ejk.write_kv_cache, cache_layout=layout, **keywords)
    slots = struct(num_tokens, dtype=jnp.int32)
    arguments = (*row_shapes(kind, num_tokens), *pool_shapes(layout, kind), slots)
    traced = jax.jit(function, donate_argnums=(2, 3)).trace(*arguments)
    return traced.lower(lowering_platforms=(platform,)).as_text()


def pool_results(text):
    """Name the operations of a module that have a result with all pages."""
    pattern = rf"^ +%\S+ = (?:stablehlo\.)?([\w.]+).*(?:->|:) .*[<x]{NUM_PAGES}x"
    return re.findall(pattern, text, re.MULTILINE)


def aliases(text):
    """Return which operand each result of each custom call is in the place of."""
    pattern = r"output_tuple_indices = \[(\d*)\],\s*operand_index = (\d+)"
    return [(int(result or 0), int(operand)) for result, operand in re.findall(pattern, text)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_for_cuda_it_is_one_kernel_in_place(layout, kind, for_an_h100):
    text = lower_write("cuda", layout, kind)
    assert kernels(text) == {"cuda"}
    # Barriers, or XLA would hand the kernel slices of what a loop stacks: see `_launch.call`.
    assert pool_results(text).count("custom_call") == 1
    assert set(pool_results(text)) == {"custom_call", "optimization_barrier"}
    # After keys, values, slots and no scales come the pools; where there is one, a dummy has a
    # result's place.
    assert aliases(text) == ([(0, 5), (1, 6)] if kind == "split" else [(1, 5)])
    assert len(re.findall(r"tf\.aliasing_output", text)) == (2 if kind == "split" else 1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [jnp.int8, jnp.float8_e4m3fn, jnp.float8_e5m2, jnp.uint8])
@pytest.mark.parametrize("capability", [80, 90])
def test_for_cuda_codes_and_scales_are_written_in_place(capability, dtype, kind, jax_triton):
    """By one kernel, which computes the scales; also where Triton knows no e4m3."""
    codes = 8 if dtype == jnp.uint8 else 16
    half = (2,) if kind == "fused" else ()
    scales = [struct(NUM_PAGES, *half, 2, 16, dtype=jnp.float32)]
    pools = [struct(*scales[0].shape, codes, dtype=dtype)]
    rows = [struct(64, 2, 16)]
    if kind == "split":
        pools, scales = 2 * pools, 2 * scales
    rows *= 1 if kind == "latent" else 2

    def write(rows, pools, scales, slots):
        rows, pools = [*rows, None][:2], [*pools, None][:2]
        names = ("key_scale", "value_scale")
        backend = ejk.TritonWriteKVCache(compute_capability=capability)
        return ejk.write_kv_cache(*rows, *pools, slots, **dict(zip(names, scales)), backend=backend)

    traced = jax.jit(write, donate_argnums=(1, 2)).trace(
        rows, pools, scales, struct(64, dtype=jnp.int32)
    )
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert kernels(text) == {"cuda"}
    assert pool_results(text).count("custom_call") == 1
    assert set(pool_results(text)) == {"custom_call", "optimization_barrier"}
    split = [(0, 3), (1, 4), (2, 5), (3, 6)]
    assert aliases(text) == (split if kind == "split" else [(1, 4), (2, 5)])
    assert len(re.findall(r"tf\.aliasing_output", text)) == 2 * len(pools)


@pytest.mark.parametrize("scan", [True, False], ids=["scan", "unrolled"])
@pytest.mark.parametrize("kind", KINDS)
def test_for_cuda_layers_pass_the_pool_from_kernel_to_kernel(kind, scan, for_an_h100):
    num_seqs = 4
    arguments = (
        *row_shapes(kind, num_seqs),
        *pool_shapes("HND", kind),
        struct(num_seqs, dtype=jnp.int32),
        struct(num_seqs, 16, 128),
        struct(num_seqs, dtype=jnp.int32),
        struct(num_seqs, 8, dtype=jnp.int32),
    )
    traced = jax.jit(functools.partial(step, "HND", kind, scan), donate_argnums=(2, 3)).trace(
        *arguments
    )
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    made = set(pool_results(text))
    assert {"custom_call", "optimization_barrier"} <= made
    assert made <= {"custom_call", "optimization_barrier", "while", "call", "func.call"}


def test_more_tokens_than_are_compared_are_sorted_first(for_an_h100):
    assert "sort" not in lower_write("cuda", "HND", "split", 16384)
    assert "sort" in lower_write("cuda", "HND", "split", 16385)


def test_without_a_device_or_its_capability_xla_is_chosen():
    if jax.default_backend() == "gpu":
        pytest.skip("a GPU says its own capability")
    assert kernels(lower_write("cuda", "HND", "split")) == set()
    slots = struct(4, dtype=jnp.int32)
    arguments = (*row_shapes("split", 4), *pool_shapes("HND", "split"), slots)
    report = ejk.backend_report(*arguments, operation=ejk.write_kv_cache, platform="cuda")
    assert report.chosen == "xla"
    [refusal] = report.refusals["triton"]
    assert refusal == (
        "no cuda device is here to compile for: for an H100, "
        "ejk.register_backend(ejk.TritonWriteKVCache(compute_capability=90))"
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_export_holds_the_kernel_of_each_platform(layout, kind, for_an_h100):
    shape = dict(zip(KINDS, SHAPES))[kind]
    slots = np.resize([3, 40, 3, -1, 17, 96, 5], shape.num_tokens).astype(np.int32)
    case = build(shape, F32, layout, slots)
    function = jax.jit(functools.partial(ejk.write_kv_cache, cache_layout=layout))
    exported = jax.export.export(
        function, platforms=PLATFORMS, disabled_checks=ejk.export_disabled_checks()
    )(*case.operands())
    assert kernels(exported.mlir_module()) == {*PLATFORMS} - {"cpu"}
    again = jax.export.deserialize(exported.serialize())
    if jax.default_backend() == "cpu":
        caches = again.call(*case.operands())
        assert_written(case, [np.asarray(x) for x in caches if x is not None])
