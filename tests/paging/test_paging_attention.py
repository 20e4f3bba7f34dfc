"""The page manager and the operations together: random operations over pools on the device.

Keys and values of a token are drawn from the number that the model has for it. So a sequence reads
back its own, and attention over its pages equals dense attention to them, only if every page is the
right one. Pages that are given up are overwritten: with NaN, or with a number of the page's.

Hypothesis' machine takes 10,000 steps in a thorough run.
"""

import functools
import os
import random

import hypothesis
import hypothesis.stateful as stateful
import jax
import jax.numpy as jnp
import numpy as np
import paging_operations as operations
from paging_model import Model

import ejk

THOROUGH = bool(os.environ.get("EJK_TEST_THOROUGH"))
HEADS, DIM = 2, 8
SIZES = dict(page_size=3, num_pages=12, max_seqs=6, max_blocks=4)


@functools.cache
def vector(number, what):
    """A token's key, value or query, `[HEADS, DIM]`."""
    seed = np.random.default_rng([number, "kvq".index(what)])
    return seed.standard_normal((HEADS, DIM)).astype(np.float32)


def vectors(numbers, what):
    return np.array([vector(n, what) for n in numbers], np.float32).reshape(-1, HEADS, DIM)


@functools.partial(jax.jit, donate_argnames="pools")
def write(pools, key, value, slots):
    return ejk.write_kv_cache(key, value, *pools, slots, backend="xla")


@functools.partial(jax.jit, donate_argnames="pools")
def copy(pools, copies):
    return ejk.copy_kv_pages(*pools, *copies.T, backend="xla")


@jax.jit
def attend(pools, query, inputs, sliding_window):
    return ejk.ragged_page_attention(
        query,
        *pools,
        inputs.context_lens,
        inputs.block_tables,
        inputs.cu_q_lens,
        sliding_window=sliding_window,
        backend="xla",
    )


def padded(x, size):
    return np.pad(x, ((0, size - len(x)), *[(0, 0)] * (x.ndim - 1)))


class WithPools(Model):
    """Also runs each step on pools of keys and values."""

    def __init__(self, **sizes):
        super().__init__(**sizes)
        shape = (self.num_pages, HEADS, self.page_size, DIM)
        self.pools = tuple(jnp.full(shape, np.nan, jnp.float32) for _ in range(2))
        self.least = dict(min_seqs=8, min_tokens=48, min_blocks=4)  # one program
        self.rows = 0

    def lose(self, pages):
        super().lose(pages)
        for page in pages.tolist():  # of every other page what stays is finite
            canary = np.full((self.page_size, HEADS, DIM), 1e3 + page if page % 2 else np.nan)
            self.put(page * self.page_size + np.arange(self.page_size), canary, canary)

    def copy(self, copies):
        super().copy(copies)
        pairs = np.full((8, 2), -1, np.int32)
        pairs[: len(copies)] = copies
        self.pools = tuple(copy(self.pools, pairs)[:2])

    def spoil(self, slots):
        super().spoil(slots)
        junk = np.full((len(slots), HEADS, DIM), 1e6)
        self.put(slots, junk, junk)

    def put(self, slots, key, value):
        """Write rows to slots, in one program."""
        size = self.least["min_tokens"]
        slots = np.pad(slots, (0, size - len(slots)), constant_values=-1).astype(np.int32)
        rows = (padded(x.astype(np.float32), size) for x in (key, value))
        self.pools = tuple(write(self.pools, *rows, slots)[:2])

    def ran(self, batch, numbers):
        new = [n for seq, q_len in zip(numbers, batch.q_lens) for n in numbers[seq][-q_len:]]
        slots = batch.inputs.slot_mapping[: len(new)]
        self.put(slots, vectors(new, "k"), vectors(new, "v"))
        window = np.int32(min(self.window, 1000))  # longer than any sequence: none
        query = padded(vectors(new, "q"), batch.inputs.tokens.size)
        out = np.asarray(attend(self.pools, query, batch.inputs, window))
        assert not out[len(new) :].any()
        rows = iter(out)
        for own, q_len in zip(numbers.values(), batch.q_lens):
            keys, values = vectors(own, "k"), vectors(own, "v")
            for position in range(len(own) - q_len, len(own)):
                seen = slice(max(position + 1 - self.window, 0), position + 1)
                logits = np.einsum("hd,jhd->hj", vector(own[position], "q"), keys[seen])
                weights = np.exp(DIM**-0.5 * (logits - logits.max(1, keepdims=True)))
                weights /= weights.sum(1, keepdims=True)
                expected = np.einsum("hj,jhd->hd", weights, values[seen])
                np.testing.assert_allclose(next(rows), expected, atol=1e-5)
                self.rows += 1

    def check_reads(self, table, numbers, first_query):
        super().check_reads(table, numbers, first_query)
        positions = np.arange(max(first_query + 1 - self.window, 0), len(numbers))
        pages = np.asarray(table)[positions // self.page_size]
        for pool, what in zip(self.pools, "kv"):
            read = np.asarray(pool)[pages, :, positions % self.page_size]
            np.testing.assert_array_equal(read, vectors(numbers, what)[positions])


def new_model(rng):
    window = rng.choice([None, None, 1, 3, 5])
    return WithPools(**SIZES, sliding_window=window, prefix_caching=rng.random() < 0.8)


def test_every_sequence_attends_to_its_own_tokens():
    rng = random.Random(0)
    often = 2 * operations.WITH_SEQUENCES + 2 * (operations.allocate, operations.beam)
    refused = 0
    for window in (None, 3):
        model = WithPools(**SIZES, sliding_window=window)
        for _ in range(150):
            rng.choice(often if model.seqs else (operations.allocate,))(model, rng)
            model.check()
        statistics = model.manager.statistics()
        refused += model.refused
        assert model.rows > 100 and min(statistics.copies, statistics.hit_tokens) > 5
        assert statistics.preemptions and statistics.evictions
    assert refused


def test_any_operations_over_pools():
    stateful.run_state_machine_as_test(
        operations.machine(new_model),
        settings=hypothesis.settings(max_examples=200 if THOROUGH else 6, stateful_step_count=50),
    )


def test_a_page_of_another_is_seen():
    """Or the tests above would prove nothing."""
    model = WithPools(**SIZES)
    seqs = [model.allocate([0, 1, 0, 1]), model.allocate([1, 1, 0])]
    operations.compute(model, seqs)
    model.check()
    tables = [model.manager.block_table(seq) for seq in seqs]
    model.pools = tuple(pool.at[tables[0][0]].set(pool[tables[1][0]]) for pool in model.pools)
    with np.testing.assert_raises(AssertionError):
        model.check()
