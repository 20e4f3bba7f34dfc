"""Runs the Pallas kernel in JAX's interpreter of TPU kernels, on every version of JAX.

Memory that was not written is NaN there, a read out of bounds raises, and races are detected:
jax 0.12 raises on one, older versions print a line and set a flag.
"""

import contextlib
from collections.abc import Iterator

import jax
import numpy as np
from jax.experimental.pallas import tpu as pltpu

import ejk


class RaceError(Exception):
    """Two accesses to the same memory that nothing orders."""


def params(dma_execution_mode: str = "on_wait", **options) -> pltpu.InterpretParams:
    """Return how to interpret: everything is checked."""
    return pltpu.InterpretParams(
        **{
            "detect_races": True,
            "dma_execution_mode": dma_execution_mode,
            "uninitialized_memory": "nan",
            "out_of_bounds_reads": "raise",
            **options,
        }
    )


def backend(dma_execution_mode: str = "on_wait", cores: int = 1, **fields):
    """Return a backend that is interpreted, with blocks of two pages unless said otherwise."""
    interpret = params(dma_execution_mode, num_cores_or_threads=cores)
    return ejk.PallasPageAttention(
        **{"pages_per_compute_block": 2, "interpret": interpret, **fields}
    )


def run(case, backend, **options):
    """Run `case`; returns the output and the LSE.

    Raises:
        RaceError: on a race.
    """
    call = jax.jit(
        ejk.page_attention,
        static_argnames=(
            "num_splits", "cache_layout", "attn_logits_soft_cap", "value_head_dim", "return_lse",
            "backend",
        ),
    )  # fmt: skip
    arguments = {**case.semantics(), "num_splits": case.num_splits, **options}
    with races_raise():
        out, lse = call(*case.arguments(), return_lse=True, backend=backend, **arguments)
        out, lse = np.asarray(out), np.asarray(lse)
    return out, lse


@contextlib.contextmanager
def races_raise() -> Iterator[None]:
    """Raise `RaceError` for a race in what is computed, and waited for, inside."""
    try:
        yield
    except Exception as error:
        if "RACE DETECTED" in str(error):
            raise RaceError(str(error)) from error
        raise
    if _flagged():
        raise RaceError("the interpreter flagged a race")


def reset():
    """Forget the state of an interpretation that ended in an exception."""
    from jax._src import dispatch

    dispatch.runtime_tokens.clear()
    pltpu.reset_tpu_interpret_mode_state()


def _flagged() -> bool:
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call

    races = interpret_pallas_call.races
    return races is not None and races.races_found
