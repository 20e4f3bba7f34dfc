"""The real call lowers for CUDA on a machine that has no GPU."""

import functools
import importlib
import re
import subprocess
import sys
import threading
import types
import typing
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import triton
import triton.language as tl

import ejk
from ejk._errors import Mendable
from ejk.backends.triton import _jax_triton, _launch

pytestmark = pytest.mark.usefixtures("jax_triton")


@triton.jit
@typing.no_type_check
def scale_kernel(
    x_ptr,
    bias_ptr,
    ids_ptr,
    y_ptr,
    count_ptr,
    SIZE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SCALE: tl.constexpr,
):
    offs = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    y = tl.load(x_ptr + offs).to(tl.float32) * SCALE
    if HAS_BIAS:
        y += tl.load(bias_ptr + offs)
    tl.store(y_ptr + offs, y)
    tl.store(count_ptr + offs, tl.load(ids_ptr + offs) + 1)


def scale(x, ids, bias=None, *, by=2, interpret=False):
    return _launch.call(
        scale_kernel,
        {"x_ptr": x, "bias_ptr": bias, "ids_ptr": ids},
        {
            "y_ptr": jax.ShapeDtypeStruct(x.shape, jnp.float32),
            "count_ptr": jax.ShapeDtypeStruct(ids.shape, jnp.int32),
        },
        {"SIZE": 16, "HAS_BIAS": bias is not None, "SCALE": float(by)},
        grid=2,
        num_warps=1,
        num_stages=2,
        compute_capability=90,
        interpret=interpret,
    )


X = jax.ShapeDtypeStruct((32,), jnp.bfloat16)
IDS = jax.ShapeDtypeStruct((32,), jnp.int32)


def lower(function, *arguments):
    return jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()


def custom_calls(text):
    """Returns the target, operand types and result types of each custom call."""
    pattern = r"custom_call @(\w+)\(.*?\).*? : \(([^)]*)\) -> \(?(.*?)\)?$"
    return re.findall(pattern, text, re.MULTILINE)


def carried(text):
    """Returns what each custom call carries for jaxlib, unpacked."""
    packed = re.findall(r'opaque = "(.*?)"[,}]', text)
    escape = re.compile(rb"\\(\\|[0-9A-F]{2})")

    def meant(found):
        return b"\\" if found[1] == b"\\" else bytes([int(found[1], 16)])

    return [zlib.decompress(escape.sub(meant, one.encode())) for one in packed]


def test_our_kernels_carry_no_more_than_is_run(monkeypatch):
    """XLA handles what a call carries in every run, so line numbers would cost time."""
    [whole] = carried(lower(scale, X, IDS))
    assert b"scale_kernel" in whole and b".loc" in whole and b"tt.func" in whole
    monkeypatch.setattr(scale_kernel, "__module__", "ejk.backends.triton.some_kernel")
    [lean] = carried(lower(functools.partial(scale, by=3), X, IDS))
    assert b"scale_kernel" in lean and b".loc" not in lean and b"tt.func" not in lean


def test_operands_come_before_results_and_the_absent_input_has_a_stand_in():
    ((target, operands, results),) = custom_calls(lower(scale, X, IDS))
    assert target == _launch.CUSTOM_CALL_TARGET
    assert operands == "tensor<32xbf16>, tensor<32xbf16>, tensor<32xi32>"
    assert results == "tensor<32xf32>, tensor<32xi32>"


def test_present_input_is_passed():
    bias = jax.ShapeDtypeStruct((32,), jnp.float32)
    ((_, operands, _),) = custom_calls(lower(scale, X, IDS, bias))
    assert operands == "tensor<32xbf16>, tensor<32xf32>, tensor<32xi32>"


def test_lowers_inside_other_jits_with_operations_around():
    # The inner jit makes JAX look for dead code, which runs jax-triton's rule.
    @jax.jit
    def inner(x, ids):
        y, count = scale(x * 2, ids)
        return y + 1, count

    def outer(x, ids):
        y, _ = inner(x, ids)
        return jax.lax.fori_loop(0, 3, lambda _, total: total + y.sum(), 0.0)

    assert len(custom_calls(lower(outer, X, IDS))) == 1


def test_exports():
    checks = ejk.export_disabled_checks()
    exported = jax.export.export(jax.jit(scale), platforms=("cuda",), disabled_checks=checks)(
        X, IDS
    )
    assert exported.platforms == ("cuda",)


