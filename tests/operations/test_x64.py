"""With 64-bit types on, which kernels do not have, every public function does what it did."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from entries import edge
from jax.sharding import PartitionSpec as P

import ejk

SIZES = dict(num_heads=4, num_kv_heads=2, head_dim=64, page_size=16, max_blocks=20)


@pytest.fixture
def arguments():
    rng = np.random.default_rng(0)
    query = rng.standard_normal((2, 4, 64), np.float32)
    pool = rng.standard_normal((64, 2, 16, 64), np.float32)
    tables = rng.permutation(64)[:40].reshape(2, 20)
    return query, pool, pool, np.array([20, 320]), tables


@edge
def test_calls_and_plans_change_no_bit(entry, arguments):
    def attend():
        plan = ejk.plan_page_attention(arguments[3], **SIZES, backend=entry.backend)
        assert plan.work.dtype == jnp.int32
        return ejk.page_attention(*arguments, plan=plan, return_lse=True, backend=entry.backend)

    narrow = attend()
    with jax.enable_x64(True):
        wide = attend()
        assert [x.dtype for x in wide] == [jnp.float32, jnp.float32]
    for a, b in zip(narrow, wide, strict=True):
        np.testing.assert_array_equal(a, b)


def test_the_rest(arguments):
    with jax.enable_x64(True):
        ejk.check_page_attention_inputs(*arguments)
        nothing = np.zeros((0, 1, 1, 1), np.float32), np.zeros((0, 1, 1), np.float32)
        assert [x.dtype for x in ejk.merge_attention_states(*nothing)] == [jnp.float32] * 2
        bounds, tokens = np.array([0, 2, 5]), np.ones((5, 4, 64), np.float32)
        ragged = functools.partial(ejk.ragged_page_attention, return_lse=True)
        found = ragged(tokens, *arguments[1:], bounds)
        assert [x.dtype for x in found] == [jnp.float32, jnp.float32]
        grad = jax.grad(lambda query: ragged(query, *arguments[1:], bounds)[1].sum())
        assert grad(jnp.asarray(tokens)).dtype == jnp.float32
        mesh = jax.make_mesh((1,), ("pages",), devices=jax.devices()[:1])
        for function, given in (
            (ejk.page_attention, arguments),
            (ejk.ragged_page_attention, (tokens, *arguments[1:], bounds)),
        ):
            call = functools.partial(
                function, axis_name="pages", sliding_window=2**40, return_lse=True
            )
            split = jax.shard_map(call, mesh=mesh, in_specs=P(), out_specs=P())
            assert [x.dtype for x in split(*given)] == [jnp.float32, jnp.float32]
        grad = jax.grad(lambda query: ejk.page_attention(query, *arguments[1:]).sum())
        assert grad(jnp.asarray(arguments[0])).dtype == jnp.float32
