"""`vmap` of a problem: folded into a larger one, or else mapped over."""

from collections.abc import Callable
from typing import Any

import jax


def batch(primitive: Any, call: Callable[..., Any], leaves, axes, *, problem, choice, treedef):
    """Batch `primitive`, whose operands are `leaves`; `call` runs a problem."""
    size = next(x.shape[a] for x, a in zip(leaves, axes) if a is not None)
    if size == 0:
        empty = [jax.numpy.zeros((0, *r.shape), r.dtype) for r in problem.results]
        return empty, [0] * len(empty)
    axes = [-1 if a is None else a for a in axes]
    operands = jax.tree.unflatten(treedef, leaves)
    folded = problem.fold(size, operands, jax.tree.unflatten(treedef, axes))
    if folded is None:
        mapped = [jax.numpy.moveaxis(x, a, 0) for x, a in zip(leaves, axes) if a >= 0]

        def one(slices):
            rest = iter(slices)
            given = (x if a < 0 else next(rest) for x, a in zip(leaves, axes))
            return primitive.bind(*given, problem=problem, choice=choice, treedef=treedef)

        results = jax.lax.map(one, mapped)
    else:
        results = [x.reshape(size, -1, *x.shape[1:]) for x in call(folded[0], choice, folded[1])]
    return results, [0] * len(results)
