"""Hypothesis strategies that draw a whole call, poisoned wherever it must not be read.

Shapes, dtypes and features come from a short list, so that programs are compiled once; lengths,
tables and numbers are drawn freely. Slots that no sequence sees hold NaN, Inf and the largest
finite numbers; table entries that no visible token needs hold junk.
"""

import contextlib
import dataclasses
import itertools
import os
import random
from collections.abc import Callable
from typing import Any, Self

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import oracle
import poison
from hypothesis import strategies as st
from shapes import SHAPES, Shape

DTYPES = (np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16))
LAYOUTS = ("HND", "NHD", "KV_HEADS_FIRST")  # of two pools, or of a fused one
FEATURES = ("sliding_window", "attn_logits_soft_cap", "sinks", "alibi_slopes", "attn_scale")
INTEGERS = tuple(np.dtype(f"{kind}int{bits}") for kind in ("", "u") for bits in (8, 16, 32, 64))
INT32_MAX = 2**31 - 1


@dataclasses.dataclass(frozen=True)
class Configuration:
    """What a program is compiled for."""

    shape: Shape
    dtype: np.dtype
    cache_layout: str
    features: frozenset[str] = frozenset()
    num_splits: int = 0
    fused: bool = False
    cache_dtype: np.dtype | None = None  # another than the query's
    scales: str = "none"  # or "scalar", "head" or "token"

    @property
    def holds(self) -> np.dtype:
        """The type of the pools: uint8 for int4, two values a byte."""
        return self.dtype if self.cache_dtype is None else self.cache_dtype

    @property
    def is_quantised(self) -> bool:
        """The cache is of another type than the query, or has scales."""
        return self.holds != self.dtype or self.scales != "none"


INT8, INT4 = np.dtype(np.int8), np.dtype(np.uint8)
E4M3, E5M2 = np.dtype(ml_dtypes.float8_e4m3fn), np.dtype(ml_dtypes.float8_e5m2)
F32, BF16, F16 = DTYPES
CACHES = (
    (BF16, INT8, "token"), (BF16, E4M3, "head"), (BF16, INT4, "token"), (F32, BF16, "none"),
    (F16, E4M3, "token"), (BF16, E5M2, "none"), (F32, INT8, "head"), (BF16, F16, "head"),
    (F32, INT4, "token"), (BF16, INT8, "scalar"), (F16, E5M2, "head"), (F16, BF16, "token"),
    (F32, E4M3, "none"), (F16, INT8, "token"), (BF16, F32, "none"), (F16, INT4, "token"),
    (F32, E5M2, "token"), (BF16, BF16, "token"), (BF16, E4M3, "token"), (F16, INT8, "head"),
    (F32, INT8, "token"), (F32, F16, "scalar"), (BF16, E5M2, "token"),
)  # fmt: skip
"""Types of queries and caches, and what has a scale."""


def quantised_configurations() -> list[Configuration]:
    """Deal out the types of `CACHES` over the shapes."""
    rng = random.Random(21)
    made, caches = [], itertools.cycle(CACHES)
    for shape in SHAPES:
        dtype, cache, scales = next(caches)
        while cache == INT4 and (shape.head_dim % 2 or shape.width % 2):
            dtype, cache, scales = next(caches)
        features = frozenset(feature for feature in FEATURES if rng.random() < 0.3)
        options = rng.choice((0, 1, 3)), rng.random() < 0.4 and shape.fusible, cache, scales
        made.append(Configuration(shape, dtype, rng.choice(LAYOUTS), features, *options))
    return made


