"""The interpreter catches what a kernel does wrong, and computes what a kernel does right."""

import threading
import typing
import warnings

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import triton
import triton.language as tl
from triton.runtime.jit import JITFunction

from ejk.backends.triton import _launch
from ejk.backends.triton.interpreter import builder as interpreter_builder
from ejk.backends.triton.interpreter.memory import MemoryAccessError
from ejk.backends.triton.interpreter.patches import initialise_tensor, remembered_block_types
from ejk.testing.interpreter import interpret
from ejk.testing.memory import RaceError, memory_checked


def launch(kernel, inputs, outputs, constants, *, grid=1):
    return _launch.call(
        kernel,
        inputs,
        outputs,
        constants,
        grid=grid,
        num_warps=4,
        num_stages=2,
        compute_capability=None,
        interpret=True,
    )


@triton.jit
@typing.no_type_check
def shift_kernel(
    x_ptr, y_ptr, SIZE: tl.constexpr, SHIFT: tl.constexpr, STRIDE: tl.constexpr, BLOCK: tl.constexpr
):
    offs = tl.program_id(0) * STRIDE + tl.arange(0, BLOCK)
    mask = offs < SIZE
    x = tl.load(x_ptr + offs + SHIFT, mask=mask, other=0.0)
    tl.store(y_ptr + offs, x, mask=mask)


def shift(*, shift=0, stride=8, size=24, input_size=24, output_size=24):
    x = np.arange(input_size, dtype=np.float32)
    y = jax.ShapeDtypeStruct((output_size,), np.float32)
    return interpret(shift_kernel, x, y, size, shift, stride, BLOCK=8, grid=3)["y_ptr"]


def test_clean_kernel_passes():
    with memory_checked() as checker:
        y = shift()
    np.testing.assert_array_equal(y, np.arange(24))
    assert checker.lanes == {("load", "x_ptr"): 24, ("store", "y_ptr"): 24}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shift": 1}, "program 2: load outside 'x_ptr' .* 1 of 8 lanes, the first 4 bytes past"),
        (
            {"shift": -2},
            "program 0: load outside 'x_ptr' .* 2 of 8 lanes, the first 8 bytes before",
        ),
        ({"output_size": 23}, "program 2: store outside 'y_ptr' .* the first 4 bytes past its end"),
        ({"shift": 2**31, "input_size": 0}, "program 0: load outside 'x_ptr'"),
    ],
)
def test_access_outside_a_buffer_is_refused(changes, message):
    with pytest.raises(MemoryAccessError, match=f"shift_kernel, {message}"):
        shift(**changes)


def test_race_is_refused():
    with memory_checked(), pytest.raises(RaceError, match="programs 0 and 1 both store byte 16 of"):
        shift(stride=4)


@triton.jit
@typing.no_type_check
def reverse_kernel(x_ptr, y_ptr, z_ptr, WAITS: tl.constexpr, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + offs, tl.load(x_ptr + offs))
    if WAITS:
        tl.debug_barrier()
    last = (tl.program_id(0) + 1) * BLOCK - 1
    tl.store(z_ptr + offs, tl.load(y_ptr + last - tl.arange(0, BLOCK)))


def test_a_program_waits_for_its_threads_before_it_loads_what_they_stored():
    x, out = np.arange(8, dtype=np.float32), jax.ShapeDtypeStruct((8,), np.float32)
    with memory_checked():
        found = interpret(reverse_kernel, x, out, out, WAITS=True, BLOCK=4, grid=2)
        np.testing.assert_array_equal(found["z_ptr"], [3, 2, 1, 0, 7, 6, 5, 4])
        with pytest.raises(RaceError, match="program 0 loads byte 12 of 'y_ptr', which it has st"):
            interpret(reverse_kernel, x, out, out, WAITS=False, BLOCK=4, grid=2)


@triton.jit
@typing.no_type_check
def far_kernel(x_ptr, id_ptr, y_ptr, STRIDE: tl.constexpr, WIDE: tl.constexpr):
    row = tl.load(id_ptr)
    if WIDE:
        row = row.to(tl.int64)
    tl.store(y_ptr, tl.load(x_ptr + row * STRIDE))


