"""What is wrong with a machine, and the command that mends it: pure functions of its facts."""

from collections.abc import Iterator
from typing import NamedTuple

from ejk.backends.mosaic_gpu._installed import OLDEST_JAX, WRONG_CUDA
from ejk.cli._machine import Machine, numbers

CUDA13_DRIVER, CUDA12_DRIVER = 580, 525  # the oldest, of JAX's installation guide
OLDEST_JAX_OF_EJK, JAX_TOO_NEW = (0, 10, 2), (0, 13)
OLDEST_TRITON = (3, 6)
# Variables that switch off what makes a program fast, or make it run something else.
SLOW_VARIABLES = {
    "JAX_DISABLE_JIT": "every operation is dispatched alone",
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "XLA compiles without most optimisations",
    "TRITON_ALWAYS_COMPILE": "kernels on disk are not used",
    "TRITON_INTERPRET": "Triton interprets every kernel on the CPU",
}
SLOW_FLAGS = {
    "--xla_backend_optimization_level=0": "XLA compiles without optimisations",
    "--xla_gpu_enable_command_buffer=": "no CUDA graphs: a step launches kernel by kernel",
    "--xla_gpu_autotune_level=0": "XLA does not choose among its kernels",
}
FALSE = ("", "0", "false", "no", "off")


class Diagnosis(NamedTuple):
    """One fault: what is wrong, what follows, and what mends it."""

    name: str
    fault: str
    mend: str


def diagnose(machine: Machine) -> list[Diagnosis]:
    """Return all faults of a machine; none if what it has can be used."""
    parts = (_versions, _unseen, _cuda, _triton, _files, _switched_off)
    return [found for part in parts for found in part(machine)]


def _versions(machine: Machine) -> Iterator[Diagnosis]:
    jax, python = machine.version("jax"), machine.python
    if python < (3, 12):
        spelled = ".".join(map(str, python))
        yield Diagnosis(
            "python", f"Python {spelled} is too old: ejk needs 3.12", "python3.12 -m venv .venv"
        )
    if jax and not OLDEST_JAX_OF_EJK <= jax[:3] < JAX_TOO_NEW:
        yield Diagnosis(
            "jax",
            f"jax {machine.packages['jax']} does not fit: ejk needs 0.10.2 or later, below 0.13",
            'pip install "jax>=0.10.2,<0.13"',
        )
    if machine.jax_error:
        chosen = machine.environment.get("JAX_PLATFORMS")
        where = f" with JAX_PLATFORMS={chosen}" if chosen else ""
        yield Diagnosis(
            "jax devices",
            f"JAX has no devices{where}: {machine.jax_error}",
            "unset JAX_PLATFORMS" if chosen else _installation(machine),
        )


def _unseen(machine: Machine) -> Iterator[Diagnosis]:
    """Devices that the system has and JAX does not use."""
    gpus, chosen = len(machine.nvidia_gpus), machine.environment.get("JAX_PLATFORMS", "")
    has_device = bool(gpus or machine.amd_gpus or machine.has_tpu)
    if has_device and machine.platform == "cpu" and chosen.split(",")[0] == "cpu":
        yield Diagnosis(
            "JAX_PLATFORMS", f"JAX_PLATFORMS={chosen} hides the accelerator", "unset JAX_PLATFORMS"
        )
        return
    hidden = machine.environment.get("CUDA_VISIBLE_DEVICES")
    if gpus and machine.platform == "cpu" and hidden in ("", "-1"):
        yield Diagnosis(
            "CUDA_VISIBLE_DEVICES",
            f"CUDA_VISIBLE_DEVICES={hidden!r} hides {gpus} GPU{'s' * (gpus > 1)}",
            "unset CUDA_VISIBLE_DEVICES",
        )
    elif gpus and machine.platform == "cpu" and not _plugins(machine):
        yield Diagnosis(
            "CUDA plugin",
            f"JAX does not see {gpus} NVIDIA GPU{'s' * (gpus > 1)}: its CUDA plugin is not "
            "installed",
            _installation(machine),
        )
    elif gpus and machine.platform == "cpu" and not list(_cuda(machine)):
        yield Diagnosis(
            "CUDA",
            f"JAX does not see {gpus} NVIDIA GPU{'s' * (gpus > 1)}, and its plugin is installed: "
            f"{machine.cuda_error or 'JAX does not say why'}",
            f'pip install --force-reinstall "ejk[{_extra(machine)}]"',
        )
    if machine.amd_gpus and machine.platform == "cpu":
        if "jax-rocm7-plugin" not in machine.packages:
            yield Diagnosis(
                "ROCm plugin",
                "JAX does not see the AMD GPU: its ROCm plugin is not installed",
                'pip install "ejk[rocm]"',
            )
    if machine.has_tpu and machine.platform == "cpu" and "libtpu" not in machine.packages:
        yield Diagnosis(
            "libtpu", "JAX does not see the TPU: libtpu is not installed", 'pip install "ejk[tpu]"'
        )


