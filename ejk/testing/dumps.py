"""A user's own call in one file: its arrays and options, which `ejk repro` runs again."""

import inspect
import json
import os
import shlex
import zipfile
from collections.abc import Callable
from typing import Any

import jax
import ml_dtypes
import numpy as np
from jax.core import Tracer

import ejk
from ejk._describe import describe
from ejk.testing import oracle, runs
from ejk.testing.case import ATTENTIONS, OPERATIONS, SCALES
from ejk.testing.copy_kv_cache import UNIT_OF, CopyKVCacheCase
from ejk.testing.page_attention import PageAttentionCase
from ejk.testing.ragged_page_attention import RaggedPageAttentionCase
from ejk.testing.recipes import RecipeError
from ejk.testing.runs import Call
from ejk.testing.shapes import Shape
from ejk.testing.write_kv_cache import WriteKVCacheCase

HEADER = "call"
HINTS = ("max_context_len", "max_q_len", "prefix_groups")
OF_A_MESH = ("axis_name", "page_offset")


def dump(
    path: str | os.PathLike[str],
    operation: str | Callable[..., Any],
    *arguments: Any,
    pages: str = "all",
    **options: Any,
) -> str:
    """Write a call to a file, so that it can be run elsewhere and compared with the oracle.

    Arrays keep their types and every bit, also of what must not be read. Instead of a plan it is
    kept that there was one; of a backend, its name. Nothing is pickled.

    Args:
        path: of the file, `.npz`.
        operation: the function that was called, as `ejk.page_attention`, or its name.
        *arguments: those of the call.
        pages: `"visible"` keeps of the pools what tables or slots name, and numbers it anew: of
            gigabytes a few megabytes are left. A fault of large offsets is left out with the rest.
        **options: the keyword arguments of the call.

    Returns:
        The command that runs the file. It is printed, too, with the sizes.

    Raises:
        TypeError: an argument is traced, or none that a file holds; the call's own.
        ValueError: the operation or `pages` is unknown, or the call is a part of one on several
            devices.

    Examples:
        >>> import contextlib, os, tempfile, jax.numpy as jnp, ejk.testing
        >>> pool = jnp.ones((4, 2, 8, 16))
        >>> call = (jnp.ones((1, 2, 16)), pool, pool, jnp.array([9]), jnp.array([[3, 0]]))
        >>> path = os.path.join(tempfile.mkdtemp(), "call.npz")
        >>> with contextlib.redirect_stdout(None):
        ...     line = ejk.testing.dump(path, ejk.page_attention, *call, sliding_window=4)
        >>> line.split()[:4]
        ['python', '-m', 'ejk', 'repro']
    """
    name = operation if isinstance(operation, str) else getattr(operation, "__name__", "")
    if name not in OPERATIONS:
        raise ValueError(f"operation={describe(operation)} must be one of {', '.join(OPERATIONS)}")
    if pages not in ("all", "visible"):
        raise ValueError(f"pages={pages!r} must be 'all' or 'visible'")
    given = inspect.signature(getattr(ejk, name)).bind(*arguments, **options).arguments
    arrays, static = _apart(given)
    if pages == "visible":
        arrays = _visible(name, arrays, given.get("cache_layout", "HND"))
    dtypes = {key: x.dtype.name for key, x in arrays.items()}
    header = {"ejk": ejk.__version__, "operation": name, "options": static, "dtypes": dtypes}
    held = {key: _as_bits(x) for key, x in arrays.items()}
    with open(path, "wb") as file:
        np.savez(file, allow_pickle=False, **{HEADER: np.array(json.dumps(header)), **held})
    line = f"python -m ejk repro {shlex.quote(os.fspath(path))}"
    size = sum(x.nbytes for x in held.values()) / 1024
    spelled = f"{size:.1f} KiB" if size < 1024 else f"{size / 1024:.1f} MiB"
    print(f"{os.fspath(path)}: {name}, {len(held)} arrays, {spelled}\n{line}")
    return line


