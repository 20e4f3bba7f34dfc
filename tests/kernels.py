"""The files of kernels, by the names that tests give them, and launches on NumPy arrays."""

import pathlib

import numpy as np

from ejk.testing.interpreter import interpret

BACKENDS = pathlib.Path(__file__).parents[1] / "ejk" / "backends"


def kernel_modules(backend: str) -> dict[str, str]:
    """Map the names of a backend's kernels to modules, such as `write_kv_cache_kernel`."""
    found = {}
    for path in sorted((BACKENDS / backend).rglob("*kernel.py")):
        parts = path.relative_to(BACKENDS).with_suffix("").parts
        found["_".join(parts[1:])] = ".".join(("ejk", "backends", *parts))
    return found


def launch_on_numpy(kernel, inputs, outputs, constants, *, in_place=None, grid, **_):
    """Do what `ejk.backends.triton._launch.call` does, at once: large arrays are not copied."""
    in_place = in_place or {}
    # A pointer that must not be touched, for what is absent.
    pointers = {
        name: np.empty(0, np.int8) if x is None else x
        for name, x in (inputs | in_place | outputs).items()
    }
    stored = interpret(kernel, **pointers, **constants, in_place=[*in_place], grid=grid)
    return tuple(stored.get(name) for name in (*outputs, *in_place))
