"""How a case is run: its arguments by name, traced ones and static ones, and its programs."""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

import ejk
from ejk.testing.case import ATTENTIONS, SCALES, STATIC, narrow

Arrays = dict[str, Any]
Checked = Iterator[tuple[Any, tuple[Any, ...]]]

COPIES = ("key_cache", "value_cache")
POOLS = (*COPIES, *SCALES)
TABLES = ("query", *COPIES, "context_lens", "block_tables")
POSITIONAL = {
    "page_attention": TABLES,
    "ragged_page_attention": (*TABLES, "cu_q_lens"),
    "write_kv_cache": ("key", "value", *COPIES, "slot_mapping"),
    "copy_kv_slots": (*COPIES, "source_slots", "target_slots"),
    "copy_kv_pages": (*COPIES, "source_pages", "target_pages"),
}
INDICES = ("slot_mapping", "source_slots", "target_slots", "source_pages", "target_pages")


@dataclasses.dataclass(frozen=True)
class Call:
    """A case of an operation, the backend that runs it, and what else is drawn of it.

    Attributes:
        twin: makes another case of the same sizes, types and static arguments.
        seed: of what a composition draws.
        hints: further arguments by keyword.
    """

    operation: str
    case: Any
    backend: ejk.Backend
    twin: Callable[[], Any]
    seed: int = 0
    hints: Arrays = dataclasses.field(default_factory=dict)

    def split(self, case: Any) -> tuple[Arrays, Arrays]:
        """Return the arguments that are traced, by name, and the others."""
        given = dict(zip(POSITIONAL[self.operation], case.operands()))
        given |= keywords(self.operation, case) | self.hints
        static = {name: x for name, x in given.items() if x is None or not is_traced(name, x)}
        traced = {name: x for name, x in given.items() if name not in static}
        return jax.tree.map(lambda x: narrow(np.asarray(x)), traced), static

    def run(
        self, body: Callable[..., Any], static: Arrays, *arrays: Any, donate: bool = False
    ) -> tuple[Any, ...]:
        """Run a program, compiled once for all that have its static arguments.

        A body takes the operation, the static arguments and the backend before the arrays, of which
        the first are donated if asked for.
        """
        program = _compiled(body, self.operation, tuple(static.items()), self.backend, donate)
        return tuple(jax.tree.map(np.asarray, program(*arrays)))


def is_traced(name: str, x: Any) -> bool:
    """Say whether `jit` traces an argument: arrays are, and the scale."""
    if name in ("attn_scale", "prefix_groups"):
        return True
    return name not in STATIC and hasattr(x, "dtype")


def keywords(operation: str, case: Any) -> Arrays:
    """Return a case's arguments by keyword."""
    given = case.semantics()
    if operation == "page_attention":
        given["num_splits"] = case.num_splits
    if "attn_scale" in given:
        given["attn_scale"] = np.float32(given["attn_scale"])
    return given


@functools.lru_cache(128)
def _compiled(
    body: Callable[..., Any],
    operation: str,
    static: tuple[Any, ...],
    backend: ejk.Backend,
    donate: bool,
) -> Callable[..., Any]:
    program = functools.partial(body, operation, dict(static), backend)
    return jax.jit(program, donate_argnums=0 if donate else ())


def forget_programs() -> None:
    """Let go of what was compiled."""
    _compiled.cache_clear()


def perform(
    operation: str, static: Arrays, backend: ejk.Backend, arrays: Arrays
) -> tuple[Any, ...]:
    """Call the operation; return what it does but None."""
    lse = {"return_lse": True} if operation in ATTENTIONS else {}
    results = getattr(ejk, operation)(**static, **arrays, **lse, backend=backend)
    return tuple(x for x in results if x is not None)


def page_size_of(pool: Any, cache_layout: str) -> int:
    return pool.shape[-3 if cache_layout in ("NHD", "INTERLEAVED") else -2]


def plain(call: Call) -> Checked:
    """Outside of `jit`, with integers of every width, from NumPy or from JAX."""
    given = dict(zip(POSITIONAL[call.operation], call.case.arguments()))
    arrays = given | keywords(call.operation, call.case) | call.hints
    yield call.case, tuple(map(np.asarray, perform(call.operation, {}, call.backend, arrays)))


def jit(call: Call) -> Checked:
    """Under `jit` with every array traced."""
    arrays, static = call.split(call.case)
    yield call.case, call.run(perform, static, arrays)
