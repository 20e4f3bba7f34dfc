"""What the Pallas backends have alike: where they run, what they refuse first, how they compile."""

import abc
from collections.abc import Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ejk import _jax
from ejk._backend import Backend
from ejk.backends.pallas._chip import TOO_OLD, chip, chip_version

INT4 = frozenset({"key_cache.dtype=uint8 (int4)"})
"""The feature of caches that kernels lack: two values of int4 lie side by side in a lane."""


class PallasBackend(Backend):
    """A way to run one operation as a Pallas kernel on a TPU, or interpreted on a CPU."""

    name = "pallas"
    interpret: bool | Hashable
    vmem_limit_bytes: int | None = None  # by chip, but for those who have it as a field

    @property
    def platforms(self) -> tuple[str, ...]:
        return ("cpu",) if self.interpret else ("tpu",)

    @property
    def effects(self) -> frozenset[Any]:
        """The interpreter's callbacks run in order."""
        return _jax.callback_effects() if self.interpret else frozenset()

    @property
    def vmem_limit(self) -> int:
        return self.vmem_limit_bytes or chip().vmem_limit_bytes

    @property
    def interpreter(self) -> Any:
        """What `pallas_call` takes for `interpret`."""
        if self.interpret is not True:
            return self.interpret
        from jax.experimental.pallas import tpu as pltpu

        return pltpu.InterpretParams(uninitialized_memory="nan", out_of_bounds_reads="raise")

    def first_refusals(self, taken_by: str, *dtypes: np.dtype) -> list[str]:
        """Say why no kernel takes arrays of `dtypes` on this chip."""
        reasons = []
        if (version := chip_version()) in TOO_OLD:
            reasons.append(f"TPU {version}: the kernel needs a v4 or later")
        if jnp.float16 in dtypes:
            reasons.append(f"dtype=float16: {taken_by} takes float32 and bfloat16")
        return reasons

    def vmem_refusals(self, needing: str, vmem: dict[str, int]) -> list[str]:
        """Say what needs more memory next to the core than there is, and for which buffers."""
        if (total := sum(vmem.values())) <= self.vmem_limit:
            return []
        bound = "above vmem_limit_bytes=" if "vmem_limit_bytes" in vars(self) else "of "
        parts = ", ".join(f"{name} {size}" for name, size in vmem.items() if size)
        return [f"{needing} {total} bytes of VMEM, {bound}{self.vmem_limit}: {parts}"]

    def run(self, problem: Any, operands: Any, platform: str) -> Sequence[jax.Array]:
        with jax.enable_x64(False):  # a kernel's integers have 32 bits, whatever the caller's have
            return self.launch(problem, operands)

    @abc.abstractmethod
    def launch(self, problem: Any, operands: Any) -> Sequence[jax.Array]:
        """Run the problem, with integers of 32 bits."""
