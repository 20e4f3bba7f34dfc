"""Runs any Triton kernel on NumPy arrays, on the CPU, with every access checked."""

import inspect
from collections.abc import Callable, Collection
from typing import Any

import jax
import numpy as np

from ejk.backends.triton import _launch
from ejk.backends.triton.interpreter import grids
from ejk.backends.triton.interpreter.memory import poisoned

# What `kernel[grid](...)` takes besides the kernel's parameters: it changes speed alone.
_LAUNCH_OPTIONS = {"num_warps", "num_stages", "num_ctas", "maxnreg"}


def interpret(
    kernel: Any,
    *arguments: Any,
    grid: int | tuple[Any, ...] | Callable[[dict[str, Any]], tuple[Any, ...]],
    in_place: Collection[str] = (),
    **named: Any,
) -> dict[str, np.ndarray]:
    """Run a Triton kernel on NumPy arrays, on the CPU, and return what it stored.

    Arguments are passed as in `kernel[grid](...)`, but for what the kernel writes: an output is a
    shape and a dtype, and an array is an input unless `in_place` names it. Nothing is compiled. An
    access outside the arrays is an error; under `ejk.testing.memory_checked` so are races and
    loads of what nobody stored, and under `ejk.testing.shuffled` programs run in another order.

    Args:
        kernel: a function decorated with `triton.jit`; or with `triton.autotune` around that, and
            then what it would tune is an argument like others.
        arguments: the kernel's arguments, in its order. An array of NumPy or JAX, C-contiguous, is
            an input. `jax.ShapeDtypeStruct(shape, dtype)` is an output: it starts as poison, NaN or
            an extreme integer. Numbers, None, and whatever a `tl.constexpr` is, are themselves.
        grid: programs on each of one to three axes, or a function of all arguments by name.
        in_place: names of parameters that the kernel reads and writes. Their arguments are NumPy
            arrays, which are changed.
        named: arguments by the names of the kernel's parameters. `num_warps`, `num_stages`,
            `num_ctas` and `maxnreg` change nothing.

    Returns:
        The outputs and the arrays of `in_place`, by name, in the kernel's order.

    Raises:
        ImportError: if Triton is not installed.
        TypeError: for an argument that is missing, unknown, or of none of these kinds.
        ValueError: for an array that is not contiguous or shares memory with one that is changed,
            an empty grid, or a kernel that has nothing to store to.
        ejk.testing.MemoryAccessError: if the kernel loads or stores outside its arrays, or stores
            to an input.
        ejk.testing.DeadlockError: if a program waits for one that runs later. Programs run one
            after another, each to its end.

    Examples:
        >>> import jax, numpy as np, triton, triton.language as tl
        >>> @triton.jit
        ... def double(x_ptr, y_ptr, SIZE: tl.constexpr):
        ...     offs = tl.arange(0, SIZE)
        ...     tl.store(y_ptr + offs, 2 * tl.load(x_ptr + offs))
        >>> y = jax.ShapeDtypeStruct((4,), np.float32)
        >>> interpret(double, np.ones(4, np.float32), y, SIZE=4, grid=1)
        {'y_ptr': array([2., 2., 2., 2.], dtype=float32)}
    """
    if reason := _launch.available("cpu"):
        raise ImportError(reason)
    from ejk.backends.triton.interpreter import call  # Triton, which not everybody has

    function = kernel
    while hasattr(function, "fn"):  # triton.jit, and triton.autotune and triton.heuristics around
        function = function.fn
    values = _bind(function, arguments, named, in_place)
    inputs, outputs, changed, constants = {}, {}, {}, {}
    for name, value in values.items():
        if "constexpr" in str(inspect.signature(function).parameters[name].annotation):
            constants[name] = getattr(value, "value", value)
        elif name in in_place:
            changed[name] = value
        elif isinstance(value, jax.ShapeDtypeStruct):
            outputs[name] = poisoned(value.shape, np.dtype(value.dtype))
        elif isinstance(value, np.ndarray | jax.Array):
            inputs[name] = np.asarray(value)
        elif value is None:
            constants[name] = None
        elif isinstance(value, bool | int | float | np.generic):
            constants[name] = call.number(value)
        else:
            raise TypeError(
                f"{name} must be an array, jax.ShapeDtypeStruct(shape, dtype) for an output, a "
                f"number or None, not {type(value).__name__}"
            )
    _check_arrays(function.__name__, inputs, outputs, changed)
    axes = _grid(grid(values) if callable(grid) else grid)
    call.run(function, inputs, outputs, constants, in_place=changed, grid=axes)
    stored = changed | outputs
    return {name: stored[name] for name in values if name in stored}


def _bind(
    function: Callable[..., None],
    arguments: tuple[Any, ...],
    named: dict[str, Any],
    in_place: Collection[str],
) -> dict[str, Any]:
    """Return the argument of each parameter of a kernel, its defaults included."""
    signature = inspect.signature(function)
    options = _LAUNCH_OPTIONS - {*signature.parameters}
    named = {name: value for name, value in named.items() if name not in options}
    try:
        bound = signature.bind(*arguments, **named)
    except TypeError as error:
        raise TypeError(f"{function.__name__}{signature}: {error}") from None
    bound.apply_defaults()
    for name in in_place:
        if not isinstance(value := bound.arguments.get(name), np.ndarray):
            raise TypeError(
                f"in_place names {name!r}, which must be a NumPy array among the arguments, not "
                f"{type(value).__name__}"
            )
    return bound.arguments


def _check_arrays(
    kernel: str,
    inputs: dict[str, np.ndarray],
    outputs: dict[str, np.ndarray],
    changed: dict[str, np.ndarray],
) -> None:
    """Refuse what the kernel would not see as the caller does."""
    if not changed and not outputs:
        raise ValueError(
            f"{kernel} has nothing to store to: pass jax.ShapeDtypeStruct(shape, dtype) for an "
            "output, or name an array in `in_place`"
        )
    arrays = inputs | changed
    for name, array in arrays.items():
        if not array.flags.c_contiguous:
            raise ValueError(
                f"{name} has strides {array.strides}, and must be C-contiguous: pass "
                "np.ascontiguousarray of it, and the strides of that"
            )
    for name, array in changed.items():
        if not array.flags.writeable:
            raise ValueError(
                f"{name} is changed in place, and is read-only, as what JAX hands over is: pass "
                "np.array of it"
            )
        for other in arrays.keys() - {name}:
            if np.may_share_memory(array, arrays[other]):
                raise ValueError(f"{name} is changed in place, and shares memory with {other}")


def _grid(grid: Any) -> grids.Grid:
    axes = grid if isinstance(grid, tuple | list) else (grid,)
    if not 1 <= len(axes) <= 3 or any(int(axis) != axis or axis < 1 for axis in axes):
        raise ValueError(f"{grid=} must be one to three integers of 1 or more")
    x, y, z = (*(int(axis) for axis in axes), 1, 1)[:3]
    return x, y, z
