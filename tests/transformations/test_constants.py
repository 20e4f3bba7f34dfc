"""Constants under transformations: what is no tracer need not be a `jax.Array`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from entries import interpreted

import ejk
from ejk import _page_attention

# One backend has latent caches alone.
OF_ALL = [b for b in _page_attention.BACKENDS if b.name != "mosaic_gpu"]
BACKENDS = {"automatic": None, **interpreted(OF_ALL)}
POOL = np.random.default_rng(0).standard_normal((8, 2, 4, 16), np.float32)
QUERY = np.random.default_rng(1).standard_normal((3, 4, 16), np.float32)
LENS, TABLES = np.array([3, 4, 1], np.int32), np.array([[5, 1], [0, 2], [7, 3]], np.int32)
SCALES = {"default": None, "number": 0.25, "NumPy": np.float32(0.25)}
WRAPPED = {
    "jit": jax.jit,
    "checkpoint": jax.checkpoint,
    "scan": lambda f: lambda *a: jax.lax.scan(lambda c, _: (c + f(*a), None), 0.0, length=1)[0],
    "cond": lambda f: lambda *a: jax.lax.cond(True, f, lambda *_: 0.0, *a),
}
# JAX refuses effects there, which the Pallas interpreter has.
HAS_EFFECTS = ("checkpoint", "cond")


def cases():
    for backend in BACKENDS:
        for wrap in WRAPPED:
            if not (backend == "pallas" and wrap in HAS_EFFECTS):
                yield backend, wrap


@pytest.mark.one_in(2)
@pytest.mark.parametrize("scale", SCALES.values(), ids=SCALES)
@pytest.mark.parametrize("backend, wrap", list(cases()))
def test_vmap_of_a_gradient(backend, wrap, scale):
    def loss(query, length, table):
        return ejk.page_attention(
            query[None], POOL, POOL, length[None], table[None], scale, backend=BACKENDS[backend]
        ).sum()

    wanted = jnp.stack([jax.grad(loss)(*one) for one in zip(map(jnp.asarray, QUERY), LENS, TABLES)])
    mapped = jax.vmap(jax.grad(WRAPPED[wrap](loss)))
    for function in (mapped, jax.jit(mapped)):
        np.testing.assert_allclose(function(QUERY, LENS, TABLES), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_jacobians(backend):
    def rows(query):
        return ejk.page_attention(query, POOL, POOL, LENS, TABLES, backend=BACKENDS[backend]).sum(
            -1
        )

    wanted = jax.jacrev(rows)(jnp.asarray(QUERY))
    np.testing.assert_allclose(jax.jacrev(jax.jit(rows))(QUERY), wanted, rtol=1e-5, atol=1e-6)


def test_an_exported_derivative():
    def loss(query):
        return ejk.page_attention(query, POOL, POOL, LENS, TABLES).sum()

    exported = jax.export.export(jax.jit(loss))(QUERY)
    again = jax.export.deserialize(exported.serialize(vjp_order=1))
    ours = jax.grad(again.call)(jnp.asarray(QUERY))
    np.testing.assert_allclose(ours, jax.grad(loss)(jnp.asarray(QUERY)), rtol=1e-5, atol=1e-6)
