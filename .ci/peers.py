"""Run JAX's own tests of its paged attentions with `ejk.compat` in the place of what they import.

    python .ci/peers.py FOLDER [options of pytest]

FOLDER is a checkout of github.com/jax-ml/jax of the installed version. Nothing of a test is
changed, but that it takes the machine for a TPU or a GPU; on a CPU both run as XLA programs. A test
of what the original refuses fails where that is no mistake here, as a block size that does not
divide. The tests are Apache-2.0 and no part of this project.
"""

import pathlib
import sys
import warnings

import jax
import jax.experimental.pallas.ops.tpu.paged_attention as tpu_paged_attention
import jax.experimental.pallas.ops.tpu.ragged_paged_attention as tpu_ragged_paged_attention
import pytest
from jax._src import test_util

from ejk.compat import jax_gpu, jax_tpu

with warnings.catch_warnings(action="ignore"):
    import jax.experimental.pallas.ops.gpu.paged_attention as gpu_paged_attention

TESTS = (
    "tpu_paged_attention_kernel_test.py",
    "tpu_ragged_paged_attention_test.py",
    "gpu_paged_attention_test.py",
)


def main(folder: str, *options: str) -> int:
    for module in (tpu_paged_attention, gpu_paged_attention):
        own = jax_gpu if module is gpu_paged_attention else jax_tpu
        module.paged_attention = own.paged_attention
    tpu_ragged_paged_attention.ragged_paged_attention = jax_tpu.ragged_paged_attention
    # A test of JAX fails that is the first to use a persistent cache of programs.
    jax.config.update("jax_enable_compilation_cache", False)
    # Some sizes are left out for later TPUs.
    test_util.is_device_tpu_at_least = lambda version: version <= 5
    test_util.is_cuda_compute_capability_at_least = lambda capability: True
    tests = [str(pathlib.Path(folder) / "tests" / "pallas" / name) for name in TESTS]
    return pytest.main([*tests, "-p", "no:cacheprovider", "-c", "/dev/null", *options])


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
