"""What has to be installed to launch Triton kernels, and the command that installs what is not."""

import importlib
import importlib.metadata
import importlib.util
import sys
import warnings

from ejk._errors import Mendable


def missing(platform: str) -> str | None:
    """Say which package is missing, or does not fit; None if all are there.

    Lowering for a GPU takes Triton, jax-triton 0.4, and JAX's plugin for such GPUs, with which
    jaxlib builds the custom call. It takes no GPU, and none of the libraries that the plugin
    depends on. The interpreter, for `cpu`, takes Triton alone.
    """
    packages = ("triton",) if platform == "cpu" else ("triton", "jax-triton")
    for package in packages:
        if not _is_installed(package):
            if sys.platform != "linux":
                return f"{package} is not installed; there is none but for Linux"
            extra = "triton" if platform == "cpu" or _has_plugin() else _extra(platform)
            return Mendable(f"{package} is not installed", f'pip install "ejk[{extra}]"')
    if platform == "cpu":
        return None
    jax_triton = version("jax-triton")
    if jax_triton and not jax_triton.startswith("0.4."):
        return Mendable(
            f"jax-triton {jax_triton} does not fit", 'pip install "jax-triton>=0.4,<0.5"'
        )
    return None if _has_plugin() else _plugin_refusal(platform)


def _is_installed(package: str) -> bool:
    """Say whether a package can be found; PyTorch distributes Triton under names of its own."""
    spec = importlib.util.find_spec(package.replace("-", "_"))
    return spec is not None and spec.origin is not None  # a mere folder of that name has none


def version(package: str) -> str | None:
    """Return the version that is installed of a package."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _has_plugin() -> bool:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a plugin that does not fit is refused instead
        # Without a plugin the module is there and empty.
        return hasattr(importlib.import_module("jaxlib.gpu_triton"), "TritonKernel")


def _extra(platform: str) -> str:
    if platform == "rocm":
        return "rocm"
    has_cuda12 = version("jax-cuda12-plugin") or version("jax-cuda12-pjrt")
    return "cuda12" if has_cuda12 else "cuda13"


def _plugin_refusal(platform: str) -> Mendable:
    extra, jaxlib = _extra(platform), version("jaxlib")
    if platform == "rocm":
        return Mendable("JAX's ROCm plugin is not installed", 'pip install "ejk[rocm]"')
    plugin = f"jax-{extra}-plugin"
    found = version(plugin)
    reason = f"{plugin} {found} does not fit jaxlib {jaxlib}" if found else (
        f"{plugin} is not installed"
    )  # fmt: skip
    return Mendable(reason, f'pip install --no-deps "{plugin}=={jaxlib}"')
