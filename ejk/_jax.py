"""JAX's internals: each behind a function that says what it is for.

JAX promises none of them. What could change in silence raises here instead, and
`tests/package/test_jax_internals.py` asks each function whether the installed JAX still has it.
"""

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax._src import dispatch
from jax._src.lib import cuda_versions
from jax.core import ShapedArray
from jax.experimental import io_callback
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir, partial_eval
from jax.sharding import Sharding

Context = mlir.LoweringRuleContext
"""Where a primitive is lowered."""

Rule = Callable[..., Any]
"""What JAX asks of a primitive."""


def primitive(
    name: str,
    result_types: Rule,
    lowerings: Mapping[str | None, Rule],
    *,
    multiple_results: bool = True,
    impl: Rule | None = None,
    batcher: Rule | None = None,
    jvp: Rule | None = None,
    transpose: Rule | None = None,
) -> Primitive:
    """Return a new primitive that has these rules.

    Args:
        name: how jaxprs show it.
        result_types: of the operands' types and the parameters, the results' types and effects.
        lowerings: for each platform, or for all under None, of a `Context`, the operands and the
            parameters, the results.
        multiple_results: there is a list of results; else one.
        impl: runs it where nothing traces it; it is compiled if None.
        batcher: of the mesh axes that a `vmap` axis is split over, the operands, the axis of each
            and the parameters, the results and their axes. Element by element if None.
        jvp: of primals, tangents and parameters, the results and theirs.
        transpose: it is linear: of a cotangent, the operands and the parameters, their cotangents.
    """
    made = Primitive(name)
    made.multiple_results = multiple_results
    made.def_impl(impl or functools.partial(dispatch.apply_primitive, made))
    made.def_effectful_abstract_eval(result_types)
    for platform, rule in lowerings.items():
        mlir.register_lowering(made, rule, platform=platform)
    if batcher is None:
        batching.defvectorized(made)
    else:
        batching.fancy_primitive_batchers[made] = lambda mapped, *arrays, **parameters: batcher(
            mapped.explicit_mesh_axis, *arrays, **parameters
        )
    if jvp:
        ad.primitive_jvps[made] = jvp
    if transpose:
        ad.deflinear2(made, transpose)
    return made


def varying(x: Any) -> frozenset[str]:
    """Return the mesh axes of `shard_map` that an array varies over."""
    return varying_as(x).varying


def varying_as(x: Any) -> Any:
    """Return what `jax.ShapeDtypeStruct` takes as `manual_axis_type`, to vary as an array does."""
    return jax.typeof(x).manual_axis_type


def result_type(result: jax.ShapeDtypeStruct, sharding: Sharding, like: Any) -> ShapedArray:
    """Return the type of a primitive's result that varies as an operand of type `like` does."""
    axes = like.manual_axis_type
    return ShapedArray(result.shape, result.dtype, sharding=sharding, manual_axis_type=axes)


def require_devices(primitive: Primitive) -> None:
    """Have JAX lower programs that hold `primitive` for the devices that they are split over."""
    _read(dispatch, "prim_requires_devices_during_lowering").add(primitive)


def operand_types(ctx: Context) -> Sequence[Any]:
    """Return the types of the operands of the primitive that is lowered."""
    return ctx.avals_in


def lower(
    ctx: Context,
    function: Callable[..., Sequence[Any]],
    operands: Sequence[Any],
    types: Sequence[Any] | None = None,
) -> Any:
    """Lower a function in the place of a primitive.

    Args:
        ctx: the primitive's.
        function: is traced.
        operands: lowered already.
        types: of the operands; the primitive's if None.
    """
    inner = ctx if types is None else ctx.replace(avals_in=types)
    results = mlir.lower_fun(function, multiple_results=True)(inner, *operands)
    if inner is not ctx and inner.tokens_out is not None:  # they order effects
        ctx.set_tokens_out(inner.tokens_out)
    return results


