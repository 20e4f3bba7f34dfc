"""Hypothesis strategies that draw a whole `ejk.write_kv_cache` call, of random bits."""

import dataclasses
import functools
import itertools
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from ejk.testing import oracle
from ejk.testing.case import Case, given_scales
from ejk.testing.configurations import (
    ALL,
    BF16,
    DTYPES,
    E4M3,
    E5M2,
    F16,
    F32,
    INT4,
    INT8,
    INTEGERS,
    LAYOUTS,
    Few,
)
from ejk.testing.oracle import Array, DType
from ejk.testing.written import assert_written as assert_written


@dataclasses.dataclass(frozen=True)
class WriteShape:
    """The sizes of one call; `value_head_dim` None: fused pools; 0: latent ones."""

    name: str
    num_tokens: int
    num_kv_heads: int
    head_dim: int
    value_head_dim: int | None
    page_size: int
    num_pages: int = 6

    @property
    def num_slots(self) -> int:
        return self.num_pages * self.page_size

    def pool_shape(self, layout: str, width: int) -> tuple[Any, ...]:
        heads, pages, slots = self.num_kv_heads, self.num_pages, self.page_size
        fused = () if self.value_head_dim is not None else (2,)
        return {
            "HND": (pages, *fused, heads, slots, width),
            "NHD": (pages, *fused, slots, heads, width),
            "KV_HEADS_FIRST": (heads, pages, *fused, slots, width),
            "INTERLEAVED": (pages, slots, 2 * heads, width),  # of fused pools alone
        }[layout]


SHAPES = (
    WriteShape("llama-3-8b, a quarter", 7, 2, 128, 128, page_size=16),
    WriteShape("fused", 6, 2, 64, None, page_size=32),
    WriteShape("deepseek-v3", 5, 1, 576, 0, page_size=16),
    WriteShape("a prompt", 33, 2, 64, 64, page_size=16),
    WriteShape("odd everything", 9, 3, 33, 17, page_size=3),
    WriteShape("one of everything", 1, 1, 1, 1, page_size=1, num_pages=1),
    WriteShape("fused, single slots", 20, 3, 8, None, page_size=1, num_pages=30),
    WriteShape("long pages", 40, 1, 24, 40, page_size=48, num_pages=2),
)


class WriteConfiguration(NamedTuple):
    """What a program is compiled for."""

    shape: WriteShape
    dtype: DType
    cache_layout: str
    cache_dtype: DType | None = None  # another than that of the new tokens
    scales: str = "none"  # or "scalar", "head" or "token"

    @property
    def is_quantised(self) -> bool:
        return self.cache_dtype is not None


WRITTEN_CACHES = (
    (BF16, INT8, "token"), (BF16, E4M3, "token"), (BF16, INT4, "token"), (F32, BF16, "none"),
    (BF16, E4M3, "none"), (F16, INT8, "head"), (F32, E5M2, "token"), (F32, INT4, "token"),
    (BF16, E4M3, "head"), (F32, INT8, "token"), (F16, BF16, "scalar"), (F16, E4M3, "token"),
    (F32, INT8, "scalar"), (F16, E5M2, "none"), (BF16, F16, "none"), (F32, F16, "head"),
    (BF16, INT8, "token"), (F32, INT4, "token"), (F32, E5M2, "scalar"), (BF16, F32, "none"),
)  # fmt: skip
"""Types of new tokens and caches, and what has a scale."""

# Every dtype and layout, dealt out over the shapes.
_PLAIN = tuple(
    WriteConfiguration(shape, dtype, layout)
    for shape, (dtype, layout) in zip(
        SHAPES * 2, itertools.cycle(zip(DTYPES * 4, (*LAYOUTS, *LAYOUTS[1:], LAYOUTS[0])))
    )
)

_QUANTISED = tuple(
    WriteConfiguration(shape, dtype, layout, cache, scales)
    for (dtype, cache, scales), shape, layout in zip(
        WRITTEN_CACHES, itertools.cycle(SHAPES[:5] + SHAPES[6:]), itertools.cycle(LAYOUTS)
    )
    if cache != INT4 or not (shape.head_dim | (shape.value_head_dim or 0)) % 2
)

_INTERLEAVED = tuple(
    WriteConfiguration(shape, dtype, "INTERLEAVED", cache, scales)
    for shape, dtype, cache, scales in (
        (SHAPES[1], BF16, None, "none"), (SHAPES[6], F32, INT8, "token"), (SHAPES[1], BF16, E4M3,
         "head"),
    )
)  # fmt: skip

CONFIGURATIONS = _PLAIN + _QUANTISED + _INTERLEAVED


@dataclasses.dataclass(frozen=True, repr=False)
class WriteKVCacheCase(Case):
    """One call of `ejk.write_kv_cache`: its positional arguments, and the layout."""

    key: Array
    value: Array | None
    key_cache: Array
    value_cache: Array | None
    slot_mapping: Array
    cache_layout: str
    as_jax: bool = True
    scales: tuple[Any, Any] = (None, None)  # as they are passed

    @property
    def operation(self) -> str:
        return "write_kv_cache"

    def expected(self) -> tuple[Array, ...]:
        """What the oracle says of the caches that there are, then of their scales."""
        scales = given_scales(self.scales)
        pools = oracle.write_kv_cache(*self.operands(), cache_layout=self.cache_layout, **scales)
        return tuple(pool for pool in pools if pool is not None)

    def check(self, results: Iterable[Any]) -> None:
        """Raise an `AssertionError` where a bit is another than the oracle's."""
        assert_written(self, results)

    def operands(self) -> tuple[Any, ...]:
        return self.key, self.value, self.key_cache, self.value_cache, self.slot_mapping

    def semantics(self) -> dict[str, Any]:
        """The layout, and the scales that there are: as JAX arrays where `as_jax`."""
        scales = {
            name: jnp.asarray(x) if self.as_jax and isinstance(x, np.ndarray) else x
            for name, x in given_scales(self.scales).items()
        }
        return {"cache_layout": self.cache_layout, **scales}


