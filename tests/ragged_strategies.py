"""Draws calls of `ejk.ragged_page_attention`, as `strategies` draws those of `page_attention`."""

import dataclasses
import functools
from itertools import combinations
from typing import Self

import jax.numpy as jnp
import numpy as np
import oracle
import poison
from hypothesis import strategies as st
from strategies import (
    CONFIGURATIONS,
    INTEGERS,
    Case,
    Configuration,
    are_few,
    draw_options,
    draw_pools,
    draw_tables,
    fixed,
    lengths,
    one_of,
    windows,
)

TOTAL = 13  # new tokens of a drawn call
EXTRAS = ("positions", "tree_mask")


@dataclasses.dataclass(frozen=True)
class RaggedCase(Case):
    """One call. Rows that see nothing hold poison, rows of no sequence have junk options."""

    cu_q_lens: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(1, np.int32))

    def operands(self):
        return (*super().operands(), self.cu_q_lens)

    def expected(self):
        return oracle.ragged_page_attention(*self.operands(), **self.semantics())

    @functools.cached_property
    def rows_seen(self):
        """Each row's sequence and the tokens that it sees, valid pages or not."""
        names = ("sliding_window", "causal", *EXTRAS)
        options = {name: self.options[name] for name in names if name in self.options}
        return oracle.ragged_rows(len(self.query), self.lengths(), self.cu_q_lens, **options)

    def seen(self, row):
        if self.rows_seen[row] is None:
            return 0, []
        keys, tables = self.in_layout(self.keys, self.values)[0], self.block_tables
        return oracle.only_pages([self.rows_seen[row]], keys, tables, self.cache_layout)[0]

    @property
    def outside(self):
        return np.array([row is None for row in self.rows_seen])

    @property
    def bounds(self) -> list[int]:
        """`cu_q_lens` made sane."""
        clipped = [min(max(int(c), 0), len(self.query)) for c in self.cu_q_lens]
        return [max(clipped[: s + 1]) for s in range(len(clipped))]

    def with_other_junk(self, seed: int, finite: bool = False) -> Self:
        other = super().with_other_junk(seed, finite)
        rng = np.random.default_rng(seed)
        fill = poison.ordinary if finite else poison.numbers
        blind = np.array([not (row and row[1]) for row in self.rows_seen])
        junk = fill(rng, self.query.shape, self.dtype)
        query = np.where(blind[:, None, None], junk, self.query)
        options = dict(self.options)
        if "positions" in options:
            anything = rng.integers(-(2**31), 2**31, len(query)).astype(np.int32)
            options["positions"] = np.where(self.outside, anything, options["positions"])
        if "tree_mask" in options:
            mask = options["tree_mask"]
            q_lens = np.array([0 if row is None else self._q_len(row[0]) for row in self.rows_seen])
            unread = np.arange(mask.shape[1]) >= q_lens[:, None]
            options["tree_mask"] = np.where(unread, rng.random(mask.shape) < 0.5, mask)
        return other.replace(query=query, options=options)

    def _q_len(self, s):
        return self.bounds[s + 1] - self.bounds[s]

    def part(self, s: int, begin: int = 0, end: int | None = None) -> Self:
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
            cu_q_lens=np.array([0, end - begin]), options=options,
        )  # fmt: skip


@st.composite
def ragged_cases(draw, configurations=CONFIGURATIONS, extras=EXTRAS, causal=True) -> RaggedCase:
    """Draw a call of one of `configurations`, with any of `extras`."""
    config = draw(one_of(configurations))
    shape = config.shape
    ints = [dtype for dtype in INTEGERS if np.iinfo(dtype).max >= shape.num_pages]
    lens_dtype = draw(st.sampled_from(INTEGERS))
    lens = [draw(lengths(shape, lens_dtype)) for _ in range(shape.num_seqs)]
    number = configurations.index(config)
    extras = () if are_few() else extras
    some = [frozenset(few) for n in range(len(extras) + 1) for few in combinations(extras, n)]
    return build_ragged(
        config,
        np.array(lens, lens_dtype),
        draw(_bounds(shape.num_seqs)),
        extras=fixed(draw, some, number),
        tables_dtype=draw(st.sampled_from(ints)),
        window=draw(fixed(draw, windows(shape), number)),
        seed=draw(st.integers(0, 2**32 - 1)),
        share=draw(st.booleans()),
        invalid=draw(st.sampled_from((0.0, 0.0, 0.3, 1.0))),
        magnitudes=(draw(st.sampled_from((0.1, 1.0, 2.0))), draw(st.sampled_from((0.01, 1.0, 99)))),
        as_jax=draw(st.booleans()),
        causal=causal,
    )


def _bounds(num_seqs):
    """Where sequences begin and end: mostly sane, or anything at all."""
    sane = st.lists(st.integers(0, TOTAL), min_size=num_seqs + 1, max_size=num_seqs + 1)
    tight = sane.map(lambda cuts: [0, *sorted(cuts)[1:-1], TOTAL])
    dtypes = st.sampled_from([dtype for dtype in INTEGERS if dtype.itemsize > 1])

    def hostile(dtype):
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
    context_lens: np.ndarray,
    cu_q_lens: np.ndarray,
    *,
    total=TOTAL,
    extras=frozenset(),
    tables_dtype=np.int32,
    window=None,
    seed=0,
    share=False,
    invalid=0.0,
    magnitudes=(1.0, 1.0),
    as_jax=False,
    causal=True,
    prefix_groups=None,
) -> RaggedCase:
    """Make a call; the arguments are those of `strategies.build`, and the bounds of the rows.

    Of the sequences of each of the `prefix_groups` the tables name the same first pages.
    """
    rng = np.random.default_rng(seed)
    shape, dtype = config.shape, config.dtype
    options = draw_options(config, rng, window) | ({} if causal else {"causal": False})
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
    case = RaggedCase(
        shape, dtype, config.cache_layout, query.astype(dtype), np.zeros(0), None, context_lens,
        tables, options, config.num_splits, np.zeros(0), np.zeros(0), as_jax, config.fused,
        cu_q_lens=cu_q_lens,
    )  # fmt: skip
    seen: list[set[int]] = [set() for _ in context_lens]
    for s, tokens in filter(None, case.rows_seen):
        seen[s] |= {j for j, _ in tokens}
    *pools, scales = draw_pools(rng, config, case.block_tables, seen, magnitudes)
    named = dict(zip(("keys", "values", "live", "needed"), pools))
    case = case.replace(**named, scales=scales)
    return case.replace(needed=case.needed | in_groups).with_other_junk(seed)


def share_pages(tables, prefix_groups):
    """Let the tables of each group name the pages of its first sequence; return where they do."""
    shared = np.zeros(tables.shape, bool)
    groups, num_pages = ((), ()) if prefix_groups is None else prefix_groups
    for group, count in enumerate(num_pages):
        rows = np.flatnonzero(np.asarray(groups) == group)
        if len(rows) and count > 0:
            tables[rows, :count] = tables[rows[0], :count]
            shared[rows, :count] = True
    return shared


def narrow(x):
    """`jit` takes no 64-bit integers; a caller must have narrowed them with care before."""
    if x.dtype.kind in "iu" and x.dtype.itemsize == 8:
        x = np.clip(x, max(np.iinfo(x.dtype).min, -1), 2**31 - 1).astype(np.int32)
    return jnp.asarray(x)
