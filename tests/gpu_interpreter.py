"""Runs the Pallas Mosaic GPU kernels in JAX's interpreter of GPU kernels.

Memory that was not written is NaN there, a read out of bounds raises, so does a race, and an
arrival at a barrier that nobody waits for. It knows products of the tensor cores from JAX 0.12 on.
"""

import os

import jax
import numpy as np
import pytest

import ejk

ON_GPU = bool(os.environ.get("EJK_TEST_GPU"))  # the kernels themselves, without the interpreter

marks = [
    pytest.mark.skipif(
        not ON_GPU and jax.__version_info__ < (0, 12), reason="its interpreter has no wgmma"
    ),
    # Of what is masked afterwards: slots that nobody sees are poisoned.
    pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered in (matmul|add)"),
]


def run(case, backend, **options):
    """Run `case`; returns the output and the LSE."""
    arguments = {**case.semantics(), "num_splits": case.num_splits, **options}
    out, lse = ejk.page_attention(*case.arguments(), return_lse=True, backend=backend, **arguments)
    return np.asarray(out), np.asarray(lse)


def reset():
    """Forget the state of an interpretation that ended in an exception."""
    if ON_GPU:
        return
    from jax._src import dispatch
    from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call

    dispatch.runtime_tokens.clear()
    interpret_pallas_call.reset_gpu_interpret_mode_state()
