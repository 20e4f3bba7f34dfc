"""The prefill kernel for Hopper: interpreted, or on the GPU with `--gpu`.

The interpreter sees races, stray reads and barriers out of step. Every slot that no new token sees
is poisoned, page 0 altogether, and so is shared memory.
"""

import dataclasses
import itertools

import gpu_interpreter
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from entries import RaggedEntry

import ejk
from ejk.backends.mosaic_gpu import _installed
from ejk.testing.bits import bits_equal
from ejk.testing.bounds import assert_close
from ejk.testing.configurations import E4M3, E5M2, FEATURES, INT4, INT8, LAYOUTS, Configuration
from ejk.testing.ragged_page_attention import RaggedPageAttentionCase, build_ragged
from ejk.testing.shapes import Shape

pytestmark = gpu_interpreter.marks

BF16, F16 = np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16)
INT32 = np.iinfo(np.int32)
# Three blocks and a half of 128 tokens; a tile has 32 new tokens, a short sequence up to 16. What
# the interpreter takes goes with the KV heads and with the pages of a block.
SHAPE = Shape("groups of 4", 8, 2, 128, page_size=32, max_blocks=14, num_pages=65, num_seqs=4)
ONE_HEAD = dataclasses.replace(SHAPE, num_heads=4, num_kv_heads=1)
PLAIN = Configuration(ONE_HEAD, BF16, "HND")
BACKEND = ejk.MosaicGpuRaggedPageAttention(num_sms=3, interpret=not gpu_interpreter.ON_GPU)
ATTEND = RaggedEntry("mosaic_gpu", BACKEND, examples=0)
# Two tiles, a single token, none, a draft; rows of nobody before and after.
LENS, BOUNDS, TOTAL = (170, 129, 0, 7), (1, 34, 35, 35, 38), 39
# A short tile on blocks of which some need no mask, and a single token.
LONG = {"lens": (429, 60, 0, 0), "bounds": (0, 17, 18, 18, 18), "total": 19}


@pytest.fixture(autouse=True)
def _fresh_interpreter():
    yield
    gpu_interpreter.reset()


def changed(**fields) -> Shape:
    return dataclasses.replace(SHAPE, **fields)


def build(
    config=PLAIN, lens=LENS, bounds=BOUNDS, *, total=TOTAL, junk=True, **options
) -> RaggedPageAttentionCase:
    """Make a call whose page 0 is nobody's: it is loaded in place of hidden pages.

    Without `junk` the entries that no visible token needs name it.
    """
    case = build_ragged(config, np.array(lens), np.array(bounds), total=int(total), **options)
    free = np.flatnonzero(~case.live.any(axis=1))[0]
    order, tables = np.arange(config.shape.num_pages), case.block_tables.copy()
    order[[0, free]] = free, 0
    for old, new in ((0, free), (free, 0)):
        tables[case.block_tables == old] = new
    if not junk:
        tables[~case.needed] = 0
    scales = case.scales
    if case.has_token_scales:
        scales = tuple(None if x is None else x[order] for x in scales)
    return case.replace(
        keys=case.keys[order], values=case.values[order], live=case.live[order],
        block_tables=tables, scales=scales,
    )  # fmt: skip


def check(*args, **options) -> RaggedPageAttentionCase:
    case = build(*args, **options)
    assert_close(case, *ATTEND(case))
    return case


CALLS = {
    "long ones": ((300, 260, 45, 7), (1, 36, 37, 57, 60)),
    "edges of blocks": ((256, 128, 160, 16), (0, 32, 48, 49, 57)),
    "next to edges": ((257, 127, 129, 17), (0, 33, 50, 51, 62)),
    "new tokens alone": ((33, 1, 16, 12), (0, 33, 34, 50, 62)),
    "empty ones": ((0, 65, 0, 200), (3, 20, 20, 37, 60)),
    "more new tokens than tokens": ((3, 20, 129, 0), (0, 35, 36, 60, 62)),
    "hostile lengths": ((INT32.min, INT32.max, -1, 130), (0, 17, 52, 55, 60)),
    "bounds that fall": (LENS, (40, 3, 70, 20, 5)),
    "hostile bounds": (LENS, (INT32.min, -1, 34, INT32.max, 2)),
    "nobody's rows": (LENS, (7, 7, 7, 7, 7)),
}


