"""Reverse mode of every operation, as XLA programs: the same whichever backend ran the call."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ejk import _backend, _dispatch
from ejk._reverse_mode import reverse_mode_alone


def with_pull_back(
    forward: Callable[[Any, _backend.Choice, Any], tuple[Any, Any]],
    pull_back: Callable[[Any, Any, Any], Any],
) -> Callable[[Any, _backend.Choice, Any], tuple[jax.Array, ...]]:
    """Return `_dispatch.call` with derivatives in reverse mode, and none in forward mode.

    `forward(problem, choice, operands)` returns the results and what is kept of the call;
    `pull_back(problem, kept, cotangents)` returns the cotangents of the operands.
    """

    @functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
    def call(problem: Any, choice: _backend.Choice, operands: Any) -> tuple[jax.Array, ...]:
        return _dispatch.call(problem, choice, operands)

    def backward(problem: Any, choice: _backend.Choice, kept: Any, cotangents: Any) -> tuple[Any]:
        kept, cotangents = jax.tree.map(jnp.asarray, (kept, cotangents))  # constants are NumPy's
        return (pull_back(problem, kept, cotangents),)

    call.defvjp(forward, backward)
    return lambda problem, choice, operands: call(
        problem, choice, reverse_mode_alone(problem, operands)
    )
