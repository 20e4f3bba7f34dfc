"""The one file that knows jax-triton from inside, of its 0.4 line, and mends it.

What it substitutes is private to jax-triton, and holds for the process: calls of other libraries
pass through. `tests/backends/test_triton_internals.py` asks the installed versions for it.
"""

import contextlib
import functools
import importlib
import os
import types
from collections.abc import Generator
from typing import Any

from ejk import _jax
from ejk.backends.triton import _compiled

# CU_TENSOR_MAP_DATA_TYPE_TFLOAT32 of the CUDA driver API.
_TMA_TF32 = 11


@functools.cache
def load() -> Any:
    """Import jax-triton with its known faults mended."""
    with _environment_variable_kept("TRITON_CACHE_DIR"), _tma_constant():
        jax_triton = importlib.import_module("jax_triton")
        triton_lib = importlib.import_module("jax_triton.triton_lib")
    # JAX 0.12 passes a third argument, which jax-triton 0.4.1 does not take.
    _jax.drop_dead_code_rule(triton_lib.triton_kernel_call_p)
    _keep_compiler_and_interpreter_apart(triton_lib)
    _compile_for_running(triton_lib)
    _specialize_without_torch(triton_lib)
    _pass_8_bit_floats_as_bytes(triton_lib)
    return jax_triton


@contextlib.contextmanager
def _environment_variable_kept(name: str) -> Generator[None]:
    """Undo what importing jax-triton does to a variable of Triton's: it deletes or empties it."""
    value = os.environ.get(name)
    try:
        yield
    finally:
        if value is not None:
            os.environ[name] = value
        else:
            os.environ.pop(name, None)


@contextlib.contextmanager
def _tma_constant() -> Generator[None]:
    """Lend Triton's driver a name that jax-triton imports from it.

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
    """Make a compilation wait for kernels that another thread interprets.

    For the length of a launch the interpreter replaces the functions of `triton.language`, which
    the compiler reads.
    """
    from ejk.backends.triton.interpreter.patches import triton_language_lock

    compile_kernel = triton_lib.TritonFunction.get_or_create_kernel

    @functools.wraps(compile_kernel)
    def compile_alone(*args: Any, **kwargs: Any) -> Any:
        with triton_language_lock:
            return compile_kernel(*args, **kwargs)

    triton_lib.TritonFunction.get_or_create_kernel = compile_alone


def _compile_for_running(triton_lib: Any) -> None:
    """Compile our kernels unless they are on disk, and without what debuggers read.

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

    def make_lean_kernel(
        name: str, warps: int, ctas: int, shared_memory: int, binary: Any, ttir: str, *rest: Any
    ) -> Any:
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
    """Keep Triton from importing torch, which takes seconds, when a first kernel is compiled.

    Triton below 3.9 imports torch, where it is installed, to tell a tensor of torch's from other
    arguments. jax-triton asks for nothing but pointers, which Triton's backend answers as well.
    """

    def specialize_pointer(
        backend: Any, pointer: Any, is_const: bool, do_specialize: bool, is_aligned: bool
    ) -> tuple[str, Any]:
        return f"*{pointer.dtype}", backend.get_tensor_specialization(pointer, align=is_aligned)

    names = vars(triton_lib._triton) | {"native_specialize_impl": specialize_pointer}
    triton_lib._triton = types.SimpleNamespace(**names)


def _pass_8_bit_floats_as_bytes(triton_lib: Any) -> None:
    """Declare pointers to 8-bit floats as pointers to bytes, which are what our kernels take.

    Triton refuses a pointer to float8_e4m3fn below sm_89, whatever a kernel does with it.
    """
    compile_kernel = triton_lib.TritonFunction.get_or_create_kernel

    @functools.wraps(compile_kernel)
    def compile_for_bytes(
        self: Any, make_target: Any, platform: Any, args: Any, kinds: Any, **kwargs: Any
    ) -> Any:
        if self.fn.__module__.startswith("ejk."):
            kinds = ["*u8" if kind.startswith("*fp8") else kind for kind in kinds]
        return compile_kernel(self, make_target, platform, args, kinds, **kwargs)

    triton_lib.TritonFunction.get_or_create_kernel = compile_for_bytes