def configurations(per_shape: int) -> list[Configuration]:
    """Deal out all that a call may have over the shapes, the same every time."""
    rng = random.Random(20)
    dtypes, layouts = itertools.cycle(DTYPES), itertools.cycle(LAYOUTS)
    plain = [Configuration(shape, next(dtypes), next(layouts)) for shape in SHAPES]
    rich = [
        Configuration(
            shape,
            rng.choice(DTYPES),
            rng.choice(LAYOUTS),
            frozenset(feature for feature in FEATURES if rng.random() < 0.5),
            rng.choice((0, 1, 2, 3, 7)),
            rng.random() < 0.5 and shape.fusible,
        )
        for _ in range(per_shape - 1)
        for shape in SHAPES
    ]
    made = plain + rich + quantised_configurations()
    fused = [c for c in made if c.fused][::2]  # one in two is interleaved instead
    return [
        dataclasses.replace(c, fused=False, cache_layout="INTERLEAVED") if c in fused else c
        for c in made
    ]


THOROUGH = bool(os.environ.get("EJK_TEST_THOROUGH"))
CONFIGURATIONS = configurations(12 if THOROUGH else 2)


@dataclasses.dataclass(frozen=True)
class Case:
    """One call. Pools are kept as `[num_pages, page_size, num_kv_heads, width]`."""

    shape: Shape
    dtype: np.dtype
    cache_layout: str
    query: np.ndarray
    keys: np.ndarray
    values: np.ndarray | None
    context_lens: np.ndarray
    block_tables: np.ndarray
    options: dict[str, Any]
    num_splits: int
    live: np.ndarray  # bool [num_pages, page_size]: slots that some sequence sees
    needed: np.ndarray  # bool [num_seqs, max_blocks]: entries that some visible position needs
    as_jax: bool
    fused: bool = False
    scales: tuple[Any, Any] = (None, None)
    """Of keys and values: numbers, one a KV head, or `[num_pages, page_size, num_kv_heads]`."""

    def operands(self):
        """The five positional arguments, as NumPy arrays."""
        pools = self.in_layout(self.keys, self.values)
        return (self.query, *pools, self.context_lens, self.block_tables)

    def in_layout(self, keys, values):
        """Arrange keys and values as they are passed, in memory."""
        if self.cache_layout == "INTERLEAVED":
            both = np.stack([keys, values], 3)
            return [both.reshape(*keys.shape[:2], -1, *keys.shape[3:]), None]
        order = {"NHD": (0, 1, 2, 3), "HND": (0, 2, 1, 3), "KV_HEADS_FIRST": (2, 0, 1, 3)}
        pools = [
            None
            if pool is None
            else np.ascontiguousarray(pool.transpose(order[self.cache_layout][: pool.ndim]))
            for pool in (keys, values)
        ]
        if not self.fused:
            return pools
        after_pages = 2 if self.cache_layout == "KV_HEADS_FIRST" else 1
        return [np.stack(pools, after_pages), None]

    def arguments(self):
        """The five positional arguments, as JAX arrays where `as_jax` (64-bit integers never)."""
        return tuple(
            jnp.asarray(x) if self.as_jax and x is not None and x.dtype.itemsize < 8 else x
            for x in self.operands()
        )

    def semantics(self):
        """The keyword arguments that change the answer."""
        latent = {"value_head_dim": self.shape.width} if self.shape.latent else {}
        scales = self.in_layout(*self.scales) if self.has_token_scales else self.scales
        named = zip(("key_scale", "value_scale"), scales)
        scales = {name: scale for name, scale in named if scale is not None}
        return {"cache_layout": self.cache_layout, **self.options, **latent, **scales}

    @property
    def has_token_scales(self) -> bool:
        return np.ndim(self.scales[0]) == 3

    def expected(self):
        """What the oracle says: the output and the LSE."""
        return oracle.page_attention(*self.operands(), **self.semantics())

    def seen(self, row):
        """The sequence of a row, and the tokens that it sees with their distances."""
        keys = self.in_layout(self.keys, self.values)[0]
        lens, tables, window = self.context_lens, self.block_tables, "sliding_window"
        where = (keys, lens[row], tables[row], self.cache_layout)
        last = oracle.length_of(*where) - 1
        visible = oracle.visible_positions(*where, self.options.get(window))
        return row, [(j, j - last) for j in visible]

    @property
    def outside(self) -> np.ndarray:
        """Which rows are no sequence's."""
        return np.zeros(len(self.query), bool)

    def lengths(self) -> list[int]:
        """The clipped length of every sequence."""
        capacity = self.block_tables.shape[1] * self.shape.page_size
        return [min(max(int(n), 0), capacity) for n in self.context_lens]

    def replace(self, **changes) -> Self:
        return dataclasses.replace(self, **changes)

    def with_other_junk(self, seed: int, finite: bool = False) -> Self:
        """The same call with something else in every slot and entry that must not be read."""
        rng = np.random.default_rng(seed)
        fill = poison.ordinary if finite else poison.numbers

        def refill(pool):
            if pool is None:
                return None
            live = self.live.reshape(*self.live.shape, *[1] * (pool.ndim - 2))
            return np.where(live, pool, fill(rng, pool.shape, pool.dtype))

        junk = poison.junk_entries(rng, self.block_tables.shape, self.block_tables.dtype, self.keys)
        tables = np.where(self.needed, self.block_tables, junk)
        pools = {"keys": refill(self.keys), "values": refill(self.values)}
        if self.has_token_scales:
            pools["scales"] = tuple(map(refill, self.scales))
        return self.replace(**pools, block_tables=tables)

    def permuted(self, seed: int, more_pages: int = 0) -> Self:
        """The same call with the pages of a larger pool in another order, others poisoned."""
        rng = np.random.default_rng(seed)
        num_pages = self.shape.num_pages
        old = np.arange(num_pages)
        new = rng.permutation(num_pages + more_pages)[:num_pages]

        def move(pool):
            if pool is None:
                return None
            moved = poison.numbers(rng, (num_pages + more_pages, *pool.shape[1:]), pool.dtype)
            moved[new[old]] = pool
            return moved

        live = np.zeros((num_pages + more_pages, self.shape.page_size), bool)
        live[new] = self.live
        tables = self.block_tables.astype(np.int32 if more_pages else self.block_tables.dtype)
        valid = poison.is_page(self.block_tables, num_pages)
        tables[valid] = new[self.block_tables[valid].astype(np.int64)]
        if more_pages:  # what named no page might name one now
            tables[~valid] = -1
        shape = dataclasses.replace(self.shape, num_pages=num_pages + more_pages)
        scales = tuple(map(move, self.scales)) if self.has_token_scales else self.scales
        return self.replace(
            shape=shape, keys=move(self.keys), values=move(self.values), scales=scales,
            block_tables=tables, live=live,
        )  # fmt: skip

    def rows(self, order, more_blocks: int = 0) -> Self:
        """The sequences `order` of this call, alone, their tables wider by junk."""
        order = np.asarray(order)
        wide = ((0, 0), (0, more_blocks))
        tables = np.pad(self.block_tables[order], wide, constant_values=0)
        needed = np.pad(self.needed[order], wide, constant_values=False)
        lens = np.array(self.lengths(), np.int32)[order]
        shape = dataclasses.replace(self.shape, num_seqs=len(order), max_blocks=tables.shape[1])
        # `live` keeps what the others see: to these rows it is junk that happens to be finite.
        return self.replace(
            shape=shape, query=self.query[order], context_lens=lens, block_tables=tables,
            needed=needed,
        )  # fmt: skip


