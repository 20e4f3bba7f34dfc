"""Launch Triton kernels from JAX, through jax-triton or the interpreter."""

import functools
import importlib
import inspect
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import jax

from ejk._errors import Mendable
from ejk.backends.triton import _installed, _jax_triton

CUSTOM_CALL_TARGET = "triton_kernel_call_ffi"


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
    """Run a Triton kernel on every index of a one-axis grid.

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
        from ejk.backends.triton.interpreter import call as interpreter

        return interpreter.call(kernel, inputs, outputs, constants, in_place=in_place, grid=grid)

    # Fusing a product and a sum into one instruction changes rounding, so the choice is written
    # out here instead of following a default.
    compiler_options: dict[str, Any] = {"enable_fp_fusion": True}
    if max_registers is not None:
        compiler_options["maxnreg"] = max_registers
    results = _triton_call(
        kernel,
        inputs,
        outputs,
        in_place,
        grid=(grid,),
        num_warps=num_warps,
        num_stages=num_stages,
        compute_capability=compute_capability,
        backend_options=compiler_options,
        **constants,
    )
    kept = [*outputs.values(), *in_place.values()]
    return tuple(None if k is None else result for k, result in zip(kept, results))


def _triton_call(
    kernel: Any,
    inputs: Mapping[str, jax.Array | None],
    outputs: Mapping[str, jax.ShapeDtypeStruct | None],
    in_place: Mapping[str, jax.Array],
    **launch: Any,
) -> Any:
    """Return a result for each of `outputs`, also an absent one, and of `in_place`."""
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
    with warnings.catch_warnings():
        # jax-triton would rather have a mutable reference, which a lowering rule has not got.
        warnings.filterwarnings("ignore", "input_output_aliases", DeprecationWarning)
        results = _jax_triton.load().triton_call(
            *operands,
            *written,
            kernel=kernel,
            name=kernel.fn.__name__,
            input_output_aliases=aliases,
            out_type=result_types,
            **launch,
        )
    return jax.lax.optimization_barrier(results) if aliases else results


@functools.cache
def available(platform: str = "cuda") -> str | None:
    """Say in one line why kernels cannot be launched, or return None if they can.

    Args:
        platform: the one to lower for; "cpu" asks about the interpreter.
    """
    try:
        if reason := _installed.missing(platform):
            return reason
        importlib.import_module("triton")
        if platform != "cpu":
            _jax_triton.load()
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
    function: Callable[..., Any], pointer_names: tuple[str, ...], constant_names: tuple[str, ...]
) -> None:
    """Refuse names that the kernel does not have in this order: jax-triton checks none of it."""
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