def _cuda(machine: Machine) -> Iterator[Diagnosis]:
    plugins, jaxlib = _plugins(machine), machine.packages.get("jaxlib")
    for plugin in plugins:
        found = machine.packages[plugin]
        if jaxlib and numbers(found)[:3] != numbers(jaxlib)[:3]:
            yield Diagnosis(
                "plugin version",
                f"{plugin} {found} does not fit jaxlib {jaxlib}: JAX does not load it",
                f'pip install --no-deps "{plugin}=={jaxlib}"',
            )
    if len(plugins) > 1:
        unused = plugins[0] if _extra(machine) == "cuda13" else plugins[1]
        yield Diagnosis(
            "two plugins", f"{' and '.join(plugins)} are both installed", f"pip uninstall {unused}"
        )
    driver = numbers(machine.driver or "")
    needed = CUDA13_DRIVER if "jax-cuda13-plugin" in plugins else CUDA12_DRIVER
    if driver and plugins and driver[0] < needed:
        mend = 'pip uninstall -y jax-cuda13-plugin jax-cuda13-pjrt && pip install "ejk[cuda12]"'
        yield Diagnosis(
            "driver",
            f"the NVIDIA driver {machine.driver} is too old for {plugins[-1]}: it needs {needed}",
            mend if driver[0] >= CUDA12_DRIVER else "install a newer NVIDIA driver",
        )
    if machine.platform == "cuda" and machine.cuda in WRONG_CUDA:
        major, rest = divmod(machine.cuda or 0, 1000)
        yield Diagnosis(
            "CUDA 12.8",
            f"CUDA {major}.{rest // 10}.{rest % 10} compiles causal Mosaic GPU kernels wrongly: "
            "mosaic_gpu is refused, triton runs instead",
            'pip install --upgrade --upgrade-strategy eager "ejk[cuda12]"',
        )
    if machine.capability is not None and machine.capability < 80:
        yield Diagnosis(
            "old GPU",
            f"compute capability {machine.capability} is below 80: its kernels cannot copy "
            "asynchronously, so calls run on XLA",
            "use a GPU of the Ampere generation or later",
        )
    jax = machine.version("jax")
    if machine.capability == 90 and jax and jax[:3] < OLDEST_JAX:
        yield Diagnosis(
            "jax for Mosaic",
            f"jax {machine.packages['jax']} is too old for the kernels of Hopper in mosaic_gpu: "
            "triton runs instead",
            'pip install --upgrade "ejk[cuda13]"',
        )


def _triton(machine: Machine) -> Iterator[Diagnosis]:
    triton, jax_triton = machine.version("triton"), machine.packages.get("jax-triton")
    is_gpu = machine.platform in ("cuda", "rocm")
    if is_gpu and triton is None:
        yield Diagnosis(
            "triton", "triton is not installed: calls run on XLA", 'pip install "ejk[triton]"'
        )
    elif is_gpu and jax_triton is None:
        yield Diagnosis(
            "jax-triton",
            "jax-triton is not installed: calls run on XLA",
            'pip install "ejk[triton]"',
        )
    if triton and triton < OLDEST_TRITON:
        yield Diagnosis(
            "triton version",
            f"triton {machine.packages['triton']} is too old: ejk needs 3.6 or later",
            'pip install --upgrade "ejk[triton]"',
        )
    if jax_triton and numbers(jax_triton)[:2] != (0, 4):
        yield Diagnosis(
            "jax-triton version",
            f"jax-triton {jax_triton} does not fit: ejk calls version 0.4",
            'pip install "jax-triton>=0.4,<0.5"',
        )
    has_plugin = _plugins(machine) or "jax-rocm7-plugin" in machine.packages
    if jax_triton and not has_plugin:
        plugin = f"jax-{_extra(machine)}-plugin"
        yield Diagnosis(
            "jax-triton alone",
            "jax-triton is installed without JAX's plugin for GPUs: importing it fails, and no "
            "kernel can be lowered for CUDA",
            f'pip install --no-deps "{plugin}=={machine.packages.get("jaxlib")}"',
        )
    numpy = machine.version("numpy")
    if triton and numpy and triton[:2] == (3, 6) and numpy >= (2, 4):
        yield Diagnosis(
            "numpy",
            f"triton {machine.packages['triton']} does not interpret with numpy "
            f"{machine.packages['numpy']}: interpret=True fails",
            'pip install "numpy<2.4"',
        )


def _files(machine: Machine) -> Iterator[Diagnosis]:
    named = machine.environment.get("TRITON_PTXAS_PATH")
    if machine.platform == "cuda" and "triton" in machine.packages and not named:
        if not machine.ptxas.get("triton"):
            yield Diagnosis(
                "ptxas",
                "triton has no ptxas: no kernel can be assembled",
                'pip install --force-reinstall "ejk[triton]"',
            )
    for variable, path in machine.unwritable.items():
        moved = f"export {variable}=$HOME/.cache/ejk"
        yield Diagnosis(
            variable,
            f"the cache {path} cannot be written: each process compiles every kernel again",
            f"mkdir -p $HOME/.cache/ejk && {moved}",
        )


def _switched_off(machine: Machine) -> Iterator[Diagnosis]:
    for variable, effect in SLOW_VARIABLES.items():
        value = machine.environment.get(variable, "")
        if value.lower() not in FALSE:
            yield Diagnosis(variable, f"{variable}={value}: {effect}", f"unset {variable}")
    for given in machine.environment.get("XLA_FLAGS", "").split():
        if given in SLOW_FLAGS:
            yield Diagnosis(
                "XLA_FLAGS", f"XLA_FLAGS has {given}: {SLOW_FLAGS[given]}", "unset XLA_FLAGS"
            )


def _plugins(machine: Machine) -> list[str]:
    names = ("jax-cuda12-plugin", "jax-cuda13-plugin")
    return [name for name in names if name in machine.packages]


def _extra(machine: Machine) -> str:
    """Name the extra for the machine's driver."""
    driver = numbers(machine.driver or "")
    return "cuda12" if driver and driver[0] < CUDA13_DRIVER else "cuda13"


def _installation(machine: Machine) -> str:
    """Return the command that installs what the machine's device takes."""
    if machine.nvidia_gpus:
        return f'pip install "ejk[{_extra(machine)}]"'
    if machine.amd_gpus:
        return 'pip install "ejk[rocm]"'
    return 'pip install "ejk[tpu]"' if machine.has_tpu else "pip install --force-reinstall jax"