@pytest.mark.one_in(4)
@pytest.mark.fast(10)
@pytest.mark.parametrize("lens, bounds", CALLS.values(), ids=CALLS)
def test_lengths(lens, bounds):
    check(lens=lens, bounds=bounds, total=62)


NOT_CAUSAL = {
    "of tiles and a draft": ((), LENS, BOUNDS, None),
    "window": (("sliding_window",), LENS, BOUNDS, 60),
    # Of rows before the first position it would begin before all integers.
    "window of all": (("sliding_window",), (3, 20, 0, 129), (0, 35, 36, 37, 39), INT32.max),
    "slopes": (("alibi_slopes",), LENS, BOUNDS, None),
    # Rows without a position see all there is; those of an empty sequence nothing.
    "caps": (("attn_logits_soft_cap",), (3, 20, 0, 129), (0, 35, 36, 37, 39), None),
}


@pytest.mark.one_in(2)
@pytest.mark.parametrize("features, lens, bounds, window", NOT_CAUSAL.values(), ids=NOT_CAUSAL)
def test_tokens_that_see_later_ones(features, lens, bounds, window):
    config = Configuration(ONE_HEAD, BF16, "HND", frozenset({"causal=False", *features}))
    given = {} if window is None else {"window": np.int32(window)}
    check(config, lens, bounds, invalid=0.1, seed=3, **given)


@pytest.mark.one_in(4)
@pytest.mark.fast(6)
@pytest.mark.parametrize(
    "layout, fused", [*itertools.product(LAYOUTS, (False, True)), ("INTERLEAVED", False)]
)
def test_layouts(layout, fused):
    config = Configuration(SHAPE, BF16, layout, fused=fused)
    check(config, (150, 70, 0, 3), (0, 20, 21, 21, 23), total=25, invalid=0.1, seed=1)


