"""Hypothesis strategies that draw a whole call, poisoned wherever it must not be read.

Shapes, dtypes and features come from a short list, so that programs are compiled once; lengths,
tables and numbers are drawn freely. Slots that no sequence sees hold NaN, Inf and the largest
finite numbers; table entries that no visible token needs hold junk.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from hypothesis import strategies as st

import ejk
from ejk.testing import bounds, oracle, poison
from ejk.testing.case import Case, given_scales
from ejk.testing.configurations import (
    ALL,
    CONFIGURATIONS,
    INT32_MAX,
    INTEGERS,
    Configuration,
    Few,
)
from ejk.testing.oracle import Array, DType
from ejk.testing.pools import draw_options, draw_pools, draw_tables
from ejk.testing.shapes import Shape


@dataclasses.dataclass(frozen=True, repr=False)
class PageAttentionCase(Case):
    """One call of `ejk.page_attention`. Pools are `[num_pages, page_size, num_kv_heads, width]`."""

    shape: Shape
    dtype: DType
    cache_layout: str
    query: Array
    keys: Array
    values: Array | None
    context_lens: Array
    block_tables: Array
    options: dict[str, Any]
    num_splits: int
    live: Array = dataclasses.field(repr=False)
    """bool `[num_pages, page_size]`: slots that some sequence sees."""
    needed: Array = dataclasses.field(repr=False)
    """bool `[num_seqs, max_blocks]`: entries that some visible position needs."""
    as_jax: bool
    fused: bool = False
    scales: tuple[Any, Any] = (None, None)
    """Of keys and values: numbers, one a KV head, or `[num_pages, page_size, num_kv_heads]`."""
    hints: dict[str, Any] = dataclasses.field(default_factory=dict[str, Any])
    """What changes the speed, and the last bit of rounding: keyword arguments of the call."""

    @property
    def operation(self) -> str:
        return "page_attention"

    def keywords(self, backend: Any = None) -> dict[str, Any]:
        hints = {"num_splits": self.num_splits} | self.hints
        if hints.pop("plan", False):
            hints["plan"] = self.plan(backend)
        return {**hints, **self.semantics(), "return_lse": True}

    def check(self, results: Iterable[Any]) -> None:
        """Raise an `AssertionError` that names the row, its error and its bound."""
        bounds.assert_close(self, *results)

    def plan(self, backend: Any, context_lens: Any = None, **changes: Any) -> Any:
        """Make the call's plan, or that of other lengths or facts."""
        lens = self.context_lens if context_lens is None else context_lens
        window = self.options.get("sliding_window")
        facts: dict[str, Any] = {"sliding_window": window, **self.plan_facts(), **changes}
        return ejk.plan_page_attention(lens, **facts, backend=backend)

    def plan_facts(self) -> dict[str, Any]:
        """What a plan of the call is made for, but for the window."""
        names = ("num_heads", "num_kv_heads", "head_dim", "page_size")
        facts = {name: getattr(self.shape, name) for name in names}
        return facts | {"max_blocks": self.block_tables.shape[1]}

    def operands(self) -> tuple[Any, ...]:
        pools = self.in_layout(self.keys, self.values)
        return (self.query, *pools, self.context_lens, self.block_tables)

    def in_layout(self, keys: Array, values: Array | None) -> tuple[Array, Array | None]:
        """Arrange keys and values as they are passed, in memory."""
        if self.cache_layout == "INTERLEAVED" and values is not None:
            both = np.stack([keys, values], 3)
            return both.reshape(*keys.shape[:2], -1, *keys.shape[3:]), None
        order = {"NHD": (0, 1, 2, 3), "HND": (0, 2, 1, 3), "KV_HEADS_FIRST": (2, 0, 1, 3)}
        axes = order[self.cache_layout][: keys.ndim]
        keys = np.ascontiguousarray(keys.transpose(axes))
        if values is None:
            return keys, None
        values = np.ascontiguousarray(values.transpose(axes))
        if not self.fused:
            return keys, values
        return np.stack([keys, values], 2 if self.cache_layout == "KV_HEADS_FIRST" else 1), None

    def semantics(self) -> dict[str, Any]:
        latent = {"value_head_dim": self.shape.width} if self.shape.latent else {}
        scales = self.in_layout(*self.scales) if self.has_token_scales else self.scales
        given = given_scales(scales)
        return {"cache_layout": self.cache_layout, **self.options, **latent, **given}

    @property
    def has_token_scales(self) -> bool:
        return np.ndim(self.scales[0]) == 3

    def expected(self) -> tuple[Array, Array]:
        """What the oracle says: the output and the LSE."""
        return oracle.page_attention(*self.operands(), **self.semantics())

    def seen(self, row: int) -> tuple[int, Array]:
        """The sequence of a row, and the tokens that it sees: positions and distances."""
        keys = self.in_layout(self.keys, self.values)[0]
        lens, tables, window = self.context_lens, self.block_tables, "sliding_window"
        where = (keys, lens[row], tables[row], self.cache_layout)
        last = oracle.length_of(*where) - 1
        visible = oracle.visible_positions(*where, self.options.get(window))
        return row, oracle.tokens((j, j - last) for j in visible)

    @property
    def outside(self) -> np.ndarray:
        """Which rows are no sequence's."""
        return np.zeros(len(self.query), bool)

    def lengths(self) -> Array:
        """The clipped length of every sequence."""
        capacity = self.block_tables.shape[1] * self.shape.page_size
        return np.array([min(max(int(n), 0), capacity) for n in self.context_lens], np.int64)

    def with_other_junk(self, seed: int, finite: bool = False) -> "PageAttentionCase":
        """The same call with something else in every slot and entry that must not be read."""
        rng = np.random.default_rng(seed)
        fill = poison.ordinary if finite else poison.numbers

        def refill(pool: Array | None) -> Array | None:
            if pool is None:
                return None
            live = self.live.reshape(*self.live.shape, *[1] * (pool.ndim - 2))
            return np.where(live, pool, fill(rng, pool.shape, pool.dtype))

        junk = poison.junk_entries(rng, self.block_tables.shape, self.block_tables.dtype, self.keys)
        tables = np.where(self.needed, self.block_tables, junk)
        pools: dict[str, Any] = {"keys": refill(self.keys), "values": refill(self.values)}
        if self.has_token_scales:
            pools["scales"] = tuple(map(refill, self.scales))
        return self.replace(**pools, block_tables=tables)

    def permuted(self, seed: int, more_pages: int = 0) -> "PageAttentionCase":
        """The same call with the pages of a larger pool in another order, others poisoned."""
        rng = np.random.default_rng(seed)
        num_pages = self.shape.num_pages
        old = np.arange(num_pages)
        new = rng.permutation(num_pages + more_pages)[:num_pages]

        def move(pool: Array | None) -> Array | None:
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

    def rows(self, which: Iterable[Any], more_blocks: int = 0) -> "PageAttentionCase":
        """The sequences `which` of this call without its hints, their tables wider by junk."""
        order = np.array([*which], np.intp)
        wide = ((0, 0), (0, more_blocks))
        tables = np.pad(self.block_tables[order], wide, constant_values=0)
        needed = np.pad(self.needed[order], wide, constant_values=False)
        lens = self.lengths().astype(np.int32)[order]
        shape = dataclasses.replace(self.shape, num_seqs=len(order), max_blocks=tables.shape[1])
        # `live` keeps what the others see: to these rows it is junk that happens to be finite.
        return self.replace(
            shape=shape, query=self.query[order], context_lens=lens, block_tables=tables,
            needed=needed, hints={},
        )  # fmt: skip


