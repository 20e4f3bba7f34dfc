"""The chips: which one a computation is lowered for, and what a kernel may ask of it.

From the static profile of libtpu 0.0.52: predicted, not measured on a TPU.
"""

from typing import Any, NamedTuple

MIB = 2**20


class Chip(NamedTuple):
    """One generation."""

    vmem_limit_bytes: int  # what a kernel asks for on a core: less than there is
    round_blocks: int = 4  # at most: where it is 2, code for 4 spills 500 registers
    wide_round_blocks: int = 1  # where one block of heads wider than a tile would be a round
    cores: int = 1  # that one launch shares: as the device says
    reordered_copies: int = 0  # that its compiler makes of a round in "NHD": found by compiling
    fp8_weights: bool = True  # the matrix unit takes keys and values of float8 as they are
    nan_of_e4m3: bool = False  # and takes the NaN of float8_e4m3fn for one, not for 480

    @property
    def of_sizes(self) -> dict[str, Any]:
        """What a launch has to be sized by: fields of `PagedSizes`."""
        names = ("reordered_copies", "fp8_weights", "nan_of_e4m3")
        return {name: getattr(self, name) for name in names}


CHIPS = {
    "v4": Chip(vmem_limit_bytes=14 * MIB, round_blocks=2, reordered_copies=4, fp8_weights=False),
    "v5e": Chip(vmem_limit_bytes=64 * MIB, round_blocks=2, wide_round_blocks=2),
    "v5p": Chip(vmem_limit_bytes=40 * MIB, round_blocks=2, wide_round_blocks=2),
    "v6e": Chip(vmem_limit_bytes=64 * MIB),
    "7x": Chip(vmem_limit_bytes=40 * MIB, nan_of_e4m3=True),
}
"""By the chip version that `pltpu.get_tpu_info()` names.

On v5e one block of 512 tokens of 8 KV heads of 256 entries spills 331 registers, and two of 256 in
a round 105, for 7 % more cycles; the memory is the bound either way. Fewer heads were not tried.
"""

UNKNOWN = CHIPS["v4"]
"""Where the computation is lowered with no TPU in sight: right everywhere, best nowhere."""

TOO_OLD = ("v2", "v3")
"""Their matrix unit takes no bfloat16 from a kernel."""

SMEM_LIMIT_BYTES = 960 * 2**10
"""What a kernel may use of the 1 MiB that every generation has."""


def chip() -> Chip:
    """Return the chip that the computation is lowered for, as far as anyone can say."""
    info = _tpu_info()
    if info is None:
        return UNKNOWN
    return CHIPS.get(str(info.chip_version), UNKNOWN)._replace(cores=info.num_cores)


def chip_version() -> str | None:
    """Return the name of that chip, or None."""
    info = _tpu_info()
    return None if info is None else str(info.chip_version)


def _tpu_info() -> Any:
    from jax.experimental.pallas import tpu as pltpu

    try:
        return pltpu.get_tpu_info()
    except ValueError:  # no TPU here, and no abstract mesh of TPUs around the call
        return None
