"""Runs a problem shard by shard where XLA splits a computation over several devices.

XLA knows nothing of what an opaque kernel does: handed a cache that is split over devices, it
gathers all of it on each. What each device runs instead is the problem of its own shards:

- on a mesh with explicit axes the operands' types say how they are split, and `shard_map` does it;
- else only XLA knows. The problem is lowered as `custom_partitioning`: Shardy is told which axes of
  operands and results belong together and, once it has settled how the operands are split, asks
  for the program of one device. `jax.export` cannot save who it asks, and libtpu does not ask
  (jax-ml/jax#38196): there XLA splits its own program, and kernels are refused.

Arrays that are split in a way that would gather a cache raise `ValueError`: on explicit axes and in
eager calls at once. Under `jit` XLA alone knows, and makes a `jax.errors.JaxRuntimeError` of it.

On one device and inside `shard_map` none of this is needed, nor is it used.
"""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
from jax.core import ShapedArray, Tracer
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from ejk import _jax
from ejk._backend import Problem
from ejk._dtypes import DTYPES
from ejk._errors import Mendable
from ejk._shards import POOL_NAMES, Axes, Shards, splitting_axes


def obstacle(ctx: _jax.Context, platform: str) -> str | None:
    """Say why what XLA cannot see into is not split here, or return None where it is."""
    is_partitioned = _jax.is_partitioned(ctx)
    if platform == "tpu" and is_partitioned:
        return Mendable(
            "cannot be split by plain jit, as libtpu has no custom partitioning",
            "give the mesh explicit axes, or use jax.shard_map",
        )
    if is_partitioned and _jax.is_exported(ctx):
        return Mendable(
            "cannot be exported for plain jit to split, as its program is made once XLA has "
            "settled the shards",
            "give the mesh explicit axes, or use jax.shard_map",
        )
    left = _jax.axes_left_to_xla(ctx)
    if not left:
        return None
    return Mendable(
        f"cannot be split over the mesh axes {', '.join(left)}, which shard_map leaves to XLA",
        "leave out axis_names",
    )


def explicit_mesh(types: Iterable[Any]) -> Any:
    """Return the mesh whose explicit axes some array lies on, or None."""
    meshes = (of.sharding.mesh for of in types)
    return next((mesh for mesh in meshes if AxisType.Explicit in mesh.axis_types), None)


def on_each_device(*arrays: Any) -> tuple[Any, ...]:
    """Return small arrays whole on each device, where explicit axes split them."""
    if (mesh := explicit_mesh(map(jax.typeof, arrays))) is None:
        return arrays
    whole = (NamedSharding(mesh, PartitionSpec(*[None] * x.ndim)) for x in arrays)
    return tuple(map(jax.sharding.reshard, arrays, whole))


def check_placed(problem: Problem, operands: Any) -> None:
    """Check how the arrays of an eager call lie, before XLA does, which hides what was raised.

    Raises:
        ValueError: an array would have to move that is too large for it.
    """
    if any(isinstance(getattr(operands, name, None), Tracer) for name in POOL_NAMES):
        return  # XLA alone knows where tracers lie, and pools have to lie alike
    leaves, treedef = jax.tree.flatten(operands)
    # NumPy's constants lie nowhere.
    placed = [None if isinstance(x, Tracer) else getattr(x, "sharding", None) for x in leaves]
    meshes = {of.mesh for of in placed if isinstance(of, NamedSharding)}
    if len(meshes) == 1 and problem.axes:
        specs = [
            _full_spec(x) if isinstance(of, NamedSharding) else PartitionSpec(*[None] * x.ndim)
            for x, of in zip(leaves, placed)
        ]
        problem.shards(treedef.unflatten(specs), meshes.pop().shape)


Run = Callable[[Any, Any], Any]
"""Runs a problem, of its operands or their leaves."""


class Batched(NamedTuple):
    """Where operands and results of a problem have an axis more, and how that axis is split."""

    operands: Sequence[int | None]  # for each leaf
    along: tuple[str, ...] | None = None  # mesh axes
    results: int | None = None

    def with_axis(self, spec: Any, axis: int | None) -> Any:
        """Return how an array is split that has the axis, too."""
        return (
            spec if None in (spec, axis) else PartitionSpec(*spec[:axis], self.along, *spec[axis:])
        )


