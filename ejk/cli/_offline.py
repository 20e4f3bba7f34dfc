"""Compile Triton kernels for GPUs that are not here, and read what the compiler made of them.

Registers, spills, shared memory and the width of copies follow from the target alone.
"""

import dataclasses
import re
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_POINTER_TYPES = {
    "bool": "*i1",
    "int8": "*i8",
    "uint8": "*u8",
    "int32": "*i32",
    "int64": "*i64",
    "float16": "*fp16",
    "bfloat16": "*bf16",
    "float32": "*fp32",
    "float8_e4m3fn": "*u8",  # see `_jax_triton`
    "float8_e5m2": "*u8",
}


@dataclasses.dataclass(frozen=True)
class CudaProgram:
    """A kernel compiled for an NVIDIA GPU.

    Attributes:
      registers: 32-bit registers of a thread.
      spill_store_bytes: bytes a thread writes for want of registers.
      spill_load_bytes: bytes a thread reads back.
      shared_bytes: shared memory of a program.
      async_copies: number of `cp.async` instructions by width in bytes; 16 is the wide one.
      matrix_products: number of tensor core instructions.
      warnings: numbers of what the assembler advises: C7510 and more, of products that wait.
      ptx: the program.
    """

    registers: int
    spill_store_bytes: int
    spill_load_bytes: int
    shared_bytes: int
    async_copies: Mapping[int, int]
    matrix_products: int
    warnings: frozenset[str]
    ptx: str

    @property
    def wide_async_copies(self) -> int:
        """Number of 16-byte `cp.async` instructions."""
        return self.async_copies.get(16, 0)


@dataclasses.dataclass(frozen=True)
class AmdProgram:
    """A kernel compiled for an AMD GPU.

    Attributes:
      vgprs: vector registers of a thread.
      vgpr_spills: vector registers kept in memory instead.
      sgpr_spills: scalar registers kept elsewhere.
      lds_bytes: shared memory of a program.
      matrix_products: number of matrix core instructions.
      assembly: the program.
    """

    vgprs: int
    vgpr_spills: int
    sgpr_spills: int
    lds_bytes: int
    matrix_products: int
    assembly: str


def compile_kernel(
    kernel: Any,
    pointers: Mapping[str, str],
    constants: Mapping[str, Any],
    target: str,
    *,
    num_warps: int,
    num_stages: int,
    max_registers: int | None = None,
) -> Any:
    """Compile a kernel.

    Args:
      kernel: a function decorated with `triton.jit`.
      pointers: NumPy's name of the element type of each pointer, in the kernel's order.
      constants: the `tl.constexpr` parameters.
      target: as in `"sm_90"` or `"gfx942"`.
      num_warps: warps a program runs on.
      num_stages: depth of the software pipeline.
      max_registers: of a thread, on an NVIDIA GPU; the compiler's choice if None.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    is_cuda = target.startswith("sm_")
    gpu = GPUTarget("cuda", _capability(target), 32) if is_cuda else GPUTarget("hip", target, 64)
    options: dict[str, Any] = {"num_warps": num_warps, "num_stages": num_stages}
    if is_cuda:
        options["maxnreg"] = max_registers
    names = [parameter.name for parameter in kernel.params]
    assert names == [*pointers, *(n for n in names if n in constants)], "pointers come first"
    signature = {name: _POINTER_TYPES[dtype] for name, dtype in pointers.items()}
    signature |= {name: "constexpr" for name in names if name in constants}
    # jax-triton promises the compiler that every array starts on a multiple of 16 bytes.
    attributes = {(number,): [["tt.divisibility", 16]] for number in range(len(pointers))}
    source = ASTSource(kernel, signature, dict(constants), attributes)
    return triton.compile(source, target=gpu, options={**options, "enable_fp_fusion": True})


def read_cuda(compiled: Any, target: str) -> CudaProgram:
    """Return what the compiler made of a kernel for an NVIDIA GPU."""
    ptx = compiled.asm["ptx"]
    usage = _resource_usage(ptx, _capability(target))
    copies: dict[int, int] = {}
    for width in re.findall(r"cp\.async\.c[ag]\.shared\.global[^\]]*\][^\]]*\], (\w+)", ptx):
        copies[int(width, 0)] = copies.get(int(width, 0), 0) + 1
    return CudaProgram(
        registers=number_in(usage, r"Used (\d+) registers"),
        spill_store_bytes=number_in(usage, r"(\d+) bytes spill stores"),
        spill_load_bytes=number_in(usage, r"(\d+) bytes spill loads"),
        shared_bytes=compiled.metadata.shared,
        async_copies=copies,
        matrix_products=len(re.findall(r"\b(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma)\b", ptx)),
        warnings=frozenset(re.findall(r"\bC75\d\d\b", usage)),
        ptx=ptx,
    )


def read_amd(compiled: Any) -> AmdProgram:
    """Return what the compiler made of a kernel for an AMD GPU."""
    assembly = compiled.asm["amdgcn"]
    return AmdProgram(
        vgprs=number_in(assembly, r"\.vgpr_count:\s+(\d+)"),
        vgpr_spills=number_in(assembly, r"\.vgpr_spill_count:\s+(\d+)"),
        sgpr_spills=number_in(assembly, r"\.sgpr_spill_count:\s+(\d+)"),
        lds_bytes=compiled.metadata.shared,
        matrix_products=len(re.findall(r"\bv_(?:mfma|wmma)_", assembly)),
        assembly=assembly,
    )


def _capability(target: str) -> int:
    return int(target.removeprefix("sm_"))


def _resource_usage(ptx: str, capability: int) -> str:
    """Return what the assembler that Triton brings along reports of a program."""
    from triton.backends.nvidia.compiler import get_ptxas

    architecture = re.search(r"\.target (sm_\w+)", ptx)
    assert architecture is not None
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        command = [get_ptxas(capability).path, "-v", f"--gpu-name={architecture[1]}"]
        command += ["-o", str(Path(folder) / "kernel.cubin"), str(source)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stderr


def number_in(text: str, pattern: str) -> int:
    """Return the number that a pattern finds in what a compiler says."""
    found = re.search(pattern, text)
    assert found is not None, f"{pattern!r} is not in {text[-2000:]!r}"
    return int(found[1])
