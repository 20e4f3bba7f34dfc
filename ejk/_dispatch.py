"""A call as JAX sees it: one primitive, lowered for each platform to what runs it there.

The primitive stands for every operation. It carries the problem (the static facts of the call)
and the backends that may run it, best first; each platform's lowering rule takes the first that
does not refuse. So CPU arrays in a GPU process, ahead-of-time compilation for a TPU and one
`jax.export` for several platforms each get the right kernel. Nothing here knows an operation.
"""

import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

import jax
import numpy as np
from jax.core import ShapedArray
from jax.extend.core import Jaxpr, Primitive, jaxprs_in_params
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from ejk import _jax, _partition
from ejk._backend import (
    PLATFORMS,
    Backend,
    Choice,
    Problem,
    Refusals,
    check_results,
    unsupported,
)
from ejk._batching import batch
from ejk._errors import Mendable
from ejk._reverse_mode import refuse_forward_mode

LOGGER = logging.getLogger("ejk")
_warned: set[str] = set()


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return `function(problem, how, operands)`, traced once for all calls of a kind.

    So an eager call costs little more than one of `jax.jit` does. Operands may be NumPy arrays,
    which callers may change as soon as the call returns: `jax.jit` alone would still read them.
    """

    # A function may use no operand, but only operands say which devices the mesh is of.
    @functools.partial(jax.jit, static_argnums=(0, 1), keep_unused=True, inline=True)
    def traced(problem: Problem, how: Any, operands: Any) -> Any:
        return function(problem, how, vary_together(operands))

    def run(problem: Problem, how: Any, operands: Any) -> Any:
        _partition.check_placed(problem, operands)
        own = jax.tree.map(lambda x: x.copy() if isinstance(x, np.ndarray) else x, operands)
        return traced(problem, how, own)

    return run


def refuse_undeclared(problem: Problem, choice: Choice) -> None:
    """Raise which features backends lack, if the call has one that none of them declares."""
    lacking = {backend: problem.features - backend.features for backend in choice.backends}
    if frozenset.intersection(*lacking.values()):
        raise unsupported(
            problem,
            [(b, f"does not support {name}") for b in lacking for name in sorted(lacking[b])],
        )


def call(problem: Problem, choice: Choice, operands: Any) -> tuple[jax.Array, ...]:
    """Run `problem` on the first backend that can, once the platform is known."""
    # What no backend has, and what was asked for and can run nowhere, is refused while the caller's
    # line is still on the stack, not when the computation is lowered.
    if choice.automatic:
        refuse_undeclared(problem, choice)
    else:
        choice.select(problem, platform=None)
    leaves, treedef = jax.tree.flatten(vary_together(operands))
    mesh = _partition.explicit_mesh(map(jax.typeof, leaves))
    kinds = (jax.sharding.get_abstract_mesh() if mesh is None else mesh).axis_types
    primitive = split_p if not kinds or AxisType.Auto in kinds else call_p
    return tuple(primitive.bind(*leaves, problem=problem, choice=choice, treedef=treedef))


@compiled
def answer(
    problem: Problem, run: Callable[[Any, Any], Sequence[jax.Array]], operands: Any
) -> tuple[jax.Array, ...]:
    """Return `run(problem, operands)`, what static facts answer, split and varying as a call's."""
    results = run(problem, operands)
    leaves, treedef = jax.tree.flatten(operands)
    types = [jax.typeof(x) for x in leaves]
    mesh = _partition.explicit_mesh(types)
    if mesh is not None:
        specs = _partition.shards(problem, treedef, types).results
        results = [jax.sharding.reshard(x, NamedSharding(mesh, s)) for x, s in zip(results, specs)]
    return tuple(vary_together((operands, results))[1])


def vary_together(operands: Any) -> Any:
    """Make every operand vary over all mesh axes of `shard_map` that any of them varies over.

    Then the results do too, and a gradient is summed over the axes that its operand lacks.
    """
    axes = frozenset[str]().union(*map(_jax.varying, jax.tree.leaves(operands)))

    def vary(x: Any) -> Any:
        missing = axes - _jax.varying(x)
        return jax.lax.pcast(x, tuple(missing), to="varying") if missing else x

    return jax.tree.map(vary, operands)


