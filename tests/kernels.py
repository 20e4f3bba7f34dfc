"""The files of kernels, by the names that tests give them."""

import pathlib

BACKENDS = pathlib.Path(__file__).parents[1] / "ejk" / "backends"


def kernel_modules(backend: str) -> dict[str, str]:
    """Map the names of a backend's kernels to modules, such as `write_kv_cache_kernel`."""
    found = {}
    for path in sorted((BACKENDS / backend).rglob("*kernel.py")):
        parts = path.relative_to(BACKENDS).with_suffix("").parts
        found["_".join(parts[1:])] = ".".join(("ejk", "backends", *parts))
    return found
