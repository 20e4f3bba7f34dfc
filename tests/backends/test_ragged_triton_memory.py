"""The ragged Triton kernels touch only what is theirs, whatever integers the caller passes."""

import dataclasses

import hypothesis
import jax.numpy as jnp
import numpy as np
import pytest
from entries import RAGGED_TRITON, RaggedEntry
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from test_triton_memory import ANY_INT32, BF16, F32, Stores
from tiers import THOROUGH

import ejk
from ejk.backends.triton.interpreter.memory import observe
from ejk.testing.bits import bits_equal
from ejk.testing.bounds import assert_close
from ejk.testing.configurations import LAYOUTS
from ejk.testing.memory import memory_checked
from ejk.testing.ragged_page_attention import RaggedPageAttentionCase
from ejk.testing.shapes import Shape

TOTAL = 23
SHAPES = (
    Shape("groups of 3", 6, 2, 16, page_size=8, max_blocks=5),
    Shape("single slots, odd head", 2, 1, 33, page_size=1, max_blocks=40, value_head_dim=17),
    Shape("a head of 64 + 16", 4, 2, 80, page_size=16, num_seqs=2),
    Shape("latent, 512 + 64", 20, 1, 576, 16, value_head_dim=512, latent=True, num_seqs=2),
    Shape("long enough to be cut", 4, 2, 16, page_size=32, max_blocks=12),
)


def hostile_integers(shape):
    """Draw a call of a shape: about half of all integers, and the window, are anything."""

    def mixture(size, valid):
        either = st.booleans().flatmap(lambda is_valid: valid if is_valid else ANY_INT32)
        return arrays(np.int32, size, elements=either, fill=st.nothing())

    size = shape.num_seqs + 1
    bounds = st.lists(st.integers(0, TOTAL), min_size=size, max_size=size)
    sane = bounds.map(lambda cuts: np.array(sorted(cuts), np.int32))
    return st.fixed_dictionaries(
        {
            "context_lens": mixture(shape.num_seqs, st.integers(0, shape.capacity)),
            "block_tables": mixture(
                (shape.num_seqs, shape.max_blocks), st.integers(0, shape.num_pages - 1)
            ),
            "cu_q_lens": sane | mixture(shape.num_seqs + 1, st.integers(0, TOTAL)),
            "window": st.none() | ANY_INT32 | st.integers(1, shape.capacity),
            "positions": st.none() | mixture(TOTAL, st.integers(0, shape.capacity)),
            "tree_width": st.sampled_from((0, 0, 1, 7, TOTAL)),
            "max_q_len": st.sampled_from((None, 1, 8)),
            "cache_layout": st.sampled_from(LAYOUTS),
            "fused": st.booleans() if shape.fusible else st.just(False),
            "dtype": st.sampled_from((F32, BF16)),
        }
    )


