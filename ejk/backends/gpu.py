"""The GPU that a kernel is compiled for: what its launch may count on, in whatever language."""

import dataclasses
from typing import Any

import jax

from ejk._errors import Mendable

# Shared memory that one block of threads may use, in bytes, by compute capability (CUDA C
# programming guide, table of technical specifications).
SHARED_MEMORY = {
    80: 163 * 1024,
    86: 99 * 1024,
    87: 163 * 1024,
    89: 99 * 1024,
    90: 227 * 1024,
    100: 227 * 1024,
    103: 227 * 1024,
    110: 227 * 1024,
    120: 99 * 1024,
    121: 99 * 1024,
}
SHARED_MEMORY_ROCM = 64 * 1024  # gfx942, and no less on its successors (AMD CDNA 3 ISA)
H100 = {"compute_capability": 90, "num_sms": 132}
MAX_GRID = 2**31 - 1  # programs of a launch, along the first axis (the same table)


@dataclasses.dataclass(frozen=True)
class Target:
    """A GPU's facts."""

    compute_capability: int | None
    """None on ROCm, where the compiler asks the device itself, and of the interpreter."""
    num_sms: int
    shared_memory: int  # bytes a program
    is_amd: bool = False

    @property
    def warp_size(self) -> int:
        """Threads that run in step."""
        return 64 if self.is_amd else 32

    @property
    def is_like_hopper(self) -> bool:
        """It is Hopper, or the interpreter, which takes the sizes that were measured there."""
        return self.compute_capability in (90, None) and not self.is_amd

    @property
    def is_too_old(self) -> bool:
        return self.compute_capability is not None and self.compute_capability < 80

    @classmethod
    def of(
        cls, platform: str, compute_capability: int | None, num_sms: int | None
    ) -> "Target | None":
        """Return the target; what is not given comes from the first device, if there is one."""
        if platform == "cpu":  # The interpreter takes any size; as large as the largest GPU.
            return cls(None, num_sms or 4, max(SHARED_MEMORY.values()))
        if platform == "cuda" and compute_capability and num_sms:
            return cls(compute_capability, num_sms, _shared_memory(compute_capability))
        try:
            device = jax.local_devices(backend=platform)[0]
        except RuntimeError:
            return None
        num_sms = num_sms or device.core_count
        if platform == "rocm":
            return cls(None, num_sms, SHARED_MEMORY_ROCM, is_amd=True)
        if compute_capability is None:
            compute_capability = capability_of(device)
        return cls(compute_capability, num_sms, _shared_memory(compute_capability))


def capability_of(device: Any) -> int:
    """Return the compute capability of an NVIDIA GPU: 90 of JAX's "9.0"."""
    major, minor = str(device.compute_capability).split(".")
    return 10 * int(major) + int(minor)


def cannot_compile(target: Target | None, platform: str, example: str) -> str:
    """Say why nothing is compiled for a target that is not known, or too old.

    `example` is a backend of `ejk` that says to compile for an H100.
    """
    if target is None:
        reason = f"no {platform} device is here to compile for"
        if platform != "cuda":
            return reason
        return Mendable(reason, f"for an H100, ejk.register_backend(ejk.{example})")
    return (
        f"compute_capability={target.compute_capability} must be at least 80: older GPUs cannot "
        "copy asynchronously"
    )


def _shared_memory(compute_capability: int) -> int:
    """Return what the newest known generation up to `compute_capability` has."""
    known = [capability for capability in SHARED_MEMORY if capability <= compute_capability]
    return SHARED_MEMORY[max(known)] if known else 0