def calls(jaxpr: Jaxpr) -> Iterator[tuple[Problem, Choice]]:
    """Yield the problem and the choice of each call that a jaxpr holds, at any depth."""
    for problem, choice, _ in calls_with_operands(jaxpr):
        yield problem, choice


def calls_with_operands(jaxpr: Jaxpr) -> Iterator[tuple[Problem, Choice, Any]]:
    """Yield the same with the types of the operands."""
    for equation in jaxpr.eqns:
        if equation.primitive in (call_p, split_p):
            params = equation.params
            types = params["treedef"].unflatten([x.aval for x in equation.invars])
            yield params["problem"], params["choice"], types
        for inner in jaxprs_in_params(equation.params):
            yield from calls_with_operands(inner)


def _result_types(
    *types: Any, problem: Problem, choice: Choice, treedef: Any
) -> tuple[list[ShapedArray], frozenset[Any]]:
    effects = frozenset[Any]().union(*(backend.effects for backend in choice.backends))
    mesh = _partition.explicit_mesh(types)
    if mesh is not None:
        specs = _partition.shards(problem, treedef, types).results
    else:
        mesh = types[0].sharding.mesh
        specs = [PartitionSpec(*[None] * len(result.shape)) for result in problem.results]
    results = [
        _jax.result_type(result, NamedSharding(mesh, spec), like=types[0])
        for result, spec in zip(problem.results, specs)
    ]
    return results, effects


def _lower(
    platform: str,
    ctx: _jax.Context,
    *leaves: Any,
    problem: Problem,
    choice: Choice,
    treedef: Any,
) -> Any:
    types = _jax.operand_types(ctx)
    if _partition.explicit_mesh(types) is not None:

        def call_again(problem: Problem, leaves: Sequence[Any]) -> Sequence[jax.Array]:
            return call(problem, choice, treedef.unflatten(leaves))

        return _partition.lower_split(ctx, leaves, problem, treedef, call_again)
    obstacle = _partition.obstacle(ctx, platform)

    def run(problem: Problem, operands: Any) -> Sequence[jax.Array]:
        backend, refused = choice.weigh(problem, platform, obstacle)
        _log_choice(problem, platform, backend, refused)
        return check_results(backend, problem, backend.run(problem, operands, platform))

    # What a backend runs is one device's own; over which mesh axes its arrays vary is settled.
    local = [ShapedArray(of.shape, of.dtype) for of in types]
    backend = choice.select(problem, platform, obstacle)
    splits = problem.axes and not (backend.effects or obstacle)
    if splits and _jax.is_partitioned(ctx):
        calls_back = backend.is_opaque and platform == "cpu"  # its kernels are interpreted
        return _partition.lower(ctx, leaves, local, problem, treedef, run, calls_back)
    return _jax.lower(ctx, lambda *leaves: run(problem, treedef.unflatten(leaves)), leaves, local)


def _log_choice(problem: Problem, platform: str, backend: Backend, refused: Refusals) -> None:
    """Say which backend runs, as a warning where XLA does for want of what can be mended."""
    reasons = "".join(f"; not {other.name}: {refusal}" for other, refusal in refused)
    LOGGER.debug("%s on %s: %s%s", problem.operation, platform, backend.name, reasons)
    if backend.name != "xla" or platform not in ("cuda", "tpu"):
        return
    for other, refusal in refused:
        if isinstance(refusal, Mendable) and refusal not in _warned:
            _warned.add(refusal)
            LOGGER.warning(
                "%s on %s runs on xla and not on %s: %s",
                problem.operation, platform, other.name, refusal,
            )  # fmt: skip


def _differentiate(primals: Any, tangents: Any, *, problem: Problem, **params: Any) -> NoReturn:
    refuse_forward_mode(operation=problem.operation)


def _primitive() -> Primitive:
    return _jax.primitive(
        "ejk",
        _result_types,
        {platform: functools.partial(_lower, platform) for platform in PLATFORMS},
        batcher=functools.partial(batch, call),
        jvp=_differentiate,
    )


# Outside `shard_map` the lowering has to know the devices that a program is split over. JAX then
# wants devices for every lowering and one mesh for the whole program: inside, it need not.
call_p = _primitive()
split_p = _primitive()
_jax.require_devices(split_p)
