"""Left padding and attention in chunks, as `docs/migrating.md` has them by `positions`."""

import numpy as np
import pytest
from definition import attend
from entries import ragged_edge

import ejk

LENS, BOUNDS = np.array([20, 9, 15], np.int32), np.array([0, 1, 10, 14], np.int32)
FAR, CHUNK = 2**30, 8


@pytest.mark.parametrize("kind", ["left padding", "chunks"])
@ragged_edge
def test_what_a_token_sees_begins_where_it_is_said(entry, kind):
    """A decode step, a whole prefill, and a few new tokens; hidden tokens of a decode hold NaN."""
    rng = np.random.default_rng(4)
    first = np.array([3, 2, 13])
    tables = rng.permutation(9).reshape(3, 3).astype(np.int32)
    query = rng.standard_normal((14, 4, 32)).astype(entry.dtype)
    pools = [rng.standard_normal((9, 2, 8, 32)).astype(entry.dtype) for _ in range(2)]
    seq = np.repeat(np.arange(3), np.diff(BOUNDS))
    place = np.arange(14) - BOUNDS[seq + 1] + LENS[seq]
    if kind == "chunks":
        positions, window = place // CHUNK * CHUNK + CHUNK - 1, CHUNK
    else:
        positions, window = np.where(place >= first[seq], first[seq] + FAR - 1, 0), FAR
        for j in range(first[0]):  # new tokens that are padding themselves see padding
            for pool in pools:
                pool[tables[0, j // 8], :, j % 8] = np.nan
    with entry.refusing():
        out = ejk.ragged_page_attention(
            query, *pools, LENS, tables, BOUNDS, sliding_window=window,
            positions=positions.astype(np.int32), backend=entry.backend,
        )  # fmt: skip
    for row, (s, t) in enumerate(zip(seq, place)):
        begin = t // CHUNK * CHUNK if kind == "chunks" else first[s]
        if t < begin:
            continue  # padding: what it gets is nobody's
        k, v = (pool[tables[s]].swapaxes(1, 2).reshape(-1, 2, 32)[begin : t + 1] for pool in pools)
        expected = attend(query[row : row + 1], k, v, 32**-0.5, np.ones((1, len(k)), bool))[0]
        np.testing.assert_allclose(np.asarray(out[row : row + 1]), expected, atol=2e-6, rtol=0)


@ragged_edge
def test_windows_count_positions_among_new_tokens_far_from_where_they_lie(entry):
    """Three new tokens share each position, so that a window reaches over three times as many."""
    length, new, window = 160, 128, 20
    rng = np.random.default_rng(4)
    place = np.arange(length)
    position = np.where(place < length - new, place, length - new + (place + new - length) // 3)
    tables = rng.permutation(10)[None].astype(np.int32)
    query = rng.standard_normal((new, 2, 16)).astype(entry.dtype)
    pools = [rng.standard_normal((10, 1, 16, 16)).astype(entry.dtype) for _ in range(2)]
    with entry.refusing():
        out = ejk.ragged_page_attention(
            query, *pools, np.array([length]), tables, np.array([0, new]), sliding_window=window,
            positions=position[-new:].astype(np.int32), backend=entry.backend,
        )  # fmt: skip
    k, v = (pool[tables[0]].swapaxes(1, 2).reshape(length, 1, 16) for pool in pools)
    visible = place <= place[-new:, None]
    visible &= position > position[-new:, None] - window
    expected, _ = attend(query, k, v, 16**-0.5, visible)
    np.testing.assert_allclose(np.asarray(out), expected, atol=2e-6, rtol=0)
