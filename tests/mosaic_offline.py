"""Compiles a Pallas Mosaic GPU kernel for Hopper without a GPU, and reads what came of it.

`compile_call` lowers one call in a process of its own, and hands Mosaic's module to the entry point
that JAX's CUDA plugin has for it. That wants a CUDA driver, for which a few lines of C stand in: an
H100 that runs nothing, and keeps the program that it is to load. ptxas, libdevice and the
disassembler are those that Triton brings. Nothing here is public: what is missing skips the test.

`make test` installs what has that entry point in a folder of its own. In the environment itself JAX
would take it for a platform in every test.
"""

import ctypes
import dataclasses
import functools
import importlib.util
import os
import pathlib
import pickle
import re
import shutil
import subprocess
import sys
import tempfile
from typing import Any

PJRT = pathlib.Path(sys.prefix) / "jax-cuda13-pjrt"
DRIVER = """
#include <elf.h>
#include <stdio.h>
int cuInit(unsigned flags) { return 0; }
int cuDriverGetVersion(int *version) { *version = 13000; return 0; }
int cuCtxGetDevice(int *device) { *device = 0; return 0; }
int cuDeviceGetAttribute(int *value, int attribute, int device) {
  *value = attribute == 75 ? 9 : 0;  // the major number of the compute capability
  return 0;
}
int cuGetErrorString(int code, const char **text) { *text = "no driver"; return 0; }
int cuModuleLoadData(void **module, const void *image) {
  const Elf64_Ehdr *elf = image;  // the tables of sections and segments are its end
  long sections = elf->e_shoff + elf->e_shnum * elf->e_shentsize;
  long segments = elf->e_phoff + elf->e_phnum * elf->e_phentsize;
  FILE *file = fopen("kernel.cubin", "wb");
  fwrite(image, 1, sections > segments ? sections : segments, file);
  fclose(file);
  *module = (void *)1;
  return 0;
}
int cuModuleGetFunction(void **f, void *module, const char *name) { *f = (void *)1; return 0; }
int cuFuncSetAttribute(void *f, int attribute, int value) {
  FILE *file = fopen("attributes", "a");
  fprintf(file, "%d=%d\\n", attribute, value);
  fclose(file);
  return 0;
}
"""


@dataclasses.dataclass(frozen=True)
class Program:
    """What ptxas made of a kernel.

    Attributes:
        registers: of a thread when it starts; the warpgroups trade them.
        spilled: bytes that a thread stores for want of registers.
        shared_memory: bytes that a block of threads is given.
        serialised: its warnings that products of the tensor cores wait for one another.
        ptx: the program.
        sass: the same as the GPU runs it, an instruction a line.
    """

    registers: int
    spilled: int
    shared_memory: int
    serialised: list[str]
    ptx: str
    sass: str

    @property
    def traded(self) -> tuple[int, int]:
        """Registers of a thread of the warpgroups that ask for more, and of the others.

        A request for more than the others have left is waited for, without an end.
        """
        kinds = (rf"setmaxnreg.{kind}\S* (\d+);" for kind in ("inc", "dec"))
        (more,), (fewer,) = ({*re.findall(kind, self.ptx)} for kind in kinds)
        return int(more), int(fewer)

    @functools.cached_property
    def loops(self) -> list[list[str]]:
        """The innermost loops with products of the tensor cores: the operations of each."""
        at: dict[str, int] = {}
        operations: list[str] = []
        for line in self.sass.splitlines():
            if label := re.match(r"(\.L_\S+):", line):
                at[label[1]] = len(operations)
            elif operation := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;", line):
                operations.append(operation[1])
        jumps = [re.search(r"\bBRA\b.*`\((\S+)\)", x) for x in operations]
        back = {(at[x[1]], i) for i, x in enumerate(jumps) if x and at[x[1]] <= i}
        inner = [x for x in back if not any(x != y and x[0] <= y[0] and y[1] <= x[1] for y in back)]
        bodies = (operations[begin : end + 1] for begin, end in sorted(inner))
        return [body for body in bodies if any("HGMMA" in x for x in body)]


def missing() -> str | None:
    """Say what is not here to compile with."""
    found = importlib.util.find_spec("jax_plugins")
    folders = [*(found.submodule_search_locations or ())] if found else []
    if not any(pathlib.Path(x, "xla_cuda13").exists() for x in (*folders, PJRT / "jax_plugins")):
        return "JAX's plugin for CUDA 13 is not installed"
    return None if shutil.which("gcc") else "there is no gcc"


def compile_call(function: str, *arguments: Any, **options: Any) -> Program:
    """Compile a call of `ejk` with arguments of such shapes in a process of its own."""
    import triton

    tools = pathlib.Path(triton.__file__).parent / "backends" / "nvidia"
    with tempfile.TemporaryDirectory() as folder:
        source = pathlib.Path(folder) / "driver.c"
        source.write_text(DRIVER)
        library = source.with_name("libcuda.so.1")
        subprocess.run(["gcc", "-shared", "-fPIC", "-o", library, source], check=True)
        cuda = source.with_name("cuda_sdk_lib")  # where it looks first, in the working directory
        (cuda / "nvvm").mkdir(parents=True)
        (cuda / "bin").symlink_to(tools / "bin")
        (cuda / "nvvm" / "libdevice").symlink_to(tools / "lib")
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "LD_LIBRARY_PATH": folder,
            "PATH": f"{tools / 'bin'}:{os.environ['PATH']}",
            "PYTHONPATH": f"{pathlib.Path(__file__).parents[1]}:{PJRT}",
            "MOSAIC_GPU_DUMP_PTX": "1",  # to standard output, with what ptxas says
            "MOSAIC_GPU_DUMP_PTXAS": "1",
        }
        run = functools.partial(subprocess.run, cwd=folder, env=environment, capture_output=True)
        compiled = run(
            [sys.executable, os.path.abspath(__file__)],
            input=pickle.dumps((function, arguments, options)),
        )
        said = (compiled.stdout + compiled.stderr).decode()
        assert compiled.returncode == 0, said[-5000:]
        sass = run(["nvdisasm", "-c", "kernel.cubin"], check=True).stdout.decode()
        attributes = source.with_name("attributes").read_text()
    return Program(
        registers=int(re.search(r"Used (\d+) registers", said)[1]),
        spilled=int(re.search(r"(\d+) bytes spill stores", said)[1]),
        shared_memory=int(re.search(r"^8=(\d+)$", attributes, re.MULTILINE)[1]),
        serialised=re.findall(r"^.*\(C751[0-8]\).*$", said, re.MULTILINE),
        ptx=said[said.index(".version") : said.rindex("}")],
        sass=sass,
    )


def main() -> None:
    import jax
    import jax_plugins.xla_cuda13 as plugin  # pyright: ignore[reportMissingImports]
    from jax.experimental.mosaic.gpu import core

    import ejk

    function, arguments, options = pickle.load(sys.stdin.buffer)
    arrays = {name: x for name, x in options.items() if isinstance(x, jax.ShapeDtypeStruct)}
    static = {name: x for name, x in options.items() if name not in arrays}
    call = jax.jit(functools.partial(getattr(ejk, function), **static))
    call.trace(*arguments, **arrays).lower(lowering_platforms=("cuda",))
    library = ctypes.CDLL(plugin._get_library_path())
    library.MosaicGpuCompile.argtypes = [ctypes.c_char_p, ctypes.c_int]
    library.MosaicGpuCompile.restype = ctypes.c_void_p
    (module,) = core.KNOWN_KERNELS.values()
    assert library.MosaicGpuCompile(module, len(module))


if __name__ == "__main__":
    main()
