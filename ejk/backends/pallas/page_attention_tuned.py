"""What differs between generations of TPUs for the decode kernel: data only.

Block sizes come from the static profile of libtpu 0.0.52 (predicted, not measured on a TPU): a
block's copies must cover latency times bandwidth, and its tokens the fixed 600 to 900 cycles
that one softmax over all heads takes.
"""

from typing import NamedTuple


class Chip(NamedTuple):
    """One generation. Bytes are of one core."""

    vmem_limit_bytes: int  # what the kernel asks for: less than there is
    block_bytes: int  # of keys and values in flight
    block_kv: int  # fewest tokens of a block, if they fit
    cores: int = 1  # that one launch shares: as the device says


MIB = 2**20

CHIPS = {
    "v4": Chip(vmem_limit_bytes=14 * MIB, block_bytes=1 * MIB, block_kv=256),
    "v5e": Chip(vmem_limit_bytes=64 * MIB, block_bytes=1 * MIB, block_kv=512),
    "v5p": Chip(vmem_limit_bytes=40 * MIB, block_bytes=2 * MIB, block_kv=1024),
    "v6e": Chip(vmem_limit_bytes=64 * MIB, block_bytes=1 * MIB, block_kv=1024),
    "7x": Chip(vmem_limit_bytes=40 * MIB, block_bytes=4 * MIB, block_kv=1024),
}
"""By the chip version that `pltpu.get_tpu_info()` names."""

UNKNOWN = Chip(vmem_limit_bytes=14 * MIB, block_bytes=1 * MIB, block_kv=256)
"""Where the computation is lowered with no TPU in sight: right everywhere, best nowhere."""

TOO_OLD = ("v2", "v3")
"""Their matrix unit takes no bfloat16 from a kernel."""

MAX_BLOCK_KV = 4096

SMEM_LIMIT_BYTES = 960 * 2**10
"""Of the 1 MiB that every generation has."""