def is_partitioned(ctx: Context) -> bool:
    """Say whether XLA splits the computation: not on one device, nor inside `shard_map`."""
    axes = _axis_context(ctx)
    if isinstance(axes, mlir.SPMDAxisContext):
        return False
    devices = _read(axes, "device_assignment")
    return devices is not None and len(devices) > 1


def axes_left_to_xla(ctx: Context) -> list[str]:
    """Return the mesh axes, inside `shard_map`, that it leaves to XLA."""
    axes = _axis_context(ctx)
    if isinstance(axes, mlir.ShardingContext):
        return []
    manual = _read(axes, "manual_axes")
    sizes = _read(axes, "mesh").shape.items()
    return [name for name, size in sizes if size > 1 and name not in manual]


def is_exported(ctx: Context) -> bool:
    """Say whether `jax.export` lowers, so that the program is run elsewhere."""
    return ctx.module_context.lowering_parameters.for_export


class HostCallbacks:
    """Calls back to Python out of programs that are made when XLA has settled the shards.

    XLA is given all callbacks of a computation before it asks for them: these stand in.
    """

    MOST = 12  # as many as the kernels of a call, where each is interpreted

    def __init__(self, ctx: Context, count: int):
        self.first, self.count = len(ctx.module_context.host_callbacks), count
        self.functions: list[Callable[..., Any]] = []
        for index in range(count):
            ctx.module_context.add_host_callback(functools.partial(self._call, index))

    def _call(self, index: int, *arrays: Any) -> Any:
        return self.functions[index](*arrays)

    def lower(self, ctx: Context, function: Rule, operands: Sequence[Any]) -> Any:
        """Lower a function in the place of a primitive, whose callbacks these are."""
        module = ctx.module_context.replace(host_callbacks=[None] * self.first)
        results = lower(ctx.replace(module_context=module), function, operands)
        self.functions = module.host_callbacks[self.first :]
        if len(self.functions) > self.count:
            raise NotImplementedError(
                f"where XLA splits a program, it calls back to Python {self.count} times at most, "
                f"not {len(self.functions)}: use jax.shard_map"
            )
        return results


@functools.cache
def callback_effects() -> frozenset[Any]:
    """Return the effects of calling back to Python in order, as the interpreters of Pallas do."""

    def call_back() -> None:
        io_callback(lambda: None, None)
        io_callback(lambda: None, None, ordered=True)

    return frozenset(jax.make_jaxpr(call_back)().effects)


def cuda_version() -> int | None:
    """Return which CUDA is installed, 12080 for 12.8.0; None without JAX's plugin.

    Where the plugin is installed without CUDA, to lower alone, the one that it was built with.
    """
    if cuda_versions is None:
        return None
    try:
        return cuda_versions.cuda_runtime_get_version()
    except RuntimeError:
        return cuda_versions.cuda_runtime_build_version()


def drop_dead_code_rule(primitive: Primitive) -> None:
    """Drop a primitive's rule for dead code where JAX would call it with more than it accepts.

    JAX's own then does what a pure kernel needs: it drops the call when nobody uses a result.
    """
    rule = partial_eval.dce_rules.get(primitive)
    passed = inspect.signature(partial_eval.dce_jaxpr_closed_call_rule).parameters
    if rule and len(passed) != len(inspect.signature(rule).parameters):
        del partial_eval.dce_rules[primitive]


def _axis_context(ctx: Context) -> Any:
    """Return who splits the computation: XLA, or `shard_map`. Another would not be noticed."""
    axes = ctx.module_context.axis_context
    if not isinstance(axes, mlir.SPMDAxisContext | mlir.ShardingContext):
        raise _unknown(f"an axis context {type(axes).__name__}")
    return axes


def _read(of: Any, name: str) -> Any:
    if not hasattr(of, name):
        raise _unknown(f"no {getattr(of, '__name__', type(of).__name__)}.{name}")
    return getattr(of, name)


def _unknown(what: str) -> RuntimeError:
    return RuntimeError(
        f"jax {jax.__version__} has {what}, so that ejk cannot tell which devices arrays are split "
        "over: install a version of jax that this version of ejk names in its dependencies"
    )
