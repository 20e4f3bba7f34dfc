"""Launches Triton kernels from JAX: the one file that knows jax-triton, of its 0.4 line."""

import contextlib
import functools
import importlib
import inspect
import os
import types
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import jax

from ejk import _jax
from ejk._errors import Mendable
from ejk.backends.triton import _compiled, _installed

CUSTOM_CALL_TARGET = "triton_kernel_call_ffi"

# CU_TENSOR_MAP_DATA_TYPE_TFLOAT32 of the CUDA driver API.
_TMA_TF32 = 11


def call(
    kernel: Any,
    inputs: Mapping[str, jax.Array | None],
    outputs: Mapping[str, jax.ShapeDtypeStruct | None],
    constants: Mapping[str, int | float | bool | str | None],
    *,
    in_place: Mapping[str, jax.Array] | None = None,
    grid: int,
    num_warps: int,
    num_stages: int,
    max_registers: int | None = None,
    compute_capability: int | None,
    interpret: bool,
) -> tuple[Any, ...]:
    """Runs a Triton kernel on every index of a one-axis grid.

    The kernel's parameters are pointers to the inputs, then pointers to the outputs, then its
    compile-time constants. There are no runtime scalars: jax-triton tells the compiler nothing
    about the divisibility of one, and a stride of unknown divisibility costs every wide load.

    Args:
      kernel: a function decorated with `triton.jit`.
      inputs: the kernel's leading parameters, in order. None is an input that is absent: the
        kernel gets a pointer that it must not touch, and a constant must tell it so.
      outputs: the parameters that follow, in order. Their memory is not initialised. None is an
        output that is absent.
      constants: every `tl.constexpr` parameter without a default.
      in_place: parameters between inputs and outputs that the kernel reads and writes.
      grid: number of programs, from 1 to 2**31 - 1.
      num_warps: warps a program runs on.
      num_stages: depth of the software pipeline.
      max_registers: of a thread, on an NVIDIA GPU; the compiler's choice if None.
      compute_capability: 90 for sm_90; the capability of the machine's GPU if None.
      interpret: runs the kernel on the CPU with Triton's interpreter.

    Returns:
      One array for each entry of `outputs`, in order, then one for each of `in_place`.

    Raises:
      TypeError: if the names do not match the kernel's signature.
    """
    in_place = in_place or {}
    _check_signature(kernel.fn, (*inputs, *in_place, *outputs), tuple(constants))
    assert 1 <= grid < 2**31, f"{grid=} must be in [1, 2**31)"
    if interpret:
        from ejk.backends.triton import _interpret

        return _interpret.call(kernel, inputs, outputs, constants, in_place=in_place, grid=grid)

    present = [value for value in inputs.values() if value is not None]
    operands = [present[0] if value is None else value for value in inputs.values()]
    # An output that is absent still has its place among the results: an input's pointer there
    # would come after those of outputs, and jaxlib hands buffers out inputs first.
    absent = jax.ShapeDtypeStruct((1,), "float32")
    result_types = [absent if value is None else value for value in outputs.values()]
    result_types += [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in in_place.values()]
    aliases = {len(inputs) + i: len(outputs) + i for i in range(len(in_place))}
    # XLA from jaxlib 0.11 on lets a kernel read a slice of an array, or write one, where it lies,
    # and forgets that a result has to lie where its operand does: a loop's stacked results were
    # never written. Behind a barrier it sees no slice, and still makes no copy.
    written = tuple(in_place.values())
    if aliases:
        written = jax.lax.optimization_barrier(written)
    # Fusing a product and a sum into one instruction changes rounding, so the choice is written
    # out here instead of following a default.
    compiler_options: dict[str, Any] = {"enable_fp_fusion": True}
    if max_registers is not None:
        compiler_options["maxnreg"] = max_registers
    with warnings.catch_warnings():
        # jax-triton would rather have a mutable reference, which a lowering rule has not got.
        warnings.filterwarnings("ignore", "input_output_aliases", DeprecationWarning)
        results = _import_jax_triton().triton_call(
            *operands,
            *written,
            kernel=kernel,
            grid=(grid,),
            name=kernel.fn.__name__,
            num_warps=num_warps,
            num_stages=num_stages,
            compute_capability=compute_capability,
            input_output_aliases=aliases,
            out_type=result_types,
            backend_options=compiler_options,
            **constants,
        )
    if aliases:
        results = jax.lax.optimization_barrier(results)
    kept = [*outputs.values(), *in_place.values()]
    return tuple(None if k is None else result for k, result in zip(kept, results))


@functools.cache
def available(platform: str = "cuda") -> str | None:
    """Says in one line why kernels cannot be launched, or returns None if they can.

    Args:
      platform: the one to lower for; "cpu" asks about the interpreter.
    """
    try:
        if reason := _installed.missing(platform):
            return reason
        importlib.import_module("triton")
        if platform != "cpu":
            _import_jax_triton()
    except Exception as error:  # What a broken installation raises cannot be listed.
        broken = "triton" if platform == "cpu" else "jax-triton"
        said = " ".join(str(error).split())
        return Mendable(
            f"{broken} cannot be imported: {type(error).__name__}: {said}",
            'pip install --force-reinstall "ejk[triton]"',
        )
    return None


