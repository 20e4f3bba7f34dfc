"""Hypothesis strategies of recipes: sizes are drawn freely, so that failures shrink to small ones.

A draw is one program and many calls of it, as to compile takes longer than to run: who runs them
stops where the program has had its share of time. What stands first in a list is what a failure is
shrunk towards. Types are `Any` where beartype would draw an item to look at: Hypothesis wants to
know of every draw.
"""

from typing import Any

import numpy as np
from hypothesis import strategies as st

import ejk
from ejk.testing.case import WRITERS
from ejk.testing.configurations import (
    CACHES,
    DTYPES,
    F16,
    F32,
    FEATURES,
    INT4,
    INTEGERS,
    LAYOUTS,
)
from ejk.testing.copy_kv_cache import TYPES
from ejk.testing.ragged_page_attention import EXTRAS
from ejk.testing.recipes import Recipe
from ejk.testing.write_kv_cache import WRITTEN_CACHES, hostile_slots

SEEDS = st.integers(0, 2**32 - 1)
WIDTHS = (1, 2, 4, 8, 16, 33, 64, 80, 96, 128, 144, 192, 256)
PAGE_SIZES = (1, 2, 3, 8, 16, 48, 64)
OF_MATRIX_UNITS = {"head_dim": (64, 128, 256), "page_size": (8, 16, 32, 64)}
MOST_LOGITS = 12_000  # the oracle takes microseconds of each
ROWS = (1, 2, 3, 5, 8, 13, 33)  # slots of a write or a copy: each number is a program
MOST_CALLS = 64  # of a program: drawn in a twentieth of a second, compiled in several on a GPU
MOST_INTEGERS = 1000  # of them: Hypothesis draws no more than 8 KiB
GO_ON = st.integers(0, 200)  # 0: no further call
FITS = st.sampled_from((True,) * 7 + (False,))  # to what the backend declares; or any call

_PLAIN: list[tuple[Any, Any, str]] = [(dtype, None, "none") for dtype in DTYPES]

FIELDS: dict[str, tuple[dict[str, Any], ...]] = {
    "page_attention xla": ({"block_kv": 16},),
    "page_attention triton": ({"num_sms": 16}, {"block_kv": 16, "num_sms": 6}),
    "page_attention pallas": ({"pages_per_compute_block": 2},),
    "ragged_page_attention xla": ({"block_q": 4, "block_kv": 16}, {"least_saved_bytes": 0}),
    "ragged_page_attention triton": (
        {"block_rows": 16, "block_kv": 32, "few_block_kv": 16, "num_sms": 6},
        {"least_saved_bytes": 0},
    ),
    "ragged_page_attention pallas": (
        {"block_q": 3, "pages_per_block": 2}, {"least_saved_bytes": 0},
    ),
    "ragged_page_attention mosaic_gpu": ({"num_sms": 2},),
}  # fmt: skip
"""Fields of a backend with which short contexts are cut into several blocks, or groups pay."""
# Of latent caches, for Hopper's kernels; of ragged batches where a window needs no more.
LATENT_HEADS = {"page_attention": (5, 16, 33, 64, 128), "ragged_page_attention": (33, 64, 128)}


