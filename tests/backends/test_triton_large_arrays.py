"""The Triton kernels on arrays that 32-bit offsets cannot reach, and positions near 2**31.

The arrays are sparse, so that they take little memory, and stay NumPy's: JAX would copy them.
"""

import functools
import inspect
import math
import mmap
import re
from pathlib import Path

import mutants
import numpy as np
import pytest
from kernels import launch_on_numpy

import ejk
from ejk._arguments import Arguments
from ejk._problems import page_attention_problem
from ejk.backends.page_attention import PageAttentionOperands
from ejk.backends.triton import _launch
from ejk.backends.triton._sizes import MAX_CAPACITY
from ejk.backends.triton.interpreter.memory import MemoryAccessError
from ejk.backends.triton.page_attention import attending
from ejk.backends.triton.page_attention import kernel as page_attention_kernel
from ejk.testing.bits import bits_equal

F16, I32 = np.dtype(np.float16), np.dtype(np.int32)


def sparse(shape, dtype=F16):
    """Make an array of zeros of which only what is written takes memory."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000  # MAP_NORESERVE on Linux
    memory = mmap.mmap(-1, math.prod(shape) * dtype.itemsize, flags=flags)
    return np.frombuffer(memory, dtype).reshape(shape)


@pytest.fixture(autouse=True)
def little_memory():
    """A test must not touch the pages of a large pool."""
    before = resident_bytes()
    yield
    assert resident_bytes() - before < 2**29


def resident_bytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


@pytest.fixture
def on_numpy(monkeypatch):
    """Launches take and return NumPy arrays."""
    monkeypatch.setattr(_launch, "call", launch_on_numpy)


def attend(query, keys, values, lens, tables, layout="HND", *, window=None, num_splits=1, **tuning):
    """Run the adapter and the kernels on NumPy arrays."""
    backend = ejk.TritonPageAttention(interpret=True, **tuning)
    given = Arguments(
        query, keys, values, lens, tables, attn_scale=None, max_context_len=None,
        cache_layout=layout, sliding_window=window, soft_cap=None, sinks=None, alibi_slopes=None,
        value_head_dim=None, return_lse=True,
    )  # fmt: skip
    problem = page_attention_problem(given, num_splits, plan=None)
    if reasons := backend.refusals(problem, "cpu"):
        raise ejk.UnsupportedError("; ".join(reasons))
    scale = np.array(query.shape[2] ** -0.5, np.float32)
    window = None if window is None else np.array(window, np.int32)
    operands = PageAttentionOperands(
        query, keys, values, lens, tables, scale, window, sinks=None, alibi_slopes=None,
        plan=None,
    )  # fmt: skip
    return backend.run(problem, operands, "cpu")


# Pages of 2**11 elements over two heads, or of 2**12 over four: the pools have 2**32.
LARGE = {
    "HND": ("HND", 2, 2**21 + 8),
    "NHD": ("NHD", 2, 2**21 + 8),
    "KV_HEADS_FIRST, heads 2**31 apart": ("KV_HEADS_FIRST", 2, 2**21 + 8),
    "KV_HEADS_FIRST, heads 2**30 apart": ("KV_HEADS_FIRST", 4, 2**20 + 8),
    "HND, fused": ("HND", 2, 2**20 + 8, True),
    "NHD, fused": ("NHD", 2, 2**20 + 8, True),
    "KV_HEADS_FIRST, fused": ("KV_HEADS_FIRST", 2, 2**20 + 8, True),
}


def large_call(layout, num_kv_heads, num_pages, fused=False, *, page_size=16, head_dim=64):
    """Make a call that reads a few pages at the far end; return it on a large and a small pool."""
    rng = np.random.default_rng(0)
    shape = {
        "HND": (num_pages, num_kv_heads, page_size, head_dim),
        "NHD": (num_pages, page_size, num_kv_heads, head_dim),
        "KV_HEADS_FIRST": (num_kv_heads, num_pages, page_size, head_dim),
    }[layout]
    axis = shape.index(num_pages)
    if fused:
        shape = (*shape[: axis + 1], 2, *shape[axis + 1 :])
    pages = np.array([num_pages - 1, 3, num_pages // 2, num_pages - 2, num_pages // 4 * 3])
    large, small = [], []
    for _ in range(1 if fused else 2):
        pool = sparse(shape)
        assert pool.size > 2**31
        few = rng.standard_normal(np.take(pool, pages, axis).shape).astype(F16)
        pool[(slice(None),) * axis + (pages,)] = few
        large.append(pool)
        small.append(few)
    query = rng.standard_normal((2, 3 * num_kv_heads, head_dim)).astype(F16)
    lens = np.array([2 * page_size + 5, 3 * page_size], np.int32)
    tables = np.array([[0, 1, 2], [3, 0, 4]])
    absent = [None] * fused
    return (
        (query, *large, *absent, lens, pages[tables].astype(np.int32), layout),
        (query, *small, *absent, lens, tables.astype(np.int32), layout),
    )


@pytest.mark.parametrize("num_splits", [1, 3])
@pytest.mark.parametrize("name", LARGE)
def test_pools_above_2_31_elements(on_numpy, name, num_splits):
    large, small = (
        attend(*call, num_splits=num_splits, block_kv=16) for call in large_call(*LARGE[name])
    )
    assert not np.isnan(small[0]).any() and small[0].any()
    bits_equal(large, small)


def wide_tables():
    """Make a call whose tables have 2**31 entries before the last row."""
    rng = np.random.default_rng(0)
    query = rng.standard_normal((9, 2, 16)).astype(F16)
    keys, values = rng.standard_normal((2, 40, 1, 1, 16)).astype(F16)
    tables = sparse((9, 2**28), I32)
    tables[:, :4] = rng.permutation(40)[:36].reshape(9, 4)
    lens = np.full(9, 4, np.int32)
    return (query, keys, values, lens, tables), (query, keys, values, lens, tables[:, :4].copy())


@pytest.mark.parametrize("num_splits", [0, 1], ids=["planned", "one pass"])
def test_tables_above_2_31_entries(on_numpy, num_splits):
    bits_equal(*(attend(*call, num_splits=num_splits, block_kv=16) for call in wide_tables()))


def repeated_page(
    page_size, max_blocks=1, num_seqs=1, num_kv_heads=1, head_dim=1, value_head_dim=1, fused=False,
    layout="NHD",
):  # fmt: skip
    """Make a call on one page of zeros but for its last values, which are 2, again and again."""
    query = np.ones((num_seqs, num_kv_heads, head_dim), F16)
    if layout == "INTERLEAVED":
        keys, values = sparse((1, page_size, 2 * num_kv_heads, head_dim)), None
        keys[0, -300:, 1::2] = 2
    elif fused:
        keys, values = sparse((1, 2, page_size, num_kv_heads, head_dim)), None
        keys[0, 1, -300:] = 2
    else:
        keys = sparse((1, page_size, num_kv_heads, head_dim))
        values = sparse((1, page_size, num_kv_heads, value_head_dim))
        values[0, -300:] = 2
    lens = np.full(num_seqs, page_size * max_blocks, I32)
    return query, keys, values, lens, np.zeros((num_seqs, max_blocks), I32), layout


MOST = {"page_size": 2**16, "max_blocks": MAX_CAPACITY // 2**16}
LARGE_PAGE = {"page_size": 2**20, "num_kv_heads": 8, "head_dim": 128}


@pytest.mark.parametrize(
    ("page", "tuning"),
    [
        (MOST, {"num_splits": 1}),
        (MOST, {"num_splits": 7}),
        (MOST, {"num_splits": 0, "split_tokens": 2**28}),
        (MOST | {"num_seqs": 3}, {"num_splits": 0}),
        ({"page_size": MAX_CAPACITY}, {"num_splits": 7}),
        ({"page_size": 512}, {"num_splits": 0, "split_tokens": 2**31 - 1}),
        (LARGE_PAGE | {"value_head_dim": 128}, {}),
        ({"page_size": 2**22 - 2, "value_head_dim": 512}, {}),
        (LARGE_PAGE | {"fused": True}, {}),
        ({"page_size": 2**22 - 2, "head_dim": 512, "fused": True}, {}),
        ({"page_size": 2**21 - 2, "head_dim": 512, "layout": "INTERLEAVED"}, {}),
    ],
    ids=str,
)
def test_positions_and_pages_up_to_the_limits_are_right(on_numpy, page, tuning):
    assert MOST["page_size"] * MOST["max_blocks"] == MAX_CAPACITY
    out, lse = attend(*repeated_page(**page), window=300, **tuning)
    np.testing.assert_allclose(out, 2, rtol=1e-3)
    np.testing.assert_allclose(lse, math.log(300), rtol=1e-5)


def test_parts_beyond_the_context_see_nothing(on_numpy):
    """Far more parts than blocks: the last parts would begin past 2**31."""
    out, lse = attend(*repeated_page(**MOST), window=300, num_splits=2000)
    np.testing.assert_allclose(out, 2, rtol=1e-3)
    np.testing.assert_allclose(lse, math.log(300), rtol=1e-5)


TOO_MANY = f"must be at most {MAX_CAPACITY}: positions past the last token are 32-bit"


@pytest.mark.parametrize(
    ("page", "tuning", "reason"),
    [
        ({"page_size": 2**31 - 1}, {}, f"max_blocks * page_size={2**31 - 1} {TOO_MANY}"),
        (
            {"page_size": 2**31 - 129},
            {"num_splits": 7},
            f"max_blocks * page_size={2**31 - 129} {TOO_MANY}",
        ),
        (
            {"page_size": 2**16, "max_blocks": 2**15 - 1},
            {"num_splits": 0, "split_tokens": 2**28},
            f"max_blocks * page_size={2**31 - 2**16} {TOO_MANY}",
        ),
        (
            {"page_size": MAX_CAPACITY + 1, "num_seqs": 2},
            {"num_splits": 0},
            f"max_blocks * page_size={MAX_CAPACITY + 1} {TOO_MANY}",
        ),
        (
            {"page_size": 2**22, "value_head_dim": 512},
            {},
            f"a page of page_size={2**22} has 2**31 elements or more",
        ),
        (
            {"page_size": 2**22, "head_dim": 512, "fused": True},
            {},
            f"a page of page_size={2**22} has 2**31 elements or more",
        ),
        (
            {"page_size": 2**21, "head_dim": 512, "layout": "INTERLEAVED"},
            {},
            f"a page of page_size={2**21} has 2**31 elements or more",
        ),
        (
            LARGE_PAGE | {"head_dim": 256},
            {},
            f"a page of page_size={2**20} has 2**31 elements or more",
        ),
        (
            MOST | {"num_kv_heads": 32},
            {"num_splits": 0, "split_tokens": 16, "block_kv": 16},
            f"its grid of {MAX_CAPACITY * 2} programs exceeds {2**31 - 1}",
        ),
        (
            MOST | {"num_kv_heads": 256},
            {"num_splits": 2**24},
            f"its grid of {MAX_CAPACITY * 2} programs exceeds {2**31 - 1}",
        ),
    ],
    ids=str,
)
def test_what_32_bits_cannot_hold_is_refused(on_numpy, page, tuning, reason):
    with pytest.raises(ejk.UnsupportedError, match=re.escape(reason)):
        attend(*repeated_page(**page), window=300, **tuning)


def test_splits_beyond_one_a_block_are_not_launched(on_numpy):
    """More splits than blocks of the table weigh nothing: they cost no memory, and no bit."""
    page = {"page_size": 16, "max_blocks": 40, "num_seqs": 3, "value_head_dim": 64}
    many, few = (attend(*repeated_page(**page), num_splits=n) for n in (2**21, 2**4))
    bits_equal(many, few)


def test_more_programs_to_combine_than_a_grid_holds_are_refused(on_numpy):
    """Rows of heads: of 2**31 heads there is one program each, of 64 one that attends."""
    query = np.broadcast_to(np.zeros((), F16), (2**16, 2**15, 1))
    keys, values = sparse((1, 1, 16, 1)), sparse((1, 1, 16, 1024))
    lens, tables = np.zeros(2**16, I32), np.zeros((2**16, 1), I32)
    with pytest.raises(ejk.UnsupportedError, match=f"{2**31} programs to combine exceed"):
        attend(query, keys, values, lens, tables, num_splits=2)


@pytest.mark.fault("page_attention", "triton")
@pytest.mark.parametrize(
    ("name", "bug", "call"),
    [
        ("key_ptr", "page.to(tl.int64)", functools.partial(large_call, *LARGE["HND"])),
        ("key_ptr", "page.to(tl.int64)", functools.partial(large_call, *LARGE["NHD"])),
        (
            "key_ptr",
            "(pid % NUM_KV_HEADS).to(tl.int64)",
            functools.partial(large_call, *LARGE["KV_HEADS_FIRST, heads 2**30 apart"]),
        ),
        ("block_tables_ptr", "(piece // NUM_SPLITS).to(tl.int64)", wide_tables),
        ("block_tables_ptr", "tl.load(row_ptr).to(tl.int64)", wide_tables),
    ],
)
def test_offsets_of_32_bits_are_caught(on_numpy, monkeypatch, tmp_path, name, bug, call):
    modules = {"page_attention_kernel": page_attention_kernel, "attend": attending}
    [changed] = [n for n, module in modules.items() if bug in inspect.getsource(module)]
    narrow = mutants.load(modules[changed], bug, bug.removesuffix(".to(tl.int64)"), tmp_path)
    monkeypatch.setattr(page_attention_kernel, changed, getattr(narrow, changed))
    with pytest.raises(MemoryAccessError, match=f"load outside '{name}'"):
        attend(*call()[0], num_splits=0 if "row_ptr" in bug else 1)