# XLA of jax 0.10 computes bfloat16 in float32 on a CPU, moves included, and so do the programs that
# stand in for kernels there: what a NaN carries is lost. Kernels and later versions keep it.
KEEPS_PAYLOADS = jax.__version_info__ >= (0, 11)


def build(
    shape: WriteShape,
    dtype: DType,
    layout: str,
    slots: Array,
    *,
    seed: int = 0,
    as_jax: bool = True,
    cache_dtype: DType | None = None,
    scales: str = "none",
) -> WriteKVCacheCase:
    """Make a call of random bits: NaN of every payload among them, and none may change.

    Of another cache than that of `dtype`, the new tokens are numbers, some of which are odd.
    """
    rng = np.random.default_rng(seed)
    cache = dtype if cache_dtype is None else cache_dtype

    def pool(width: int) -> Array:
        sizes = shape.pool_shape(layout, width // (1 + (cache == INT4)))
        return _random_bits(rng, cache, *sizes)

    def scale(pool: Array | None) -> Any:
        of_tokens = None if pool is None else _random_bits(rng, F32, *pool.shape[:-1])
        of_heads = np.exp(rng.standard_normal(shape.num_kv_heads)).astype(np.float32) / 50
        return {"none": None, "scalar": 0.04, "head": of_heads, "token": of_tokens}[scales]

    new = functools.partial(_random_bits if cache_dtype is None else _odd_numbers, rng, dtype)
    rows, width = (len(slots), shape.num_kv_heads), shape.value_head_dim
    key_cache, value_cache = pool(shape.head_dim), pool(width) if width else None
    of_values = scales != "token" or value_cache is not None
    return WriteKVCacheCase(
        key=new(*rows, shape.head_dim),
        value=None if width == 0 else new(*rows, width or shape.head_dim),
        key_cache=key_cache,
        value_cache=value_cache,
        slot_mapping=slots,
        cache_layout=layout,
        as_jax=as_jax,
        scales=(scale(key_cache), scale(value_cache) if width != 0 and of_values else None),
    )


def _random_bits(rng: np.random.Generator, dtype: DType, *shape: Any) -> Array:
    """NaN of every payload are among them."""
    raw = rng.integers(0, 256, (*shape, dtype.itemsize), np.uint8)
    x = raw.view(dtype)[..., 0]
    if dtype == jnp.bfloat16 and not KEEPS_PAYLOADS:
        with np.errstate(invalid="ignore"):  # of NaN that signal
            x[np.isnan(x)] = np.nan
    return x


def _odd_numbers(rng: np.random.Generator, dtype: DType, *shape: Any) -> Array:
    """Rows of every size, and some with NaN, infinities, zeros and the ends of float32."""
    size = np.exp(rng.uniform(-9, 9, (*shape[:-1], 1)))
    rows = size * rng.standard_normal(shape)
    odd = np.array([np.nan, np.inf, -np.inf, 0, 3e38, 1e-42, 448.5, 127.5, 57344, 7.5])
    where = (rng.random(shape) < 0.1) & (rng.random((*shape[:-1], 1)) < 0.4)
    rows = np.where(where, rng.choice(odd, shape), rows)
    rows[rng.random(shape[:-1]) < 0.1] = 0
    with np.errstate(over="ignore"):
        return rows.astype(dtype)


def hostile_slots(dtype: DType, num_slots: int) -> list[Any]:
    """Next to the pool, the ends of every integer type, and what narrows to a slot."""
    limits = np.iinfo(dtype)
    slots = [-1, -num_slots, num_slots, num_slots + 1, limits.min, limits.max]
    slots += [2**31 - 1, 2**31, -(2**31), 2**32, 2**32 + 1, 1 - 2**32, 2**63, 2**8, 2**16 + 1]
    return [x for x in slots if limits.min <= x <= limits.max and not 0 <= x < num_slots]


@st.composite
def writes(
    draw: Any, configurations: Sequence[Any] = CONFIGURATIONS, few: Few = ALL
) -> WriteKVCacheCase:
    """Draw a call: some slots anywhere, some of a few, so that they meet, and some outside."""
    shape, dtype, layout, cache_dtype, scales = draw(few.of(configurations))
    kind = draw(st.sampled_from(INTEGERS))
    top = min(shape.num_slots - 1, np.iinfo(kind).max)
    near = st.integers(max(0, top - 3), top)
    inside, outside = st.integers(0, top), hostile_slots(kind, shape.num_slots)
    any_slot = draw(st.sampled_from((inside, near, inside | near | st.sampled_from(outside))))
    slots = draw(arrays(kind, shape.num_tokens, elements=any_slot, fill=st.nothing()))
    return build(
        shape, dtype, layout, slots,
        seed=draw(st.integers(0, 2**32 - 1)), as_jax=draw(st.booleans()),
        cache_dtype=cache_dtype, scales=scales,
    )  # fmt: skip