_drawn: tuple[int, int] | None = None
_suits: Callable[[Configuration], bool] | None = None


@contextlib.contextmanager
def few_configurations(seed: int, count: int, suits: Callable[[Configuration], bool] | None = None):
    """Let what is drawn have `count` configurations alone, by `seed`: each is a program or two.

    The properties and the backends have different ones, and many calls of each. A backend that
    takes few of them has one that `suits` it, where there is one.
    """
    global _drawn, _suits
    _drawn, _suits = None if THOROUGH else (seed, count), suits
    try:
        yield
    finally:
        _drawn = _suits = None


def one_of(configurations):
    """Draw one of `configurations`, or one of the few of them that `few_configurations` let be."""
    if _suits is not None:
        configurations = [c for c in configurations if _suits(c)] or configurations
    if _drawn is None:
        return st.sampled_from(configurations)
    seed, count = _drawn
    rng = random.Random(seed)
    # Pallas refuses float16: one of another type is always among them, and one quantised cache.
    plain = [c for c in configurations if not c.is_quantised] or configurations
    first = rng.choice([c for c in plain if c.dtype != np.float16])
    others = [c for c in plain if c != first]
    few = [first, *rng.sample(others, min(count - 1, len(others)))]
    quantised = [c for c in configurations if c.is_quantised and c not in few]
    return st.sampled_from([*few, *rng.sample(quantised, min(1, len(quantised)))])


