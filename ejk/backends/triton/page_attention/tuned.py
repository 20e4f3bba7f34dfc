"""Blocks that were measured to beat the heuristic of `page_attention/blocks.py`: data only.

Written by `benchmarks/tune.py --table` from `benchmarks/results/tune_*.jsonl`: each entry gains at
least 1 % on the devices named above it, as the geometric mean over its batches. What is not here
is served by the heuristic.
"""

from typing import NamedTuple


class Pipeline(NamedTuple):
    """The attention kernel's loop over tokens, and how it runs."""

    block_kv: int  # tokens a step
    num_warps: int
    num_stages: int


class Cell(NamedTuple):
    """What the choice of blocks may follow from."""

    compute_capability: int | None
    itemsize: float  # bytes of an entry of keys and values
    head_dim: int  # of keys and of values
    rows: int  # of the product: query heads of a group, padded
    large: bool  # the call fills the GPU


TUNED: dict[Cell, Pipeline] = {
    # NVIDIA H100 80GB HBM3: 5.5 for 5.5 us; NVIDIA H200: 5.3 for 5.3 us
    Cell(90, 2, 128, 16, False): Pipeline(64, 4, 3),
    # NVIDIA H100 80GB HBM3: 7.0 for 7.1 us; NVIDIA H200: 6.7 for 6.8 us
    Cell(90, 2, 256, 16, False): Pipeline(64, 8, 2),
    # NVIDIA H100 80GB HBM3: 204.1 for 206.9 us; NVIDIA H200: 157.9 for 166.2 us
    Cell(90, 2, 512, 16, True): Pipeline(32, 4, 3),
    # NVIDIA H200: 4.9 for 5.0 us
    Cell(90, 4, 64, 2, False): Pipeline(64, 2, 2),
    # NVIDIA H200: 5.5 for 5.6 us
    Cell(90, 4, 64, 4, False): Pipeline(64, 2, 2),
    # NVIDIA H200: 241.0 for 309.1 us
    Cell(90, 4, 64, 4, True): Pipeline(128, 2, 2),
    # NVIDIA H200: 6.1 for 7.0 us
    Cell(90, 4, 128, 1, False): Pipeline(64, 2, 2),
    # NVIDIA H200: 6.8 for 7.6 us
    Cell(90, 4, 128, 2, False): Pipeline(64, 2, 3),
    # NVIDIA H200: 7.6 for 8.0 us
    Cell(90, 4, 128, 4, False): Pipeline(64, 4, 3),
    # NVIDIA H200: 12.6 for 12.7 us
    Cell(90, 4, 128, 16, False): Pipeline(32, 2, 2),
    # NVIDIA H200: 629.9 for 927.7 us
    Cell(90, 4, 128, 16, True): Pipeline(128, 8, 2),
    # NVIDIA H200: 9.1 for 9.6 us
    Cell(90, 4, 256, 1, False): Pipeline(64, 2, 2),
    # NVIDIA H200: 9.8 for 10.1 us
    Cell(90, 4, 256, 2, False): Pipeline(64, 2, 2),
    # NVIDIA H200: 12.0 for 12.2 us
    Cell(90, 4, 256, 4, False): Pipeline(32, 2, 3),
    # NVIDIA H200: 17.0 for 17.4 us
    Cell(90, 4, 256, 8, False): Pipeline(32, 1, 2),
    # NVIDIA H200: 23.7 for 27.3 us
    Cell(90, 4, 256, 16, False): Pipeline(32, 2, 2),
}
