"""Gradients of `ejk.ragged_page_attention`, on every backend, as `test_gradients` has it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from edges import LENS, config
from entries import RAGGED, each_case, ragged_edge
from test_gradients import FLOATS, ORDINARY, check, operands

import ejk
from ejk.testing.ragged_page_attention import (
    RaggedPageAttentionCase,
    build_ragged,
    ragged_cases,
    with_own_options,
)

BOUNDS = np.array([1, 5, 5, 7, 8, 10, 11, 12, 12, 12])  # the first row and the last are no one's


def attend(case: RaggedPageAttentionCase, backend, floats: dict):
    """Call `ejk` with the float operands apart, the integers of the case closed over."""
    floats = {"value_cache": None, **floats}
    positional = [floats.pop(name) for name in FLOATS[:3]]
    keywords = {**case.semantics(), **floats}
    return ejk.ragged_page_attention(
        *positional, *case.operands()[3:], **keywords, return_lse=True, backend=backend
    )


def clean_query(case: RaggedPageAttentionCase) -> RaggedPageAttentionCase:
    """Rows that see nothing may hold NaN: `ejk` reads none of it, the dense program would."""
    blind = np.array([not len(case.seen(row)[1]) for row in range(len(case.query))])
    return case.replace(query=np.where(blind[:, None, None], 0, case.query).astype(case.dtype))


@each_case(functools.partial(ragged_cases, with_own_options(ORDINARY)), share=0.2, entries=RAGGED)
def test_gradients_agree_with_autodiff_of_the_definition(entry, case):
    """For every float operand, through the output and the LSE; exactly 0 on unread memory."""
    check(clean_query(case), entry, attend)


@pytest.mark.one_in(5)
@ragged_edge
@pytest.mark.parametrize(
    ("features", "extras"),
    [
        ((), ()),
        (("sliding_window", "sinks", "alibi_slopes"), ()),
        (("sinks", "alibi_slopes"), ("positions", "tree_mask")),
    ],
    ids=["plain", "features", "tree"],
)
def test_gradients_at_the_edges(entry, features, extras):
    """Shared pages, entries that name no page, more new tokens than tokens, fused pools."""
    called, extras = config(features=frozenset(features)), frozenset(extras)
    case = build_ragged(called, LENS, BOUNDS, window=17, share=True, extras=extras)
    check(clean_query(case), entry, attend)
    fused = config(features=frozenset(features), fused=True)
    case = build_ragged(fused, LENS[::-1].copy(), BOUNDS, window=17, invalid=0.4, extras=extras)
    check(clean_query(case), entry, attend)


@ragged_edge
def test_queries_that_see_nothing_and_unread_memory_change_no_bit(entry):
    """Whatever they hold: their own gradients are exactly 0, and so are those of the memory."""
    called = config(features=frozenset({"sinks", "alibi_slopes"}), dtype=entry.dtype)
    case = build_ragged(called, np.array([48, 0, 2, 33, 0]), BOUNDS[:6])

    def grads(case):
        floats = operands(case)

        def loss(floats):
            out, lse = attend(case, entry.backend, floats)
            return out.sum(dtype=jnp.float32) + jnp.where(jnp.isfinite(lse), lse, 0).sum()

        with entry.refusing():
            return jax.grad(loss)(floats)

    given = grads(case)
    for name, grad in grads(case.with_other_junk(seed=1)).items():
        np.testing.assert_array_equal(grad, given[name])
    blind = [not len(case.seen(row)[1]) for row in range(len(case.query))]
    assert any(blind) and not np.asarray(given["query"])[np.array(blind)].any()
    assert np.isfinite(given["query"]).all() and np.isfinite(given["key_cache"]).all()


@ragged_edge
def test_what_a_sink_leaves_no_weight_has_no_gradient(entry):
    keys, tables = np.ones((2, 1, 16, 16), entry.dtype), np.array([[1, 0]], np.int32)

    def loss(query, keys, values):
        out = ejk.ragged_page_attention(
            query, keys, values, np.array([20]), tables, np.array([0, 3]), 60.0,
            sinks=np.zeros(1, np.float32), backend=entry.backend,
        )  # fmt: skip
        return out.sum(dtype=jnp.float32)

    with entry.refusing():
        grads = jax.grad(loss, argnums=(0, 1, 2))(-keys[:1, 0, :3].swapaxes(0, 1), keys, keys)
    for grad in grads:
        assert not np.asarray(grad).any()


@ragged_edge
def test_vmap_of_grad_equals_grads_one_by_one(entry):
    lens, first = LENS[:4], BOUNDS[:5]
    case = build_ragged(config(dtype=entry.dtype), lens, first)
    clean = {name: jnp.nan_to_num(x, posinf=0, neginf=0) for name, x in operands(case).items()}
    queries = jnp.stack([clean["query"], clean["query"][::-1]])
    bounds = jnp.stack([jnp.asarray(first), jnp.asarray(first).at[2:].add(1)])

    def loss(query, keys, values, bounds):
        out = ejk.ragged_page_attention(
            query, keys, values, lens, case.block_tables, bounds, backend=entry.backend
        )
        return (out * out).sum(dtype=jnp.float32)

    most = 1e-5 if entry.dtype == np.float32 else 2e-2
    grad, pools = jax.grad(loss, argnums=(0, 1, 2)), (clean["key_cache"], clean["value_cache"])
    with entry.refusing():
        mapped = jax.vmap(grad, in_axes=(0, None, None, 0))(queries, *pools, bounds)
        for i in range(2):
            for a, b in zip(mapped, grad(queries[i], *pools, bounds[i])):
                a_i, b = (np.asarray(x, np.float32) for x in (a[i], b))
                np.testing.assert_allclose(a_i, b, rtol=most, atol=most)


@ragged_edge
def test_forward_mode_is_refused(entry):
    case = build_ragged(config(dtype=entry.dtype), LENS, BOUNDS)
    query = jnp.asarray(case.query)

    def run(query):
        with entry.refusing():
            return attend(case, entry.backend, {**operands(case), "query": query})

    for forward in (
        lambda: jax.jvp(run, (query,), (query,)),
        lambda: jax.jit(jax.jacfwd(run))(query),
        lambda: jax.hessian(lambda q: run(q)[0].sum())(query),
    ):
        with pytest.raises(NotImplementedError, match=r"derivatives in reverse mode alone"):
            forward()


@pytest.mark.parametrize("num_layers", [4, 8])
def test_a_trainer_keeps_the_pools_of_each_layer_once(num_layers):
    """As `docs/examples.md` says; a scan that carries one pool of all layers keeps it in each."""
    pages = dict(num_pages=64, page_size=16)
    lens, bounds, tables = np.array([16]), np.array([0, 16]), np.arange(4)[None]
    slots = ejk.ragged_slot_mapping(tables, lens, bounds, total_tokens=16, **pages)

    def layer(x, scale, pools, slots, tables):
        heads = (x * scale).reshape(16, 4, 16)
        pools = ejk.write_kv_cache(heads[:, :2], heads[:, 2:], *pools, slots)
        out = ejk.ragged_page_attention(heads, *pools, lens, tables, bounds)
        return x + out.reshape(x.shape), pools

    @jax.checkpoint
    def with_own_pools(x, xs):
        return layer(x, *xs, slots, tables)

    @jax.checkpoint
    def with_a_pool_of_all(carry, xs):
        scale, of_layer = xs
        places = (
            ejk.layer_slot_mapping(slots, of_layer, **pages),
            ejk.layer_block_tables(tables, of_layer, num_pages=64),
        )
        return layer(carry[0], scale, carry[1], *places), None

    def own_pools(scales, pools):
        pools = tuple(pool.reshape(num_layers, 64, *pool.shape[1:]) for pool in pools)
        return jax.lax.scan(with_own_pools, jnp.ones((16, 64)), (scales, pools))[0].sum()

    def a_pool_of_all(scales, pools):
        xs, x = (scales, jnp.arange(num_layers)), jnp.ones((16, 64))
        return jax.lax.scan(with_a_pool_of_all, (x, pools), xs)[0][0].sum()

    given = jnp.ones(num_layers), (jnp.zeros((num_layers * 64, 2, 16, 16)),) * 2
    size = sum(pool.nbytes for pool in given[1])
    used, gradients = [], []
    for loss in (own_pools, a_pool_of_all):
        compiled = jax.jit(jax.grad(loss)).lower(*given).compile()
        used.append(compiled.memory_analysis().temp_size_in_bytes)
        gradients.append(compiled(*given))
    assert used[0] < 2.5 * size and used[1] > num_layers * size
    np.testing.assert_allclose(*gradients, rtol=1e-5)


def test_rows_of_no_sequence_have_no_sink():
    query, pool = jnp.ones((5, 2, 8)), jnp.ones((4, 1, 4, 8))

    def loss(sinks):
        out = ejk.ragged_page_attention(
            query, pool, pool, np.array([6]), np.array([[0, 1]]), np.array([1, 4]), sinks=sinks
        )
        return out.sum()

    assert np.isfinite(jax.grad(loss)(jnp.array([200.0, 1.0]))).all()
