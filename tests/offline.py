"""Compiles Triton kernels for GPUs that are not here, and reads what the compiler made of them.

Registers, spills, shared memory and the width of copies follow from the target alone, so a machine
without a GPU can hold a kernel to its budget on every generation.

With `EJK_TEST_CODE=after.txt` every program that a test compiles leaves a line in that file: a
digest of its code, the test and the kernel. A change that only moves code leaves the same lines.
"""

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import triton

from ejk.cli import _offline
from ejk.cli._offline import AmdProgram, CudaProgram

CUDA_TARGETS = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")
AMD_TARGETS = ("gfx942",)

# What one program may use of shared memory (LDS), in bytes.
SHARED_MEMORY_BYTES = {
    "sm_80": 163 * 1024,
    "sm_86": 99 * 1024,
    "sm_89": 99 * 1024,
    "sm_90": 227 * 1024,
    "sm_100": 227 * 1024,
    "sm_120": 99 * 1024,
    "gfx942": 64 * 1024,
}


def compile_cuda(
    kernel: Any,
    pointers: Mapping[str, str],
    constants: Mapping[str, Any],
    target: str,
    *,
    num_warps: int = 4,
    num_stages: int = 3,
    max_registers: int | None = None,
) -> CudaProgram:
    """Compiles a kernel for one of `CUDA_TARGETS`; arguments as of `_offline`."""
    options = {"num_warps": num_warps, "num_stages": num_stages, "max_registers": max_registers}
    return _offline.read_cuda(_compile(kernel, pointers, constants, target, options), target)


def compile_amd(
    kernel: Any,
    pointers: Mapping[str, str],
    constants: Mapping[str, Any],
    target: str,
    *,
    num_warps: int = 4,
    num_stages: int = 2,
) -> AmdProgram:
    """Compiles a kernel for one of `AMD_TARGETS`; the arguments are those of `compile_cuda`."""
    options = {"num_warps": num_warps, "num_stages": num_stages}
    return _offline.read_amd(_compile(kernel, pointers, constants, target, options))


def _compile(
    kernel: Any,
    pointers: Mapping[str, str],
    constants: Mapping[str, Any],
    target: str,
    options: Mapping[str, Any],
) -> Any:
    if record := os.environ.get("EJK_TEST_CODE"):
        triton.knobs.compilation.disable_line_info = True  # it names files, which may move
    compiled = _offline.compile_kernel(kernel, pointers, constants, target, **options)
    if record:
        _record(Path(record), kernel, compiled)
    return compiled


def _record(path: Path, kernel: Any, compiled: Any) -> None:
    code = compiled.asm["ptx" if "ptx" in compiled.asm else "amdgcn"]
    digest = hashlib.sha256(code.replace(kernel.__name__, "kernel").encode()).hexdigest()
    test = os.environ["PYTEST_CURRENT_TEST"].split("::", 1)[1]
    with path.open("a") as lines:
        lines.write(f"{digest} {test} {kernel.__name__}\n")