@st.composite
def cases(
    draw: Any, configurations: Sequence[Any] = CONFIGURATIONS, few: Few = ALL
) -> PageAttentionCase:
    """Draw a call of one of `configurations`."""
    config = draw(few.of(configurations))
    number = configurations.index(config)
    shape = config.shape
    ints = [dtype for dtype in INTEGERS if np.iinfo(dtype).max >= shape.num_pages]
    lens_dtype = draw(st.sampled_from(INTEGERS))
    tables_dtype = draw(st.sampled_from(ints))
    lens = [draw(lengths(shape, lens_dtype)) for _ in range(shape.num_seqs)]
    return build(
        config,
        np.array(lens, lens_dtype),
        tables_dtype=tables_dtype,
        window=draw(windows(shape)),
        seed=draw(st.integers(0, 2**32 - 1)),
        share=draw(st.booleans()),
        invalid=draw(st.sampled_from((0.0, 0.0, 0.3, 1.0))),
        magnitudes=(draw(st.sampled_from((0.1, 1.0, 2.0))), draw(st.sampled_from((0.01, 1.0, 99)))),
        as_jax=draw(st.booleans()),
    ).replace(hints=draw(few.fixed(HINTS, number)))


HINTS: tuple[dict[str, Any], ...] = (
    {}, {}, {"max_context_len": 0}, {"max_context_len": 17}, {"max_context_len": 10**6},
    {"plan": True},
)  # fmt: skip
"""None, a bound that is too small or too large, and a plan."""


def build(
    config: Configuration,
    context_lens: Array,
    *,
    tables_dtype: npt.DTypeLike = np.int32,
    window: Any = None,
    seed: int = 0,
    share: bool = False,
    invalid: float = 0.0,
    magnitudes: tuple[Any, Any] = (1.0, 1.0),
    as_jax: bool = False,
) -> PageAttentionCase:
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
    seen = dict(enumerate(range(max(n - int(window), 0), n) for n in lens))
    keys, values, live, needed, scales = draw_pools(rng, config, tables, seen, magnitudes)
    tables = np.where(needed, tables, poison.junk_entries(rng, tables.shape, tables.dtype, keys))
    query = magnitudes[0] * rng.standard_normal((len(lens), shape.num_heads, shape.head_dim))
    return PageAttentionCase(
        shape, dtype, config.cache_layout, query.astype(dtype), keys, values, context_lens,
        tables, options, config.num_splits, live, needed, as_jax, config.fused, scales,
    )  # fmt: skip


def windows(shape: Shape) -> st.SearchStrategy[Any]:
    edges = st.sampled_from((1, shape.page_size + 1, INT32_MAX))
    numbers = st.integers(1, shape.capacity + 3) | edges
    return numbers | numbers.map(jnp.int32)


def lengths(shape: Shape, dtype: DType) -> st.SearchStrategy[int]:
    page, capacity, limits = shape.page_size, shape.capacity, np.iinfo(dtype)
    edges = [0, 1, page - 1, page, page + 1, capacity - 1, capacity, capacity + 1, -1,
             limits.min, limits.max, 2**32, 2**32 + 1, -(2**32) + 1]  # fmt: skip
    edges = [edge for edge in edges if limits.min <= edge <= limits.max]
    return st.sampled_from(edges) | st.integers(0, min(capacity, limits.max))
