"""Gradients of attention against differences of the oracle, in float64.

Along a random direction of one operand the oracle is differenced; the gradient times the direction
must be its slope. What no row sees must have a gradient of exactly 0.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import ejk
from ejk.testing.runs import POSITIONAL, Arrays, Call, Checked, jit, perform

STEP = 1e-4  # its square and the end of float64 are far below float32's
ROUNDINGS = 1e-4
"""Of the sizes of the terms that are summed: many times what float32 loses, far below a fault."""


def gradient(call: Call) -> Checked:
    """In reverse mode, with respect to queries, keys and values of float32; otherwise `jit`."""
    case = call.case
    if not case.dtype == case.keys.dtype == np.float32 or case.scales[0] is not None:
        return (yield from jit(call))
    arrays, static = call.split(case)
    floats = {name: arrays.pop(name) for name in POSITIONAL[call.operation][:3] if name in arrays}
    weights = drawn_weights(case, call.seed)
    grads = dict(zip(sorted(floats), call.run(_pulled, static, floats, arrays, weights)))
    assert_gradients(case, grads, weights, call.seed)


def _pulled(
    operation: str, static: Arrays, backend: ejk.Backend, floats: Arrays, rest: Arrays, weights: Any
) -> Any:
    """Return the gradient of the weighted sum of outputs and LSEs."""

    def loss(floats: Arrays) -> Any:
        out, lse = perform(operation, static, backend, floats | rest)
        return (weights[0] * out).sum() + jnp.where(weights[1] == 0, 0.0, weights[1] * lse).sum()

    grads = jax.grad(loss)(floats)
    return tuple(grads[name] for name in sorted(grads))


def drawn_weights(case: Any, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw what outputs and LSEs are multiplied by; 0 for LSEs of rows that see nothing."""
    rng = np.random.default_rng(seed)
    out, lse = case.expected()
    of_lse = np.where(np.isfinite(lse), rng.standard_normal(lse.shape), 0)
    return rng.standard_normal(out.shape).astype(np.float32), of_lse.astype(np.float32)


def assert_gradients(
    case: Any, grads: dict[str, np.ndarray], weights: tuple[np.ndarray, np.ndarray], seed: int
) -> None:
    """Hold gradients with respect to `query`, `key_cache` and `value_cache` to the oracle's."""
    rng = np.random.default_rng(seed)
    for name, grad in grads.items():
        assert np.isfinite(grad).all(), f"the gradient of {name} must be finite"
        field = {"query": "query", "key_cache": "keys", "value_cache": "values"}[name]
        holds_both = name == "key_cache" and case.values is not None and "value_cache" not in grads
        fields = ("keys", "values") if holds_both else (field,)
        towards = {f: rng.standard_normal(getattr(case, f).shape) for f in fields}
        laid_out = towards[field]
        if field != "query":
            pools = [towards.get(f, np.zeros(0)) for f in ("keys", "values")]
            dead = [~case.live[..., None, None] & np.ones(x.shape, bool) for x in towards.values()]
            if holds_both:
                laid_out, unread = (case.in_layout(*x)[0] for x in (pools, dead))
            else:
                split = case.replace(fused=False)
                laid_out, unread = (split.in_layout(x, None)[0] for x in (towards[field], *dead))
            assert not grad[unread].any(), f"the gradient of {name} must be 0 where nothing is seen"
        slope = (_loss(case, towards, STEP, weights) - _loss(case, towards, -STEP, weights)) / 2
        terms = grad.astype(np.float64) * laid_out
        error = abs(terms.sum() - slope / STEP)
        bound = ROUNDINGS * (np.abs(terms).sum() + sum(np.abs(w).sum() for w in weights) / 100)
        assert error <= bound, (
            f"the gradient of {name} is off by {error:.3g} along a direction, allowed {bound:.3g}"
        )


def _loss(case: Any, towards: dict[str, np.ndarray], step: float, weights: Any) -> float:
    moved = {f: getattr(case, f).astype(np.float64) + step * x for f, x in towards.items()}
    with np.errstate(invalid="ignore", over="ignore"):  # of what nobody sees
        out, lse = case.replace(**moved).expected()
    return float((weights[0] * out).sum() + (weights[1] * np.where(weights[1] == 0, 0, lse)).sum())