def test_compiling_and_interpreting_live_in_one_process():
    x, ids = jnp.arange(32, dtype=jnp.bfloat16), jnp.arange(32, dtype=jnp.int32)
    before = lower(scale, X, IDS)
    interpreted = jax.jit(lambda *arguments: scale(*arguments, interpret=True))
    failures = []

    def interpret():
        for _ in range(50):
            y, count = map(np.asarray, interpreted(x, ids))
            if not (np.all(y == 2 * np.arange(32)) and np.all(count == np.arange(1, 33))):
                failures.append((y, count))

    thread = threading.Thread(target=interpret)
    thread.start()
    try:
        for scale_by in range(3, 8):  # New constants, so that no cache answers.
            text = lower(lambda *arguments, by=scale_by: scale(*arguments, by=by), X, IDS)
            assert len(custom_calls(text)) == 1
    finally:
        thread.join()
    assert not failures
    jax.clear_caches()
    assert lower(scale, X, IDS) == before


def test_importing_jax_triton_keeps_the_environment():
    program = """
import os
os.environ["TRITON_CACHE_DIR"] = "kept"
import ejk
from ejk.backends.triton import _launch
import sys
assert not {"triton", "jax_triton"} & set(sys.modules)
assert _launch.available() is None
assert "jax_triton" in sys.modules
assert os.environ["TRITON_CACHE_DIR"] == "kept"
"""
    subprocess.run([sys.executable, "-W", "error", "-c", program], check=True)


def test_a_broken_installation_says_how(monkeypatch):
    real = importlib.import_module

    def fail(name, *arguments):
        if name == "jax_triton":
            raise ImportError("needs\nGPU")
        return real(name, *arguments)

    monkeypatch.setattr(importlib, "import_module", fail)
    _launch.available.cache_clear()
    _jax_triton.load.cache_clear()
    try:
        reason = _launch.available()
        assert reason == (
            "jax-triton cannot be imported: ImportError: needs GPU: "
            'pip install --force-reinstall "ejk[triton]"'
        )
        assert isinstance(reason, Mendable), "XLA would run in its place without a word"
        assert _launch.available("cpu") is None
    finally:
        _launch.available.cache_clear()


@pytest.mark.parametrize("is_aligned", [True, False])
def test_pointers_are_specialized_as_triton_does_without_importing_torch(is_aligned):
    """Triton below 3.9 imports torch the first time that it is asked."""
    libtriton = importlib.import_module("triton._C.libtriton")
    triton_lib = importlib.import_module("jax_triton.triton_lib")
    _jax_triton.load()
    backend = triton.compiler.make_backend(triton.backends.compiler.GPUTarget("cuda", 90, 32))
    for dtype in ("bf16", "fp16", "fp32", "i32", "i64"):
        pointer = types.SimpleNamespace(data_ptr=lambda: 16 * is_aligned, dtype=dtype)
        asked = (backend, pointer, False, True, is_aligned)
        ours = triton_lib._triton.native_specialize_impl
        assert ours is not libtriton.native_specialize_impl
        assert ours(*asked) == libtriton.native_specialize_impl(*asked)


@pytest.mark.parametrize("num_seqs, capacity, launches", [(64, 16640, 3), (2, 8448, 2)])
def test_a_plan_for_groups_adds_a_launch_to_its_calls_where_packs_may_pay(
    num_seqs, capacity, launches
):
    """And nothing else: attention, the combination, and what tables agree about."""
    backend = ejk.TritonPageAttention(compute_capability=90, num_sms=132)
    lens, groups = jax.ShapeDtypeStruct((num_seqs,), jnp.int32), jnp.zeros(num_seqs, jnp.int32)
    tables = jax.ShapeDtypeStruct((num_seqs, capacity // 16), jnp.int32)

    def plan(lens, tables):
        return ejk.plan_page_attention(
            lens, num_heads=32, num_kv_heads=8, head_dim=128, page_size=16,
            max_blocks=tables.shape[1], prefix_groups=(groups, jnp.array([4])),
            block_tables=tables, backend=backend,
        )  # fmt: skip

    query = jax.ShapeDtypeStruct((num_seqs, 32, 128), jnp.bfloat16)
    pool = jax.ShapeDtypeStruct((64, 8, 16, 128), jnp.bfloat16)
    text = lower(
        lambda query, pool, lens, tables, plan: ejk.page_attention(
            query, pool, pool, lens, tables, plan=plan, backend=backend
        ),
        query, pool, lens, tables, jax.eval_shape(plan, lens, tables),
    )  # fmt: skip
    assert len(custom_calls(text)) == launches
    assert set(re.findall(r"stablehlo\.(\w+)", text)) <= {
        "constant", "custom_call", "optimization_barrier", "output_operand_alias",
    }  # fmt: skip
