"""Devices by name: what kernels are compiled for, and what their data sheets promise."""

from typing import Any, NamedTuple

from ejk.backends.gpu import SHARED_MEMORY, SHARED_MEMORY_ROCM, Target, capability_of


class Device(NamedTuple):
    """One device, of vendors' data sheets: peaks, which no program reaches.

    Attributes:
        platform: as JAX lowers for it.
        target: what its kernels are compiled for.
        units: streaming multiprocessors, compute units or cores.
        gb_per_s: of its memory, in 10^9 bytes; None where the board is not known.
        tflops: of dense bfloat16 products; as well.
        kinds: the `device_kind` that JAX gives it. Other boards with the same chip, as an H100 for
            PCIe, have other peaks.
    """

    platform: str
    target: str
    units: int
    gb_per_s: int | None
    tflops: int | None
    kinds: tuple[str, ...]


DEVICES = {
    "a100": Device("cuda", "sm_80", 108, 2039, 312, ("NVIDIA A100-SXM4-80GB",)),
    "l4": Device("cuda", "sm_89", 58, 300, 121, ("NVIDIA L4",)),
    "l40s": Device("cuda", "sm_89", 142, 864, 362, ("NVIDIA L40S",)),
    "rtx4090": Device("cuda", "sm_89", 128, 1008, 165, ("NVIDIA GeForce RTX 4090",)),
    "h100": Device("cuda", "sm_90", 132, 3350, 989, ("NVIDIA H100 80GB HBM3",)),
    "h200": Device("cuda", "sm_90", 132, 4800, 989, ("NVIDIA H200",)),
    "b200": Device("cuda", "sm_100", 148, 8000, 2250, ("NVIDIA B200",)),
    "mi300x": Device("rocm", "gfx942", 304, 5300, 1307, ("AMD Instinct MI300X",)),
    "tpu-v4": Device("tpu", "v4", 2, 1228, 275, ("TPU v4",)),
    "tpu-v5e": Device("tpu", "v5e", 1, 819, 197, ("TPU v5 lite", "TPU v5e")),
    "tpu-v5p": Device("tpu", "v5p", 2, 2765, 459, ("TPU v5", "TPU v5p")),
    "tpu-v6e": Device("tpu", "v6e", 1, 1640, 918, ("TPU v6 lite", "TPU v6e")),
    # JAX sees each of its two cores as a device, with half of the chip's memory and units.
    "tpu-v7x": Device("tpu", "v7x", 1, 3690, 1153, ("TPU7x",)),
}
GPUS = ("gfx942", *(f"sm_{capability}" for capability in SHARED_MEMORY))


def device_of(here: Any, platform: str) -> Device | None:
    """Return the facts of JAX's device `here`, without peaks of a board that is not in the table.

    None of a CPU.
    """
    if platform == "cpu":
        return None
    known = next((d for d in DEVICES.values() if here.device_kind in d.kinds), None)
    if platform == "tpu":
        return known or Device(platform, "", 1, None, None, ())
    target = "gfx942" if platform == "rocm" else f"sm_{capability_of(here)}"
    found = known or Device(platform, target, 0, None, None, ())
    return found._replace(units=here.core_count)


def gpu_target(target: str, units: int | None = None) -> Target:
    """Return the facts of a GPU; of those without a number of units, an H100's."""
    known = (device.units for device in DEVICES.values() if device.target == target)
    units = units or next(known, 132)
    if target == "gfx942":
        return Target(None, units, SHARED_MEMORY_ROCM, is_amd=True)
    found = Target.of("cuda", int(target.removeprefix("sm_")), units)
    assert found is not None  # as both facts are given
    return found