def are_few() -> bool:
    """Say whether what is drawn is for a backend that takes few configurations, and no extras."""
    return _suits is not None


def fixed(draw, options, of: int):
    """Draw one of what a program depends on; of few configurations, number `of` has its own."""
    if _drawn is None:
        return draw(st.sampled_from(options))
    return random.Random(_drawn[0] + of).choice(options)


@st.composite
def cases(draw, configurations=CONFIGURATIONS) -> Case:
    """Draw a call of one of `configurations`."""
    config = draw(one_of(configurations))
    shape = config.shape
    ints = [dtype for dtype in INTEGERS if np.iinfo(dtype).max >= shape.num_pages]
    lens_dtype = draw(st.sampled_from(INTEGERS))
    tables_dtype = draw(st.sampled_from(ints))
    lens = [draw(lengths(shape, lens_dtype)) for _ in range(shape.num_seqs)]
    return build(
        config,
        np.array(lens, lens_dtype),
        tables_dtype=tables_dtype,
        window=draw(fixed(draw, windows(shape), configurations.index(config))),
        seed=draw(st.integers(0, 2**32 - 1)),
        share=draw(st.booleans()),
        invalid=draw(st.sampled_from((0.0, 0.0, 0.3, 1.0))),
        magnitudes=(draw(st.sampled_from((0.1, 1.0, 2.0))), draw(st.sampled_from((0.01, 1.0, 99)))),
        as_jax=draw(st.booleans()),
    )


def build(
    config: Configuration,
    context_lens: np.ndarray,
    *,
    tables_dtype=np.int32,
    window=None,
    seed=0,
    share=False,
    invalid=0.0,
    magnitudes=(1.0, 1.0),
    as_jax=False,
) -> Case:
    """Make a call: poison everything, then write what some sequence sees.

    Args:
        config: what the program is compiled for.
        context_lens: as they are passed.
        tables_dtype: of the block tables.
        window: used if the configuration has a window.
        seed: of all random numbers.
        share: sequences have their first page in common.
        invalid: the share of needed table entries that name no page.
        magnitudes: of queries and keys, and of values.
        as_jax: pass JAX arrays.
    """
    rng = np.random.default_rng(seed)
    shape, dtype = config.shape, config.dtype
    options = draw_options(config, rng, window)
    tables = draw_tables(rng, shape, len(context_lens), tables_dtype, share, invalid)
    window = options.get("sliding_window", INT32_MAX)
    lens = [min(max(int(n), 0), shape.capacity) for n in context_lens]
    seen = [range(max(n - int(window), 0), n) for n in lens]
    keys, values, live, needed, scales = draw_pools(rng, config, tables, seen, magnitudes)
    tables = np.where(needed, tables, poison.junk_entries(rng, tables.shape, tables.dtype, keys))
    query = magnitudes[0] * rng.standard_normal((len(lens), shape.num_heads, shape.head_dim))
    return Case(
        shape, dtype, config.cache_layout, query.astype(dtype), keys, values, context_lens,
        tables, options, config.num_splits, live, needed, as_jax, config.fused, scales,
    )  # fmt: skip


def draw_tables(rng, shape, num_seqs, dtype, share, invalid):
    """Make block tables; a share of the entries names no page."""
    pages = np.resize(rng.permutation(shape.num_pages), (num_seqs, shape.max_blocks))
    if share:
        pages[:, 0] = pages[0, 0]
    broken = poison.invalid_entries(rng, pages.shape, dtype, shape.num_pages)
    return np.where(rng.random(pages.shape) < invalid, broken, pages.astype(dtype))


