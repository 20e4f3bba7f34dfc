"""JAX's internals: each behind a function that says what it is for.

JAX promises none of them. What could change in silence raises here instead, and
`tests/test_jax_internals.py` asks each function whether the JAX that is installed still has it.
"""

from typing import Any

import jax
from jax.interpreters import mlir

Context = mlir.LoweringRuleContext


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


def _axis_context(ctx: Context) -> Any:
    """Return who splits the computation: XLA, or `shard_map`. Another would not be noticed."""
    axes = ctx.module_context.axis_context
    if not isinstance(axes, mlir.SPMDAxisContext | mlir.ShardingContext):
        raise _unknown(f"an axis context {type(axes).__name__}")
    return axes


def _read(of: Any, name: str) -> Any:
    if not hasattr(of, name):
        raise _unknown(f"no {type(of).__name__}.{name}")
    return getattr(of, name)


def _unknown(what: str) -> RuntimeError:
    return RuntimeError(
        f"jax {jax.__version__} has {what}, so that ejk cannot tell which devices arrays are split "
        "over: install a version of jax that this version of ejk names in its dependencies"
    )
