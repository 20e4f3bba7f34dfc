"""One call as a line of text: what builds it, and no array.

A recipe holds sizes, types, lengths, tables' seeds and how the call is composed. It is drawn by
Hypothesis and shrunk by it, yet holds nothing of it: any version builds the same call.
"""

import base64
import binascii
import dataclasses
import json
import math
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

import ejk
from ejk._nearest import did_you_mean
from ejk.testing import copy_kv_cache, page_attention, ragged_page_attention, write_kv_cache
from ejk.testing.case import OPERATIONS
from ejk.testing.configurations import FEATURES, Configuration
from ejk.testing.shapes import Shape

LONG = 160  # characters of JSON, from which on it is compressed
LARGEST_TEXT = 2**20  # bytes of JSON: a line that somebody pastes must not fill the memory
LARGEST_ARRAY = 2**26  # values
VALUES = (
    "lens", "cu_q_lens", "seed", "share", "invalid", "magnitudes", "slots", "sources", "targets",
)  # fmt: skip
"""What differs between the calls of one program."""


class RecipeError(ValueError):
    """A text is not a recipe; the message says why."""


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What builds a call, and how it is run.

    Attributes:
        operation: one of `ejk.testing.case.OPERATIONS`.
        backend: its name.
        call: what `build_case` takes; what is left out has its default.
        composition: one of `ejk.testing.compositions.COMPOSITIONS`.
        fields: those of the backend that are not the default's.
        version: of the `ejk` that made the recipe. Another one may build another call of it.
    """

    operation: str
    backend: str
    call: dict[str, Any]
    composition: str = "plain"
    fields: dict[str, Any] = dataclasses.field(default_factory=dict)
    version: str = ejk.__version__

    def __str__(self) -> str:
        text = json.dumps(dataclasses.asdict(self), separators=(",", ":"))
        if len(text) <= LONG:
            return text
        return base64.urlsafe_b64encode(zlib.compress(text.encode(), 9)).decode().rstrip("=")

    @property
    def program(self) -> str:
        """What the call's program is compiled for: all but the values, of lists how many."""
        values = VALUES + ("window",) * bool(self.call.get("traced_window"))
        call = {
            name: x if name not in values else len(x)
            for name, x in self.call.items()
            if name not in values or isinstance(x, list)
        }
        facts = self.operation, self.backend, call, self.composition, self.fields
        return json.dumps(facts, sort_keys=True)


def parse(text: str) -> Recipe:
    """Read a recipe back from its text.

    Raises:
        RecipeError: it is not one.
    """
    spelled = text if text.lstrip().startswith("{") else _inflated(text)
    try:
        given = json.loads(spelled)
    except (ValueError, RecursionError) as error:
        raise RecipeError(f"it is not JSON: {error}") from None
    if not isinstance(given, dict):
        raise RecipeError(f"it must be a JSON object, not {type(given).__name__}")
    names = [field.name for field in dataclasses.fields(Recipe)]
    _check_names("it", given, names, ("operation", "backend", "call"))
    for name in given:
        kind = dict if name in ("fields", "call") else str
        if not isinstance(given[name], kind):
            raise RecipeError(f"{name} must be {kind.__name__}, not {type(given[name]).__name__}")
    if given["operation"] not in OPERATIONS:
        near = did_you_mean(given["operation"], OPERATIONS)
        raise RecipeError(f"operation={given['operation']!r} must be one of {OPERATIONS}{near}")
    return Recipe(**given)


def _inflated(text: str) -> str:
    try:
        packed = base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
        reader = zlib.decompressobj()
        found = reader.decompress(packed, LARGEST_TEXT)
    except (binascii.Error, zlib.error, ValueError):
        raise RecipeError("it is neither JSON nor what was printed: is its end missing?") from None
    if not reader.eof:
        raise RecipeError(f"its end is missing, or it is longer than {LARGEST_TEXT} bytes")
    return found.decode(errors="replace")


def _check_names(where: str, given: Mapping[str, Any], names: Any, needed: Any) -> None:
    for name in given:
        if name not in names:
            raise RecipeError(f"{where} has {name!r}, which is unknown{did_you_mean(name, names)}")
    if missing := [name for name in needed if name not in given]:
        raise RecipeError(f"{where} must have {', '.join(missing)}")


def build_case(operation: str, call: Mapping[str, Any], seeds_on: int = 0) -> Any:
    """Build the case of a recipe's call, with all seeds further on by `seeds_on`.

    Raises:
        RecipeError: what is given builds none.
    """
    build, names, needed = _BUILDERS[operation]
    _check_names("call", call, names, needed)
    try:
        return build(operation, {**call, "seed": (call.get("seed", 0) + seeds_on) % 2**32})
    except RecipeError:
        raise
    except Exception as error:
        said = " ".join(str(error).split())
        raise RecipeError(f"call builds nothing: {type(error).__name__}: {said}") from None


def sizes(given: Mapping[str, Any], rows: int) -> dict[str, Any]:
    """Check the sizes of a call with so many rows: integers, and arrays that fit."""
    for name, size in given.items():
        least = 0 if name == "value_head_dim" else 1
        if size is not None and not (isinstance(size, int) and least <= size < 2**20):
            raise RecipeError(f"shape has {name}={size!r}, which must be an integer of a size")

    def product(*names: str) -> int:
        return math.prod(given.get(name) or 1 for name in names)

    width = max(product("head_dim"), product("value_head_dim"))
    heads = max(product("num_heads"), product("num_kv_heads"))
    for what, count in {
        "a pool": product("num_pages", "page_size", "num_kv_heads") * width,
        "rows": rows * heads * width,
        "logits": rows * product("num_heads", "max_blocks", "page_size") * ("num_heads" in given),
    }.items():
        if count > LARGEST_ARRAY:
            raise RecipeError(f"shape makes {what} of {count} values, at most {LARGEST_ARRAY}")
    return dict(given)


