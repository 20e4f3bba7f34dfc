"""Groups of sequences that share their first pages change nothing but last bits."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from edges import SMALL, config
from entries import RAGGED, counted, each_case, each_of
from gpu_interpreter import ON_GPU
from hypothesis import strategies as st

import ejk
from ejk.backends.prefix_groups import SharedPrefixes
from ejk.testing.bits import bits_equal
from ejk.testing.bounds import assert_close
from ejk.testing.configurations import FEATURES
from ejk.testing.ragged_page_attention import EXTRAS, build_ragged, draw_groups, ragged_cases

LENS = np.array([48, 40, 5, 49, 33, 17, 35, 47, 40])
BOUNDS = np.array([0, 1, 4, 4, 5, 7, 8, 9, 11, 12])
GROUPS = np.array([0, 0, -1, 0, 1, 1, 1, 0, 7]), np.array([2, 1])
"""Of four that share two pages, and of three that share one."""
SHARING = [entry for entry in RAGGED if hasattr(entry.backend, "least_saved_bytes")]
"""Mosaic GPU leaves groups out of account: drawn calls show it, and its interpreter is slow."""


def each_sharing(body):
    """Run a test of `entry` on each backend that reads a prefix once."""
    return each_of(SHARING)(counted(body))


def sharing(entry):
    """The backend, but one that reads every group's prefix once, whether that pays or not."""
    if entry not in SHARING:
        return entry
    backend = dataclasses.replace(entry.backend, least_saved_bytes=0)
    return dataclasses.replace(entry, backend=backend)


@st.composite
def grouped_cases(draw, few):
    """Draw a call, and groups of sequences that may share a page."""
    case = draw(ragged_cases(few=few))
    return case, draw(draw_groups(len(case.block_tables)))


@each_case(grouped_cases, 0.5, RAGGED)
def test_any_groups_change_nothing(entry, case):
    case, groups = case
    assert_close(case, *sharing(entry)(case, prefix_groups=groups))


def alter(tables, row, entry, to):
    tables = tables.copy()
    tables[row, entry] = to
    return tables


TABLES = {
    "of which one differs": lambda tables: alter(tables, 3, 1, tables[8, 1]),
    "that name no page": lambda tables: alter(tables, [0, 1, 3, 7], 0, -1),
    "of which one names no page": lambda tables: alter(tables, 3, 0, 2**31 - 1),
}
NUMBERS = {  # of one shape: one program runs them all
    "as they are": GROUPS,
    "of one each": (np.arange(9), np.array([2, 2])),
    "longer than a sequence": (GROUPS[0], np.array([3, 2**31 - 1])),
    "hostile": (np.array([0, 0, 2**40, 0, -(2**40), 1, 1, 0, 2]), np.array([2, -(2**33)])),
}
CALLS = {
    "plain": ((), (), {}),
    "every option": (FEATURES, (), {}),
    "a tree": (("sliding_window", "alibi_slopes", "sinks"), EXTRAS, {}),
    "quantised": ((), (), {"cache_dtype": np.dtype(np.int8), "scales": "token"}),
    "latent": ((), (), {"shape": dataclasses.replace(SMALL, num_kv_heads=1, latent=True)}),
}


def grouped_case(features=(), extras=(), **changes):
    case = build_ragged(
        config(features=frozenset(features), **changes), LENS, BOUNDS, window=20,
        extras=frozenset(extras), prefix_groups=GROUPS,
    )  # fmt: skip
    if "positions" in case.options:  # behind what is shared, or it cannot be
        positions = np.maximum(case.options["positions"], 33)
        case = case.replace(options=case.options | {"positions": positions})
    return case


@pytest.mark.one_in(3)
@each_sharing
@pytest.mark.parametrize("call", CALLS)
def test_groups_change_nothing(entry, call):
    """Whether tables agree about what is said to be shared, or not; with NaN in what is unread."""
    features, extras, changes = CALLS[call]
    case, entry = grouped_case(features, extras, dtype=entry.dtype, **changes), sharing(entry)
    result = entry(case, prefix_groups=GROUPS)
    if not extras:  # positions were changed after what they show had been written
        assert_close(case, *result)
        bits_equal(result, entry(case.with_other_junk(seed=3), prefix_groups=GROUPS))
    plain = entry(case)
    for got, expected in zip(result, plain):
        np.testing.assert_allclose(
            got.astype(np.float32), expected.astype(np.float32), rtol=0, atol=2e-2
        )


@each_sharing
def test_wrong_groups_change_nothing(entry):
    entry = sharing(entry)
    case = grouped_case(dtype=entry.dtype)
    for groups in NUMBERS.values():
        assert_close(case, *entry(case, prefix_groups=groups))
    case = case.replace(keys=clean(case.keys), values=clean(case.values))
    for change in TABLES.values():
        changed = case.replace(block_tables=change(case.block_tables))
        assert_close(changed, *entry(changed, prefix_groups=GROUPS))


def clean(pool):
    """Write what is poisoned: other tables show it."""
    return np.nan_to_num(pool.astype(np.float32), nan=1, posinf=1, neginf=1).clip(-3, 3).astype(
        pool.dtype
    )  # fmt: skip