def test_offsets_of_32_bits_are_caught():
    pool = np.zeros(2**31 + 1, np.int8)  # Takes no memory but for the page that is written.
    pool[-1] = 7
    arguments = pool, np.array([2**15], np.int32), jax.ShapeDtypeStruct((1,), np.int8), 2**16
    assert interpret(far_kernel, *arguments, WIDE=True, grid=1)["y_ptr"] == 7
    with pytest.raises(MemoryAccessError, match=f"{2**31} bytes before its start"):
        interpret(far_kernel, *arguments, WIDE=False, grid=1)


@triton.jit
@typing.no_type_check
def misuse_kernel(x_ptr, absent_ptr, y_ptr, MISUSE: tl.constexpr):
    x = tl.load(x_ptr)
    if MISUSE == "store to an input":
        tl.store(x_ptr, x + 1)
    elif MISUSE == "touch what is absent":
        x += tl.load(absent_ptr)
    elif MISUSE == "use lanes masked off":
        x += tl.sum(tl.load(x_ptr + tl.arange(0, 2), mask=tl.arange(0, 2) < 1), 0)
    elif MISUSE == "add to an output":
        x += tl.load(y_ptr)
    if MISUSE != "forget to store":
        tl.store(y_ptr, x)


def misuse(how):
    x, y = np.ones(1, np.float32), jax.ShapeDtypeStruct((1,), np.float32)
    return interpret(misuse_kernel, x, None, y, how, grid=1)["y_ptr"]


def test_store_to_an_input_is_refused():
    message = "misuse_kernel, program 0: store to 'x_ptr', which is an input"
    with pytest.raises(MemoryAccessError, match=message):
        misuse("store to an input")


def test_touch_of_what_is_absent_is_refused():
    """`ejk` hands a kernel a pointer for an operand that it has not got, as jax-triton does."""
    inputs = {"x_ptr": jnp.ones(1), "absent_ptr": None}
    outputs = {"y_ptr": jax.ShapeDtypeStruct((1,), jnp.float32)}
    with pytest.raises(jax.errors.JaxRuntimeError, match="load of 'absent_ptr', which is absent"):
        jax.block_until_ready(
            launch(misuse_kernel, inputs, outputs, {"MISUSE": "touch what is absent"})
        )


@pytest.mark.parametrize("how", ["use lanes masked off", "add to an output", "forget to store"])
def test_misuse_is_poisoned(how):
    assert misuse("nothing") == 1
    assert np.isnan(misuse(how))


def test_error_names_the_kernel_through_jit():
    @jax.jit
    def load_past_the_end(x):
        out = jax.ShapeDtypeStruct((24,), jnp.float32)
        constants = {"SIZE": 24, "SHIFT": 1, "STRIDE": 8, "BLOCK": 8}
        return launch(shift_kernel, {"x_ptr": x}, {"y_ptr": out}, constants, grid=3)

    with pytest.raises(jax.errors.JaxRuntimeError, match="program 2: load outside 'x_ptr'"):
        jax.block_until_ready(load_past_the_end(jnp.zeros(24)))


@triton.jit
@typing.no_type_check
def _twice(x):
    return x * 2


@triton.jit
@typing.no_type_check
def _row_max_of_twice(x):
    return tl.max(_twice(x), axis=1)


@triton.jit
@typing.no_type_check
def dot_kernel(
    a_ptr,
    b_ptr,
    product_ptr,
    max_ptr,
    rounded_ptr,
    M: tl.constexpr,
    K: tl.constexpr,
    N: tl.constexpr,
):
    offs_m, offs_n = tl.arange(0, M), tl.arange(0, N)
    acc = tl.zeros([M, N], dtype=tl.float32)
    for start in tl.range(0, K, 16):
        offs_k = start + tl.arange(0, 16)
        a = tl.load(a_ptr + offs_m[:, None] * K + offs_k[None, :])
        b = tl.load(b_ptr + offs_k[:, None] * N + offs_n[None, :])
        acc = tl.dot(a, b, acc)
    offs_out = offs_m[:, None] * N + offs_n[None, :]
    tl.store(product_ptr + offs_out, acc)
    tl.store(max_ptr + offs_m, _row_max_of_twice(acc))
    tl.store(rounded_ptr + offs_out, acc.to(rounded_ptr.dtype.element_ty))


