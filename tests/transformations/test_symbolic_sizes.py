"""`jax.export` with symbolic sizes: XLA's programs take any, kernels say that they cannot."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

import ejk

SIZES = {"batch": 4, "pages": 12, "width": 3, "total_tokens": 6}
XLA = (None, "xla", ejk.XlaPageAttention(block_kv=16))
KERNELS = {
    "cuda": ejk.TritonPageAttention(compute_capability=90, num_sms=132),
    "tpu": ejk.PallasPageAttention(),
}


def types(sizes):
    pool = jax.ShapeDtypeStruct((sizes["pages"], 2, 4, 16), jnp.float32)
    batch = sizes["batch"]
    return (
        jax.ShapeDtypeStruct((batch, 4, 16), jnp.float32), pool, pool,
        jax.ShapeDtypeStruct((batch,), jnp.int32),
        jax.ShapeDtypeStruct((batch, sizes["width"]), jnp.int32),
    )  # fmt: skip


def arrays(given):
    draw = np.random.default_rng(0)
    return [
        draw.standard_normal(x.shape, np.float32)
        if x.dtype == jnp.float32
        else draw.integers(0, 11, x.shape).astype(np.int32)
        for x in given
    ]


def symbolic(which):
    [size] = export.symbolic_shape("n", constraints=["n >= 1", "n <= 1024"])
    return types(SIZES | {which: size})


@pytest.mark.parametrize("which", ["batch", "pages", "width"])
@pytest.mark.parametrize("backend", XLA, ids=["automatic", "xla", "block_kv"])
def test_xla_takes_any_size(which, backend):
    def attend(*args):
        return ejk.page_attention(*args, backend=backend)

    exported = export.export(jax.jit(attend))(*symbolic(which))
    for size in (1, SIZES[which]):
        given = arrays(types(SIZES | {which: size}))
        np.testing.assert_allclose(exported.call(*given), attend(*given), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("which", ["batch", "pages", "width"])
@pytest.mark.parametrize("platform", KERNELS)
def test_kernels_say_that_sizes_must_be_static(which, platform):
    backend = KERNELS[platform]
    function = jax.jit(lambda *args: ejk.page_attention(*args, backend=backend, num_splits=2))
    message = rf"{backend.name}: compiles for sizes that are static, and .*=n.* is symbolic"
    with pytest.raises(ejk.UnsupportedError, match=message):
        export.export(function, platforms=[platform])(*symbolic(which))


@pytest.mark.parametrize("platform", KERNELS)
def test_automatic_choice_takes_xla(platform):
    function = jax.jit(ejk.page_attention)
    module = export.export(function, platforms=[platform])(*symbolic("batch")).mlir_module()
    assert "triton_kernel_call" not in module and "tpu_custom_call" not in module


def test_new_tokens_and_writes():
    [size] = export.symbolic_shape("n")
    query, pool, _, lens, tables = types(SIZES | {"total_tokens": size})
    query = jax.ShapeDtypeStruct((size, *query.shape[1:]), query.dtype)
    bounds = jax.ShapeDtypeStruct((SIZES["batch"] + 1,), jnp.int32)

    def attend(query, pool, lens, tables, bounds):
        return ejk.ragged_page_attention(query, pool, pool, lens, tables, bounds)

    exported = export.export(jax.jit(attend))(query, pool, lens, tables, bounds)
    given = arrays(types(SIZES | {"batch": 4}))
    rows = np.random.default_rng(1).standard_normal((6, 4, 16), np.float32)
    given = (rows, given[1], given[3], given[4], np.array([0, 1, 1, 5, 6], np.int32))
    np.testing.assert_allclose(exported.call(*given), attend(*given), rtol=1e-5, atol=1e-6)

    def write(tokens, pool, slots):
        return ejk.write_kv_cache(tokens, tokens, pool, pool, slots)[0]

    tokens = jax.ShapeDtypeStruct((size, 2, 16), jnp.float32)
    slots = jax.ShapeDtypeStruct((size,), jnp.int32)
    exported = export.export(jax.jit(write))(tokens, pool, slots)
    given = (np.ones((3, 2, 16), np.float32), given[1], np.array([0, -1, 9], np.int32))
    np.testing.assert_array_equal(exported.call(*given), write(*given))


@pytest.mark.parametrize("dtype", ["int8", "int32", "uint32"])
def test_every_size_at_once(dtype):
    """With integers of every width: they are clipped to sizes that are not known."""
    n, pages, width, tokens = export.symbolic_shape("n, pages, width, tokens")
    sizes = {"batch": n, "pages": pages, "width": width}
    query, keys, values, lens, tables = types(sizes)
    lens, tables = (jax.ShapeDtypeStruct(x.shape, dtype) for x in (lens, tables))
    new = jax.ShapeDtypeStruct((tokens, *query.shape[1:]), query.dtype)
    bounds = jax.ShapeDtypeStruct((n + 1,), dtype)
    rows = jax.ShapeDtypeStruct((tokens, 2, 16), query.dtype)
    slots = jax.ShapeDtypeStruct((tokens,), dtype)

    def planned(query, keys, values, lens, tables):
        plan = ejk.plan_page_attention(
            lens, num_heads=4, num_kv_heads=2, head_dim=16, page_size=4,
            max_blocks=tables.shape[1],
        )  # fmt: skip
        return ejk.page_attention(query, keys, values, lens, tables, plan=plan)

    q, k, v, n, t = (x if x.dtype == np.float32 else x.astype(dtype) for x in arrays(types(SIZES)))
    cu, token, slot = np.arange(5).astype(dtype), k[:4, :, 0], np.array([3, 0, 47, 100], dtype)
    calls = [
        (planned, (query, keys, values, lens, tables), (q, k, v, n, t)),
        (ejk.ragged_page_attention, (new, keys, values, lens, tables, bounds), (q, k, v, n, t, cu)),
        (ejk.write_kv_cache, (rows, rows, keys, values, slots), (token, token, k, v, slot)),
    ]
    for function, symbolic_types, given in calls:
        exported = export.export(jax.jit(function))(*symbolic_types)
        for a, b in zip(jax.tree.leaves(exported.call(*given)), jax.tree.leaves(function(*given))):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