def integers(name: str, given: Any, dtype: str) -> np.ndarray:
    """Check integers and return them as an array."""
    limits = np.iinfo(dtype)
    if not isinstance(given, list) or len(given) > 2**12:
        raise RecipeError(f"{name} must be a list of at most {2**12} integers")
    for x in given:
        if not isinstance(x, int) or not limits.min <= x <= limits.max:
            raise RecipeError(f"{name} has {x!r}, which must be an integer of {dtype}")
    return np.array(given, dtype)


def _chosen(name: str, call: Mapping[str, Any], known: tuple[str, ...]) -> frozenset[str]:
    """Check names, and return them as a set."""
    given = call.get(name, [])
    _check_names(name, dict.fromkeys(given), known, ())
    return frozenset(given)


def _cache_dtype(call: Mapping[str, Any]) -> np.dtype | None:
    name = call.get("cache_dtype")
    return None if name is None else np.dtype(name)


def _attention(operation: str, call: dict[str, Any]) -> Any:
    lens = integers("lens", call["lens"], call.get("lens_dtype", "int32"))
    total = call.get("total", 1)
    if not (isinstance(total, int) and 0 <= total < 2**12):
        raise RecipeError(f"total={total!r} must be an integer below {2**12}")
    shape = Shape("drawn", **sizes(call["shape"], max(len(lens), total)), num_seqs=len(lens))
    config = Configuration(
        shape,
        np.dtype(call.get("dtype", "float32")),
        call.get("cache_layout", "HND"),
        _chosen("features", call, FEATURES),
        call.get("num_splits", 0),
        call.get("fused", False),
        _cache_dtype(call),
        call.get("scales", "none"),
    )
    window: Any = call.get("window", 1)
    options: dict[str, Any] = {
        "tables_dtype": np.dtype(call.get("tables_dtype", "int32")),
        "window": jnp.int32(window) if call.get("traced_window") else window,
        "seed": call["seed"],
        "share": call.get("share", False),
        "invalid": call.get("invalid", 0.0),
        "magnitudes": tuple(call.get("magnitudes", (1.0, 1.0))),
        "as_jax": call.get("as_jax", True),
    }
    if operation == "page_attention":
        return page_attention.build(config, lens, **options)
    cuts = integers("cu_q_lens", call["cu_q_lens"], call.get("cu_dtype", "int32"))
    extras = _chosen("extras", call, ragged_page_attention.EXTRAS)
    options["causal"] = bool(call.get("causal", True))
    return ragged_page_attention.build_ragged(
        config, lens, cuts, total=total, extras=extras, **options
    )


def _write(operation: str, call: dict[str, Any]) -> Any:
    slots = integers("slots", call["slots"], call.get("slots_dtype", "int32"))
    shape = write_kv_cache.WriteShape("drawn", len(slots), **sizes(call["shape"], len(slots)))
    return write_kv_cache.build(
        shape,
        np.dtype(call.get("dtype", "float32")),
        call.get("cache_layout", "HND"),
        slots,
        seed=call["seed"],
        as_jax=call.get("as_jax", True),
        cache_dtype=_cache_dtype(call),
        scales=call.get("scales", "none"),
    )


def _copy(operation: str, call: dict[str, Any]) -> Any:
    kind = call.get("slots_dtype", "int32")
    sources, targets = (integers(name, call[name], kind) for name in ("sources", "targets"))
    shape = call["shape"]
    rows = len(sources) * (shape.get("page_size", 1) if operation == "copy_kv_pages" else 1)
    config = copy_kv_cache.CopyConfiguration(
        write_kv_cache.WriteShape("drawn", len(sources), **sizes(shape, rows)),
        copy_kv_cache.UNIT_OF[operation],
        np.dtype(call.get("dtype", "float32")),
        call.get("cache_layout", "HND"),
        call.get("scales", "none"),
    )
    as_jax = call.get("as_jax", True)
    return copy_kv_cache.build(config, sources, targets, seed=call["seed"], as_jax=as_jax)


_COMMON = ("shape", "seed", "dtype", "cache_layout", "scales", "as_jax")
_OF_ATTENTION = (
    *_COMMON, "lens", "lens_dtype", "features", "num_splits", "fused", "cache_dtype",
    "tables_dtype", "window", "traced_window", "share", "invalid", "magnitudes",
)  # fmt: skip
_OF_RAGGED = (*_OF_ATTENTION, "cu_q_lens", "cu_dtype", "total", "extras", "causal")
_COPIES = (_copy, (*_COMMON, "sources", "targets", "slots_dtype"), ("shape", "sources", "targets"))

Builder = Callable[[str, dict[str, Any]], Any]
_BUILDERS: dict[str, tuple[Builder, tuple[str, ...], tuple[str, ...]]] = {
    "page_attention": (_attention, _OF_ATTENTION, ("shape", "lens")),
    "ragged_page_attention": (_attention, _OF_RAGGED, ("shape", "lens", "cu_q_lens")),
    "write_kv_cache": (
        _write, (*_COMMON, "cache_dtype", "slots", "slots_dtype"), ("shape", "slots"),
    ),
    "copy_kv_slots": _COPIES,
    "copy_kv_pages": _COPIES,
}  # fmt: skip
