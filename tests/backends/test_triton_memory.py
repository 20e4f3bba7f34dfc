"""The Triton kernels touch only what is theirs, whatever integers the caller passes."""

import hypothesis
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from entries import Entry
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from tiers import THOROUGH

import ejk
from ejk.backends.triton.interpreter.memory import Observer, observe
from ejk.testing import oracle
from ejk.testing.bits import bits_equal
from ejk.testing.bounds import assert_close
from ejk.testing.configurations import E4M3, INT4, INT8, LAYOUTS
from ejk.testing.memory import memory_checked
from ejk.testing.page_attention import PageAttentionCase
from ejk.testing.shapes import Shape

F32, BF16 = np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16)
INT32 = np.iinfo(np.int32)
ANY_INT32 = st.integers(INT32.min, INT32.max) | st.sampled_from(
    (INT32.min, INT32.min + 1, -1, 0, 1, INT32.max - 1, INT32.max)
)

SHAPES = (
    Shape("groups of 3", 6, 2, 16, page_size=8, max_blocks=5),
    Shape("single slots, odd head", 2, 1, 33, page_size=1, max_blocks=40, value_head_dim=17),
    Shape("a head of 64 + 16", 4, 2, 80, page_size=16, num_seqs=2),
    Shape("two blocks of the group", 80, 1, 16, page_size=3, max_blocks=9, num_seqs=2),
    Shape("latent, 512 + 64", 20, 1, 576, 16, value_head_dim=512, latent=True, num_seqs=2),
    Shape("long enough to be planned", 4, 2, 16, page_size=32, max_blocks=12),
)


def hostile_integers(shape):
    """Draw a call of a shape: half of its lengths and page ids, and its window, are anything."""

    def mixture(size, valid):
        either = st.booleans().flatmap(lambda is_valid: valid if is_valid else ANY_INT32)
        return arrays(np.int32, size, elements=either, fill=st.nothing())

    return st.fixed_dictionaries(
        {
            "context_lens": mixture(shape.num_seqs, st.integers(0, shape.capacity)),
            "block_tables": mixture(
                (shape.num_seqs, shape.max_blocks), st.integers(0, shape.num_pages - 1)
            ),
            "window": st.none() | ANY_INT32 | st.integers(1, shape.capacity),
            "num_splits": st.sampled_from((0, 1, 3, 7)),
            "cache_layout": st.sampled_from(LAYOUTS),
            "fused": st.booleans() if shape.fusible else st.just(False),
            "dtype": st.sampled_from((F32, BF16)),
            "cache": st.sampled_from((None, INT8, E4M3, INT4)),
        }
    )


def hostile_call(shape, *, window, dtype, context_lens, block_tables, cache=None, **drawn):
    """Make the call on a pool of ordinary numbers, of codes with a scale per token if `cache`."""
    rng = np.random.default_rng(0)
    pool = (shape.num_pages, shape.page_size, shape.num_kv_heads)
    query = rng.standard_normal((shape.num_seqs, shape.num_heads, shape.head_dim))
    keys = rng.standard_normal((*pool, shape.head_dim)).astype(np.float32)
    values = None if shape.latent else rng.standard_normal((*pool, shape.width)).astype(np.float32)
    scales = (None, None)
    if cache == INT4 and (shape.head_dim % 2 or shape.width % 2):
        cache = INT8
    if cache is None:
        keys, values = keys.astype(dtype), None if values is None else values.astype(dtype)
    else:
        rows = (keys, values)
        scales = tuple(None if x is None else oracle.scales_of(x, cache) for x in rows)
        keys, values = (
            None if x is None else oracle.quantised(x, scale[..., None], cache)
            for x, scale in zip(rows, scales)
        )
    live = np.zeros(pool[:2], bool)
    for length, table in zip(context_lens, block_tables):
        for j in oracle.visible_positions(keys, length, table, "NHD", window):
            live[table[j // shape.page_size], j % shape.page_size] = True
    # A window below 1 is refused where it is seen: a traced one is not.
    options = {} if window is None else {"sliding_window": jnp.int32(window)}
    return PageAttentionCase(
        shape, dtype, query=query.astype(dtype), keys=keys, values=values, live=live,
        context_lens=context_lens, block_tables=block_tables, options=options,
        needed=np.zeros(0, bool), as_jax=True, scales=scales, **drawn,
    )  # fmt: skip


class Stores(Observer):
    """Counts the stores to every element of the results, over all launches."""

    def __init__(self):
        self.counts = {}

    def launched(self, kernel, buffers, grid):
        for name in ("out_ptr", "lse_ptr"):
            if name in buffers and name not in self.counts:
                self.counts[name] = np.zeros(buffers[name].size, int)

    def accessed(self, access):
        if access.kind == "store" and access.buffer in self.counts:
            np.add.at(self.counts[access.buffer], access.offsets // access.itemsize, 1)


def stored_once(run):
    """Run a call under the checker; every element of every result is stored, and stored once.

    By the kernel for the contexts, or by the one that combines parts of them.
    """
    stores = Stores()
    with memory_checked(), observe(stores):
        out, lse = run()
    assert {name: counts.size for name, counts in stores.counts.items()} == {
        "out_ptr": out.size,
        "lse_ptr": lse.size,
    }
    for name, counts in stores.counts.items():
        np.testing.assert_array_equal(counts, 1, err_msg=name)
    return out, lse


def checked(case):
    entry = Entry("", ejk.TritonPageAttention(interpret=True, block_kv=16), examples=0)
    return stored_once(lambda: entry(case))


@pytest.mark.one_in(3)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_hostile_integers(shape):
    @hypothesis.seed(0)
    @hypothesis.settings(max_examples=500 if THOROUGH else 15)
    @hypothesis.given(hostile_integers(shape))
    def holds(drawn):
        case = hostile_call(shape, **drawn)
        result = checked(case)
        assert_close(case, *result)
        if drawn["cache"] is None:
            nan, live = case.dtype.type(np.nan), case.live[..., None, None]
            keys = np.where(live, case.keys, nan)
            values = None if case.values is None else np.where(live, case.values, nan)
            poisoned = case.replace(keys=keys, values=values)
        else:
            live = case.live[..., None]
            scales = (None if x is None else np.where(live, x, np.nan) for x in case.scales)
            poisoned = case.replace(scales=tuple(scales))
        bits_equal(result, checked(poisoned))

    holds()


@pytest.mark.parametrize("num_splits", [0, 1, 3])
def test_a_row_that_sees_nothing_has_the_sink_for_its_lse(num_splits):
    shape = Shape("many heads", 64, 1, 16, page_size=64)  # 192 tokens: 0 splits are planned
    lens, tables = np.zeros(3, np.int32), np.zeros((3, 3), np.int32)
    case = hostile_call(
        shape, window=None, dtype=F32, context_lens=lens, block_tables=tables,
        num_splits=num_splits, cache_layout="HND",
    )  # fmt: skip
    sinks = np.random.default_rng(0).standard_normal(64).astype(np.float32)
    out, lse = checked(case.replace(options={"sinks": sinks}))
    assert not out.any()
    np.testing.assert_array_equal(lse, np.broadcast_to(sinks, (3, 64)))