@functools.cache
def _check_signature(
    function: Any, pointer_names: tuple[str, ...], constant_names: tuple[str, ...]
) -> None:
    """Refuses names that the kernel does not have in this order: jax-triton checks none of it."""
    parameters = inspect.signature(function).parameters
    names = tuple(parameters)
    pointers, rest = names[: len(pointer_names)], names[len(pointer_names) :]
    if pointers != pointer_names:
        raise TypeError(
            f"the pointers of {function.__name__} are {pointers}, but {pointer_names} were given"
        )
    if not_constant := [n for n in rest if "constexpr" not in str(parameters[n].annotation)]:
        raise TypeError(f"{function.__name__} needs {not_constant} to be tl.constexpr")
    unknown = sorted(set(constant_names) - set(rest))
    required = {n for n in rest if parameters[n].default is inspect.Parameter.empty}
    missing = sorted(required - set(constant_names))
    if unknown or missing:
        raise TypeError(f"constants of {function.__name__}: {missing=}, {unknown=}")


@functools.cache
def _import_jax_triton() -> Any:
    """Imports jax-triton with its known faults mended."""
    with _environment_variable_kept("TRITON_CACHE_DIR"), _tma_constant():
        jax_triton = importlib.import_module("jax_triton")
        triton_lib = importlib.import_module("jax_triton.triton_lib")
    # JAX 0.12 passes a third argument, which jax-triton 0.4.1 does not take.
    _jax.drop_dead_code_rule(triton_lib.triton_kernel_call_p)
    _keep_compiler_and_interpreter_apart(triton_lib)
    _compile_for_running(triton_lib)
    _specialize_without_torch(triton_lib)
    return jax_triton


@contextlib.contextmanager
def _environment_variable_kept(name: str) -> Iterator[None]:
    """jax-triton deletes or empties a variable of Triton's; importing must change nothing."""
    value = os.environ.get(name)
    try:
        yield
    finally:
        if value is not None:
            os.environ[name] = value
        else:
            os.environ.pop(name, None)


@contextlib.contextmanager
def _tma_constant() -> Iterator[None]:
    """Lends Triton's driver a name that jax-triton imports from it.

    Triton 3.6 has not got it, and jax-triton takes the ImportError for a machine without NVIDIA's
    backend: every call then fails.
    """
    driver = importlib.import_module("triton.backends.nvidia.driver")
    if hasattr(driver, "TMA_TF32"):
        yield
        return
    driver.TMA_TF32 = _TMA_TF32  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        del driver.TMA_TF32  # pyright: ignore[reportAttributeAccessIssue]


def _keep_compiler_and_interpreter_apart(triton_lib: Any) -> None:
    """Makes a compilation wait for kernels that another thread interprets.

    For the length of a launch the interpreter replaces the functions of `triton.language`, which
    the compiler reads.
    """
    from ejk.backends.triton._interpreter_patches import triton_language_lock

    compile_kernel = triton_lib.TritonFunction.get_or_create_kernel

    @functools.wraps(compile_kernel)
    def compile_alone(*args: Any, **kwargs: Any) -> Any:
        with triton_language_lock:
            return compile_kernel(*args, **kwargs)

    triton_lib.TritonFunction.get_or_create_kernel = compile_alone


def _compile_for_running(triton_lib: Any) -> None:
    """Compiles our kernels unless they are on disk, and without what debuggers read.

    Line numbers and Triton's intermediate program are two thirds of what a call carries, and XLA
    handles all that a call carries in every run: on an H100 with jax 0.11.2, 20 KB more cost a
    kernel 3.7 us of the host's time.
    """
    knobs = importlib.import_module("triton").knobs
    library = triton_lib.triton_kernel_call_lib
    make_kernel = library.TritonKernel
    compile_kernel = triton_lib.TritonFunction._compile_kernel
    compile_module = triton_lib.compile_ttir_inplace
    compile_or_load = _compiled.kept_on_disk(compile_module, triton_lib.CompilationResult)

    def make_lean_kernel(name, warps, ctas, shared_memory, binary, ttir, *rest):
        return make_kernel(name, warps, ctas, shared_memory, binary, "", *rest)

    @functools.wraps(compile_kernel)
    def compile_lean(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not self.fn.__module__.startswith("ejk."):
            return compile_kernel(self, *args, **kwargs)
        with knobs.compilation.scope():
            knobs.compilation.disable_line_info = True
            library.TritonKernel = make_lean_kernel
            triton_lib.compile_ttir_inplace = compile_or_load
            try:
                return compile_kernel(self, *args, **kwargs)
            finally:
                library.TritonKernel = make_kernel
                triton_lib.compile_ttir_inplace = compile_module

    triton_lib.TritonFunction._compile_kernel = compile_lean


def _specialize_without_torch(triton_lib: Any) -> None:
    """Keeps Triton from importing torch, which takes seconds, when a first kernel is compiled.

    Triton below 3.9 imports torch, where it is installed, to tell a tensor of torch's from other
    arguments. jax-triton asks for nothing but pointers, which Triton's backend answers as well.
    """

    def specialize_pointer(backend, pointer, is_const, do_specialize, is_aligned):
        return f"*{pointer.dtype}", backend.get_tensor_specialization(pointer, align=is_aligned)

    names = vars(triton_lib._triton) | {"native_specialize_impl": specialize_pointer}
    triton_lib._triton = types.SimpleNamespace(**names)