@pytest.mark.parametrize(
    "dtype", ["float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"]
)
def test_dot_and_nested_functions_inside_jit(dtype):
    m, k, n = 16, 32, 8
    generator = np.random.default_rng(0)
    a, b = (generator.normal(size=shape).astype(dtype) for shape in [(m, k), (k, n)])

    @jax.jit
    def compute(a, b):
        outputs = {
            "product_ptr": jax.ShapeDtypeStruct((m, n), jnp.float32),
            "max_ptr": jax.ShapeDtypeStruct((m,), jnp.float32),
            "rounded_ptr": jax.ShapeDtypeStruct((m, n), dtype),
        }
        constants = {"M": m, "K": k, "N": n}
        return launch(dot_kernel, {"a_ptr": a * 1, "b_ptr": b}, outputs, constants)

    with memory_checked():
        product, row_max, rounded = map(np.asarray, compute(a, b))
    expected = a.astype(np.float64) @ b.astype(np.float64)
    np.testing.assert_allclose(product, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(row_max, 2 * product.max(1))
    largest = float(ml_dtypes.finfo(dtype).max)
    nearest = np.clip(product, -largest, largest).astype(dtype)
    np.testing.assert_array_equal(rounded.astype(np.float32), nearest.astype(np.float32))


@triton.jit
@typing.no_type_check
def narrow_kernel(x_ptr, sum_ptr, less_ptr, SIZE: tl.constexpr):
    offs = tl.arange(0, SIZE)
    x = tl.load(x_ptr + offs)
    tl.store(sum_ptr + offs, -x + x * x)
    tl.store(less_ptr + offs, x < 0)


def test_bfloat16_arithmetic():
    x = np.array([-3.0, 1.0, 1.9921875, 0.0], ml_dtypes.bfloat16)
    outputs = (jax.ShapeDtypeStruct((4,), dtype) for dtype in (x.dtype, bool))
    total, less = interpret(narrow_kernel, x, *outputs, 4, grid=1).values()
    np.testing.assert_array_equal(total.astype(np.float32), (-x + x * x).astype(np.float32))
    np.testing.assert_array_equal(less, x < 0)


@triton.jit
@typing.no_type_check
def copy_kernel(x_ptr, y_ptr, empty_ptr, SIZE: tl.constexpr):
    offs = tl.arange(0, SIZE)
    tl.store(y_ptr + offs, tl.load(x_ptr + offs))


@triton.jit
@typing.no_type_check
def narrow_sum_kernel(x_ptr, y_ptr):
    tl.store(y_ptr, tl.sum(tl.load(x_ptr + tl.arange(0, 4)), 0))


def test_sum_of_bits_is_refused():
    x = np.ones(4, ml_dtypes.bfloat16)
    with pytest.raises(NotImplementedError, match="a reduction of bf16: convert to float32 first"):
        interpret(narrow_sum_kernel, x, jax.ShapeDtypeStruct((1,), np.float32), grid=1)


# JAX has no 64-bit types by default.
DTYPES = [dtype for dtype in interpreter_builder.TRITON_TYPES if np.dtype(dtype).itemsize < 8]


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_type_passes_through_jit(dtype):
    @jax.jit
    def copy(x):
        y = jax.ShapeDtypeStruct((8,), dtype)
        empty = jax.ShapeDtypeStruct((0, 3), dtype)
        return launch(copy_kernel, {"x_ptr": x}, {"y_ptr": y, "empty_ptr": empty}, {"SIZE": 8})

    x = (np.arange(8) % 2).astype(dtype)
    y, empty = map(np.asarray, copy(x))
    assert y.dtype == x.dtype
    assert empty.shape == (0, 3)
    np.testing.assert_array_equal(y.view(np.uint8), x.view(np.uint8))


def test_kernel_may_be_a_closure():
    @triton.jit
    @typing.no_type_check
    def add_one(x):
        return x + 1

    @triton.jit
    @typing.no_type_check
    def kernel(x_ptr, y_ptr):
        tl.store(y_ptr, add_one(tl.load(x_ptr)))

    y = jax.ShapeDtypeStruct((1,), np.int32)
    assert interpret(kernel, np.ones(1, np.int32), y, grid=1)["y_ptr"] == 2


def test_triton_is_restored():
    state = [dict(vars(owner)) for owner in (tl, tl.core, tl.tensor, JITFunction)]
    names = set(globals())
    shift()
    with pytest.raises(MemoryAccessError):
        shift(shift=1)
    assert state == [dict(vars(owner)) for owner in (tl, tl.core, tl.tensor, JITFunction)]
    assert names == set(globals())
    with pytest.raises(RuntimeError):
        _twice(1)


@pytest.mark.parametrize("element", [tl.bfloat16, tl.pointer_type(tl.int8)], ids=str)
@pytest.mark.parametrize("shape", [(), (4,), (16, 8)], ids=str)
def test_what_is_remembered_of_tensors_is_what_triton_makes(element, shape):
    """An attribute that another Triton adds must not be missing while a kernel is interpreted."""

    def made(kind, initialise, *arguments):
        made = object.__new__(kind)
        initialise(made, *arguments)
        return {name: (type(value), repr(value)) for name, value in vars(made).items()}

    kind = tl.block_type(element, [*shape]) if shape else element
    handle = object()
    sound = made(tl.tensor, tl.tensor.__init__, handle, kind)
    assert made(tl.tensor, initialise_tensor, handle, kind) == sound
    if shape:
        remembered = remembered_block_types(tl.block_type.__init__)
        for _ in ("made", "remembered"):
            again = made(tl.block_type, remembered, element, [tl.constexpr(n) for n in shape])
            assert again == made(tl.block_type, tl.block_type.__init__, element, [*shape])


def test_many_threads_interpret_at_once():
    size = 1 << 18  # Large enough for JAX to copy operands on another thread.

    def compute(x):
        out = jax.ShapeDtypeStruct((size,), jnp.float32)
        constants = {"SIZE": size, "SHIFT": 0, "STRIDE": size, "BLOCK": size}
        return launch(shift_kernel, {"x_ptr": x + 1}, {"y_ptr": out}, constants)[0] * 2

    compute = jax.jit(compute)
    results = {}

    def work(number):
        results[number] = np.asarray(compute(jnp.full(size, number, jnp.float32)))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, result in results.items():
        np.testing.assert_array_equal(result, 2.0 * (number + 1))


def test_nan_in_a_maximum_is_no_warning():
    @triton.jit
    @typing.no_type_check
    def kernel(x_ptr, y_ptr):
        tl.store(y_ptr, tl.max(tl.load(x_ptr + tl.arange(0, 4)), 0))

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        x, y = np.full(4, np.nan, np.float32), jax.ShapeDtypeStruct((1,), np.float32)
        assert np.isnan(interpret(kernel, x, y, grid=1)["y_ptr"])


def test_equal_launches_compile_once():
    constants = {"SIZE": 8, "SHIFT": 0, "STRIDE": 8, "BLOCK": 8}

    @jax.jit
    def compute(x):
        out = jax.ShapeDtypeStruct((8,), jnp.float32)
        return launch(shift_kernel, {"x_ptr": x}, {"y_ptr": out}, constants)

    first, second = (str(jax.make_jaxpr(compute)(jnp.zeros(8))) for _ in range(2))
    assert first == second


@pytest.mark.parametrize(
    ("inputs", "constants", "message"),
    [
        (["y_ptr"], ["SIZE", "SHIFT", "STRIDE", "BLOCK"], "the pointers of shift_kernel"),
        (["x_ptr"], ["SIZE", "SHIFT", "STRIDE"], r"missing=\['BLOCK'\]"),
        (["x_ptr"], ["SIZE", "SHIFT", "STRIDE", "BLOCK", "X"], r"unknown=\['X'\]"),
    ],
)
def test_names_must_match_the_signature(inputs, constants, message):
    out = jax.ShapeDtypeStruct((8,), jnp.float32)
    with pytest.raises(TypeError, match=message):
        launch(
            shift_kernel,
            dict.fromkeys(inputs, jnp.zeros(8)),
            {"y_ptr": out},
            dict.fromkeys(constants, 8),
        )
