"""A shape that every backend runs, and lengths at its edges: a capacity of three pages of 16."""

import dataclasses

import numpy as np

from ejk.testing.configurations import Configuration
from ejk.testing.shapes import Shape

SMALL = Shape("edges", 4, 2, 128, page_size=16, num_pages=30, num_seqs=9)
LENGTHS = np.array([0, 1, 15, 16, 17, 47, 48, 49, 33])
LENS = np.array([48, 0, 5, 49, 33, 17, 16, 1, 40])  # of ragged batches


def config(**changes):
    plain = Configuration(SMALL, np.dtype(np.float32), "HND")
    return dataclasses.replace(plain, **changes)
