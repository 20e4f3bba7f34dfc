"""`ejk.check_page_attention_inputs` where values are traced."""

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import checkify

import ejk

POOL = jnp.zeros((8, 2, 16, 64))


@jax.jit
@checkify.checkify
def checked(lens, tables):
    ejk.check_page_attention_inputs(jnp.zeros((2, 4, 64)), POOL, POOL, lens, tables)


@pytest.mark.parametrize(
    "lens, tables, message",
    [
        ([48, 17], [[0, 1, 2], [3, 7, -1]], None),
        ([48, 49], [[0, 1, 2], [3, 7, 0]], "context_lens[1]=49 must be in [0, 48]"),
        ([48, 17], [[0, 1, 8], [3, 7, 0]], "block_tables[0, 2]=8 must be in [0, 8)"),
        ([48, 17], [[0, 1, 2], [3, -1, 0]], "block_tables[1, 1]=-1 must be in [0, 8)"),
    ],
)
def test_the_first_mistake_is_named(lens, tables, message):
    error, _ = checked(jnp.array(lens), jnp.array(tables))
    if message is None:
        error.throw()
    else:
        with pytest.raises(checkify.JaxRuntimeError) as info:
            error.throw()
        assert message in str(info.value)
