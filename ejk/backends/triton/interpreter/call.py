"""Run Triton kernels on the CPU, inside `jax.jit`, with Triton's own interpreter.

`memory` checks every access, `builder` computes, and `patches` makes Triton interpret for the
length of a launch.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental.buffer_callback import buffer_callback

from ejk.backends.triton.interpreter.builder import builder, number, pointer
from ejk.backends.triton.interpreter.grids import Grid, programs
from ejk.backends.triton.interpreter.memory import Memory, poison
from ejk.backends.triton.interpreter.patches import interpretable, triton_interprets

__all__ = ["call", "number", "run"]


def call(
    kernel: Any,
    inputs: Mapping[str, jax.Array | None],
    outputs: Mapping[str, jax.ShapeDtypeStruct | None],
    constants: Mapping[str, int | float | bool | str | None],
    *,
    in_place: Mapping[str, jax.Array],
    grid: int,
) -> tuple[Any, ...]:
    """Interpret a kernel as a JAX operation on the CPU platform.

    `_launch.call` describes the arguments. What the interpreter raises arrives, as text, in the
    `jax.errors.JaxRuntimeError` of whoever waits for the result.
    """
    launch = _Launch(
        kernel.fn,
        tuple((name, value is not None) for name, value in inputs.items()),
        tuple((name, value is not None) for name, value in outputs.items()),
        tuple(in_place),
        tuple((name, type(value), value) for name, value in constants.items()),
        grid,
    )
    present = [value for value in inputs.values() if value is not None]
    results = [value for value in outputs.values() if value is not None]
    results += [jax.ShapeDtypeStruct(value.shape, value.dtype) for value in in_place.values()]
    # `jax.pure_callback` hands over JAX arrays that may still be on their way, and waiting for them
    # in the callback takes the thread that would bring them: with JAX 0.10 on two cores it hangs.
    # Buffers are there when the callback starts, and are not copied.
    written = iter(buffer_callback(launch, tuple(results))(*present, *in_place.values()))
    kept = (*outputs.values(), *in_place.values())
    return tuple(None if value is None else next(written) for value in kept)


@dataclasses.dataclass(frozen=True)
class _Launch:
    """The callback of a launch. JAX compares it by value, so equal launches compile once."""

    function: Callable[..., None]
    inputs: tuple[tuple[str, bool], ...]
    outputs: tuple[tuple[str, bool], ...]
    in_place: tuple[str, ...]
    constants: tuple[tuple[str, type, Any], ...]  # With the type, for 1 == 1.0 == True.
    grid: int

    def __call__(self, context: Any, results: Sequence[Any], *operands: Any) -> None:
        present, written = map(np.asarray, operands), map(np.asarray, results)
        inputs = {name: next(present) if given else None for name, given in self.inputs}
        outputs = {name: next(written) if given else None for name, given in self.outputs}
        for output in outputs.values():
            if output is not None:
                output[...] = poison(output.dtype)
        in_place = {name: next(written) for name in self.in_place}
        for array, before in zip(in_place.values(), present):
            array[...] = before
        constants = {name: value for name, _, value in self.constants}
        run(self.function, inputs, outputs, constants, in_place=in_place, grid=(self.grid, 1, 1))


def run(
    function: Callable[..., None],
    inputs: Mapping[str, np.ndarray | None],
    outputs: Mapping[str, np.ndarray | None],
    constants: Mapping[str, Any],
    *,
    in_place: Mapping[str, np.ndarray],
    grid: Grid,
) -> None:
    """Interpret a kernel on NumPy arrays.

    Args:
        function: the Python function that `triton.jit` decorates.
        inputs: what its pointer parameters point to; an access to one that is None is an error.
            Never written.
        outputs: C-contiguous arrays that it writes. As they are, not poisoned; None as for inputs.
        constants: its other parameters: compile-time constants and numbers.
        in_place: C-contiguous arrays that it reads and writes.
        grid: number of programs on each axis; `grids` says in which order they run.

    Raises:
        MemoryAccessError: if the kernel reads or writes outside its arrays, or writes to an input.
        DeadlockError: if a program waits for one that runs after it.
    """
    with triton_interprets(), np.errstate(all="ignore"):  # A GPU raises no floating-point traps.
        memory = Memory(function.__name__, inputs, in_place, outputs, grid)
        pointers = {
            name: pointer(memory.addresses[name], None if array is None else array.dtype)
            for name, array in (*inputs.items(), *in_place.items(), *outputs.items())
        }
        program = interpretable(function)
        with builder.launch(memory, grid):
            for index, position in programs(grid):
                builder.begin_program(index, position)
                program(**pointers, **constants)
