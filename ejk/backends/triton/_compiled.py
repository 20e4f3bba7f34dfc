"""Compiled kernels on disk, in Triton's own cache: jax-triton compiles them in every process again.

Three quarters of the time of a first call go to the passes of Triton and LLVM. The cache is
where Triton keeps its own kernels: `TRITON_CACHE_DIR`, or `~/.triton/cache`. What is kept is text
in JSON, named after all that it follows from. `TRITON_ALWAYS_COMPILE=1` does without.
"""

import dataclasses
import functools
import hashlib
import importlib
import json
import logging
import os
from collections.abc import Callable
from typing import Any

from ejk.backends.triton import _installed, _packed_pairs

FILE = "ejk.json"
# What jax-triton makes of a compiled kernel; its other fields are for those who dump programs.
KEPT = ("binary", "name", "shared_mem_bytes", "global_scratch_size", "global_scratch_align")


def kept_on_disk(
    compile_module: Callable[..., Any], result_type: Callable[..., Any]
) -> Callable[..., Any]:
    """Return jax-triton's `compile_ttir_inplace` that compiles only what the disk does not hold."""

    def compile_mended(module: Any, backend: Any, options: Any, target: Any) -> Any:
        result = compile_module(module, backend, options, target)
        return dataclasses.replace(result, binary=_packed_pairs.mended(result.binary))

    @functools.wraps(compile_module)
    def compile_or_load(module: Any, backend: Any, options: Any, target: Any) -> Any:
        knobs = importlib.import_module("triton").knobs
        if target.backend != "cuda":
            return compile_module(module, backend, options, target)
        if knobs.compilation.always_compile or os.environ.get("JAX_TRITON_DUMP_DIR"):
            return compile_mended(module, backend, options, target)
        key = _key(module, backend, options)
        if (kept := _load(key)) is not None:
            return result_type(**kept, ttgir="", llir="")
        result = compile_mended(module, backend, options, target)
        if not result.tensordesc_meta:
            _keep(key, {name: getattr(result, name) for name in KEPT})
        return result

    return compile_or_load


def _key(module: Any, backend: Any, options: Any) -> str:
    """Name what a compiled kernel follows from: the program, the compiler, and what it is told."""
    libtriton = importlib.import_module("triton._C.libtriton")
    library = os.stat(str(libtriton.__file__))
    facts = (
        str(module),
        backend.hash(),
        options.hash(),
        sorted(libtriton.get_cache_invalidating_env_vars().items()),
        [_installed.version(package) for package in ("triton", "jax-triton")],
        (library.st_size, library.st_mtime_ns),  # of a Triton that someone builds
        _packed_pairs.VERSION,
    )
    return hashlib.sha256(repr(facts).encode()).hexdigest()


def _manager(key: str) -> Any:
    return importlib.import_module("triton.runtime.cache").get_cache_manager(key)


def _load(key: str) -> dict[str, Any] | None:
    try:
        if path := _manager(key).get_file(FILE):
            with open(path) as file:
                kept = json.load(file)
            return kept if isinstance(kept, dict) and kept.keys() == {*KEPT} else None
    except (OSError, RuntimeError, ValueError) as error:
        _log(error)
    return None


def _keep(key: str, result: dict[str, Any]) -> None:
    try:
        _manager(key).put(json.dumps(result), FILE, binary=False)
    except (OSError, RuntimeError) as error:
        _log(error)


def _log(error: Exception) -> None:
    logging.getLogger("ejk").debug("Triton's cache on disk cannot be used: %s", error)
