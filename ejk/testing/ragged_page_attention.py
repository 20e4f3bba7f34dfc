"""Draws calls of `ejk.ragged_page_attention`, as `page_attention` draws those of its own."""

import dataclasses
import functools
import itertools
from collections.abc import Collection, Iterable, Sequence
from typing import Any, cast

import numpy as np
import numpy.typing as npt
from hypothesis import strategies as st

from ejk.testing import oracle, poison
from ejk.testing.configurations import ALL, CONFIGURATIONS, INTEGERS, Configuration, Few
from ejk.testing.oracle import Array, DType
from ejk.testing.page_attention import PageAttentionCase, lengths, windows
from ejk.testing.pools import draw_options, draw_pools, draw_tables

TOTAL = 13  # new tokens of a drawn call
EXTRAS = ("positions", "tree_mask")


@dataclasses.dataclass(frozen=True, repr=False)
class RaggedPageAttentionCase(PageAttentionCase):
    """One call. Rows that see nothing hold poison, rows of no sequence have junk options."""

    cu_q_lens: Array = dataclasses.field(default_factory=lambda: np.zeros(1, np.int32))

    @property
    def operation(self) -> str:
        return "ragged_page_attention"

    def keywords(self, backend: Any = None) -> dict[str, Any]:
        return {**self.hints, **self.semantics(), "return_lse": True}

    def operands(self) -> tuple[Any, ...]:
        return (*super().operands(), self.cu_q_lens)

    def expected(self) -> tuple[Array, Array]:
        return oracle.ragged_page_attention(*self.operands(), **self.semantics())

    @functools.cached_property
    def rows_seen(self) -> oracle.Rows:
        """The sequence of each row that has one, and what the row sees, pages valid or not."""
        names = ("sliding_window", "causal", *EXTRAS)
        options = {name: self.options[name] for name in names if name in self.options}
        return oracle.ragged_rows(len(self.query), self.lengths(), self.cu_q_lens, **options)

    def seen(self, row: int) -> tuple[int, Array]:
        if row not in self.rows_seen:
            return 0, oracle.tokens([])
        keys, tables = self.in_layout(self.keys, self.values)[0], self.block_tables
        one = {row: self.rows_seen[row]}
        return oracle.only_pages(one, keys, tables, self.cache_layout)[row]

    @property
    def outside(self) -> Array:
        return np.array([row not in self.rows_seen for row in range(len(self.query))], bool)

    @property
    def bounds(self) -> Array:
        """`cu_q_lens` made sane."""
        clipped = [min(max(int(c), 0), len(self.query)) for c in self.cu_q_lens]
        return np.maximum.accumulate(np.array(clipped, np.int64))

    def with_other_junk(self, seed: int, finite: bool = False) -> "RaggedPageAttentionCase":
        other = cast(RaggedPageAttentionCase, super().with_other_junk(seed, finite))
        rng = np.random.default_rng(seed)
        fill = poison.ordinary if finite else poison.numbers
        rows = [self.rows_seen.get(row, (-1, ())) for row in range(len(self.query))]
        blind = np.array([not len(seen) for _, seen in rows], bool)
        junk = fill(rng, self.query.shape, self.dtype)
        query = np.where(blind[:, None, None], junk, self.query)
        options = dict(self.options)
        if "positions" in options:
            anything = rng.integers(-(2**31), 2**31, len(query)).astype(np.int32)
            options["positions"] = np.where(self.outside, anything, options["positions"])
        if "tree_mask" in options:
            mask = options["tree_mask"]
            q_lens = np.array([0 if s < 0 else self._q_len(s) for s, _ in rows], np.int64)
            unread = np.arange(mask.shape[1]) >= q_lens[:, None]
            options["tree_mask"] = np.where(unread, rng.random(mask.shape) < 0.5, mask)
        return other.replace(query=query, options=options)

    def _q_len(self, s: int) -> int:
        return int(self.bounds[s + 1] - self.bounds[s])

    def part(self, s: int, begin: int = 0, end: int | None = None) -> "RaggedPageAttentionCase":
        """New tokens `[begin, end)` of one sequence, alone; those after them do not yet exist."""
        length = self._q_len(s)
        end = length if end is None else end
        rows = slice(self.bounds[s] + begin, self.bounds[s] + end)
        options = dict(self.options)
        for name in EXTRAS:
            if name in options:
                options[name] = options[name][rows]
        one = slice(s, s + 1)
        lens = np.array([self.lengths()[s] - (length - end)], np.int64)
        return self.replace(
            shape=dataclasses.replace(self.shape, num_seqs=1), query=self.query[rows],
            context_lens=lens, block_tables=self.block_tables[one], needed=self.needed[one],
            cu_q_lens=np.array([0, end - begin]), options=options, hints={},
        )  # fmt: skip


