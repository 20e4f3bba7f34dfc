"""Compile a Mosaic GPU kernel for Hopper on any machine, and read what came of it.

Mosaic assembles its kernels when they are loaded. `compile_call` lowers one call in a process of
its own, and hands Mosaic's module to the entry point that JAX's CUDA plugin has for it. That wants
a CUDA driver, for which a few lines of C stand in: an H100 that runs nothing, and keeps the program
that it is to load. ptxas and libdevice are those that Triton brings.
"""

import ctypes
import dataclasses
import functools
import importlib.metadata
import importlib.util
import os
import pathlib
import pickle
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from typing import Any

from ejk.cli._offline import number_in

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
PLUGINS = ("xla_cuda13", "xla_cuda12")


@dataclasses.dataclass(frozen=True)
class Assembled:
    """What ptxas made of a kernel.

    Attributes:
        registers: of a thread when it starts; the warpgroups trade them.
        spilled: bytes that a thread stores for want of registers.
        shared_memory: bytes that a block of threads is given.
        serialised: its warnings that products of the tensor cores wait for one another.
        ptx: the program.
        cubin: what the GPU loads.
    """

    registers: int
    spilled: int
    shared_memory: int
    serialised: list[str]
    ptx: str
    cubin: bytes


def missing(folders: Iterable[str] = ()) -> str | None:
    """Say what is not here to compile with, and the command that installs it."""
    if not sys.platform.startswith("linux"):
        return "Mosaic GPU kernels are assembled on Linux alone"
    if importlib.util.find_spec("triton") is None:
        return 'triton, which brings ptxas, is not installed: pip install "ejk[triton]"'
    if plugin(folders) is None:
        version = importlib.metadata.version("jaxlib")
        return (
            "JAX's plugin for CUDA, which assembles Mosaic GPU kernels, is not installed: "
            f'pip install --no-deps "jax-cuda13-plugin=={version}" "jax-cuda13-pjrt=={version}"'
        )
    if compiler() is None:
        return "there is no C compiler, for the stand-in of a driver: apt-get install gcc"
    return None


def plugin(folders: Iterable[str] = ()) -> pathlib.Path | None:
    """Return the library of JAX's plugin for CUDA, in these folders too; None if there is none."""
    found = importlib.util.find_spec("jax_plugins")
    places = [*folders, *((found and found.submodule_search_locations) or ())]
    libraries = (
        pathlib.Path(place, name, "xla_cuda_plugin.so") for place in places for name in PLUGINS
    )
    return next((library for library in libraries if library.is_file()), None)


def compiler() -> str | None:
    """Return the C compiler: what `CC` names, or the first of those that are usual."""
    named = (os.environ.get("CC"), "gcc", "clang", "cc")
    return next((path for name in named if name and (path := shutil.which(name))), None)


def tools() -> pathlib.Path:
    """Return the folder of what Triton brings of CUDA."""
    found = importlib.util.find_spec("triton")
    assert found is not None and found.origin is not None  # as `missing` says
    return pathlib.Path(found.origin).parent / "backends" / "nvidia"


def compile_call(
    function: str, *arguments: Any, folders: Iterable[str] = (), **options: Any
) -> Assembled:
    """Compile a call of `ejk` with arguments of such shapes in a process of its own.

    Raises:
        ValueError: with what the compiler says, where it fails.
    """
    library, cc = plugin(folders), compiler()
    assert library is not None and cc is not None  # as `missing` says
    with tempfile.TemporaryDirectory() as folder:
        source = pathlib.Path(folder) / "driver.c"
        source.write_text(DRIVER)
        driver = source.with_name("libcuda.so.1")
        subprocess.run([cc, "-shared", "-fPIC", "-o", driver, source], check=True)
        cuda = source.with_name("cuda_sdk_lib")  # where it looks first, in the working directory
        (cuda / "nvvm").mkdir(parents=True)
        (cuda / "bin").symlink_to(tools() / "bin")
        (cuda / "nvvm" / "libdevice").symlink_to(tools() / "lib")
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "LD_LIBRARY_PATH": folder,
            "PATH": f"{tools() / 'bin'}:{os.environ['PATH']}",
            "PYTHONPATH": os.pathsep.join([str(pathlib.Path(__file__).parents[2]), *sys.path]),
            "MOSAIC_GPU_DUMP_PTX": "1",  # to standard output, with what ptxas says
            "MOSAIC_GPU_DUMP_PTXAS": "1",
        }
        compiled = subprocess.run(
            [sys.executable, "-m", __name__],
            input=pickle.dumps((str(library), function, arguments, options)),
            cwd=folder,
            env=environment,
            capture_output=True,
            check=False,
        )
        said = (compiled.stdout + compiled.stderr).decode(errors="replace")
        if compiled.returncode:
            raise ValueError(said[-2000:])
        attributes = source.with_name("attributes").read_text()
        cubin = source.with_name("kernel.cubin").read_bytes()
    return Assembled(
        registers=number_in(said, r"Used (\d+) registers"),
        spilled=number_in(said, r"(\d+) bytes spill stores"),
        shared_memory=number_in(attributes, r"(?m)^8=(\d+)$"),
        serialised=re.findall(r"^.*\(C751[0-8]\).*$", said, re.MULTILINE),
        ptx=said[said.index(".version") : said.rindex("}")],
        cubin=cubin,
    )


def main() -> None:
    """Compile the call that the standard input describes: the process of its own."""
    import jax
    from jax.experimental.mosaic.gpu import core

    import ejk

    path, function, arguments, options = pickle.load(sys.stdin.buffer)
    arrays = {name: x for name, x in options.items() if isinstance(x, jax.ShapeDtypeStruct)}
    static = {name: x for name, x in options.items() if name not in arrays}
    call = jax.jit(functools.partial(getattr(ejk, function), **static))
    call.trace(*arguments, **arrays).lower(lowering_platforms=("cuda",))
    library = ctypes.CDLL(path)
    library.MosaicGpuCompile.argtypes = [ctypes.c_char_p, ctypes.c_int]
    library.MosaicGpuCompile.restype = ctypes.c_void_p
    (module,) = core.KNOWN_KERNELS.values()
    if not library.MosaicGpuCompile(module, len(module)):
        sys.exit("Mosaic GPU does not compile it")


if __name__ == "__main__":
    main()
