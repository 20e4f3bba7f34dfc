"""The launch of a Mosaic kernel: operands, results and shared memory by name."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.experimental.pallas import mosaic_gpu as plgpu


class Memory(NamedTuple):
    """What a kernel is given, each a `NamedTuple` whose absent entries are None."""

    inputs: Any
    outputs: Any  # types
    shared: Any  # types


def launch(
    kernel: Callable[[Any, Any, Any], None],
    memory: Memory,
    *,
    name: str,
    grid: int,
    warpgroups: int,
    by_lanes: bool = False,
    interpret: bool,
) -> Any:
    """Launch `kernel(inputs, outputs, shared)` once; returns the outputs.

    With `by_lanes`, Pallas lowers operations one by one to those of threads. It infers no layouts
    then, which takes seconds of a large kernel.
    """
    by_name = jax.tree.structure(memory)  # in which what is None is absent
    arrays, results, scratch = map(jax.tree.leaves, memory)

    def body(*refs: Any) -> None:
        kernel(*jax.tree.unflatten(by_name, refs))

    body.__name__ = name
    levels = plgpu.LoweringSemantics
    semantics = levels.Lane if by_lanes else levels.Warpgroup
    launch = plgpu.kernel(
        body,
        out_type=results,
        scratch_types=scratch,
        grid=(grid,),
        grid_names=("program",),
        num_threads=warpgroups,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(
            approx_math=True, unsafe_no_auto_barriers=True, lowering_semantics=semantics
        ),
        interpret=interpreter(interpret),
    )
    return jax.tree.unflatten(jax.tree.structure(memory.outputs), launch(*arrays))


def interpreter(interpret: bool) -> Any:
    """Return what `plgpu.kernel` takes for `interpret`."""
    return plgpu.InterpretGPUParams(detect_races=True) if interpret else False