def shards(
    problem: Problem, treedef: Any, types: Sequence[Any], axes: Sequence[int | None] = ()
) -> Shards:
    """Return how a problem is split whose operands are of `types` on explicit axes.

    Their axes in `axes` are not the problem's.

    Raises:
        ValueError: an operand would have to be gathered, which explicit axes never do unasked.
    """
    mesh = explicit_mesh(types)
    specs = [_full_spec(of) for of in types]
    for number, axis in enumerate(axes):
        if axis is not None:
            specs[number] = PartitionSpec(*specs[number][:axis], *specs[number][axis + 1 :])
    if problem.axes is None:  # small: each device runs all of it
        whole = [PartitionSpec(*[None] * len(spec)) for spec in specs]
        results = tuple(PartitionSpec(*[None] * len(r.shape)) for r in problem.results)
        return Shards(problem, treedef.unflatten(whole), results)
    tree = treedef.unflatten(specs)
    found = problem.shards(tree, mesh.shape)
    for name, spec, needed in zip(tree._fields, tree, found.operands):
        for entries in zip(spec or (), needed or spec or ()):
            had, has = (splitting_axes(entry, mesh.shape) for entry in entries)
            if had and had != has:
                raise ValueError(
                    f"{name}.sharding.spec={spec} must be {needed}, as the others are split: pass "
                    f"jax.sharding.reshard({name}, jax.P{tuple(needed)})"
                )
    return found


def split(
    problem: Problem,
    treedef: Any,
    leaves: Sequence[Any],
    run: Run,
    batched: Batched | None = None,
) -> Any:
    """Run `run(problem, leaves)` shard by shard, as the types of the leaves are split.

    Those that shards do without are None.
    """
    batched = batched or Batched([None] * len(leaves))
    types = [jax.typeof(x) for x in leaves]
    mesh = explicit_mesh(types)
    own = shards(problem, treedef, types, batched.operands)
    specs = treedef.flatten_up_to(own.operands)
    specs = [batched.with_axis(spec, axis) for spec, axis in zip(specs, batched.operands)]
    placed = [
        None if spec is None else jax.sharding.reshard(x, NamedSharding(mesh, spec))
        for x, spec in zip(leaves, specs)
    ]
    names = zip(mesh.axis_names, mesh.axis_types)
    return jax.shard_map(
        lambda *leaves: tuple(run(own.problem, leaves)),
        mesh=mesh,
        in_specs=tuple(specs),
        out_specs=tuple(batched.with_axis(spec, batched.results) for spec in own.results),
        axis_names={name for name, kind in names if kind == AxisType.Explicit},
    )(*placed)


def lower_split(
    ctx: _jax.Context, leaves: Sequence[Any], problem: Problem, treedef: Any, run: Run
) -> Any:
    """Lower `split`: the types of the leaves name the explicit axes that they are split over."""
    with jax.sharding.use_abstract_mesh(explicit_mesh(_jax.operand_types(ctx))):
        return _jax.lower(ctx, lambda *leaves: split(problem, treedef, leaves, run), leaves)


def left_to_xla(pull_back: Callable[..., Any], operands: Any) -> Callable[..., Any]:
    """Return `pull_back`, whose results are cotangents of `operands`, split as these are.

    How gathers and scatters in between are split is for XLA to find, also on explicit axes.
    """
    types = jax.tree.map(jax.typeof, operands)
    mesh = explicit_mesh(jax.tree.leaves(types))
    if mesh is None:
        return pull_back

    def sharding(of: Any) -> NamedSharding | None:
        has_gradient = of.dtype.name in DTYPES
        return NamedSharding(mesh, of.sharding.spec) if has_gradient else None

    return jax.sharding.auto_axes(pull_back, out_sharding=jax.tree.map(sharding, types))