def with_own_options(configurations: Iterable[Configuration]) -> list[Configuration]:
    """Give ragged batches' own options to configurations, to each its own, to the first none."""
    options = itertools.cycle(((), ("positions", "tree_mask"), ("causal=False",), ("positions",),
                               ("tree_mask",), (), ("positions", "causal=False")))  # fmt: skip
    return [
        dataclasses.replace(config, features=config.features | {*more})
        for config, more in zip(configurations, options)
    ]


RAGGED_CONFIGURATIONS = with_own_options(CONFIGURATIONS)
HINTS: tuple[dict[str, Any], ...] = (
    {}, {}, {"max_q_len": 0}, {"max_q_len": 3, "max_context_len": 17}, {"max_context_len": 0},
    {"max_q_len": 10**6, "max_context_len": 10**6}, {"prefix_groups": True},
)  # fmt: skip
"""None, bounds that are too small or too large, and groups that may share a page."""


@st.composite
def ragged_cases(
    draw: Any, configurations: Sequence[Any] = RAGGED_CONFIGURATIONS, few: Few = ALL
) -> RaggedPageAttentionCase:
    """Draw a call of one of `configurations`."""
    config = draw(few.of(configurations))
    number, shape = configurations.index(config), config.shape
    ints = [dtype for dtype in INTEGERS if np.iinfo(dtype).max >= shape.num_pages]
    lens_dtype = draw(st.sampled_from(INTEGERS))
    lens = [draw(lengths(shape, lens_dtype)) for _ in range(shape.num_seqs)]
    hints = draw(few.fixed(HINTS, number))
    if "prefix_groups" in hints:
        hints = {"prefix_groups": draw(draw_groups(shape.num_seqs))}
    return build_ragged(
        config,
        np.array(lens, lens_dtype),
        draw(_bounds(shape.num_seqs)),
        tables_dtype=draw(st.sampled_from(ints)),
        window=draw(windows(shape)),
        seed=draw(st.integers(0, 2**32 - 1)),
        share=draw(st.booleans()),
        invalid=draw(st.sampled_from((0.0, 0.0, 0.3, 1.0))),
        magnitudes=(draw(st.sampled_from((0.1, 1.0, 2.0))), draw(st.sampled_from((0.01, 1.0, 99)))),
        as_jax=draw(st.booleans()),
    ).replace(hints=hints)