@pytest.mark.one_in(4)
@pytest.mark.fast(6)
@pytest.mark.parametrize("page_size", [8, 16, 32, 64, 128, 256])
def test_pages_that_are_hidden(page_size):
    blocks = -(-300 // page_size)
    shape = dataclasses.replace(
        ONE_HEAD, page_size=page_size, max_blocks=blocks, num_pages=5 * blocks
    )
    config = Configuration(shape, BF16, "NHD")
    invalid = min(0.02 * page_size, 0.4)
    case = check(config, (300, 130, 0, 7), (0, 17, 18, 18, 20), invalid=invalid, seed=page_size)
    ids = case.block_tables[case.needed]
    assert ((ids < 0) | (ids >= shape.num_pages)).any() and (ids < shape.num_pages).any()


@pytest.mark.one_in(4)
@pytest.mark.parametrize("group", [1, 3, 7, 8, 64])
def test_groups(group):
    """New tokens of a tile and heads of a group are its rows; of 7, two rows are nobody's."""
    kv_heads = 2 if group == 3 else 1
    shape = changed(num_heads=group * kv_heads, num_kv_heads=kv_heads)
    own = 64 // group  # new tokens of a warpgroup
    bounds = np.cumsum([0, own + 1, min(own, 5), 2 * own + 1, 1])
    lens = (own + 5, 130, 2 * own + 1, 60)
    check(Configuration(shape, BF16, "HND"), lens, bounds, total=bounds[-1] + 1)


@pytest.mark.one_in(4)
@pytest.mark.fast(4)
@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
@pytest.mark.parametrize("head_dim", [64, 256])
def test_head_dimensions(head_dim, dtype):
    """Of 64 a tile has 48 new tokens, of 256 a block 64 tokens."""
    config = Configuration(changed(head_dim=head_dim), dtype, "HND", frozenset(FEATURES))
    q_len = 49 if head_dim == 64 else 17
    bounds = np.cumsum([1, q_len, 1, 0, 2])
    check(config, (200, 45, 0, 7), bounds, total=bounds[-1] + 1, window=150, invalid=0.05)


@pytest.mark.one_in(4)
@pytest.mark.fast(7)
@pytest.mark.parametrize("feature", [*FEATURES, "all"])
def test_features(feature):
    shape, features = (SHAPE, FEATURES) if feature == "all" else (ONE_HEAD, (feature,))
    config = Configuration(shape, BF16, "HND", frozenset(features))
    check(config, **LONG, window=jnp.int32(300), junk=False, seed=3)


CACHES = {
    "int8, a scale a head": (BF16, INT8, "head", "NHD", False),
    "e4m3": (F16, E4M3, "none", "HND", True),
    "e5m2, one scale": (BF16, E5M2, "scalar", "KV_HEADS_FIRST", True),
    "a float cache with scales": (F16, None, "head", "HND", False),
    "int8, a scale a token": (BF16, INT8, "token", "HND", True),
    "int4": (BF16, INT4, "token", "INTERLEAVED", False),
}


@pytest.mark.fast(2)
@pytest.mark.parametrize("dtype, cache, scales, layout, fused", CACHES.values(), ids=CACHES)
def test_quantised_caches(dtype, cache, scales, layout, fused):
    """A window behind which pages are not copied, hidden pages, and contexts that are cut."""
    config = Configuration(
        SHAPE, dtype, layout, frozenset({"sliding_window"}), fused=fused, cache_dtype=cache,
        scales=scales,
    )  # fmt: skip
    check(config, **LONG, window=300, invalid=0.05, seed=2)


WINDOWS = {
    "of one": (1, True),
    "inside a block": (17, False),
    "of a block": (128, True),
    "of two blocks and more": (300, False),
    "of all": (1000, True),
    "traced": (jnp.int32(270), True),
    "traced, of nothing": (jnp.int32(0), True),
}


@pytest.mark.one_in(4)
@pytest.mark.parametrize("window, junk", WINDOWS.values(), ids=WINDOWS)
def test_windows(window, junk):
    config = dataclasses.replace(PLAIN, features=frozenset({"sliding_window"}))
    check(config, **LONG, window=window, junk=junk, invalid=0.02)


@pytest.mark.parametrize("scale", [-0.3, 0.0, jnp.float32(-0.1)], ids=str)
def test_scales(scale):
    case = build(**LONG).replace(options={"attn_scale": scale})
    assert_close(case, *ATTEND(case))


def build_cut(q_len, features=()) -> RaggedPageAttentionCase:
    """Make a call whose long contexts are worth being cut, if programs are idle: one is narrow."""
    shape = changed(num_heads=4, num_kv_heads=1, page_size=64, max_blocks=12, num_pages=60)
    bounds = np.cumsum([1, q_len, 1, 0, 0])
    return build(
        Configuration(shape, BF16, "HND", frozenset(features)), (760, 750, 5, 0), bounds,
        total=bounds[-1], window=740,
    )  # fmt: skip


@pytest.mark.one_in(2)
@pytest.mark.parametrize("q_len", [2, 20], ids=["narrow", "wide"])
@pytest.mark.parametrize(
    "features", [(), ("causal=False",), ("sinks", "sliding_window", "alibi_slopes")], ids=len
)
def test_contexts_that_are_cut(features, q_len):
    backend = dataclasses.replace(BACKEND, num_sms=12)
    case = build_cut(q_len, features)
    assert_close(case, *RaggedEntry("mosaic_gpu", backend, examples=0)(case))


def build_empty_piece() -> RaggedPageAttentionCase:
    """Make a call of two tiles in five pieces each, which leave nothing for one of the first.

    The first tile's eight tokens see four granules, the last one's five.
    """
    shape = changed(num_heads=16, num_kv_heads=1, max_blocks=17, num_seqs=1)
    return build(Configuration(shape, BF16, "HND"), (514,), (0, 10), total=10)


@pytest.mark.gpu  # interpreted it is a sound kernel of the seeded bugs
def test_a_piece_for_which_nothing_is_left():
    attend = RaggedEntry("", dataclasses.replace(BACKEND, num_sms=20), examples=0)
    case = build_empty_piece()
    assert_close(case, *attend(case))


def test_single_tokens_alone():
    case = build(bounds=(0, 1, 2, 3, 4), total=4)
    assert_close(case, *ATTEND(case, max_q_len=1))


def test_a_bound_that_is_too_small():
    case = build(lens=(150, 20, 0, 7), bounds=(0, 17, 18, 18, 20), total=20)
    assert_close(case, *ATTEND(case, max_q_len=1, max_context_len=1))


@pytest.mark.fast
def test_unread_memory_and_the_order_of_pages_change_no_bit():
    config = dataclasses.replace(PLAIN, features=frozenset({"sliding_window", "sinks"}))
    case = build(config, window=139, invalid=0.1)
    result = ATTEND(case)
    bits_equal(result, ATTEND(case.with_other_junk(seed=1)))
    bits_equal(result, ATTEND(case.permuted(seed=1)))


def test_asking_for_the_lse_changes_no_bit_of_the_output():
    case = build()
    out = ejk.ragged_page_attention(*case.arguments(), **case.semantics(), backend=BACKEND)
    bits_equal([np.asarray(out)], ATTEND(case)[:1])


# The interpreter lowers its threads' programs without the 64 bits that it traced them with.
@pytest.mark.parametrize("x64", [False, pytest.param(True, marks=pytest.mark.gpu)])
def test_jit_changes_no_bit(x64):
    case = build(dataclasses.replace(PLAIN, features=frozenset({"attn_scale"})))
    result = ATTEND(case)
    with jax.enable_x64(x64):
        scale = case.options["attn_scale"]
        traced = jax.jit(
            lambda arrays, scale: ejk.ragged_page_attention(
                *arrays, attn_scale=scale, return_lse=True, backend=BACKEND
            )
        )([np.asarray(x) for x in case.operands()], np.float32(scale))
    bits_equal(result, [np.asarray(x) for x in traced])


WHERE = {
    "a query": lambda case: (case.query, (10, 3)),
    "a key of a whole block": lambda case: (case.keys, (case.block_tables[0, 4], 1, 0)),
    "a key at the edge": lambda case: (case.keys, (case.block_tables[0, 13], 3, 0)),
    "a value of a whole block": lambda case: (case.values, (case.block_tables[0, 4], 1, 0)),
    "a value at the edge": lambda case: (case.values, (case.block_tables[0, 13], 3, 0)),
}


@pytest.mark.fast(10)
@pytest.mark.one_in(4)
@pytest.mark.parametrize("number", [np.nan, np.inf])
@pytest.mark.parametrize("where", WHERE)
def test_what_is_not_finite_and_seen_is_not_lost(where, number):
    case = build(**LONG)
    case = case.replace(query=case.query.copy(), keys=case.keys.copy(), values=case.values.copy())
    array, index = WHERE[where](case)
    array[index][7] = number
    leave_out = ()
    if "value" in where:  # which may reach other rows of its sequence
        odd = ~np.isfinite(case.expected()[0]).all((1, 2))
        assert odd.any()
        leave_out = [row for row in range(*LONG["bounds"][:2]) if not odd[row]]
    assert_close(case, *ATTEND(case), leave_out)


REFUSALS = {
    "latent": (
        {"latent": True, "head_dim": 576, "value_head_dim": 512}, BF16, "num_kv_heads=2 must be 1",
    ),
    "head_dim": ({"head_dim": 80}, BF16, "head_dim=80 must be 64, 128 or 256"),
    "other values": ({"value_head_dim": 64}, BF16, "value_head_dim=64 must be head_dim=128"),
    "a large group": ({"num_heads": 130}, BF16, "num_heads // num_kv_heads=65 must be at most 64"),
    "float32": ({}, np.dtype(np.float32), "dtype=float32: it takes bfloat16 and float16"),
    "pages of 12": ({"page_size": 12}, BF16, "page_size=12 must be 8, 16, 32, 64 or a multiple"),
}  # fmt: skip


@pytest.mark.parametrize("fields, dtype, reason", REFUSALS.values(), ids=REFUSALS)
def test_what_is_refused_is_refused_by_name(fields, dtype, reason):
    config = Configuration(changed(**fields), dtype, "HND")
    case = build_ragged(config, np.array((20, 3, 1, 1)), np.array((0, 2, 3, 4, 4)), total=4)
    with pytest.raises(ejk.UnsupportedError, match=rf"\n  mosaic_gpu: .*{reason}"):
        ATTEND(case)


@pytest.mark.parametrize("extra", ["positions", "tree_mask"])
def test_features_that_it_lacks_are_refused_by_name(extra):
    case = build_ragged(
        dataclasses.replace(PLAIN, features=frozenset({"alibi_slopes"})), np.array((20, 3, 1, 1)),
        np.array((0, 2, 3, 4, 4)), total=4, extras=frozenset({extra}),
    )  # fmt: skip
    with pytest.raises(ejk.UnsupportedError, match=rf"\n  mosaic_gpu: .*{extra}"):
        ATTEND(case)


def test_another_generation_is_refused():
    backend = ejk.MosaicGpuRaggedPageAttention(compute_capability=100, num_sms=148)
    with pytest.raises(ejk.UnsupportedError, match="compute_capability=100 must be 90"):
        RaggedEntry("mosaic_gpu", backend, examples=0)(build())


@pytest.mark.cpu
def test_an_interpreter_with_too_few_threads_is_refused(monkeypatch):
    """Its warpgroups would wait for each other forever."""
    monkeypatch.setattr(_installed, "interpreter_threads", lambda: 2)
    reason = _installed.missing(interpret=True)
    assert reason == "its interpreter wants 4 threads, and XLA has 2: set JAX_NUM_CPU_DEVICES=4"


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
@pytest.mark.parametrize("features", [(), FEATURES], ids=["plain", "features"])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_public_operations_say_the_same(head_dim, features, dtype):
    """What is interpreted on a CPU is what runs on the GPU, but for what is in `_private`."""
    shape = changed(head_dim=head_dim)
    case = build(Configuration(shape, dtype, "HND", frozenset(features)), window=139, invalid=0.1)
    public = RaggedEntry("", dataclasses.replace(BACKEND, plain=True), examples=0)(case)
    own = ATTEND(case)
    for result in (public, own):
        assert_close(case, *result)
    largest = np.abs(case.expected()[0]).max()
    eps = float(ml_dtypes.finfo(dtype).eps)
    out, other = (x[0].astype(np.float32) for x in (own, public))
    np.testing.assert_allclose(out, other, rtol=0, atol=2 * eps * largest)
    np.testing.assert_allclose(own[1], public[1], rtol=2e-6, atol=2e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("features", [(), ("alibi_slopes",)], ids=["alone", "slopes"])
def test_logits_of_any_size_are_capped(features):
    """Each size takes another way, see `capped`; a scale that is far from 1 has no near ones."""
    config = Configuration(SHAPE, BF16, "HND", frozenset(features))
    plain = RaggedEntry("", dataclasses.replace(BACKEND, plain=True), examples=0)
    usual = SHAPE.head_dim**-0.5
    for size, scale in ((0.4, usual), (1.6, usual), (8, -usual), (1, 1e-12), (1, 3e9), (1, 0.0)):
        case = build(config, **LONG, magnitudes=(size, 1.0))
        options = {"attn_scale": scale, "attn_logits_soft_cap": 10.0}
        case = case.replace(options=case.options | options)
        own, public = ATTEND(case), plain(case)
        assert_close(case, *own)
        np.testing.assert_allclose(own[1], public[1], rtol=2e-6, atol=2e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_logits_that_are_all_negative(head_dim):
    """What holds the softmax before a wait, see `_private.hold`, must store nothing for them."""
    case = build(Configuration(changed(head_dim=head_dim), BF16, "HND"), **LONG)
    case = case.replace(query=-np.abs(case.query), keys=np.abs(case.keys))
    assert_close(case, *ATTEND(case))


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_the_same_call_gives_the_same_bits(head_dim):
    """Of prefills, chunks and decodes that keep all of the GPU busy, some of them cut."""
    q_lens, lens = [700, 512, 300, 8, 1, 1, 1], [700, 3000, 2100, 4000, 4096, 4000, 900]
    bounds = np.cumsum([0, *q_lens])
    keys = jax.random.split(jax.random.key(head_dim), 3)
    query = jax.random.normal(keys[0], (bounds[-1], 32, head_dim), jnp.bfloat16)
    pools = [jax.random.normal(key, (2048, 8, 16, head_dim), jnp.bfloat16) for key in keys[1:]]
    tables = np.random.default_rng(0).permutation(2048)[: 7 * 256].reshape(7, 256)
    arrays = (query, *pools, *(jnp.asarray(x, jnp.int32) for x in (lens, tables, bounds)))

    def attend(**fields):
        backend = ejk.MosaicGpuRaggedPageAttention(**fields)
        call = jax.jit(lambda *x: ejk.ragged_page_attention(*x, return_lse=True, backend=backend))
        return [[np.asarray(x, np.float32) for x in call(*arrays)] for _ in range(8)]

    own, public = attend(), attend(plain=True)
    for results in (own, public):
        for again in results[1:]:
            bits_equal(results[0], again)
    triton = ejk.ragged_page_attention(*arrays, return_lse=True, backend="triton")
    for result in (own[0], public[0]):
        for x, y in zip(result, triton):
            np.testing.assert_allclose(x, np.asarray(y, np.float32), rtol=0, atol=2e-2)