def lower(
    ctx: _jax.Context,
    leaves: Sequence[Any],
    types: Sequence[Any],
    problem: Problem,
    treedef: Any,
    run: Run,
    calls_back: bool,
) -> Any:
    """Lower `run(problem, operands)` so that each device runs the problem of its own shards.

    Args:
        ctx: of the primitive that is lowered.
        leaves: its operands.
        types: of the leaves, where they are not split.
        problem: of the whole arrays.
        treedef: of the operands.
        run: traced once the shards are known.
        calls_back: a run may call back to Python.
    """
    axes = problem.axes
    assert axes
    kept = [of is not None for of in treedef.flatten_up_to(axes.operands)]
    leaves = [x for x, keep in zip(leaves, kept) if keep]
    types = [of for of, keep in zip(types, kept) if keep]
    treedef = jax.tree.structure(treedef.unflatten([keep or None for keep in kept]))
    callbacks = _jax.HostCallbacks(ctx, _jax.HostCallbacks.MOST if calls_back else 0)

    def program(problem: Problem) -> Callable[..., Any]:
        def run_leaves(*leaves: Any) -> Any:
            # The mesh around the caller is not the shard's: it is one device's own.
            with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ())):
                return run(problem, treedef.unflatten(leaves))

        return functools.partial(
            shard_p.bind, run=run_leaves, results=problem.results, callbacks=callbacks
        )

    def partition(mesh: Mesh, arguments: Sequence[Any], results: Sequence[Any]) -> Any:
        given = treedef.unflatten(list(arguments))
        named_specs = (functools.partial(_spec, name) for name in given._fields)
        specs = type(given)(*map(jax.tree.map, named_specs, given))
        shards = problem.shards(specs, dict(mesh.shape))
        if mesh.empty:  # then every device has all of every array
            kept = [x.sharding for x in results], tuple(x.sharding for x in arguments)
        else:
            named = functools.partial(NamedSharding, mesh)
            operands = treedef.flatten_up_to(shards.operands)
            kept = [*map(named, shards.results)], tuple(map(named, operands))
        return mesh, program(shards.problem), *kept

    function = custom_partitioning(program(problem))
    rule = _rule(axes, treedef)
    function.def_partition(partition, sharding_rule=rule, **axes.sizes)  # pyright: ignore[reportArgumentType]
    return _jax.lower(ctx, function, leaves, types)


def _spec(name: str, x: Any) -> PartitionSpec:
    """Return how XLA splits an operand."""
    if not hasattr(x.sharding, "spec") and not x.sharding.is_fully_replicated:
        raise ValueError(
            f"{name}.sharding={type(x.sharding).__name__} must be a NamedSharding: pass "
            f"jax.device_put({name}, jax.NamedSharding(mesh, spec))"
        )
    return _full_spec(x)


def _full_spec(x: Any) -> PartitionSpec:
    spec = getattr(x.sharding, "spec", ())
    return PartitionSpec(*spec, *[None] * (len(x.shape) - len(spec)))


def _rule(axes: Axes, treedef: Any) -> str:
    """Write the axes as Shardy's rule: `seqs (kv_heads group) whole0, whole1 kv_heads ...`."""
    unnamed = 0

    def spell(array: Sequence[Any]) -> str:
        nonlocal unnamed
        names: list[str] = []
        for axis in array:
            if axis is None:
                axis, unnamed = f"whole{unnamed}", unnamed + 1
            names.append(axis if isinstance(axis, str) else f"({' '.join(axis)})")
        return " ".join(names)

    operands = treedef.flatten_up_to(axes.operands)
    return " -> ".join(", ".join(map(spell, arrays)) for arrays in (operands, axes.results))


def _result_types(
    *types: Any, run: Any, results: Sequence[jax.ShapeDtypeStruct], callbacks: _jax.HostCallbacks
) -> tuple[list[ShapedArray], frozenset[Any]]:
    return [ShapedArray(result.shape, result.dtype) for result in results], frozenset()


def _lower_shard(
    ctx: _jax.Context, *leaves: Any, run: Any, results: Any, callbacks: _jax.HostCallbacks
) -> Any:
    return callbacks.lower(ctx, run, leaves)


shard_p = _jax.primitive("ejk_shard", _result_types, {None: _lower_shard})
