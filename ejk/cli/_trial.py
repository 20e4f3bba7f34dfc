"""The smallest call of each operation that each backend takes, run and compared with XLA's."""

import dataclasses
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ejk._backend import Backend
from ejk._copy_kv_cache import copy_kv_slots
from ejk._errors import Mendable, UnsupportedError
from ejk._load_tuning import OPERATIONS as BACKENDS
from ejk.cli._batch import Batch, Shape


class Copies:
    """Three copies of slots in the pools of the write's batch; two change places."""

    call = staticmethod(copy_kv_slots)

    def arguments(self) -> dict[str, Any]:
        given = WRITE.arguments()
        pools = {name: given[name] for name in ("key_cache", "value_cache")}
        ends = {"source_slots": jnp.array([0, 1, 40]), "target_slots": jnp.array([1, 0, 7])}
        return pools | ends

    def types(self) -> dict[str, Any]:
        return jax.eval_shape(self.arguments)


COMMON, LATENT = Shape(8, 2, 128), Shape(64, 1, 576, 512)
DECODE = Batch("decode", "", COMMON, 2, 40)
WRITE = Batch("write", "", COMMON, 2, 40, new_tokens=3)
BATCHES: dict[str, Batch | Copies] = {
    "page_attention": DECODE,
    "ragged_page_attention": Batch("ragged", "", COMMON, 2, 40, new_tokens=24),
    "write_kv_cache": WRITE,
    "copy_kv_cache": Copies(),
}
# What the kernels of Hopper are for.
OF_HOPPER = {"page_attention": dataclasses.replace(DECODE, shape=LATENT)}
TOLERANCE = 0.05  # of the largest value, in bfloat16


class Trial(NamedTuple):
    """What became of one backend of one operation here."""

    operation: str
    backend: str
    runs: bool
    how: str
    mend: str = ""
    failed: bool = False  # it raised, or its numbers are wrong: more than a refusal


def trials(run: bool) -> Iterator[Trial]:
    """Try every backend on the default device; interpret kernels where that is a CPU.

    Without `run` say only what refuses.
    """
    for operation, (_, backends) in BACKENDS.items():
        for backend in backends:
            yield trial(operation, backend, run)


def trial(operation: str, backend: Backend, run: bool) -> Trial:
    """Try one backend; whatever it raises is what is told of it."""
    chosen: Any = backend
    interpreted = jax.default_backend() == "cpu" and hasattr(backend, "interpret")
    if interpreted:
        chosen = dataclasses.replace(chosen, interpret=True)
    of_hopper = OF_HOPPER if backend.name == "mosaic_gpu" else {}
    batch = of_hopper.get(operation, BATCHES[operation])
    arguments = batch.arguments()
    try:
        if reason := refusal(batch, chosen):
            mend = reason.rpartition(": ")[2] if isinstance(reason, Mendable) else ""
            return Trial(operation, backend.name, False, reason, mend)
        said = "its kernel, interpreted" if interpreted else "runs"
        if not run:
            return Trial(operation, backend.name, True, said)
        start = time.perf_counter()
        found = jax.block_until_ready(batch.call(**arguments, backend=chosen))
        took = time.perf_counter() - start
        error = relative_error(found, batch.call(**arguments, backend="xla"))
    except Exception as error:
        reason = " ".join(str(error).split())
        said = f"{type(error).__name__}: {reason}"[:300]
        return Trial(operation, backend.name, False, said, failed=True)
    if not error < TOLERANCE:
        said = f"is wrong: off by {error:.1e} from XLA"
        return Trial(operation, backend.name, False, said, failed=True)
    return Trial(operation, backend.name, True, f"{said}: first call {took:.1f} s")


def refusal(batch: Batch | Copies, backend: Backend) -> str | None:
    """Return the first reason why a backend does not run a batch here; None if it does."""
    from ejk._backend_report import backend_report

    try:
        report = backend_report(operation=batch.call, backend=backend, **batch.types())
    except UnsupportedError as error:
        return str(error).splitlines()[-1].strip().removeprefix(f"{backend.name}: ")
    return next(iter(report.refusals[backend.name]), None)


def relative_error(found: Any, expected: Any) -> float:
    """Return the largest difference over the largest value; NaN of NaN."""
    worst = 0.0
    for ours, right in zip(jax.tree.leaves(found), jax.tree.leaves(expected)):
        ours, right = (np.asarray(x.astype(jnp.float32)) for x in (ours, right))
        difference = float(np.abs(ours - right).max() / max(float(np.abs(right).max()), 1e-30))
        worst = difference if not difference < worst else worst
    return worst
