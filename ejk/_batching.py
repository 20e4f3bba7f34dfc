"""`vmap` of a problem: folded into a larger one, or else mapped over."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from ejk import _partition
from ejk._backend import Choice, Problem

Call = Callable[[Problem, Choice, Any], Sequence[jax.Array]]
"""Runs a problem."""


def batch(
    call: Call,
    along: tuple[str, ...] | None,
    leaves: Sequence[Any],
    axes: Sequence[int | None],
    *,
    problem: Problem,
    choice: Choice,
    treedef: Any,
) -> tuple[Sequence[jax.Array], Sequence[int | None]]:
    """Batch a problem's primitive, whose operands are `leaves`.

    On explicit axes each device batches its own part, also of the batched axis, which is split
    `along` some.
    """
    if all(axis is None for axis in axes):
        results = call(problem, choice, treedef.unflatten(leaves))
        return results, [None] * len(results)

    def run(problem: Problem, leaves: Sequence[Any]) -> Sequence[jax.Array]:
        return _batch(call, problem, choice, treedef, axes, leaves)

    to = problem.folded_axis
    if _partition.explicit_mesh(map(jax.typeof, leaves)) is None:
        results = run(problem, leaves)
    else:
        batched = _partition.Batched(axes, along, to)
        results = _partition.split(problem, treedef, leaves, run, batched)
    return results, [to] * len(results)


def merge_axis(x: jax.Array, axis: int, size: int, to: int = 0) -> jax.Array:
    """Put a batched axis, of `size`, right before axis `to`, and make one of both.

    An array that is not batched, with an axis below 0, is repeated.
    """
    if axis < 0:
        shape = (*x.shape[:to], size, *x.shape[to:])
        x = jnp.broadcast_to(jnp.expand_dims(x, to), shape)
    else:
        x = jnp.moveaxis(x, axis, to)
    return x.reshape(*x.shape[:to], size * x.shape[to + 1], *x.shape[to + 2 :])


def _batch(
    call: Call,
    problem: Problem,
    choice: Choice,
    treedef: Any,
    axes: Sequence[int | None],
    leaves: Sequence[Any],
) -> Sequence[jax.Array]:
    """Return the results, batched on the problem's `folded_axis`. Leaves may be left out: None."""
    axes = [None if x is None else axis for x, axis in zip(leaves, axes)]
    size = next(x.shape[a] for x, a in zip(leaves, axes) if a is not None)
    to = problem.folded_axis
    if size == 0:
        shapes = ((*r.shape[:to], 0, *r.shape[to:]) for r in problem.results)
        return [jnp.zeros(shape, r.dtype) for shape, r in zip(shapes, problem.results)]
    operands = treedef.unflatten(leaves)
    folded = problem.fold(size, operands, treedef.unflatten(-1 if a is None else a for a in axes))
    if folded is not None:
        results = zip(call(folded[0], choice, folded[1]), problem.results)
        return [x.reshape(*r.shape[:to], size, *r.shape[to:]) for x, r in results]

    def one(slices: Any) -> Any:
        rest = iter(slices)
        given = [x if a is None else next(rest) for x, a in zip(leaves, axes)]
        return call(problem, choice, treedef.unflatten(given))

    mapped = [jnp.moveaxis(x, a, 0) for x, a in zip(leaves, axes) if a is not None]
    return [jnp.moveaxis(x, 0, to) for x in jax.lax.map(one, mapped)]
