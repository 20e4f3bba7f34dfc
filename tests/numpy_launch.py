"""Launches Triton kernels on NumPy arrays: nothing is compiled, and large arrays are not copied."""

import numpy as np

from ejk.backends.triton.interpreter import call as interpreter
from ejk.backends.triton.interpreter.memory import poisoned


def call(kernel, inputs, outputs, constants, *, in_place=None, grid, **_):
    """Do what `ejk.backends.triton._launch.call` does, at once and by interpretation."""
    results = {
        name: None if out is None else poisoned(out.shape, np.dtype(out.dtype))
        for name, out in outputs.items()
    }
    in_place = dict(in_place or {})
    inputs = {name: None if x is None else np.asarray(x) for name, x in inputs.items()}
    interpreter.run(kernel.fn, inputs, in_place | results, constants, grid=grid)
    return (*results.values(), *in_place.values())
