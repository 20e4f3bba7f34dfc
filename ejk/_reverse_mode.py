"""Reverse mode alone: what `jax.jvp` and its kin are told, also where a `custom_vjp` would answer.

JAX's own words for forward mode of a `custom_vjp` name neither the operation nor what to use.
"""

from typing import Any, NoReturn

import jax.numpy as jnp

from ejk import _jax


def refuse_forward_mode(*args: Any, operation: str, **params: Any) -> NoReturn:
    """Raise: a rule of a primitive."""
    raise NotImplementedError(
        f"{operation} has first derivatives in reverse mode alone: use jax.grad, jax.vjp or "
        "jax.jacrev, not jax.jvp, jax.jacfwd or jax.hessian"
    )


def reverse_mode_alone(problem: Any, operands: Any) -> Any:
    """Return the operands of what has a `custom_vjp`, which forward mode is refused for.

    Those of `problem.without_gradient` have no derivative in reverse mode either.
    """

    def guard(name: str, x: Any) -> Any:
        if x is None or not jnp.issubdtype(x.dtype, jnp.floating):
            return x
        if name in problem.without_gradient:
            return no_gradient_p.bind(x, message=problem.without_gradient[name])
        return guard_p.bind(x, operation=problem.operation)

    return type(operands)(*(guard(name, x) for name, x in operands._asdict().items()))


def _refuse_gradient(primals: Any, tangents: Any, *, message: str) -> NoReturn:
    raise ValueError(message)


def _guard_jvp(primals: Any, tangents: Any, **params: Any) -> tuple[Any, Any]:
    return guard_p.bind(*primals, **params), tangent_p.bind(*tangents, **params)


def _same_type(x: Any, **params: Any) -> tuple[Any, frozenset[Any]]:
    return x, frozenset()


# The identity, and its tangents: reverse mode transposes these, forward mode runs them.
guard_p = _jax.primitive(
    "ejk_guard",
    _same_type,
    {None: lambda ctx, x, **params: [x]},
    multiple_results=False,
    impl=lambda x, **params: x,
    jvp=_guard_jvp,
)
tangent_p = _jax.primitive(
    "ejk_tangent",
    _same_type,
    {None: refuse_forward_mode},
    multiple_results=False,
    impl=refuse_forward_mode,
    batcher=refuse_forward_mode,
    transpose=lambda cotangent, x, **params: [cotangent],
)
no_gradient_p = _jax.primitive(
    "ejk_no_gradient",
    _same_type,
    {None: lambda ctx, x, **params: [x]},
    multiple_results=False,
    impl=lambda x, **params: x,
    jvp=_refuse_gradient,
)
