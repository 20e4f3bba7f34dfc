"""How fast this device reads and copies: yardsticks of the same run.

On a GPU a rate is the best of several shapes of a kernel that only does so; elsewhere it is that of
XLA's own program.
"""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ejk.backends.triton import _launch
from ejk.cli import _timing

# Programs a multiprocessor, elements a block, warps.
SHAPES = tuple(itertools.product((4, 8, 16), (4096, 8192), (4, 8)))


@functools.cache
def read_ceiling(num_bytes: int, lock: str | None = None) -> float:
    """Return the best rate in GB/s of reading `num_bytes`, of buffers that exceed the caches."""
    if not _has_kernels():
        return _rate_of_xla(jnp.sum, num_bytes)
    from ejk.cli._ceiling_kernel import read_kernel

    return _best_rate(read_kernel, "sums_ptr", num_bytes, lock)


@functools.cache
def copy_ceiling(num_bytes: int, lock: str | None = None) -> float:
    """Return the best rate in GB/s, bytes read and bytes written, of copying `num_bytes`."""
    if not _has_kernels():
        return 2 * _rate_of_xla(jnp.negative, num_bytes)
    from ejk.cli._ceiling_kernel import copy_kernel

    return 2 * _best_rate(copy_kernel, "target_ptr", num_bytes, lock)


def _has_kernels() -> bool:
    return jax.default_backend() == "gpu" and _launch.available() is None


def _rate_of_xla(function: Any, num_bytes: int) -> float:
    source = jnp.ones((max(1, num_bytes // 4),), jnp.float32)
    program = jax.jit(function)
    return 4 * source.size / _timing.call_us(lambda: program(source)) / 1e3


def _best_rate(kernel: Any, output: str, num_bytes: int, lock: str | None) -> float:
    """Compile every shape, then time them all in one trace."""
    elements = num_bytes // 4 // 8192 * 8192
    copies = max(1, -(-(2**28) // num_bytes))
    runs = [jax.jit(functools.partial(_run, kernel, output, shape)) for shape in SHAPES]
    for run in runs:
        run.lower(*[jax.ShapeDtypeStruct((elements,), jnp.float32)] * copies).compile()

    def every_shape() -> Any:
        return [run(*buffers) for run in runs][-1]

    with _timing.exclusive(lock):
        buffers = [
            jax.random.normal(jax.random.key(i), (elements,), jnp.float32) for i in range(copies)
        ]
        found = _timing.kernels(every_shape, repeats=3)
    took = [k.end_us - k.begin_us for k in found if k.name == kernel.fn.__name__]
    best_us = np.median(np.reshape(took, (3, len(runs), copies)), axis=(0, 2)).min()
    return float(4 * elements / best_us / 1e3)


def _run(kernel: Any, output: str, shape: tuple[int, int, int], *buffers: jax.Array) -> list[Any]:
    programs_per_sm, block, num_warps = shape
    programs = programs_per_sm * jax.devices()[0].core_count
    size = programs if output == "sums_ptr" else buffers[0].size
    return [
        _launch.call(
            kernel,
            {"source_ptr": buffer},
            {output: jax.ShapeDtypeStruct((size,), jnp.float32)},
            {"NUM_ELEMENTS": buffer.size, "NUM_PROGRAMS": programs, "BLOCK": block},
            grid=programs,
            num_warps=num_warps,
            num_stages=3,
            compute_capability=None,
            interpret=False,
        )
        for buffer in buffers
    ]
