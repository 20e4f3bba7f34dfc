"""Reverse mode alone: what `jax.jvp` and its kin are told, also where a `custom_vjp` would answer.

JAX's own words for forward mode of a `custom_vjp` name neither the operation nor what to use.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir


def refuse_forward_mode(*args, operation, **params):
    """Raise: a rule of a primitive."""
    raise NotImplementedError(
        f"{operation} has first derivatives in reverse mode alone: use jax.grad, jax.vjp or "
        "jax.jacrev, not jax.jvp, jax.jacfwd or jax.hessian"
    )


def reverse_mode_alone(operation: str, operands: Any) -> Any:
    """Return the operands of what has a `custom_vjp`, which forward mode is refused for."""

    def guard(x):
        is_float = jnp.issubdtype(x.dtype, jnp.floating)
        return guard_p.bind(x, operation=operation) if is_float else x

    return jax.tree.map(guard, operands)


def _guard_jvp(primals, tangents, **params):
    [x], [t] = primals, tangents
    is_zero = isinstance(t, ad.Zero)
    return guard_p.bind(x, **params), t if is_zero else tangent_p.bind(t, **params)


# The identity, and its tangents: reverse mode transposes these, forward mode runs them.
guard_p = Primitive("ejk_guard")
guard_p.def_impl(lambda x, **_: x)
guard_p.def_abstract_eval(lambda aval, **_: aval)
batching.defvectorized(guard_p)
mlir.register_lowering(guard_p, lambda ctx, x, **_: [x])
ad.primitive_jvps[guard_p] = _guard_jvp
tangent_p = Primitive("ejk_tangent")
tangent_p.def_impl(refuse_forward_mode)
tangent_p.def_abstract_eval(lambda aval, **_: aval)
batching.primitive_batchers[tangent_p] = refuse_forward_mode
mlir.register_lowering(tangent_p, refuse_forward_mode)
ad.deflinear2(tangent_p, lambda cotangent, *_, **__: [cotangent])
