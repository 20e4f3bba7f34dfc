"""Gradients of `ejk.page_attention`, on every backend, against a dense definition in float64."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from edges import LENGTHS, config
from entries import each_case, edge

import ejk
from ejk.backends.reverse_mode import attention
from ejk.testing import oracle
from ejk.testing.configurations import CONFIGURATIONS
from ejk.testing.page_attention import PageAttentionCase, build, cases

ORDINARY = [
    c
    for c in CONFIGURATIONS
    if not c.is_quantised and (c.shape.capacity < 300 or c.shape.name == "two blocks")
]
POOLS = {
    "": {}, "fused": {"fused": True}, "interleaved": {"cache_layout": "INTERLEAVED"},
}  # fmt: skip
FLOATS = ("query", "key_cache", "value_cache", "attn_scale", "sinks", "alibi_slopes")


def operands(case: PageAttentionCase) -> dict:
    """Split a case in what is differentiated; the scale always given."""
    query, keys, values, *_ = case.operands()
    scale = case.options.get("attn_scale", case.shape.head_dim**-0.5)
    given = {
        "query": query,
        "key_cache": keys,
        "value_cache": values,
        "attn_scale": np.float32(scale),
        "sinks": case.options.get("sinks"),
        "alibi_slopes": case.options.get("alibi_slopes"),
    }
    return {name: jnp.asarray(x) for name, x in given.items() if x is not None}


def attend(case: PageAttentionCase, backend, floats: dict):
    """Call `ejk` with the float operands apart, the integers of the case closed over."""
    floats = {"value_cache": None, **floats}
    positional = [floats.pop(name) for name in FLOATS[:3]]
    keywords = {**case.semantics(), **floats, "num_splits": case.num_splits}
    return ejk.page_attention(
        *positional, *case.operands()[3:], **keywords, return_lse=True, backend=backend
    )


def spread(case: PageAttentionCase, floats: dict) -> dict:
    """Give every logit its own scale and slope, and every row its own sink."""
    shape = case.shape
    rows = (len(case.query), shape.num_heads)
    logits = (*rows, case.block_tables.shape[1] * shape.page_size)
    spread = dict(floats)
    spread["attn_scale"] = jnp.broadcast_to(floats["attn_scale"], logits)
    if "alibi_slopes" in floats:
        spread["alibi_slopes"] = jnp.broadcast_to(floats["alibi_slopes"][None, :, None], logits)
    if "sinks" in floats:
        spread["sinks"] = jnp.broadcast_to(floats["sinks"][None], rows)
    return spread


SUMMED = {"attn_scale": (0, 1, 2), "alibi_slopes": (0, 2), "sinks": (0,)}
"""The axes that `spread` adds: their sum is the gradient of the operand as it is passed."""


def dense(case: PageAttentionCase, floats: dict):
    """Attention over gathered tokens as one softmax; no poison, the small operands spread."""
    order = {"HND": (0, 2, 1, 3), "KV_HEADS_FIRST": (1, 2, 0, 3)}
    shape = case.shape
    rows = (len(case.query), case.block_tables.shape[1] * shape.page_size)
    visible, ahead = np.zeros(rows, bool), np.zeros(rows)
    tables = np.zeros((rows[0], case.block_tables.shape[1]), np.int64)
    for row in range(rows[0]):
        s, seen = case.seen(row)
        for j, distance in seen.tolist():
            visible[row, j], ahead[row, j] = True, distance
            tables[row, j // shape.page_size] = int(case.block_tables[s, j // shape.page_size])

    def gather(pool):
        canonical = pool.transpose(order.get(case.cache_layout, (0, 1, 2, 3)))
        pages = canonical[tables]
        tokens = pages.reshape(len(tables), -1, *pages.shape[3:])
        tokens = jnp.where(visible[..., None, None], tokens, jnp.zeros((), tokens.dtype))
        return jnp.repeat(tokens, shape.num_heads // shape.num_kv_heads, axis=2)

    pools = [floats[name] for name in FLOATS[1:3] if name in floats]
    if oracle.holds_both(pools[0], case.cache_layout):
        pools = oracle.halves(*pools, case.cache_layout)
    keys = gather(pools[0])
    values = keys[..., : shape.width] if shape.latent else gather(pools[1])
    product = functools.partial(jnp.einsum, precision="highest")
    logits = product("shd,sthd->sht", floats["query"], keys)
    logits = logits * floats["attn_scale"].astype(logits.dtype)
    cap = case.options.get("attn_logits_soft_cap")
    if cap is not None:
        logits = cap * jnp.tanh(logits / cap)
    wide = jnp.float64 if logits.dtype == jnp.float64 else jnp.float32
    logits = logits.astype(wide)
    if "alibi_slopes" in floats:
        distance = jnp.broadcast_to(ahead[:, None], logits.shape).astype(wide)
        logits = logits + floats["alibi_slopes"].astype(wide) * distance
    logits = jnp.where(visible[:, None], logits, -jnp.inf)
    if "sinks" in floats:
        sinks = floats["sinks"].astype(wide)[..., None]
        sinks = jnp.where(case.outside[:, None, None], -jnp.inf, sinks)
        logits = jnp.concatenate([logits, sinks], axis=2)
    some = (logits > -jnp.inf).any(-1, keepdims=True)
    safe = jnp.where(some, logits, 0.0)
    lse = jax.nn.logsumexp(safe, axis=-1, keepdims=True)
    p = jnp.where(some, jnp.exp(safe - lse), 0.0)[..., : rows[1]]
    out = product("sht,sthd->shd", p.astype(values.dtype), values)
    return out, jnp.where(some, lse, -jnp.inf)[..., 0]


def gradients(function, floats: dict, cotangents):
    """Pull random cotangents of the output and of the LSE back to every float operand."""

    def pull(floats, cotangents):
        results, pullback = jax.vjp(function, floats)
        return pullback(tuple(g.astype(x.dtype) for g, x in zip(cotangents, results)))[0]

    grads = jax.jit(pull)(floats, cotangents)
    return {name: np.asarray(grad).astype(np.float64) for name, grad in grads.items()}


def check(case: PageAttentionCase, entry, attend=attend):
    """Compare, by operand and in max-norm: twice plain autodiff's error and a few roundings.

    As for outputs, a float32 gradient may be off by 2e-6 of its largest entry in any case: the
    plain program's products are summed in another order on every platform, and now and then in
    one that happens to be exact.
    """
    rng = np.random.default_rng(7)
    rows = (len(case.query), case.shape.num_heads)
    cotangents = (
        rng.standard_normal((*rows, case.shape.width)).astype(np.float32),
        rng.standard_normal(rows).astype(np.float32),
    )
    floats = operands(case)
    with entry.refusing():
        grads = gradients(functools.partial(attend, case, entry.backend), floats, cotangents)

    clean = case.replace(
        keys=np.where(case.live[..., None, None], case.keys, 0).astype(case.dtype),
        values=case.values
        if case.values is None
        else np.where(case.live[..., None, None], case.values, 0).astype(case.dtype),
    )
    plain = gradients(lambda x: dense(clean, spread(clean, x)), operands(clean), cotangents)
    with jax.enable_x64(True):
        wide = {name: jnp.asarray(x, jnp.float64) for name, x in operands(clean).items()}
        terms = gradients(functools.partial(dense, clean), spread(clean, wide), cotangents)

    eps = float(jnp.finfo(case.dtype).eps)
    assert grads.keys() == terms.keys()
    for name, term in terms.items():
        axes = SUMMED.get(name, ())
        expected = term.sum(axes)
        roundings = max(4 * eps, 2e-6) * np.abs(expected).max()
        if axes:  # many terms that cancel: one rounding of each
            roundings += eps * np.abs(term).sum(axes).max()
        assert np.isfinite(grads[name]).all(), f"the gradient of {name} must be finite"
        error = np.abs(grads[name] - expected).max()
        bound = 2 * np.abs(plain[name] - expected).max() + roundings
        assert error <= bound + 1e-6, f"d {name} is off by {error:.3g}, allowed {bound:.3g}"
    dead = [
        None if pool is None else np.broadcast_to(~case.live[..., None, None], pool.shape)
        for pool in (case.keys, case.values)
    ]
    for name, where in zip(FLOATS[1:3], case.in_layout(*dead)):
        if where is not None:
            assert not grads[name][where].any()


@each_case(functools.partial(cases, ORDINARY), share=0.3)
def test_gradients_agree_with_autodiff_of_the_definition(entry, case):
    """For every float operand, through the output and the LSE; exactly 0 on unread memory."""
    check(case, entry)


@pytest.mark.one_in(5)
@edge
@pytest.mark.parametrize("pools", POOLS.values(), ids=POOLS)
@pytest.mark.parametrize("features", [(), ("sliding_window", "sinks", "alibi_slopes")])
def test_gradients_at_the_edges(entry, features, pools):
    """Lengths from 0 past the capacity, shared pages, entries that name no page."""
    called = config(features=frozenset(features), **pools)
    check(build(called, LENGTHS, window=17, share=True), entry)
    check(build(called, LENGTHS, window=17, invalid=0.4), entry)


@edge
def test_gradients_of_logits_of_zero_are_those_without_a_cap(entry):
    """The least cap there is, too: its product with a gradient might be taken for 0."""
    case = build(config(), LENGTHS)
    case = case.replace(query=np.zeros_like(case.query), options={})
    capped = case.replace(options={"attn_logits_soft_cap": 1.2e-38})
    cotangents = np.ones_like(case.query), np.ones(case.query.shape[:2], np.float32)
    found, expected = (
        gradients(functools.partial(attend, case, entry.backend), operands(case), cotangents)
        for case in (capped, case)
    )
    assert expected["query"].any()
    for name, grad in expected.items():
        np.testing.assert_allclose(found[name], grad, rtol=1e-5, atol=1e-6, err_msg=name)


@edge
@pytest.mark.parametrize("sink", [0.0, -10.0, 60.0])
def test_what_a_sink_leaves_no_weight_has_no_gradient(entry, sink):
    """Logits of -60 * 16 underflow beside it: their tokens are seen, but count for nothing."""
    keys, tables = np.ones((2, 1, 16, 16), np.float32), np.array([[1, 0]], np.int32)

    def loss(query, keys, values, scale):
        out = ejk.page_attention(
            query, keys, values, np.array([20]), tables, scale, sinks=np.full(1, sink, np.float32),
            backend=entry.backend,
        )  # fmt: skip
        return out.sum()

    with entry.refusing():
        grads = jax.grad(loss, argnums=(0, 1, 2, 3))(-keys[:1, 0, :1], keys, keys, 60.0)
    for grad in grads:
        assert not np.asarray(grad).any()


@edge
def test_gradients_of_a_batch_that_sees_nothing_are_zero(entry):
    case = build(config(features=frozenset({"sinks"})), np.zeros(9, np.int32))
    floats = operands(case)

    def loss(floats):
        out, lse = attend(case, entry.backend, floats)
        return out.sum() + lse[:, :1].sum()

    with entry.refusing():
        grads = jax.grad(loss)(floats)
    # The LSE of an empty row is its sink: the only way that anything comes in.
    np.testing.assert_array_equal(
        grads.pop("sinks"), [0 if np.isneginf(case.options["sinks"][0]) else 9, 0, 0, 0]
    )
    for grad in grads.values():
        assert not np.asarray(grad).any()


@edge
def test_vmap_of_grad_equals_grads_one_by_one(entry):
    cases_ = [build(config(), LENGTHS, seed=0), build(config(), LENGTHS[::-1].copy(), seed=0)]
    floats = operands(cases_[0])
    queries = jnp.stack([jnp.asarray(case.query) for case in cases_])
    tables = jnp.stack([jnp.asarray(case.block_tables) for case in cases_])
    lens = jnp.stack([jnp.asarray(case.context_lens) for case in cases_])
    clean = {name: jnp.nan_to_num(floats[name], posinf=0, neginf=0) for name in FLOATS[1:3]}

    def loss(query, keys, values, lens, tables):
        return ejk.page_attention(query, keys, values, lens, tables, backend=entry.backend).sum()

    grad = jax.grad(loss, argnums=(0, 1, 2))
    pools = (clean["key_cache"], clean["value_cache"])
    with entry.refusing():
        mapped = jax.vmap(grad, in_axes=(0, None, None, 0, 0))(queries, *pools, lens, tables)
        for i in range(2):
            one = grad(queries[i], *pools, lens[i], tables[i])
            for a, b in zip(mapped, one):
                np.testing.assert_allclose(a[i], b, rtol=1e-5, atol=1e-5)


@edge
def test_forward_mode_is_refused(entry):
    case = build(config(), LENGTHS)
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


@pytest.mark.fast
@pytest.mark.parametrize("operation", ["page_attention", "ragged_page_attention"])
def test_blocks_of_the_backward_pass_are_small_on_a_cpu_alone(operation, monkeypatch):
    """As small as they can be here: a page. The gradients are the same."""
    jax.clear_caches()
    sequences, rng = 3, np.random.default_rng(0)
    query, pool = rng.normal(size=(sequences, 4, 64)), rng.normal(size=(8, 2, 16, 64))
    pool, tables = jnp.float32(pool), jnp.array([[5, 0, 2, 7], [1, 3, 4, 4], [6, 2, 1, 0]])
    bounds = [jnp.arange(4)] * (operation == "ragged_page_attention")
    integers = (jnp.array([50, 1, 64]), tables, *bounds)

    def gradients(query):
        def loss(query):
            out = getattr(ejk, operation)(query, pool, pool, *integers, backend="xla")
            return (out**2).sum()

        return jax.grad(loss)(query)

    def blocks(platform):
        """Return the pages of blocks that a lowered program loads, of a sequence or a few."""
        traced = jax.jit(lambda query: gradients(query)).trace(jnp.float32(query))
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        return set(re.findall(r"-> tensor<(\d+x\d+)x2x16x64xf32>", text))

    of_all = gradients(jnp.float32(query))
    assert {size.split("x")[1] for size in blocks("cpu")} == {"4"}
    jax.clear_caches()
    monkeypatch.setattr(attention, "CPU_BLOCK_BYTES", 1)
    found = {platform: blocks(platform) for platform in ("cpu", "cuda", "tpu")}
    assert {size.split("x")[1] for size in found["cpu"]} == {"1", "4"}, "4 of the forward pass"
    for platform in ("cuda", "tpu"):
        assert {size.split("x")[1] for size in found[platform]} == {"4"}
    np.testing.assert_allclose(gradients(jnp.float32(query)), of_all, rtol=1e-5, atol=1e-6)
    jax.clear_caches()
