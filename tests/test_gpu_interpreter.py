"""What is quicker in the interpreter of GPU kernels is what JAX does."""

import itertools

import gpu_interpreter
import jax
import pytest

pytestmark = pytest.mark.fast


@pytest.mark.skipif(jax.__version_info__ < (0, 12), reason="its interpreter is not used")
def test_clocks_are_compared_as_its_own_comparison_does():
    from jax._src.pallas.mosaic.interpret.vector_clock import NpVectorClock

    gpu_interpreter.quicken()
    for numbers in itertools.product(range(3), repeat=4):
        one, other = NpVectorClock(2), NpVectorClock(2)
        one.clock[:], other.clock[:] = numbers[:2], numbers[2:]
        assert one.ordered(other) == (one.lt(other) or other.lt(one))
