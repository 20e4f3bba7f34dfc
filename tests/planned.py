"""Calls that the Triton backend deals out by a plan, and which kernels they launch."""

import jax
import numpy as np
from entries import Entry

import ejk
from ejk.backends.triton.interpreter.memory import Observer, observe
from ejk.testing.configurations import FEATURES, Configuration
from ejk.testing.page_attention import build
from ejk.testing.shapes import Shape

MANY = Shape("many, odd pages", 2, 1, 64, page_size=48, max_blocks=48, num_pages=350, num_seqs=7)
LONGEST = MANY.capacity
TRITON = Entry(
    "triton interpreted, planned", ejk.TritonPageAttention(interpret=True, num_sms=16), examples=24
)


def long_case(seed=0, features=frozenset(FEATURES) - {"sliding_window"}, shape=MANY, **changes):
    """One long context among short ones: it is cut, the others are not."""
    lens = np.array([LONGEST, 3, 0, 130, 1, LONGEST + 1, -4], np.int32)[: shape.num_seqs]
    config = Configuration(shape, np.dtype(np.float32), "NHD", features)
    return build(config, np.roll(lens, seed), seed=seed, invalid=0.1, as_jax=True, **changes)


class Kernels(Observer):
    """Names the kernels that are launched."""

    def __init__(self):
        self.names = []

    def launched(self, kernel, buffers, grid):
        self.names.append(kernel)

    def accessed(self, access):
        pass


def launches(run):
    """Name the kernels that a call launches."""
    kernels = Kernels()
    with observe(kernels):
        jax.block_until_ready(run())
    return [name.removesuffix("_kernel") for name in kernels.names]
