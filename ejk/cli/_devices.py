"""Devices by name: what kernels are compiled for, and what their data sheets promise."""

from typing import NamedTuple

from ejk.backends.gpu import SHARED_MEMORY, SHARED_MEMORY_ROCM, Target


class Device(NamedTuple):
    """One device, of vendors' data sheets: peaks, which no program reaches.

    Attributes:
        platform: as JAX lowers for it.
        target: what its kernels are compiled for.
        units: streaming multiprocessors, compute units or cores.
        gb_per_s: of its memory, in 10^9 bytes.
        tflops: of dense bfloat16 products.
        kinds: parts of the `device_kind` that JAX gives it.
    """

    platform: str
    target: str
    units: int
    gb_per_s: int
    tflops: int
    kinds: tuple[str, ...]


DEVICES = {
    "a100": Device("cuda", "sm_80", 108, 2039, 312, ("A100",)),  # 80 GB, SXM
    "l4": Device("cuda", "sm_89", 58, 300, 121, ("L4",)),
    "l40s": Device("cuda", "sm_89", 142, 864, 362, ("L40S",)),
    "rtx4090": Device("cuda", "sm_89", 128, 1008, 165, ("RTX 4090",)),
    "h100": Device("cuda", "sm_90", 132, 3350, 989, ("H100",)),  # SXM
    "h200": Device("cuda", "sm_90", 132, 4800, 989, ("H200",)),
    "b200": Device("cuda", "sm_100", 148, 8000, 2250, ("B200",)),
    "mi300x": Device("rocm", "gfx942", 304, 5300, 1307, ("MI300X",)),
    "tpu-v4": Device("tpu", "v4", 2, 1228, 275, ("TPU v4",)),
    "tpu-v5e": Device("tpu", "v5e", 1, 819, 197, ("TPU v5 lite", "TPU v5e")),
    "tpu-v5p": Device("tpu", "v5p", 2, 2765, 459, ("TPU v5", "TPU v5p")),
    "tpu-v6e": Device("tpu", "v6e", 1, 1640, 918, ("TPU v6 lite", "TPU v6e")),
    "tpu-v7x": Device("tpu", "v7x", 2, 7380, 2307, ("TPU7x", "TPU v7x")),
}
TPUS = {device.target: name for name, device in DEVICES.items() if device.platform == "tpu"}
GPUS = ("gfx942", *(f"sm_{capability}" for capability in SHARED_MEMORY))


def device_of(kind: str) -> Device | None:
    """Return the device that JAX names so; of several parts that fit, the longest counts."""
    fitting = [(len(part), d) for d in DEVICES.values() for part in d.kinds if part in kind]
    return max(fitting, key=lambda pair: pair[0])[1] if fitting else None


def gpu_target(target: str, units: int | None = None) -> Target:
    """Return the facts of a GPU; of those without a number of units, an H100's."""
    known = (device.units for device in DEVICES.values() if device.target == target)
    units = units or next(known, 132)
    if target == "gfx942":
        return Target(None, units, SHARED_MEMORY_ROCM, is_amd=True)
    capability = int(target.removeprefix("sm_"))
    return Target(capability, units, SHARED_MEMORY[capability])