@st.composite
def recipes(draw: Any, operation: str, backend: ejk.Backend, names: Any) -> Any:
    """Draw recipes of one program; `names` are the compositions to draw from."""
    composition = draw(st.sampled_from(list(names)))  # first: what is plain is shrunk best
    fields = draw(st.sampled_from(({}, *FIELDS.get(f"{operation} {backend.name}", ()))))
    fields = fields | ({"interpret": True} if getattr(backend, "interpret", False) else {})
    drawn = _slots(operation) if operation in WRITERS else _attention(operation, backend)
    program, values, size = draw(drawn)
    each = [draw(values)]
    while len(each) < min(MOST_CALLS, MOST_INTEGERS // size) and draw(GO_ON):
        each.append(draw(values))
    return np.array([
        Recipe(
            operation, backend.name, dict(sorted({**program, **call}.items())), composition, fields
        )
        for call in each
    ], object)  # fmt: skip


@st.composite
def _attention(draw: Any, operation: str, backend: Any) -> Any:
    is_ragged, fits = operation == "ragged_page_attention", draw(FITS)
    hopper, features = fits and backend.name == "mosaic_gpu", backend.features

    def declares(*names: Any) -> bool:
        return not fits or features.issuperset(names)

    num_seqs, total = draw(st.integers(1, 4)), draw(st.sampled_from((1, 4, 13)))
    rows = max(num_seqs, total * is_ragged)
    shape = draw(_shapes(num_seqs, rows, operation if hopper else "", declares("value_head_dim")))
    if hopper and "latent" in shape:  # decode's kernel runs it
        features = features & ejk.MosaicGpuPageAttention.features
    width = shape.get("value_head_dim", shape["head_dim"])
    same_width = width == shape["head_dim"] and not shape.get("latent")
    plain = draw(st.booleans())  # what every backend takes, if it takes the shape
    caches = _caches(_PLAIN if plain else [*_PLAIN, *CACHES], declares, hopper)
    dtype, cache, scales = draw(st.sampled_from(caches))
    if cache == INT4 and (shape["head_dim"] % 2 or width % 2):
        dtype, cache, scales = caches[0]
    layouts = [x for x in (*LAYOUTS, "INTERLEAVED") if declares(f'cache_layout="{x}"')]
    layout = draw(st.sampled_from(layouts if same_width else [x for x in layouts if x in LAYOUTS]))
    traced = draw(st.booleans())
    program: dict[str, Any] = {
        "shape": shape,
        "dtype": dtype.name,
        "cache_layout": layout,
        "features": draw(_some(FEATURES, declares, plain)),
        "num_splits": 0 if is_ragged else draw(st.sampled_from((0, 1, 2, 3, 7))),
        "cache_dtype": cache and cache.name,
        "scales": scales,
        "fused": same_width
        and layout != "INTERLEAVED"
        and declares("fused_pools")
        and draw(st.booleans()),
        "lens_dtype": draw(st.sampled_from(_names(1))),
        "tables_dtype": draw(st.sampled_from(_names(shape["num_pages"]))),
        "traced_window": traced,
        "as_jax": draw(st.booleans()),
    }
    capacity = shape["max_blocks"] * shape["page_size"]
    limits = np.iinfo(program["lens_dtype"])
    odd = (0, capacity, capacity + 1, -1, 2**32 + 1, limits.min, limits.max)
    length = st.integers(0, min(capacity, limits.max)) | _within(limits, odd)
    values = {
        "lens": st.lists(length, min_size=num_seqs, max_size=num_seqs),
        "seed": SEEDS,
        "share": st.booleans(),
        "invalid": st.sampled_from((0.0, 0.3, 1.0)),
        "magnitudes": st.tuples(st.sampled_from((1.0, 0.1, 2.0)), st.sampled_from((1.0, 0.01, 99))),
        "window": st.integers(1, capacity + 3)
        if traced
        else st.just(draw(st.sampled_from((1, shape["page_size"] + 1, 2**31 - 1)))),  # a program
    }
    if is_ragged:
        program |= {"total": total, "extras": draw(_some(EXTRAS, declares, plain))}
        causal = plain or "tree_mask" in program["extras"] or not declares("causal=False")
        program["causal"] = causal or draw(st.sampled_from((True, False)))
        program["cu_dtype"] = draw(st.sampled_from(_names(total)))
        values["cu_q_lens"] = _cuts(num_seqs, total, np.iinfo(program["cu_dtype"]))
    return program, st.fixed_dictionaries(values), 2 * num_seqs + 6


def _some(names: Any, declares: Any, plain: bool) -> Any:
    """Draw some of the optional arguments; every backend takes a scale, and declares none."""
    known = [x for x in names if not plain and (x == "attn_scale" or declares(x))]
    return st.lists(st.sampled_from(known), unique=True) if known else st.just([])


def _caches(among: Any, declares: Any, hopper: bool) -> Any:
    """Leave out the types that a backend does not declare, or for `hopper` its kernels refuse."""
    return [
        (dtype, cache, scales)
        for dtype, cache, scales in among
        if declares(*_cache_features(dtype, cache, scales))
        and not (hopper and (dtype == F32 or (dtype, scales) == (F16, "token")))
    ]


def _cache_features(dtype: Any, cache: Any, scales: Any) -> Any:
    """Name the features of a cache, as backends declare them."""
    kind = "" if cache in (None, dtype) else f"={cache.name}"
    if cache in DTYPES and kind:
        kind = " other than query.dtype"
    found = [f"key_cache.dtype{kind}{' (int4)' * (cache == INT4)}"] if kind else []
    per_token = " per token" * (scales == "token")
    return found + [f"key_scale, value_scale{per_token}"] * (scales != "none")


@st.composite
def _shapes(draw: Any, num_seqs: int, rows: int, hopper: str, may_be_latent: bool) -> Any:
    """Draw sizes: such as Hopper's kernels of the operation `hopper` take, if it is not empty."""
    aligned = bool(hopper) or draw(st.booleans())
    latent = may_be_latent and (hopper == "page_attention" or draw(st.booleans()))
    limits = OF_MATRIX_UNITS if aligned else {}
    widths = limits.get("head_dim", WIDTHS)
    if latent:
        widths = (576,) if aligned else (*widths, 576)
    head_dim = draw(st.sampled_from(widths))
    num_kv_heads = 1 if latent and aligned else draw(st.sampled_from((1, 2, 3)))
    groups = LATENT_HEADS[hopper] if hopper and latent else (1, 2, 3, 4, 5, 7, 8, 17)
    num_heads = num_kv_heads * draw(st.sampled_from(groups))
    page_size = draw(st.sampled_from(limits.get("page_size", PAGE_SIZES)))
    most = MOST_LOGITS // (num_heads * rows * page_size)
    max_blocks = draw(st.integers(1, max(1, min(most, 40))))
    shape = {
        "num_heads": num_heads,
        "num_kv_heads": num_kv_heads,
        "head_dim": head_dim,
        "page_size": page_size,
        "max_blocks": max_blocks,
        "num_pages": draw(st.integers(1, 2 * max_blocks * num_seqs)),
    }
    if latent:
        less = 64 if head_dim == 576 else draw(st.sampled_from((0, 4))) * (head_dim > 4)
        return shape | {"latent": True, "value_head_dim": head_dim - less}
    if not aligned and draw(st.booleans()):
        shape["value_head_dim"] = draw(st.sampled_from(widths))
    return shape


def _cuts(num_seqs: int, total: int, limits: Any) -> Any:
    """Draw where sequences begin and end: in order, or anything at all."""
    inside = st.integers(0, total)
    either = inside | _within(limits, (-1, total + 1, 2**32 + 1, limits.min, limits.max))
    in_order = st.lists(inside, min_size=num_seqs, max_size=num_seqs).map(lambda x: [0, *sorted(x)])
    return in_order | st.lists(either, min_size=num_seqs + 1, max_size=num_seqs + 1)


@st.composite
def _slots(draw: Any, operation: str) -> Any:
    width = draw(st.sampled_from(WIDTHS))
    shape = {
        "num_kv_heads": draw(st.integers(1, 3)),
        "head_dim": width,
        "value_head_dim": draw(st.sampled_from((width, None, 0, *WIDTHS))),
        "page_size": draw(st.sampled_from(PAGE_SIZES)),
        "num_pages": draw(st.integers(1, 8)),
    }
    is_write = operation == "write_kv_cache"
    fused, layouts = shape["value_head_dim"] is None, LAYOUTS
    if is_write and fused:
        layouts = (*LAYOUTS, "INTERLEAVED")
    program: dict[str, Any] = {"shape": shape, "cache_layout": draw(st.sampled_from(layouts))}
    if is_write:
        dtype, cache, scales = draw(st.sampled_from([*_PLAIN, *WRITTEN_CACHES]))
        program["cache_dtype"] = cache and cache.name
    else:
        dtype, scales = draw(st.sampled_from(TYPES))
        cache = dtype
    if cache == INT4 and (width % 2 or (shape["value_head_dim"] or 0) % 2):
        shape |= {"head_dim": 8, "value_head_dim": 8}
    units = shape["num_pages"] * (1 if operation == "copy_kv_pages" else shape["page_size"])
    program |= {
        "dtype": dtype.name,
        "scales": scales,
        "slots_dtype": draw(st.sampled_from(_names(1))),
        "as_jax": draw(st.booleans()),
    }
    kind = np.dtype(program["slots_dtype"])
    top = min(units - 1, np.iinfo(kind).max)
    inside = st.integers(0, top)
    few, outside = st.integers(0, min(2, top)), st.sampled_from(hostile_slots(kind, units) or [0])
    index = draw(st.sampled_from((inside, few, inside | outside)))
    names = ("slots",) if is_write else ("sources", "targets")
    count = draw(st.sampled_from(ROWS))
    rows = st.lists(st.tuples(*[index] * len(names)), min_size=count, max_size=count)
    columns = rows.map(lambda rows: dict(zip(names, map(list, zip(*rows)))))
    values = st.builds(lambda seed, of: {"seed": seed, **of}, SEEDS, columns)
    return program, values, 1 + count * len(names)


def _names(largest: int) -> list[Any]:
    """Name the integer types that hold a number, int32 first."""
    names = [dtype.name for dtype in INTEGERS if np.iinfo(dtype).max >= largest]
    return sorted(names, key=lambda name: name != "int32")


def _within(limits: Any, numbers: Any) -> Any:
    return st.sampled_from([x for x in numbers if limits.min <= x <= limits.max])
