"""How a drawn call is run, and how it is printed."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ejk.testing.oracle import Array

# What a program depends on; all else is traced.
STATIC = (
    "cache_layout", "attn_logits_soft_cap", "value_head_dim", "causal", "num_splits",
    "max_context_len", "max_q_len", "return_lse", "plan",
)  # fmt: skip
LONGEST_PRINTED = 40


def run(
    operation: Callable[..., Any],
    arguments: tuple[Any, ...],
    keywords: Mapping[str, Any],
    backend: Any,
    jit: bool,
) -> tuple[Array, ...]:
    """Call `operation`, under `jit` with every array traced; return the arrays that there are."""
    if jit:
        static = {name: x for name, x in keywords.items() if name in STATIC}
        traced = {name: x for name, x in keywords.items() if name not in STATIC}

        def body(arguments: Any, traced: Any) -> Any:
            return operation(*arguments, **traced, **static, backend=backend)

        results = jax.jit(body)(*jax.tree.map(narrow, (arguments, traced)))
    else:
        results = operation(*arguments, **keywords, backend=backend)
    results = results if isinstance(results, tuple) else (results,)
    return tuple(np.asarray(x) for x in results if x is not None)


def narrow(x: Any) -> jax.Array:
    """`jit` takes no 64-bit integers; a caller must have narrowed them with care before."""
    x = np.asarray(x) if isinstance(x, np.ndarray) else jnp.asarray(x)
    if x.dtype.kind in "iu" and x.dtype.itemsize == 8:
        x = np.clip(x, max(np.iinfo(x.dtype).min, -1), 2**31 - 1).astype(np.int32)
    return jnp.asarray(x)


def printed(x: Any) -> str:
    """Write what a reader can use: short arrays whole, of others the type and the shape."""
    if isinstance(x, np.ndarray | jax.Array):
        if not x.ndim:
            return f"{x.dtype}({x})"
        if x.size <= LONGEST_PRINTED:
            return f"{x.dtype}{np.asarray(x).tolist()}"
        return f"{x.dtype}[{', '.join(map(str, x.shape))}]"
    if isinstance(x, dict):
        return f"{{{', '.join(f'{name}={printed(y)}' for name, y in x.items())}}}"
    if isinstance(x, tuple):
        return f"({', '.join(map(printed, x))})"
    if isinstance(x, np.dtype):
        return x.name
    return repr(getattr(x, "name", x))  # of a shape its name


def represent(self: Any) -> str:
    """Write a case: its call, and every field but what says where its numbers come from."""
    fields = [field.name for field in dataclasses.fields(self) if field.repr]
    inside = [f"  {name}={printed(getattr(self, name))}," for name in fields]
    return "\n".join([f"{type(self).__name__}(  # {self.operation}", *inside, ")"])


def show(self: Any, printer: Any, cycle: bool) -> None:
    """Let Hypothesis write a case as `represent` does, and not every number of it."""
    printer.text(repr(self))