def _apart(given: dict[str, Any]) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Return what is held as arrays, and what as text."""
    arrays: dict[str, np.ndarray] = {}
    static: dict[str, Any] = {}
    for name, x in given.items():
        if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(x)):
            raise TypeError(
                f"{name} is traced and has no numbers yet: dump the call outside of jit, or from "
                "inside with jax.debug.callback"
            )
        if name in OF_A_MESH and x is not None and not (name == "page_offset" and _is_zero(x)):
            raise ValueError(f"{name}={describe(x)} must be left out: dump what one device calls")
        if name == "plan":
            static[name] = x is not None
        elif name == "backend":
            static[name] = getattr(x, "name", x)
        elif name == "prefix_groups" and x is not None:
            arrays |= {f"{name}.{i}": np.asarray(part) for i, part in enumerate(x)}
        elif isinstance(x, bool | int | float | str | None):
            static[name] = x
        elif hasattr(x, "dtype") and hasattr(x, "shape"):
            arrays[name] = np.asarray(x)
        else:
            raise TypeError(f"{name}={describe(x)} must be an array, a number, a string or None")
    return arrays, static


def _is_zero(x: Any) -> bool:
    return np.ndim(x) == 0 and int(x) == 0


def _as_bits(x: np.ndarray) -> np.ndarray:
    """View types that NumPy does not know as integers."""
    is_known = x.dtype.kind in "biuf" and x.dtype.name not in dir(ml_dtypes)
    return x if is_known else x.view(f"u{x.dtype.itemsize}")


def load(path: str | os.PathLike[str]) -> tuple[str, dict[str, Any]]:
    """Read a call from a file: the operation's name, and the arguments by name.

    Raises:
        RecipeError: the file is not such a one.
    """
    where = os.fspath(path)
    try:
        with open(path, "rb") as file:
            if file.read(2) != b"PK":  # NumPy would advise to load it unsafely
                raise zipfile.BadZipFile("it is no archive of arrays")
        with np.load(path, allow_pickle=False) as file:
            held = {name: file[name] for name in file.files}
        header = json.loads(str(held.pop(HEADER)))
        operation, options, dtypes = (header[n] for n in ("operation", "options", "dtypes"))
        given = {name: _typed(x, dtypes[name]) for name, x in held.items()}
    except OSError as error:
        raise RecipeError(f"{where} cannot be read: {error.strerror or error}") from None
    except (KeyError, TypeError, AttributeError, ValueError, zipfile.BadZipFile) as error:
        raise RecipeError(f"{where} is not a file of ejk.testing.dump: {error}") from None
    if operation not in OPERATIONS:
        raise RecipeError(f"{where} has operation={operation!r}, of {', '.join(OPERATIONS)}")
    groups = [given.pop(f"prefix_groups.{i}") for i in range(2) if f"prefix_groups.{i}" in given]
    return operation, {**options, **given, **({"prefix_groups": tuple(groups)} if groups else {})}


def _typed(x: np.ndarray, name: str) -> np.ndarray:
    dtype = np.dtype(getattr(ml_dtypes, name, name))
    return x if x.dtype == dtype else x.view(dtype)


def described(given: dict[str, Any]) -> str:
    """Return the arguments in a line: arrays by type and shape."""
    return ", ".join(
        f"{name}={describe(x) if hasattr(x, 'dtype') else repr(x)}"
        for name, x in given.items()
        if x is not None
    )


def call_of(operation: str, given: dict[str, Any], backend: ejk.Backend) -> tuple[Call, list[str]]:
    """Return a call that a file holds, and the compositions to run it by.

    Raises:
        RecipeError: the arguments make none.
    """
    hints = {name: given[name] for name in HINTS if given.get(name) is not None}
    try:
        case = _case(operation, given)
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise RecipeError(f"the arguments make no call: {type(error).__name__}: {error}") from None

    names = ["plain", "jit"] + (["plan"] if given.get("plan") else [])
    return Call(operation, case, backend, lambda: case, hints=hints), names


def _case(operation: str, given: dict[str, Any]) -> Any:
    positional: list[Any] = [given.get(name) for name in runs.POSITIONAL[operation]]
    layout = given.get("cache_layout", "HND")
    scales: Any = tuple(map(given.get, SCALES))
    if operation == "write_kv_cache":
        return WriteKVCacheCase(*positional, cache_layout=layout, scales=scales)
    if operation in UNIT_OF:
        return CopyKVCacheCase(UNIT_OF[operation], *positional, cache_layout=layout, scales=scales)
    query, key_cache, value_cache, lens, tables, *cuts = positional
    fused = oracle.holds_both(key_cache, layout)
    split = "NHD" if layout == "INTERLEAVED" else layout
    pools: Any = oracle.halves(key_cache, layout) if fused else (key_cache, value_cache)
    if np.ndim(scales[0]) > 1:
        scales = oracle.halves(scales[0], layout) if fused else scales
        scales = tuple(None if x is None else _as_nhd(x, split) for x in scales)
    keys: Any
    keys, values = (None if x is None else _as_nhd(x, split) for x in pools)
    of_values = keys if values is None else values
    width = given.get("value_head_dim") or of_values.shape[3] * (1 + (of_values.dtype == np.uint8))
    shape = Shape(
        "dumped", query.shape[1], keys.shape[2], query.shape[2], keys.shape[1], tables.shape[1],
        len(keys), len(lens), value_head_dim=width, latent=values is None,
    )  # fmt: skip
    names = (
        "attn_scale", "sliding_window", "attn_logits_soft_cap", "sinks", "alibi_slopes",
        "positions", "tree_mask", "causal",
    )  # fmt: skip
    return (RaggedPageAttentionCase if cuts else PageAttentionCase)(
        shape, query.dtype, layout, query, keys, values, lens, tables,
        {name: given[name] for name in names if given.get(name) is not None},
        given.get("num_splits", 0), np.ones(keys.shape[:2], bool), np.ones(tables.shape, bool),
        True, fused and layout != "INTERLEAVED", scales,
        **({"cu_q_lens": cuts[0]} if cuts else {}),
    )  # fmt: skip


def _as_nhd(pool: np.ndarray, layout: str) -> np.ndarray:
    """Arrange a pool, or scales of tokens, as `[num_pages, page_size, num_kv_heads, ...]`."""
    order = {"NHD": (0, 1, 2, 3), "HND": (0, 2, 1, 3), "KV_HEADS_FIRST": (1, 2, 0, 3)}[layout]
    return pool.transpose(order[: pool.ndim])


def _visible(operation: str, arrays: dict[str, np.ndarray], layout: str) -> dict[str, np.ndarray]:
    """Keep the pages that tables or slots name, numbered anew."""
    axis = int(layout == "KV_HEADS_FIRST")
    num_pages = arrays["key_cache"].shape[axis]
    size = runs.page_size_of(arrays["key_cache"], layout)
    if operation in ATTENTIONS:
        tables = arrays["block_tables"]
        first = np.arange(tables.shape[1])[None] * size
        lens = np.maximum(arrays["context_lens"].astype(np.float64), 0)
        named = {"block_tables": (1, first < lens[:, None])}
    else:
        names = [name for name in arrays if name in runs.INDICES]
        named = {name: (1 if name.endswith("pages") else size, np.True_) for name in names}
    # A narrow type may not hold the slots of a page. What int64 does not hold becomes negative.
    pages = {name: arrays[name].astype(np.int64) // slots for name, (slots, _) in named.items()}
    kept = {n: (pages[n] >= 0) & (pages[n] < num_pages) & named[n][1] for n in named}
    used = np.unique(np.concatenate([pages[n][kept[n]] for n in named]))
    cut = dict(arrays)
    for name, (slots, _) in named.items():
        new = np.searchsorted(used, np.where(kept[name], pages[name], 0))
        moved = new * slots + arrays[name].astype(np.int64) % slots
        # Others name nothing: -1, of an unsigned type its end.
        cut[name] = np.where(kept[name], moved, -1).astype(arrays[name].dtype)
    for name in runs.POOLS:
        if name in arrays and arrays[name].ndim > 2:
            cut[name] = np.take(arrays[name], used, axis)
    return cut
