"""What the cases of all operations share: how a drawn call is run, and how it is printed."""

import dataclasses
from collections.abc import Iterable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

import ejk
from ejk.testing.oracle import Array

ATTENTIONS = ("page_attention", "ragged_page_attention")
WRITERS = ("write_kv_cache", "copy_kv_slots", "copy_kv_pages")
OPERATIONS = (*ATTENTIONS, *WRITERS)
SCALES = ("key_scale", "value_scale")
# What a program depends on; all else is traced.
STATIC = (
    "cache_layout", "attn_logits_soft_cap", "value_head_dim", "causal", "num_splits",
    "max_context_len", "max_q_len", "return_lse", "plan",
)  # fmt: skip
LONGEST_PRINTED = 40

AnyCase = TypeVar("AnyCase", bound="Case")


class Case:
    """One call of an operation: a dataclass that says what it is called with."""

    as_jax: bool
    """Its arrays are passed as JAX's."""

    @property
    def operation(self) -> str:
        """The name of the public function."""
        raise NotImplementedError

    def operands(self) -> tuple[Any, ...]:
        """The positional arguments, as NumPy arrays."""
        raise NotImplementedError

    def semantics(self) -> dict[str, Any]:
        """The keyword arguments that change the answer."""
        raise NotImplementedError

    def keywords(self, backend: Any = None) -> dict[str, Any]:
        """All keyword arguments, for a backend."""
        return self.semantics()

    def expected(self) -> tuple[Array, ...]:
        """What the oracle says of the call."""
        raise NotImplementedError

    def check(self, results: Iterable[Any]) -> None:
        """Raise an `AssertionError` where results are not what is expected."""
        raise NotImplementedError

    def arguments(self) -> tuple[Any, ...]:
        """The positional arguments, as JAX arrays where `as_jax` (64-bit integers never)."""
        return tuple(
            jnp.asarray(x) if self.as_jax and x is not None and x.dtype.itemsize < 8 else x
            for x in self.operands()
        )

    def run(self, backend: Any = None, *, jit: bool = False, **overrides: Any) -> tuple[Array, ...]:
        """Call the operation, under `jit` with every array traced; return the arrays there are."""
        operation = getattr(ejk, self.operation)
        arguments, keywords = self.arguments(), {**self.keywords(backend), **overrides}
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

    def replace(self: AnyCase, **changes: Any) -> AnyCase:
        this: Any = self
        return dataclasses.replace(this, **changes)

    def __repr__(self) -> str:
        """Write the call, and every field but what says where its numbers come from."""
        this: Any = self
        fields = [field.name for field in dataclasses.fields(this) if field.repr]
        inside = [f"  {name}={printed(getattr(self, name))}," for name in fields]
        return "\n".join([f"{type(self).__name__}(  # {self.operation}", *inside, ")"])

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """Let Hypothesis write no more of a case than `repr` does."""
        printer.text(repr(self))


def given_scales(scales: tuple[Any, Any]) -> dict[str, Any]:
    """Name the scales that there are."""
    return {name: x for name, x in zip(SCALES, scales) if x is not None}


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
