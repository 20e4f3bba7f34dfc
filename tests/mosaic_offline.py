"""Compiles a Pallas Mosaic GPU kernel for Hopper without a GPU, and reads what ptxas says of it.

    python tests/mosaic_offline.py HEADS PAGE_SIZE

lowers one call, and hands Mosaic's module to the entry point that JAX's CUDA plugin has for it.
That wants a CUDA driver, for which a few lines of C stand in: an H100 that runs nothing. ptxas and
libdevice are those that Triton brings. Nothing here is public: what is missing skips the test.

`make test` installs what has that entry point in a folder of its own. In the environment itself JAX
would take it for a platform in every test.
"""

import ctypes
import dataclasses
import importlib.util
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile

PJRT = pathlib.Path(sys.prefix) / "jax-cuda13-pjrt"
DRIVER = """
int cuInit(unsigned flags) { return 0; }
int cuDriverGetVersion(int *version) { *version = 13000; return 0; }
int cuCtxGetDevice(int *device) { *device = 0; return 0; }
int cuDeviceGetAttribute(int *value, int attribute, int device) {
  *value = attribute == 75 ? 9 : 0;  // the major number of the compute capability
  return 0;
}
int cuGetErrorString(int code, const char **text) { *text = "no driver"; return 0; }
int cuModuleLoadData(void **module, const void *image) { *module = (void *)1; return 0; }
int cuModuleGetFunction(void **f, void *module, const char *name) { *f = (void *)1; return 0; }
int cuFuncSetAttribute(void *f, int attribute, int value) { return 0; }
"""


@dataclasses.dataclass(frozen=True)
class Program:
    """What ptxas made of a kernel.

    Attributes:
        registers: of a thread when it starts; the warpgroups trade them.
        spilled: bytes that a thread stores for want of registers.
        serialised: its warnings that products of the tensor cores wait for one another.
        ptx: the program.
    """

    registers: int
    spilled: int
    serialised: list[str]
    ptx: str


def missing() -> str | None:
    """Say what is not here to compile with."""
    found = importlib.util.find_spec("jax_plugins")
    folders = [*(found.submodule_search_locations or ())] if found else []
    if not any(pathlib.Path(x, "xla_cuda13").exists() for x in (*folders, PJRT / "jax_plugins")):
        return "JAX's plugin for CUDA 13 is not installed"
    return None if shutil.which("gcc") else "there is no gcc"


def compile_latent(heads: int, page_size: int) -> Program:
    """Compile the latent kernel in a process of its own."""
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
        command = [sys.executable, os.path.abspath(__file__), str(heads), str(page_size)]
        run = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, check=True
        )
    said = run.stdout + run.stderr
    return Program(
        registers=int(re.search(r"Used (\d+) registers", said)[1]),
        spilled=int(re.search(r"(\d+) bytes spill stores", said)[1]),
        serialised=re.findall(r"^.*\(C751[0-8]\).*$", said, re.MULTILINE),
        ptx=said[said.index(".version") : said.rindex("}")],
    )


def main(heads: int, page_size: int) -> None:
    import jax
    import jax.numpy as jnp
    import jax_plugins.xla_cuda13 as plugin  # pyright: ignore[reportMissingImports]
    from jax.experimental.mosaic.gpu import core

    import ejk

    backend = ejk.MosaicGpuPageAttention(compute_capability=90, num_sms=132)
    shape = jax.ShapeDtypeStruct
    call = jax.jit(lambda *args: ejk.page_attention(*args, value_head_dim=512, backend=backend))
    call.trace(
        shape((64, heads, 576), jnp.bfloat16),
        shape((64 * 4096 // page_size, 1, page_size, 576), jnp.bfloat16),
        None,
        shape((64,), jnp.int32),
        shape((64, 4096 // page_size), jnp.int32),
    ).lower(lowering_platforms=("cuda",))
    library = ctypes.CDLL(plugin._get_library_path())
    library.MosaicGpuCompile.argtypes = [ctypes.c_char_p, ctypes.c_int]
    library.MosaicGpuCompile.restype = ctypes.c_void_p
    (module,) = core.KNOWN_KERNELS.values()
    assert library.MosaicGpuCompile(module, len(module))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
