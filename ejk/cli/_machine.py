"""What a machine is: facts alone, which a test can make up."""

import dataclasses
import glob
import importlib.metadata
import os
import pathlib
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

from ejk._backend_report import default_platform
from ejk.backends.gpu import capability_of
from ejk.backends.triton._installed import version

PACKAGES = (
    "ejk", "jax", "jaxlib", "numpy", "triton", "jax-triton", "jax-cuda12-plugin",
    "jax-cuda13-plugin", "jax-rocm7-plugin", "libtpu",
)  # fmt: skip
# What changes what runs, or how fast.
VARIABLES = (
    "JAX_PLATFORMS", "JAX_DISABLE_JIT", "JAX_DISABLE_MOST_OPTIMIZATIONS", "JAX_ENABLE_X64",
    "JAX_COMPILATION_CACHE_DIR", "XLA_FLAGS", "LIBTPU_INIT_ARGS", "CUDA_VISIBLE_DEVICES",
    "LD_LIBRARY_PATH", "TRITON_CACHE_DIR", "TRITON_INTERPRET", "TRITON_ALWAYS_COMPILE",
    "TRITON_PTXAS_PATH",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Machine:
    """The facts that diagnoses follow from.

    Attributes:
        system: as `platform.system()` says.
        python: its version.
        packages: the versions of those of `PACKAGES` that are installed.
        environment: those of `VARIABLES` that are set.
        nvidia_gpus: the NVIDIA GPUs that the system has, whatever JAX sees.
        amd_gpus: how many AMD GPUs the system has.
        has_tpu: the system has a TPU.
        driver: the version of the NVIDIA driver.
        platform: what JAX computes on: `cpu`, `cuda`, `rocm` or `tpu`; None where it fails.
        devices: what JAX sees there.
        capability: 90 of sm_90, of the first GPU.
        jax_error: why JAX has no devices.
        cuda_error: why JAX has no NVIDIA GPU, where it computes on a CPU.
        cuda: 12080 of CUDA 12.8.0, as JAX's plugin has it.
        ptxas: of each of `triton` and `path` the assembler's file; None where there is none.
        unwritable: the folders of caches that cannot be written, by the variable that moves each.
    """

    system: str = "Linux"
    python: tuple[int, ...] = (3, 12, 0)
    packages: Mapping[str, str] = dataclasses.field(default_factory=dict)
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)
    nvidia_gpus: tuple[str, ...] = ()
    amd_gpus: int = 0
    has_tpu: bool = False
    driver: str | None = None
    platform: str | None = "cpu"
    devices: tuple[str, ...] = ()
    capability: int | None = None
    jax_error: str | None = None
    cuda_error: str | None = None
    cuda: int | None = None
    ptxas: Mapping[str, str | None] = dataclasses.field(default_factory=dict)
    unwritable: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def version(self, package: str) -> tuple[int, ...] | None:
        """The numbers of a package's version; None if it is not installed."""
        found = self.packages.get(package)
        return None if found is None else numbers(found)


def numbers(version: str) -> tuple[int, ...]:
    """Return the leading numbers of a version: (3, 6, 0) of 3.6.0.post1."""
    leading = re.match(r"\d+(\.\d+)*", version)
    return tuple(map(int, leading[0].split("."))) if leading else ()


def this_machine() -> Machine:
    """Gather the facts, for which JAX starts its devices; that it cannot is one of them."""
    gpus, driver = _nvidia()
    return Machine(
        system=platform.system(),
        python=sys.version_info[:3],
        packages={name: found for name in PACKAGES if (found := version(name)) is not None},
        environment={name: os.environ[name] for name in VARIABLES if name in os.environ},
        nvidia_gpus=gpus,
        amd_gpus=_amd_gpus(),
        has_tpu=bool(glob.glob("/dev/accel[0-9]*")),
        driver=driver,
        ptxas={"triton": _ptxas_of_triton(), "path": shutil.which("ptxas")},
        unwritable=_unwritable(),
        **_jax(),
    )


def _nvidia() -> tuple[tuple[str, ...], str | None]:
    """Return the names of GPUs and the driver's version."""
    command = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return tuple(glob.glob("/proc/driver/nvidia/gpus/*")), None
    lines = [line.split(", ") for line in said.stdout.strip().splitlines()]
    return tuple(line[0] for line in lines), lines[0][-1] if lines else None


def _amd_gpus(nodes: str = "/sys/class/kfd/kfd/topology/nodes") -> int:
    """Count the nodes of the kernel's driver that have vector units: the others are CPUs."""
    paths = map(pathlib.Path, glob.glob(f"{nodes}/*/properties"))
    try:
        return sum(re.search(r"simd_count [1-9]", path.read_text()) is not None for path in paths)
    except OSError:
        return 0


def _ptxas_of_triton() -> str | None:
    try:
        files = importlib.metadata.files("triton") or []
    except importlib.metadata.PackageNotFoundError:
        return None
    found = [file.locate() for file in files if file.name == "ptxas"]
    return next((str(path) for path in found if os.path.exists(str(path))), None)


def _unwritable() -> dict[str, str]:
    home = pathlib.Path.home()
    folders = {
        "TRITON_CACHE_DIR": os.environ.get("TRITON_CACHE_DIR", str(home / ".triton" / "cache")),
        "JAX_COMPILATION_CACHE_DIR": os.environ.get("JAX_COMPILATION_CACHE_DIR", ""),
    }
    return {name: path for name, path in folders.items() if path and not _can_write(path)}


def _can_write(path: str) -> bool:
    """Say whether a folder, or the first of those above it that exists, can be written."""
    there = pathlib.Path(path).absolute()
    while not there.exists():
        there = there.parent
    return there.is_dir() and os.access(there, os.W_OK)


def _jax() -> dict[str, Any]:
    """Return what JAX sees, which a broken plugin can make fail in any way."""
    import jax

    from ejk import _jax

    try:
        devices, kind = jax.local_devices(), default_platform()
        return {
            "platform": kind,
            "devices": tuple(device.device_kind for device in devices),
            "capability": capability_of(devices[0]) if kind == "cuda" else None,
            "cuda": _jax.cuda_version(),
            "cuda_error": _cuda_error() if kind == "cpu" else None,
        }
    except Exception as error:
        return {"platform": None, "jax_error": _spell(error)}


def _cuda_error() -> str | None:
    import jax

    try:
        jax.local_devices(backend="cuda")
    except Exception as error:
        return _spell(error)
    return None


def _spell(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300].rstrip(": ")