def hostile_call(
    shape, *, dtype, window, positions, tree_width, **drawn
) -> RaggedPageAttentionCase:
    """Make the call on a pool of ordinary numbers; `live` is what some token sees."""
    rng = np.random.default_rng(0)
    pool = (shape.num_pages, shape.page_size, shape.num_kv_heads)
    query = rng.standard_normal((TOTAL, shape.num_heads, shape.head_dim)).astype(dtype)
    keys = rng.standard_normal((*pool, shape.head_dim)).astype(dtype)
    values = None if shape.latent else rng.standard_normal((*pool, shape.width)).astype(dtype)
    options = {}
    if window is not None:  # one below 1 is refused where it is seen: a traced one is not
        options["sliding_window"] = jnp.int32(window)
    if positions is not None:
        options["positions"] = positions
    if tree_width:
        options["tree_mask"] = rng.random((TOTAL, tree_width)) < 0.5
    case = RaggedPageAttentionCase(
        shape, dtype, query=query, keys=keys, values=values, live=np.zeros(pool[:2], bool),
        options=options, needed=np.zeros(0, bool), as_jax=True, num_splits=0, **drawn,
    )  # fmt: skip
    live = case.live.copy()
    for row in range(TOTAL):
        seq, seen = case.seen(row)
        for j, _ in seen:
            live[case.block_tables[seq, j // shape.page_size], j % shape.page_size] = True
    return case.replace(live=live)


def checked(case, max_q_len):
    """Run a call under the checker; every result is stored, by one program of a launch alone.

    The plan stores rows of no sequence, the attention those in one piece, the combination others.
    """
    entry, stores = RaggedEntry("", RAGGED_TRITON, examples=0), Stores()
    with memory_checked(), observe(stores):
        out, lse = entry(case, max_q_len=max_q_len)
    assert {name: counts.size for name, counts in stores.counts.items()} == {
        "out_ptr": out.size,
        "lse_ptr": lse.size,
    }
    for name, counts in stores.counts.items():
        np.testing.assert_array_equal(counts, 1, err_msg=name)
    return out, lse


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_hostile_integers(shape):
    @hypothesis.seed(0)
    @hypothesis.settings(max_examples=300 if THOROUGH else 10)
    @hypothesis.given(hostile_integers(shape))
    def holds(drawn):
        max_q_len = drawn.pop("max_q_len")
        case = hostile_call(shape, **drawn)
        result = checked(case, max_q_len)
        assert_close(case, *result)
        nan, live = case.dtype.type(np.nan), case.live[..., None, None]
        keys = np.where(live, case.keys, nan)
        values = None if case.values is None else np.where(live, case.values, nan)
        bits_equal(result, checked(case.replace(keys=keys, values=values), max_q_len))

    holds()


def test_another_sequence_s_pages_are_not_read():
    """Each sequence owns pages of its own: what the others hold changes none of its bits."""
    shape = dataclasses.replace(SHAPES[0], num_pages=15, num_seqs=3)
    tables = np.random.default_rng(0).permutation(15).reshape(3, 5).astype(np.int32)
    bounds = np.array([2, 9, 10, 22], np.int32)
    case = hostile_call(
        shape, dtype=F32, window=None, positions=None, tree_width=0, cache_layout="NHD",
        fused=False, context_lens=np.array([40, 17, 33], np.int32), block_tables=tables,
        cu_q_lens=bounds,
    )  # fmt: skip
    out, lse = checked(case, None)
    for s in range(3):
        mine = np.isin(np.arange(15), tables[s])[:, None, None, None]
        keys = np.where(mine, case.keys, np.float32(np.nan))
        values = np.where(mine, case.values, np.float32(np.nan))
        again = checked(case.replace(keys=keys, values=values), None)
        rows = slice(bounds[s], bounds[s + 1])
        bits_equal((out[rows], lse[rows]), [x[rows] for x in again])


def test_the_default_blocks_hold_too():
    """Blocks as large as a GPU gets, on a batch of a few wide and narrow ones."""
    shape = SHAPES[2]
    case = hostile_call(
        shape, dtype=BF16, window=None, positions=None, tree_width=0, cache_layout="HND",
        fused=False, context_lens=np.array([48, 30], np.int32),
        block_tables=np.array([[3, 1, 5], [0, 2, 4]], np.int32),
        cu_q_lens=np.array([0, 1, 23], np.int32),
    )  # fmt: skip
    backend = ejk.TritonRaggedPageAttention(interpret=True)
    with memory_checked():
        result = RaggedEntry("", backend, examples=0)(case)
    assert_close(case, *result)


@pytest.mark.fast
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_a_negative_scale_reads_no_entry_past_the_last_token(dtype):
    """Where no block of tokens goes without a mask, none begins past the table either."""
    pool = np.ones((1, 1, 128, 16), dtype)
    out = ejk.ragged_page_attention(
        np.ones((100, 1, 16), dtype), pool, pool, np.array([128]), np.zeros((1, 1), np.int32),
        np.array([0, 100]), -0.3, sliding_window=5,
        backend=ejk.TritonRaggedPageAttention(interpret=True),
    )  # fmt: skip
    np.testing.assert_array_equal(np.asarray(out, F32), 1)