@st.composite
def draw_groups(draw: Any, num_seqs: int) -> tuple[Array, Array]:
    """Draw groups of sequences that may share a page, or numbers that are no groups."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    groups, num_pages = rng.integers(-1, 2, num_seqs), rng.choice([0, 1, 1, 1, 2], 2)
    if draw(st.booleans()):
        groups = rng.choice([*groups, 2**40, -(2**31), 2], num_seqs)
        num_pages = rng.choice([*num_pages, -(2**40), 2**31, 2**40], 2)
    return groups, num_pages


def _bounds(num_seqs: int) -> st.SearchStrategy[Array]:
    """Where sequences begin and end: mostly sane, or anything at all."""
    sane = st.lists(st.integers(0, TOTAL), min_size=num_seqs + 1, max_size=num_seqs + 1)
    tight = sane.map(lambda cuts: [0, *sorted(cuts)[1:-1], TOTAL])
    dtypes = st.sampled_from([dtype for dtype in INTEGERS if dtype.itemsize > 1])

    def hostile(dtype: DType) -> st.SearchStrategy[Array]:
        limits = np.iinfo(dtype)
        edges = [limits.min, limits.max, -1, TOTAL + 1, 2**32 + 3, 2**31]
        edges = [edge for edge in edges if limits.min <= edge <= limits.max]
        either = st.sampled_from(edges) | st.integers(0, TOTAL)
        cuts = st.lists(either, min_size=num_seqs + 1, max_size=num_seqs + 1)
        return cuts.map(lambda cuts: np.array(cuts, dtype))

    drawn = (sane.map(sorted) | tight).map(lambda cuts: np.array(cuts, np.int32))
    return drawn | dtypes.flatmap(hostile)


def build_ragged(
    config: Configuration,
    context_lens: Array,
    cu_q_lens: Array,
    *,
    total: int = TOTAL,
    extras: Collection[Any] = frozenset(),
    tables_dtype: npt.DTypeLike = np.int32,
    window: Any = None,
    seed: int = 0,
    share: bool = False,
    invalid: float = 0.0,
    magnitudes: tuple[Any, Any] = (1.0, 1.0),
    as_jax: bool = False,
    causal: bool = True,
    prefix_groups: Any = None,
) -> RaggedPageAttentionCase:
    """Make a call; the arguments are those of `page_attention.build`, and the bounds of the rows.

    Of the sequences of each of the `prefix_groups` the tables name the same first pages.
    """
    rng = np.random.default_rng(seed)
    shape, dtype = config.shape, config.dtype
    extras = {*extras} | config.features
    options = draw_options(config, rng, window)
    if not causal or "causal=False" in config.features:
        options["causal"] = False
    if "positions" in extras:
        spread = rng.integers(0, shape.capacity + 3, total)
        # A slope times 2**31 would leave nothing of a float32 logit.
        far = 99 if "alibi_slopes" in options else 2**31 - 1
        hostile = rng.choice(np.array([-1, -(2**31), far]), total)
        options["positions"] = np.where(rng.random(total) < 0.1, hostile, spread).astype(np.int32)
    if "tree_mask" in extras:
        options["tree_mask"] = rng.random((total, TOTAL - 4)) < 0.6
    query = magnitudes[0] * rng.standard_normal((total, shape.num_heads, shape.head_dim))
    tables = draw_tables(rng, shape, len(context_lens), tables_dtype, share, invalid)
    in_groups = share_pages(tables, prefix_groups)
    case = RaggedPageAttentionCase(
        shape, dtype, config.cache_layout, query.astype(dtype), np.zeros(0), None, context_lens,
        tables, options, config.num_splits, np.zeros(0), np.zeros(0), as_jax, config.fused,
        cu_q_lens=cu_q_lens,
    )  # fmt: skip
    seen: dict[int, set[int]] = {s: set() for s in range(len(context_lens))}
    for s, tokens in case.rows_seen.values():
        seen[s] |= {*tokens[:, 0].tolist()}
    keys, values, live, needed, scales = draw_pools(rng, config, tables, seen, magnitudes)
    case = case.replace(
        keys=keys, values=values, live=live, needed=needed | in_groups, scales=scales
    )
    return case.with_other_junk(seed)


def share_pages(tables: Array, prefix_groups: Any) -> Array:
    """Let the tables of each group name the pages of its first sequence; return where they do."""
    shared = np.zeros(tables.shape, bool)
    groups, num_pages = ((), ()) if prefix_groups is None else prefix_groups
    for group, count in enumerate(num_pages):
        rows = np.flatnonzero(np.asarray(groups) == group)
        if len(rows) and count > 0:
            tables[rows, :count] = tables[rows[0], :count]
            shared[rows, :count] = True
    return shared
