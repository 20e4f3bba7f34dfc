"""The page manager and the operations together: random operations over real pools.

Keys and values of a token are drawn from the number that the model has for it. So attention over a
sequence's pages equals dense attention to its own numbers only if every page is the right one.
"""

import functools
import random

import jax
import jax.numpy as jnp
import numpy as np
import paging_operations as operations
import pytest
from paging_model import Model

import ejk

HEADS, DIM = 2, 8


def vectors(numbers, what):
    """The keys, values or queries of tokens, `[tokens, HEADS, DIM]`."""
    seeds = [np.random.default_rng([number, "kvq".index(what)]) for number in numbers]
    return np.array([seed.standard_normal((HEADS, DIM)) for seed in seeds], np.float32)


@functools.partial(jax.jit, static_argnames="sliding_window")
def step(pools, query, key, value, inputs, sliding_window):
    pools = ejk.write_kv_cache(key, value, *pools, inputs.slot_mapping, backend="xla")
    out = ejk.ragged_page_attention(
        query,
        *pools,
        inputs.context_lens,
        inputs.block_tables,
        inputs.cu_q_lens,
        sliding_window=sliding_window,
        backend="xla",
    )
    return out, pools


class WithPools(Model):
    """Also runs each step on pools of keys and values, in which lost pages are NaN."""

    def __init__(self, *args, **sizes):
        super().__init__(*args, **sizes)
        shape = (self.num_pages, HEADS, self.page_size, DIM)
        self.pools = [np.full(shape, np.nan, np.float32) for _ in range(2)]
        self.least = dict(min_seqs=8, min_tokens=32, min_blocks=4)  # one program for nearly all
        self.rows = 0

    def ran(self, batch, copies, numbers):
        for pool in self.pools:
            pool[batch.freed] = np.nan
            pool[copies[:, 1]] = pool[copies[:, 0]]
        total = batch.inputs.tokens.size
        new = [n for seq, q_len in zip(numbers, batch.q_lens) for n in numbers[seq][-q_len:]]
        query, key, value = (
            np.pad(vectors(new, what), ((0, total - len(new)), (0, 0), (0, 0))) for what in "qkv"
        )
        window = self.manager.sizes.sliding_window
        out, pools = step(tuple(self.pools), query, key, value, batch.inputs, window)
        self.pools = [np.array(pool) for pool in pools]
        assert not np.asarray(out)[len(new) :].any()
        out = iter(np.asarray(out))
        for own, q_len in zip(numbers.values(), batch.q_lens):
            keys, values = vectors(own, "k"), vectors(own, "v")
            for position in range(len(own) - q_len, len(own)):
                seen = slice(max(position + 1 - self.window, 0), position + 1)
                query = vectors(own[position : position + 1], "q")[0]
                logits = np.einsum("hd,jhd->hj", query, keys[seen]) * DIM**-0.5
                weights = np.exp(logits - logits.max(1, keepdims=True))
                weights /= weights.sum(1, keepdims=True)
                expected = np.einsum("hj,jhd->hd", weights, values[seen])
                np.testing.assert_allclose(next(out), expected, atol=1e-5)
                self.rows += 1


@pytest.mark.parametrize("window", [None, 3])
def test_every_sequence_attends_to_its_own_tokens(window):
    model = WithPools(page_size=3, num_pages=16, max_seqs=8, max_blocks=4, sliding_window=window)
    rng = random.Random(0)
    often = 2 * operations.WITH_SEQUENCES + 2 * (operations.allocate, operations.beam)
    for _ in range(200):
        rng.choice(often if model.seqs else (operations.allocate,))(model, rng)
        model.check()
    statistics = model.manager.statistics()
    assert model.rows > 100 and min(statistics.copies, statistics.hit_tokens) > 5
    assert jnp.isfinite(model.pools[0]).any()