def draw_pools(rng, config, tables, seen, magnitudes):
    """Poison both pools, then write what each sequence sees, its positions `seen`.

    Returns the keys, the values, which slots some sequence sees, which entries it needs, and the
    scales of both.
    """
    shape, dtype = config.shape, config.holds
    pool_shape = (shape.num_pages, shape.page_size, shape.num_kv_heads)
    live = np.zeros(pool_shape[:2], bool)
    needed = np.zeros(tables.shape, bool)
    for s, positions in enumerate(seen):
        for j in positions:
            block, slot = divmod(j, shape.page_size)
            needed[s, block] = True
            if poison.is_page(tables[s, block], shape.num_pages):
                live[int(tables[s, block]), slot] = True
    widths = [shape.head_dim] if shape.latent else [shape.head_dim, shape.width]
    pools, scales = [], []
    for width, magnitude in zip(widths, magnitudes):
        pool = poison.numbers(rng, (*pool_shape, width // (1 + (dtype == INT4))), dtype)
        clean = magnitude * rng.standard_normal((live.sum(), shape.num_kv_heads, width))
        scale = draw_scales(rng, config, clean)
        over = scale if np.ndim(scale) < 1 else scale[..., None]
        pool[live] = oracle.quantised(clean.astype(np.float32), over, dtype)
        if config.scales == "token":
            rows, scale = scale, poison.numbers(rng, pool_shape, F32)
            scale[live] = rows
        pools.append(pool)
        scales.append(scale)
    keys, values = (*pools, None)[:2]
    return keys, values, live, needed, (*scales, None)[:2]


def draw_scales(rng, config, clean):
    """Make the scales of rows `clean [tokens, num_kv_heads, width]`, so that no code saturates."""
    if config.scales == "none":
        return None
    axis = {"scalar": None, "head": (0, 2), "token": 2}[config.scales]
    largest = oracle.LARGEST.get(config.holds.name)
    if largest is None:
        shape = np.abs(clean).max(axis, initial=0).shape
        return np.exp(rng.standard_normal(shape)).astype(np.float32)
    size = np.abs(clean).max(axis, initial=0).astype(np.float32) / np.float32(largest)
    return np.where(size == 0, np.float32(1), size * np.float32(1 + 1e-6))


def draw_options(config, rng, window):
    heads = config.shape.num_heads
    slopes = (2.0 ** -(1 + np.arange(heads) % 8)).astype(np.float32)
    sinks = rng.standard_normal(heads).astype(np.float32)
    sinks[rng.random(heads) < 0.2] = -np.inf
    drawn = {
        "sliding_window": 1 if window is None else window,
        "attn_logits_soft_cap": 2.0,
        "sinks": sinks,
        "alibi_slopes": slopes,
        "attn_scale": float(np.float32(rng.uniform(0.05, 1.0) * config.shape.head_dim**-0.5)),
    }
    return {name: value for name, value in drawn.items() if name in config.features}


def windows(shape):
    """Few static windows, each of which is a program of its own, and any number of traced ones."""
    static = [st.just(window) for window in (1, shape.page_size + 1, INT32_MAX)]
    traced = st.integers(1, shape.capacity + 3) | st.just(INT32_MAX)
    return [*static, *[traced.map(jnp.int32)] * len(static)]


def lengths(shape, dtype):
    page, capacity, limits = shape.page_size, shape.capacity, np.iinfo(dtype)
    edges = [0, 1, page - 1, page, page + 1, capacity - 1, capacity, capacity + 1, -1,
             limits.min, limits.max, 2**32, 2**32 + 1, -(2**32) + 1]  # fmt: skip
    edges = [edge for edge in edges if limits.min <= edge <= limits.max]
    return st.sampled_from(edges) | st.integers(0, min(capacity, limits.max))
