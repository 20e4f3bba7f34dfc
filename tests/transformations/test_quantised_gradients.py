"""Gradients on caches of another type: those of what the cache stands for, by the chain rule."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from edges import LENGTHS, LENS, config
from entries import edge, ragged_edge

import ejk
from ejk.testing import oracle
from ejk.testing.configurations import BF16, E4M3, E5M2, F16, F32, INT4, INT8
from ejk.testing.page_attention import build
from ejk.testing.ragged_page_attention import build_ragged
from ejk.testing.shapes import Shape

LATENT = Shape(
    "latent edges", 4, 2, 64, 16, num_pages=30, num_seqs=9, value_head_dim=32, latent=True
)
CASES = {
    "int8 per token": dict(cache_dtype=INT8, scales="token"),
    "int8 per head": dict(cache_dtype=INT8, scales="head"),
    "int4 in fused pools": dict(cache_dtype=INT4, scales="token", fused=True),
    "latent e4m3 per token": dict(cache_dtype=E4M3, scales="token", shape=LATENT),
    "latent e5m2 per head": dict(cache_dtype=E5M2, scales="head", shape=LATENT),
    "e4m3 alone": dict(cache_dtype=E4M3),
    "bfloat16 for float32": dict(cache_dtype=BF16),
    "float32 per token": dict(scales="token", fused=True),
    "float16 per head, fused": dict(cache_dtype=F16, scales="head", fused=True),
}  # fmt: skip
each_cache = pytest.mark.parametrize("changes", CASES.values(), ids=CASES)
FEATURES = frozenset({"sliding_window", "sinks", "alibi_slopes", "attn_logits_soft_cap"})


def split(case):
    """Return what is differentiated of a case, and a call of it on `ejk` and on what it means."""
    query, key_cache, value_cache, *integers = case.operands()
    keywords = case.semantics()
    scales = {n: keywords.pop(n) for n in ("key_scale", "value_scale") if n in keywords}
    pools = {"key_cache": key_cache, "value_cache": value_cache}
    floats = {"query": query, **scales}
    if case.keys.dtype in (F32, BF16, F16):
        floats |= {name: pool for name, pool in pools.items() if pool is not None}
    fixed = {name: pool for name, pool in pools.items() if name not in floats}
    live = np.broadcast_to(case.live[..., None], case.keys.shape[:3])
    live, *_ = case.in_layout(live, None if case.values is None else live)

    def of(function, backend, floats):
        given = {**fixed, **floats}
        positional = [given.pop(name) for name in ("query", *pools)]
        return function(
            *positional, *integers, **keywords, **given, return_lse=True, backend=backend
        )

    def meant(function, floats):
        given = {**fixed, **floats}
        key_scale, value_scale = (given.pop(f"{n}_scale", None) for n in ("key", "value"))
        scale = {"key_cache": key_scale, "value_cache": value_scale}
        if case.fused and not case.has_token_scales:
            scale["key_cache"] = [key_scale, value_scale]
        wide = {"query": given["query"].astype(jnp.float32)}
        for name, pool in pools.items():
            if pool is not None:
                pool = _dequantised(case, given[name], scale[name], live)
            wide[name] = pool
        return of(function, "xla", wide)

    return {name: jnp.asarray(x) for name, x in floats.items()}, of, meant


def _dequantised(case, codes, scale, live):
    """Return what a pool means, in float32, and 0 where no sequence sees it."""
    if codes.dtype == INT4:
        codes = oracle.codes(codes)
    codes = jnp.where(live[..., None], jnp.asarray(codes).astype(jnp.float32), 0)
    if scale is None:
        return codes
    if case.has_token_scales:
        return codes * jnp.where(live, scale, 0)[..., None]
    assert case.cache_layout == "HND"
    of_heads = jnp.broadcast_to(jnp.asarray(scale), (*[2] * case.fused, case.shape.num_kv_heads))
    return codes * of_heads[None, ..., None, None]


def check(entry, case, function):
    rng = np.random.default_rng(7)
    floats, of, meant = split(case)
    rows = (len(case.query), case.shape.num_heads)
    g = rng.standard_normal((*rows, case.shape.width)).astype(np.float32)
    h = rng.standard_normal(rows).astype(np.float32)

    def pull(call):
        def loss(floats):
            out, lse = call(floats)
            return (out * g).sum() + jnp.where(lse > -jnp.inf, lse * h, 0.0).sum()

        return jax.grad(loss)(floats)

    with entry.refusing():
        grads = pull(lambda floats: of(function, entry.backend, floats))
    expected = pull(lambda floats: meant(function, floats))
    for name, grad in grads.items():
        assert grad.dtype == floats[name].dtype and grad.shape == floats[name].shape
        wide = np.asarray(expected[name]).astype(np.float32)
        most = max(2e-5, 2 * float(jnp.finfo(grad.dtype).eps)) * np.abs(wide).max()
        np.testing.assert_allclose(
            np.asarray(grad).astype(np.float32), wide, rtol=0, atol=most, err_msg=name
        )


@pytest.mark.one_in(4)
@edge
@each_cache
def test_gradients_are_those_of_what_the_cache_means(entry, changes):
    """Of queries, scales and floats; exactly 0 on unread memory, whatever it holds."""
    called = config(features=FEATURES, **changes)
    check(entry, build(called, LENGTHS, window=17, share=True, invalid=0.2), ejk.page_attention)


@pytest.mark.one_in(4)
@ragged_edge
@each_cache
def test_of_ragged_batches(entry, changes):
    bounds = np.array([0, 1, 1, 3, 4, 6, 7, 8, 12, 13])
    case = build_ragged(config(features=FEATURES, **changes), LENS, bounds, window=17, share=True)
    case = case.replace(query=np.nan_to_num(case.query, posinf=0, neginf=0))
    check(entry, case, ejk.ragged_page_attention)


@pytest.mark.parametrize("dtype", [jnp.float8_e4m3fn, jnp.float8_e5m2])
def test_codes_have_no_gradient(dtype):
    pool, lens, tables = jnp.ones((4, 2, 16, 64), dtype), np.array([20]), np.array([[1, 2]])
    query = jnp.ones((1, 2, 64))

    def loss(query, keys, values):
        return ejk.page_attention(query, keys, values, lens, tables).sum()

    assert jax.grad(loss)(query, pool, pool).shape == query.shape
    for argument, name in ((1, "key_cache"), (2, "value_cache")):
        with pytest.raises(ValueError, match=rf"^{name}.dtype={dtype.dtype} has no gradient"):
            jax.jit(jax.grad(loss, argument))(query, pool, pool)


def test_rounding_to_codes_has_no_gradient():
    rows, slots = jnp.ones((3, 2, 64)), np.array([5, -1, 9])
    pool, scales = jnp.zeros((4, 2, 16, 64), jnp.int8), jnp.ones((4, 2, 16))

    def loss(rows, scales):
        _, _, scale, _ = ejk.write_kv_cache(
            rows, jax.lax.stop_gradient(rows), pool, pool, slots, key_scale=scales,
            value_scale=jnp.ones_like(scales),
        )  # fmt: skip
        return scale.sum()

    for argument, name in ((0, "key"), (1, "key_scale")):
        with pytest.raises(ValueError, match=f"^{name} has no gradient with key_cache.dtype=int8"):
            jax.grad(loss, argument)(rows, scales)
    assert not jax.grad(lambda x: loss(jax.lax.stop_gradient(rows), jax.lax.stop_gradient(x)))(
        scales
    ).any()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
@pytest.mark.parametrize("scaled", [False, True], ids=["", "scaled"])
def test_a_write_of_floats_is_differentiable(dtype, scaled):
    rng = np.random.default_rng(0)
    rows, slots = rng.standard_normal((4, 2, 8)).astype(np.float32), np.array([5, -1, 40, 5])
    pool = jnp.zeros((3, 2, 16, 8), dtype)
    g = rng.standard_normal(pool.shape).astype(np.float32)
    scale = np.array([0.5, 4.0], np.float32) if scaled else np.ones(2, np.float32)

    def loss(rows, scale):
        given = {"key_scale": scale, "value_scale": 1.0} if scaled else {}
        written, _ = ejk.write_kv_cache(
            rows, jax.lax.stop_gradient(rows), pool, pool, slots, **given
        )
        return (written.astype(jnp.float32) * g).sum()

    d_rows, d_scale = jax.grad(loss, (0, 1))(jnp.asarray(rows), jnp.asarray(scale))
    expected = np.zeros_like(rows)
    expected[2], expected[3] = g[2, :, 8] / scale[:, None], g[0, :, 5] / scale[:, None]
    most = 4 * float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(d_rows, expected, atol=most * np.abs(expected).max())
    if scaled:
        of_scale = -(expected * rows).sum((0, 2)) / scale
        np.testing.assert_allclose(d_scale, of_scale, atol=20 * most * np.abs(of_scale).max())


def test_a_scale_of_nothing_visible_changes_no_gradient_of_a_sink():
    codes = jnp.zeros((2, 1, 4, 8), jnp.int8)

    def loss(sinks):
        _, lse = ejk.page_attention(
            jnp.ones((1, 1, 8)), codes, codes, np.array([3]), np.array([[-1]]), sinks=sinks,
            key_scale=jnp.ones(1), value_scale=jnp.array([jnp.nan]), return_lse=True,
        )  # fmt: skip
        return lse.sum()

    assert jax.grad(loss)(jnp.ones(1)) == 1
