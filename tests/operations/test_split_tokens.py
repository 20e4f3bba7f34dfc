"""`split_tokens`: automatic counts, and yet a sequence's bits depend on that sequence alone."""

import numpy as np
import pytest

import ejk
from ejk.testing.bits import bits_equal

BACKEND = ejk.TritonPageAttention(interpret=True, block_kv=16, split_tokens=32)


def arguments(lens, max_blocks):
    rng = np.random.default_rng(0)
    query = rng.standard_normal((3, 6, 64), np.float32)
    pool = rng.standard_normal((64, 2, 8, 64), np.float32)
    tables = rng.permutation(64)[:60].reshape(3, 20)[:, :max_blocks]
    return query, pool, pool, np.array(lens), tables


def attend(*given):
    return ejk.page_attention(*given, return_lse=True, backend=BACKEND)


@pytest.mark.parametrize("max_blocks", [5, 8, 20])
def test_a_wider_table_changes_no_bit(max_blocks):
    lens = (30, 7, 32)
    narrow = attend(*arguments(lens, 4))
    bits_equal(map(np.asarray, narrow), map(np.asarray, attend(*arguments(lens, max_blocks))))


@pytest.mark.parametrize("seq", range(3))
def test_alone_equals_in_a_batch(seq):
    given = arguments((100, 7, 160), 20)
    query, keys, values, lens, tables = given
    one = slice(seq, seq + 1)
    alone = attend(query[one], keys, values, lens[one], tables[one])
    bits_equal((np.asarray(x)[one] for x in attend(*given)), map(np.asarray, alone))
