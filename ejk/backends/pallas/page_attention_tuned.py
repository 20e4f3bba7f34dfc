"""What was chosen for the decode kernel on TPUs: data only.

From the static profile of libtpu 0.0.52: predicted, not measured on a TPU.
"""

from typing import NamedTuple


class Chip(NamedTuple):
    """One generation."""

    vmem_limit_bytes: int  # what the kernel asks for on a core: less than there is
    round_blocks: int = 4  # at most: where it is 2, code for 4 spills 500 registers
    wide_round_blocks: int = 1  # where one block of heads wider than a tile would be a round
    cores: int = 1  # that one launch shares: as the device says
    reordered_copies: int = 0  # that its compiler makes of a round in "NHD": found by compiling


MIB = 2**20

CHIPS = {
    "v4": Chip(vmem_limit_bytes=14 * MIB, round_blocks=2, reordered_copies=4),
    "v5e": Chip(vmem_limit_bytes=64 * MIB, round_blocks=2, wide_round_blocks=2),
    "v5p": Chip(vmem_limit_bytes=40 * MIB, round_blocks=2, wide_round_blocks=2),
    "v6e": Chip(vmem_limit_bytes=64 * MIB),
    "7x": Chip(vmem_limit_bytes=40 * MIB),
}
"""By the chip version that `pltpu.get_tpu_info()` names.

On v5e one block of 512 tokens of 8 KV heads of 256 entries spills 331 registers, and two of 256 in
a round 105, for 7 % more cycles; the memory is the bound either way. Fewer heads were not tried.
"""

UNKNOWN = CHIPS["v4"]
"""Where the computation is lowered with no TPU in sight: right everywhere, best nowhere."""

TOO_OLD = ("v2", "v3")
"""Their matrix unit takes no bfloat16 from a kernel."""

ROUND_KEY_BYTES = 2 * MIB
"""Keys that are computed together: with the values, 4 MiB in flight.

Predicted, 8 KV heads of 128 entries in bfloat16, cycles of a v6e for 2,048 tokens: 5,180 in rounds
of 1 MiB, 3,820 of 2 MiB, 3,540 of 4 MiB, for which the compiler spills 500 registers and not 200.
"""

BLOCK_KV, LONG_BLOCK_KV = 1024, 2048
"""Tokens of a block, at most; the second of one KV head, of which many blocks would fill a round.

Several blocks of few KV heads make a round. Predicted, for 2,048 tokens: 2 KV heads, cycles of a
v6e, 2,270 one block a round, 1,230 four; 1 KV head, cycles of a v7x in rounds of four, 830 in
blocks of 1,024, 610 of 2,048.
"""

SMEM_LIMIT_BYTES = 960 * 2**10
"""Of the 1 MiB that every generation has."""
