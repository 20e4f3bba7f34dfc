"""Runs the Pallas Mosaic GPU kernels in JAX's interpreter of GPU kernels.

Memory that was not written is NaN there, a read out of bounds raises, so does a race, and an
arrival at a barrier that nobody waits for. It knows products of the tensor cores from JAX 0.12 on.

Most of its time would go to handing numbers over: a kernel calls back into Python for every access
to memory, with some ten integers, and JAX makes an array of its own of each; see `quicken`.
"""

import functools
import operator
import os

import jax
import numpy as np
import pytest

import ejk

OF_GPUS = "jax._src.pallas.mosaic_gpu.interpret."  # the modules of its callbacks
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


@functools.cache
def quicken() -> None:
    """Hand NumPy's arrays to the interpreter as they are, and compare clocks as lists.

    What it makes of them is the same: integers, and copies of whatever it keeps. A planted fault of
    the prefill kernel takes half of the time.
    """
    if ON_GPU or jax.__version_info__ < (0, 12):
        return
    from jax._src import callback
    from jax._src.pallas.mosaic.interpret import vector_clock
    from jax._src.pallas.mosaic_gpu.interpret import shared_memory

    through_jax, to_int = callback.io_callback_impl, shared_memory._to_int

    def call(*args, **params):
        function = getattr(params["callback"], "callback_func", None)
        while isinstance(function, functools.partial):
            function = function.func
        if not getattr(function, "__module__", "").startswith(OF_GPUS):
            return through_jax(*args, **params)
        return [np.asarray(x) for x in params["callback"](*args)]

    def integer(x):
        return int(x) if isinstance(x, np.ndarray) else to_int(x)

    def ordered(self, other):
        """Say whether one of two clocks is before the other: they differ, and it is never ahead."""
        mine, others = self.clock.tolist(), other.clock.tolist()
        return mine != others and (
            all(map(operator.le, mine, others)) or all(map(operator.ge, mine, others))
        )

    callback.io_callback_impl, shared_memory._to_int = call, integer
    vector_clock.NpVectorClock.ordered = ordered


quicken()
