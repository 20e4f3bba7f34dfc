"""What a call is cut into on a device that need not be here: its problem, its launches."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import jaxprs_in_params

from ejk import _dispatch
from ejk._backend import Backend, Problem
from ejk.backends.gpu import Target
from ejk.backends.triton._backend import TritonBackend
from ejk.cli._batch import Batch


class Call(NamedTuple):
    """One call as JAX sees it."""

    problem: Problem
    backends: tuple[Backend, ...]  # best first
    operands: Any  # types of arrays


class Launch(NamedTuple):
    """One run of a kernel."""

    kernel: Any  # a function decorated with `triton.jit`, or None
    name: str
    grid: tuple[int, ...]
    pointers: Mapping[str, str]  # types of elements by parameter
    constants: Mapping[str, Any]
    num_warps: int | None = None
    num_stages: int | None = None
    max_registers: int | None = None


def traced(batch: Batch) -> Call:
    """Trace a batch's call; no array of it is made."""
    types = batch.types()
    arrays = {name: x for name, x in types.items() if isinstance(x, jax.ShapeDtypeStruct)}
    static = {name: x for name, x in types.items() if name not in arrays}
    jaxpr = jax.make_jaxpr(lambda given: batch.call(**given, **static))(arrays)
    problem, choice, operands = next(_dispatch.calls_with_operands(jaxpr.jaxpr))
    return Call(problem, choice.backends, operands)


def for_target(backend: Backend, target: Target) -> Any:
    """Return a backend of Triton's or Mosaic's that compiles for a GPU; others as they are."""
    if not isinstance(backend, TritonBackend) or target.is_amd or target.is_too_old:
        return backend
    fields = {"compute_capability": target.compute_capability}
    if "num_sms" in vars(backend):
        fields["num_sms"] = target.num_sms
    return dataclasses.replace(backend, **fields)  # pyright: ignore[reportArgumentType]


def launches(backend: TritonBackend, target: Target, call: Call) -> list[Launch]:
    """Return what a backend of Triton's or Mosaic's launches, without compiling any of it."""
    found: list[Launch] = []

    def record(
        kernel: Any,
        inputs: Mapping[str, Any],
        outputs: Mapping[str, Any],
        constants: Mapping[str, Any],
        *,
        in_place: Mapping[str, Any] | None = None,
        grid: int,
        num_warps: int,
        num_stages: int,
        max_registers: int | None = None,
    ) -> tuple[Any, ...]:
        written = {**outputs, **(in_place or {})}
        arrays = [x for x in (*inputs.values(), *written.values()) if x is not None]
        given = {**inputs, **(in_place or {}), **outputs}
        pointers = {
            name: str(jnp.dtype((arrays[0] if x is None else x).dtype)) for name, x in given.items()
        }
        found.append(
            Launch(kernel, kernel.fn.__name__, (grid,), pointers, constants, num_warps, num_stages,
                   max_registers)
        )  # fmt: skip
        results = (*outputs.values(), *(in_place or {}).values())
        return tuple(None if x is None else jnp.zeros(x.shape, x.dtype) for x in results)

    def run(operands: Any) -> Any:
        return backend.run_on(target, call.problem, operands, record)

    of_mosaic = _kernels_of_pallas(run, call)
    return found + of_mosaic


def pallas_launches(backend: Backend, platform: str, call: Call) -> list[Launch]:
    """Return the kernels of Pallas that a backend's program holds."""
    return _kernels_of_pallas(lambda operands: backend.run(call.problem, operands, platform), call)


def _kernels_of_pallas(run: Callable[[Any], Any], call: Call) -> list[Launch]:
    jaxpr = jax.make_jaxpr(run)(jax.tree.map(_struct, call.operands))
    found: list[Launch] = []
    for equation in _equations(jaxpr.jaxpr):
        params = equation.params
        meshes = params.get("meshes") or (params.get("mesh"),)  # what Mosaic GPU's kernels have
        grids = [mesh.grid for mesh in meshes if hasattr(mesh, "grid")]
        if "grid_mapping" in params:
            grids = [params["grid_mapping"].grid]
        name = str(params.get("name") or equation.primitive.name)
        found += [Launch(None, name, tuple(grid), {}, {}) for grid in grids]
    return found


def _equations(jaxpr: Any) -> Iterator[Any]:
    for equation in jaxpr.eqns:
        yield equation
        for inner in jaxprs_in_params(equation.params):
            yield from _equations(inner)


def _struct(x: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype)
