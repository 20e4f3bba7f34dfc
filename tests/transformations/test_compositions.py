"""Random compositions of JAX's transformations over operands of every kind: as the plain call."""

import functools
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

import ejk

COUNT = 300
POOL = np.random.default_rng(0).standard_normal((2, 8, 2, 4, 16), np.float32)
QUERY = np.random.default_rng(1).standard_normal((2, 4, 16), np.float32)
LENS, TABLES = np.array([7, 4], np.int32), np.array([[5, 1], [0, 2]], np.int32)
BOUNDS, SLOTS = np.array([0, 1, 2], np.int32), np.array([6, -1], np.int32)
OPERATIONS = ("page_attention", "ragged_page_attention", "write_kv_cache")
KERNELS = {
    "page_attention": (ejk.TritonPageAttention, ejk.PallasPageAttention),
    "ragged_page_attention": (ejk.TritonRaggedPageAttention, ejk.PallasRaggedPageAttention),
    "write_kv_cache": (ejk.TritonWriteKVCache, ejk.PallasWriteKVCache),
}


def operation(name, backend, scale, rest):
    """The function of its first operand, `[2, 4, 16]`, with the others closed over."""
    pool, lens, tables, bounds, slots = rest
    if name == "page_attention":
        return lambda x: ejk.page_attention(x, *pool, lens, tables, scale, backend=backend)
    if name == "ragged_page_attention":
        return lambda x: ejk.ragged_page_attention(
            x, *pool, lens, tables, bounds, scale, backend=backend
        )
    return lambda x: ejk.write_kv_cache(x[:, :2], x[:, 2:], *pool, slots, backend=backend)[0]


def by_jit(function):
    return jax.jit(function)


def by_vmap(function):
    return lambda x: jax.vmap(function)(jnp.stack([x, x]))[1]


def by_scan(function):
    return lambda x: jax.lax.scan(lambda c, _: (c, function(c)), x, length=2)[1][1]


def by_cond(function):
    return lambda x: jax.lax.cond(jnp.asarray(x).ndim == 3, function, function, x)


def by_checkpoint(function):
    return jax.checkpoint(function)


def by_shard_map(function):
    mesh = jax.make_mesh((1,), ("one",), devices=jax.devices()[:1])
    replicated = PartitionSpec()
    return jax.shard_map(function, mesh=mesh, in_specs=replicated, out_specs=replicated)


def by_grad(function):
    """The gradient and not the result: once, for there is no second derivative."""
    return jax.grad(lambda x: (function(x) ** 2).sum())


WRAPPERS = (by_jit, by_vmap, by_scan, by_cond, by_checkpoint, by_shard_map)


def composition(seed):
    """Draw an operation, its backend, the kinds of its operands, and what goes around it."""
    draw = random.Random(seed)
    name = OPERATIONS[seed % 3]
    wrappers = draw.choices(WRAPPERS, k=draw.randint(1, 4))
    if wrappers.count(by_shard_map) > 1:  # a mesh axis can be split once
        wrappers = [by_shard_map, *(wrap for wrap in wrappers if wrap is not by_shard_map)]
    grads = draw.random() < 0.5
    at = draw.randint(0, len(wrappers))
    backend = draw.choice([None, "xla", "xla", "xla", 0, 1])
    if backend == 1 and {by_vmap, by_cond, by_checkpoint} & {*wrappers}:
        backend = "xla"  # JAX refuses there the effects that the Pallas interpreter has
    if isinstance(backend, int):
        backend = KERNELS[name][backend](interpret=True)
    scale = draw.choice([None, 0.25, 1, np.float32(0.25), jnp.float32(0.25)])
    kinds = [draw.choice([jnp.asarray, np.asarray]) for _ in range(6)]
    if grads and by_shard_map in wrappers[:at] and by_vmap in wrappers[at:]:
        wrappers.append(by_jit)  # vmap(grad(shard_map(jnp.sin))) fails in JAX, too, without
    return name, backend, scale, kinds, [*wrappers[:at], *[by_grad] * grads, *wrappers[at:]]


@pytest.mark.one_in(9)
@pytest.mark.parametrize("seed", range(COUNT))
def test_as_the_plain_call(seed):
    name, backend, scale, kinds, wrappers = composition(seed)
    arrays = (POOL, LENS, TABLES, BOUNDS, SLOTS)
    rest = [kind(x) for kind, x in zip(kinds, arrays)]
    drawn = operation(name, backend, scale, rest)
    plain = operation(name, "xla", scale, [jnp.asarray(x) for x in arrays])
    if by_grad in wrappers:
        plain = by_grad(plain)
    composed = functools.reduce(lambda function, wrap: wrap(function), wrappers, drawn)
    said = [wrap.__name__.removeprefix("by_") for wrap in wrappers]
    np.testing.assert_allclose(
        composed(kinds[5](QUERY)),
        plain(jnp.asarray(QUERY)),
        rtol=1e-4,
        atol=1e-4,
        err_msg=f"{said}",
    )
