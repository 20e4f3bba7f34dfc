"""jax-triton and Triton still have what is used of their internals, and what is replaced in them.

What is replaced by name would be missed in silence: a method that Triton calls otherwise now is one
that the interpreter no longer overrides.
"""

import importlib
import importlib.metadata

import pytest

pytestmark = [pytest.mark.fast, pytest.mark.usefixtures("jax_triton")]

INTERNALS = {
    "jax_triton.triton_lib": [
        "CompilationResult",
        "TritonFunction._compile_kernel",
        "TritonFunction.get_or_create_kernel",
        "_triton.native_specialize_impl",
        "compile_ttir_inplace",
        "triton_kernel_call_lib.TritonKernel",
        "triton_kernel_call_p",
    ],
    "triton.knobs": [
        "compilation.always_compile",
        "compilation.disable_line_info",
        "compilation.scope",
    ],
    "triton.runtime.cache": ["get_cache_manager"],
    "triton._C.libtriton": [
        "get_cache_invalidating_env_vars",
        "ir.ROUNDING_MODE.RTNE",
    ],
    "triton.language": ["block_type.__init__", "tensor.__init__"],
    "triton.language.semantic": ["TritonSemantic"],
    "triton.runtime.jit": ["JITFunction.__call__"],
    "triton.runtime.interpreter": [
        "FunctionRewriter._compile_and_exec",
        "FunctionRewriter.rewrite_ast",
        "InterpretedFunction.__call__",
        "ReduceOps.min_max",
        "ReduceScanOpInterface.check_axis",
        "ReduceScanOpInterface.check_tensor",
        "TensorHandle.get_element_ty",
        "_get_np_dtype",
        "_patch_lang",
        "interpreter_builder",
        "interpreter_semantic",
    ],
}


def has(module, path):
    value = importlib.import_module(module)
    for name in path.split("."):
        if not hasattr(value, name):
            return False
        value = getattr(value, name)
    return True


def of_version(module):
    package = module.partition(".")[0].replace("_", "-")
    return f"{package} {importlib.metadata.version(package)}"


@pytest.mark.parametrize("module", INTERNALS)
def test_internals_are_there(module):
    missing = [path for path in INTERNALS[module] if not has(module, path)]
    assert not missing, f"{of_version(module)} has no {module}.{missing}"


def test_what_the_builder_overrides_is_there():
    from triton.runtime.interpreter import InterpreterBuilder

    from ejk.backends.triton.interpreter.builder import builder

    own = {"launch", "begin_program", "_active", "_atomic"}
    own |= {f"create_atomic_{name}" for name in ("load", "store", "poll")}  # from 3.9 on
    overridden = {name for name, value in vars(type(builder)).items() if callable(value)} - own
    missing = sorted(name for name in overridden if not hasattr(InterpreterBuilder, name))
    assert {"cast_impl", "create_masked_load"} < overridden
    assert not missing, f"{of_version('triton')} has no InterpreterBuilder.{missing}"
