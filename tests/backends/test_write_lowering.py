"""`ejk.write_kv_cache` lowered for machines that are not here: one kernel, in place."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bits import assert_written
from strategies import LAYOUTS
from test_dispatch import kernels
from test_write_programs import NUM_PAGES, pool_shapes, row_shapes, step, struct
from writes import SHAPES, build

import ejk

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
    # After keys, values and slots come the pools; where there is one, a dummy has a result's place.
    assert aliases(text) == ([(0, 3), (1, 4)] if kind == "split" else [(1, 3)])
    assert len(re.findall(r"tf\.aliasing_output", text)) == (2 if kind == "split" else 1)


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