def by_hand(groups, num_pages, tables, limits, page_size):
    """What `SharedPrefixes` says, in loops."""
    leader, pages = np.arange(len(groups)), np.zeros(len(groups), int)
    for group in set(groups.tolist()) & set(range(len(num_pages))):
        rows = np.flatnonzero(groups == group)
        leader[rows] = rows[0]
        count = min(num_pages[group], min(limits[rows]) // page_size, tables.shape[1])
        agree = all((tables[row, : max(count, 0)] == tables[rows[0], : max(count, 0)]).all()
                    for row in rows)  # fmt: skip
        if len(rows) > 1 and count > 0 and agree:
            pages[rows] = count
    return leader, pages


def test_what_is_shared_is_what_the_tables_say():
    rng = np.random.default_rng(0)
    find = jax.jit(SharedPrefixes.of, static_argnums=4)
    some = 0
    for _ in range(50):
        groups, num_pages = rng.integers(-2, 5, 9), rng.integers(-1, 6, 4)
        tables, limits = rng.integers(-1, 2, (9, 4)), rng.integers(-3, 300, 9)
        if rng.random() < 0.8:
            tables[:] = tables[0]
        leader, pages = by_hand(groups, num_pages, tables, limits, 16)
        found = find(*(jnp.asarray(x, jnp.int32) for x in (groups, num_pages, tables, limits)), 16)
        np.testing.assert_array_equal(found.leader, leader)
        np.testing.assert_array_equal(found.pages, pages)
        order = [s for s in np.argsort(leader, kind="stable") if pages[s]]
        assert found.order[: len(order)].tolist() == order
        ends = np.searchsorted([leader[s] for s in order], np.arange(10))
        np.testing.assert_array_equal(found.bounds(jnp.ones(9, jnp.int32)), ends)
        some += bool(pages.any())
    assert some > 10


def test_short_prefixes_do_not_pay():
    """By default a group is read sequence by sequence where it would save less than it costs.

    Bits tell: those of a kernel. XLA may multiply matrices in another way in another program.
    """
    entry = next(entry for entry in SHARING if "triton" in entry.name)
    case = grouped_case(("sinks",))
    of_two, alone = (np.where(np.arange(9) < 2, 0, -1), np.array([1, 0])), entry(case)
    bits_equal(alone, entry(case, prefix_groups=of_two))
    for shared in (
        entry(case, prefix_groups=GROUPS), sharing(entry)(case, prefix_groups=of_two)
    ):  # fmt: skip
        assert (alone[0] != shared[0]).any(), "nothing was read once"


def gradient(case, **hints):
    query, *arrays = case.arguments()

    def loss(query):
        out = ejk.ragged_page_attention(
            query, *arrays, **case.semantics(), **hints,
            backend=ejk.XlaRaggedPageAttention(least_saved_bytes=0),
        )  # fmt: skip
        return (out * jnp.cos(jnp.arange(out.size).reshape(out.shape))).sum()

    return jax.grad(loss)(jnp.asarray(query))


def test_gradients_leave_groups_out_of_account():
    case = grouped_case(("sinks", "sliding_window"))
    close = gradient(case, prefix_groups=GROUPS), gradient(case)
    np.testing.assert_allclose(*close, rtol=0, atol=2e-5)


@pytest.mark.parametrize("operation", ["page_attention", "ragged_page_attention"])
def test_traced_mapped_and_exported(operation):
    """Groups may be traced, batched, and of a batch whose size is known when it is run."""
    case = grouped_case(dtype=np.dtype(np.float32))
    query, keys, values, lens, tables, bounds = case.operands()
    args = [query, lens, tables, *GROUPS]
    args = [np.asarray(x, np.float32 if x is query else np.int32) for x in args]
    backend = ejk.XlaRaggedPageAttention(least_saved_bytes=0)
    if operation == "page_attention":
        args[0], bounds, backend = args[0][:9], None, ejk.XlaPageAttention()
    packed = () if bounds is None else (bounds,)

    def run(query, lens, tables, groups, num_pages, *packed):
        return getattr(ejk, operation)(
            query, keys, values, lens, tables, *packed, prefix_groups=(groups, num_pages),
            backend=backend,
        )  # fmt: skip

    expected = run(*args, *packed)
    mapped = jax.vmap(run)(*([np.stack([x, x]) for x in (*args, *packed)]))
    for one in (jax.jit(run)(*args, *packed), *mapped):
        np.testing.assert_allclose(one, expected, rtol=0, atol=1e-5)
    n, m, total = jax.export.symbolic_shape("n, m, total")
    sizes = [(total if packed else n, *query.shape[1:]), (n,), (n, tables.shape[1]), (n,), (m,)]
    shapes = [jax.ShapeDtypeStruct(shape, x.dtype) for shape, x in zip(sizes, args)]
    if packed:
        packed = (packed[0].astype(np.int32),)
        shapes.append(jax.ShapeDtypeStruct((n + 1,), np.int32))
    exported = jax.export.export(jax.jit(run))(*shapes)
    np.testing.assert_allclose(exported.call(*args, *packed), expected, rtol=0, atol=1e-5)


def test_rows_before_the_first_sequence_stay_where_they_are():
    """Rows are put together group by group, but for those of nobody."""
    rng = np.random.default_rng(2)
    query = rng.standard_normal((9, 2, 8)).astype(np.float32)
    pool = rng.standard_normal((8, 1, 4, 8)).astype(np.float32)
    call = (query, pool, pool, np.array([10, 11, 9]), np.array([[0, 1, 2], [0, 1, 3], [4, 5, 6]]))
    bounds, groups = np.array([2, 4, 5, 8]), (np.array([0, 0, -1]), np.array([2]))
    expected = ejk.ragged_page_attention(*call, bounds, backend="xla")
    for backend in (
        ejk.XlaRaggedPageAttention(least_saved_bytes=0),
        ejk.TritonRaggedPageAttention(least_saved_bytes=0, interpret=not ON_GPU),
    ):
        found = ejk.ragged_page_attention(*call, bounds, prefix_groups=groups, backend=backend)
        np.testing.assert_allclose(found, expected, atol=2e-6)
