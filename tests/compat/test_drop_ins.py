"""Drop-ins give what the originals give: JAX's own references, and documentation as NumPy.

Grids of sizes are drawn from those of the originals' tests.
"""

import functools
import importlib
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from definition import attend
from jax.experimental.pallas.ops.tpu.paged_attention import quantization_utils
from jax.experimental.pallas.ops.tpu.ragged_paged_attention import ref_ragged_paged_attention

import ejk
from ejk.compat import ejkernel, flash_attention, jax_gpu, jax_tpu, tpu_inference, vllm

RNG = np.random.default_rng(19)
START = RNG.bit_generator.state
BF16, E4M3 = jnp.bfloat16, jnp.float8_e4m3fn


@pytest.fixture(autouse=True)
def the_same_numbers_whatever_ran_before():
    RNG.bit_generator.state = START


def numbers(*shape, dtype=np.float32):
    return jnp.asarray(RNG.standard_normal(shape).astype(np.float32)).astype(dtype)


def close(actual, expected, atol=2e-6):
    actual, expected = (np.asarray(x, np.float64) for x in (actual, expected))
    np.testing.assert_allclose(actual, expected, atol=atol, rtol=0)


def tables_of(num_seqs, blocks, num_pages):
    return jnp.asarray(RNG.permutation(num_pages)[: num_seqs * blocks].reshape(num_seqs, blocks))


def tokens(pool, table, length):
    """The first tokens of a sequence in pages `[num_pages, page_size, ...]`."""
    pages = np.asarray(pool, np.float64)[np.asarray(table)]
    return pages.reshape(-1, *pages.shape[2:])[:length]


@pytest.mark.parametrize("module, own, foreign", [
    ("jax.experimental.pallas.ops.tpu.paged_attention", jax_tpu, "paged_attention"),
    ("jax.experimental.pallas.ops.tpu.ragged_paged_attention", jax_tpu, "ragged_paged_attention"),
    ("jax.experimental.pallas.ops.gpu.paged_attention", jax_gpu, "paged_attention"),
])  # fmt: skip
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_signatures_are_those_of_jax(module, own, foreign):
    theirs = inspect.signature(getattr(importlib.import_module(module), foreign)).parameters
    ours = inspect.signature(getattr(own, foreign)).parameters
    assert list(ours) == list(theirs)
    for name, parameter in theirs.items():
        assert (ours[name].kind, ours[name].default) == (parameter.kind, parameter.default), name


# JAX's TPU decode: no scale is applied, and scales of codes are largest magnitudes.
@pytest.mark.parametrize("heads, page, dim, quantised, cap", [
    ((8, 8), 16, 128, False, None), ((8, 1), 64, 256, True, 1.0), ((32, 8), 32, 128, False, 1.0),
])  # fmt: skip
def test_jax_tpu_decode(heads, page, dim, quantised, cap):
    (num_heads, kv_heads), lens = heads, jnp.array([1, 2 * page + 5, 4 * page])
    q, tables = dim**-0.5 * numbers(3, num_heads, dim), tables_of(3, 4, 13)  # the caller scales
    pools = [numbers(kv_heads, 13, page, dim) for _ in range(2)]
    given, seen = pools, pools
    if quantised:
        given = [quantization_utils.quantize_to_int8(x) for x in pools]
        given = [quantization_utils.QuantizedTensor(*x) for x in given]
        seen = [quantization_utils.from_int8(x.weight, x.scales, jnp.float32) for x in given]
    args = (q, *given, lens, tables)
    keywords = dict(pages_per_compute_block=4, attn_logits_soft_cap=cap)
    out = jax_tpu.paged_attention(*args, **keywords)
    for s, n in enumerate(lens):
        k, v = (tokens(jnp.moveaxis(x, 0, 2), tables[s], int(n)) for x in seen)
        close(out[s : s + 1], attend(q[s : s + 1], k, v, 1.0, np.ones((1, len(k)), bool), cap)[0])


# JAX's TPU ragged: scale 1.0 by default, lengths with the new tokens, junk past `num_seqs`.
RAGGED = [
    ((32, 8, 128), dict()), ((4, 4, 256), dict(sm_scale=0.125, sliding_window=5, soft_cap=50.0)),
    ((8, 1, 128), dict(k_scale=0.5, v_scale=0.75, mask_value=None, vmem_limit_bytes=2**20)),
]  # fmt: skip


@pytest.mark.parametrize("sizes, options", RAGGED)
def test_jax_tpu_ragged(sizes, options):
    heads, kv_heads, dim = sizes
    q, kv_pages = 0.5 * numbers(12, heads, dim), numbers(13, 16, 2 * kv_heads, dim)
    kv_lens, tables = jnp.array([18, 40, 5, 2**31 - 1]), tables_of(4, 3, 13)
    cu_q_lens, num_seqs = jnp.array([0, 1, 8, 10, -7]), jnp.array([3])
    args = (q, kv_pages, kv_lens, tables, cu_q_lens, num_seqs)
    names = ("vmem_limit_bytes",)
    known = {name: x for name, x in options.items() if name not in names}
    before = ref_ragged_paged_attention(*args, **known)
    after = jax_tpu.ragged_paged_attention(*args, **options)
    close(after[:10], before, 1e-5)
    assert not np.any(after[10:])  # rows of no sequence: undefined there, 0 here


@pytest.mark.parametrize("lengths", [None, jnp.array([3, 48])])
@pytest.mark.parametrize("scaled", ["", "k", "kv"])
def test_jax_gpu(lengths, scaled):
    """The tables come before the lengths; without lengths all that they name is seen."""
    q, tables = 0.125 * numbers(2, 8, 64), tables_of(2, 3, 9)  # the caller scales
    pools = [numbers(2, 9, 16, 64) for _ in range(2)]
    scales = {f"{x}_scales_pages": 0.5 + jnp.abs(numbers(2, 9, 16)) for x in scaled}
    options = dict(k_splits=1, interpret=True, **scales)
    out = jax_gpu.paged_attention(q, *pools, tables, lengths, **options)
    seen = [
        x * scales.get(f"{name}_scales_pages", jnp.ones((2, 9, 16)))[..., None]
        for name, x in zip("kv", pools)
    ]
    for s, n in enumerate([48, 48] if lengths is None else lengths):
        k, v = (tokens(jnp.moveaxis(x, 0, 2), tables[s], int(n)) for x in seen)
        close(out[s : s + 1], attend(q[s : s + 1], k, v, 1.0, np.ones((1, len(k)), bool))[0])


@pytest.mark.parametrize("dtype", [jnp.int8, E4M3])
@pytest.mark.parametrize("quantised", ["k", "v"])
def test_jax_gpu_of_one_quantised_pool(quantised, dtype):
    """As of the same numbers in the other pool's type, to the bit: it holds every code."""
    q, tables, lens = numbers(2, 8, 64), tables_of(2, 3, 9), jnp.array([3, 48])
    pools = {x: numbers(2, 9, 16, 64, dtype=BF16) for x in "kv"}
    codes = (40 * numbers(2, 9, 16, 64)).astype(dtype)
    scales = {f"{quantised}_scales_pages": 0.01 + jnp.abs(numbers(2, 9, 16))}
    out, expected = (
        jax_gpu.paged_attention(
            q.astype(BF16), *(pools | {quantised: pool}).values(), tables, lens, **scales
        )
        for pool in (codes, codes.astype(BF16))
    )
    np.testing.assert_array_equal(out, expected)
    assert np.isfinite(np.asarray(out, np.float32)).all()


# Ragged paged attention v3: rows padded to 128 lanes, heads padded to a word, flat tables, lengths
# with the new tokens, scale 1.0, a third entry of `distribution`, the update in the same call.
V3 = {
    "float32, 64 of 128 lanes": dict(sizes=(8, 2, 64, 16)),
    "bfloat16, a window": dict(sizes=(4, 2, 128, 16), dtype=BF16, sliding_window=6, soft_cap=2.0),
    "e4m3, one head of a word": dict(sizes=(4, 1, 128, 32), cache=E4M3, k_scale=0.5, v_scale=0.25),
    "bfloat16, a group of 5": dict(sizes=(5, 1, 80, 16), dtype=BF16),
    "e4m3, three heads of four": dict(sizes=(3, 3, 240, 32), cache=E4M3, k_scale=0.5, v_scale=0.5),
    "queries as codes": dict(sizes=(4, 2, 128, 32), cache=E4M3, q_scale=0.5),
    "not causal": dict(sizes=(4, 2, 128, 16), use_causal_mask=False, out_dtype=BF16),
    "written before": dict(sizes=(4, 2, 128, 16), update_kv_cache=False),
}


def v3_call(sizes, dtype=jnp.float32, cache=None):
    """Return the arguments of a decode and a prefill, poisoned where nothing may be read."""
    (heads, kv_heads, dim, page), cache = sizes, cache or dtype
    packing = 4 // jnp.dtype(cache).itemsize
    rows = -(-2 * kv_heads // packing) * packing
    width = -(-dim // 128) * 128
    lens, cu, num_pages = np.array([20, 7, 99], np.int32), np.array([0, 1, 6, 77], np.int32), 7
    tables = np.arange(6).reshape(3, 2)[::-1].astype(np.int32)
    pool = np.full((num_pages, page, rows, width), np.nan, np.float32)
    for s in range(2):
        for j in range(lens[s] - (cu[s + 1] - cu[s])):
            row = np.zeros((rows, width))
            row[: 2 * kv_heads, :dim] = RNG.standard_normal((2 * kv_heads, dim))
            pool[tables[s, j // page], j % page] = row
    pool = jnp.asarray(pool).astype(cache).reshape(num_pages, page, -1, packing, width)
    new = [numbers(8, kv_heads, dim, dtype=cache) for _ in range(2)]
    distribution = jnp.array([1, 1, 2], jnp.int32)
    return (
        (0.5 * numbers(8, heads, dim)).astype(dtype),  # logits are not scaled
        *new,
        pool,
        lens,
        tables.reshape(-1),
        cu,
        distribution,
    )


def v3_expected(args, *, use_causal_mask=True, sliding_window=None, soft_cap=None, q_scale=None,
                k_scale=1.0, v_scale=1.0, out_dtype=None, update_kv_cache=True):  # fmt: skip
    q, keys, values, cache, lens, tables, cu, distribution = args
    kv_heads, pool = keys.shape[1], np.asarray(cache, np.float32)
    pool, tables = pool.reshape(*pool.shape[:2], -1, pool.shape[-1]).copy(), tables.reshape(3, -1)
    out = np.zeros(q.shape)
    for s in range(int(distribution[2])):
        n, begin, end, page = lens[s], cu[s], cu[s + 1], pool.shape[1]
        for i, j in enumerate(range(n - (end - begin), n)):
            row = pool[tables[s, j // page], j % page]
            if update_kv_cache:
                row[...] = 0
                row[: 2 * kv_heads : 2, : q.shape[2]] = keys[begin + i]
                row[1 : 2 * kv_heads : 2, : q.shape[2]] = values[begin + i]
        kv = tokens(pool, tables[s], n)[:, : 2 * kv_heads, : q.shape[2]]
        query = np.asarray(q[begin:end], np.float32)
        if q_scale is not None:
            query = np.asarray(jnp.asarray(query / q_scale).astype(E4M3), np.float32) * q_scale
        t, j = np.arange(n - (end - begin), n)[:, None], np.arange(n)[None]
        visible = (j <= t) | (not use_causal_mask)
        if sliding_window is not None:
            visible &= j > t - sliding_window
        scale = k_scale
        out[begin:end] = (
            v_scale * attend(query, kv[:, ::2], kv[:, 1::2], scale, visible, soft_cap)[0]
        )
    return out, pool.reshape(cache.shape)


@pytest.mark.parametrize("name", V3)
def test_tpu_inference(name):
    options = dict(V3[name])
    call = {x: options.pop(x) for x in ("sizes", "dtype", "cache") if x in options}
    args = v3_call(**call)
    if not options.get("update_kv_cache", True):  # as the layer before has left it
        args = (*args[:3], jnp.asarray(v3_expected(args)[1]), *args[4:])
    out, cache = tpu_inference.ragged_paged_attention(*args, **options)
    expected, pool = v3_expected(args, **options)
    half = jnp.bfloat16 in (call.get("dtype"), options.get("out_dtype"))
    assert out.dtype == (BF16 if half else jnp.float32)
    close(out, expected, 0.04 if half else 5e-5 if "cache" in call else 3e-6)
    assert cache.dtype == args[3].dtype
    np.testing.assert_array_equal(np.asarray(cache, np.float32), pool)


HD64 = {
    "float32, a window": dict(sizes=(8, 2, 64, 16), sliding_window=6, soft_cap=2.0),
    "bfloat16, one head of a word": dict(sizes=(4, 1, 64, 16), dtype=BF16),
    "e4m3, three heads of four": dict(sizes=(6, 3, 64, 32), cache=E4M3, k_scale=0.5, v_scale=0.25),
}


@pytest.mark.parametrize("name", HD64)
def test_tpu_inference_of_heads_of_64(name):
    """The same numbers as of v3, whose rows are moved: a key and its value lie in one."""
    options = dict(HD64[name])
    call = {x: options.pop(x) for x in ("sizes", "dtype", "cache") if x in options}
    args, sinks = v3_call(**call), numbers(call["sizes"][0])
    (*_, kv_heads, _), (*_, packing, _) = args[1].shape, args[3].shape
    padding = ((0, 0), (0, 0), (0, -kv_heads % packing), (0, 0))

    def side_by_side(cache):
        rows = cache.reshape(*cache.shape[:2], -1, 128)[:, :, : 2 * kv_heads, :64]
        pairs = jnp.pad(rows.reshape(*cache.shape[:2], kv_heads, 128), padding)
        return pairs.reshape(*cache.shape[:2], -1, packing, 128)

    expected, after = ejkernel.ragged_page_attention_v3(
        *args, sinks, softmax_scale=1.0, logits_soft_cap=options.get("soft_cap"),
        **{x: y for x, y in options.items() if x != "soft_cap"},
    )  # fmt: skip
    given = (*args[:3], side_by_side(args[3]), *args[4:], sinks)
    out, cache = tpu_inference.ragged_paged_attention_hd64(*given, **options)
    assert out.dtype == args[0].dtype
    close(out, expected, 0.02 if out.dtype == BF16 else 3e-6)
    np.testing.assert_array_equal(
        *(np.asarray(x, np.float32) for x in (cache, side_by_side(after)))
    )
    with pytest.raises(ValueError, match=r"kv_cache.shape=.* must end in .* a row of 128 of each"):
        tpu_inference.ragged_paged_attention_hd64(*args[:3], args[3][..., :64], *args[4:])


LIMITS = [(dict(sliding_window=0), "must be positive"), (dict(soft_cap=0.0), r"must not be 0\.0")]


@pytest.mark.parametrize("options, message", LIMITS)
def test_windows_and_caps_are_refused_in_the_words_of_the_originals(options, message):
    with pytest.raises(ValueError, match=message):
        tpu_inference.ragged_paged_attention(*v3_call((8, 2, 64, 16)), **options)
    args = (numbers(1, 4, 64), numbers(4, 8, 4, 64), jnp.array([3]), jnp.zeros((1, 2), jnp.int32))
    with pytest.raises(ValueError, match=message):
        jax_tpu.ragged_paged_attention(*args, jnp.array([0, 1]), jnp.array([1]), **options)


def test_ejkernel():
    q, k, v = numbers(2, 4, 64), numbers(9, 2, 16, 64), numbers(9, 2, 16, 64)
    lens, tables = jnp.array([3, 40]), tables_of(2, 3, 9)
    decode = ejkernel.page_attention(q, k, v, lens, tables, sliding_window=9, platform="xla")
    close(decode, ejk.page_attention(q, k, v, lens, tables, sliding_window=9))
    caches = dict(key_cache=k, value_cache=v, context_lens=lens, block_tables=tables)
    by_name = ejkernel.page_attention(query=q, **caches, sliding_window=9, num_warps=4)
    close(by_name, decode, 0)  # as of its kernels

    kv = jnp.stack([k, v], 2).transpose(0, 3, 1, 2, 4).reshape(9, 16, 4, 64)
    rows, sinks = numbers(5, 4, 64), numbers(4)
    options = dict(sinks=sinks, cache_layout="HND")
    ragged = ejk.ragged_page_attention(rows, k, v, lens, tables, jnp.array([0, 1, 5]), **options)
    args = (rows, kv, lens, tables, jnp.array([0, 1, 5]))  # scale D^-0.5, as of FlashAttention
    close(ejkernel.ragged_page_attention_v2(*args, 2, sinks), ragged)
    close(ejkernel.ragged_page_attention_v2(*args, 2, softmax_aux=sinks, num_warps=4), ragged)

    args = v3_call((8, 2, 64, 16))
    v2 = ejkernel.ragged_page_attention_v3(*args)[0]  # scale 1.0
    close(v2, v3_expected(args)[0], 3e-6)
    with pytest.raises(ejk.UnsupportedError, match=r"mesh='m': call it inside jax.shard_map"):
        ejkernel.ragged_page_attention_v3(*args, mesh="m")


# FlashAttention: lengths before the new tokens, scale D^-0.5, not causal by default, a window's
# left end one less than here, a soft cap of 0 for none, the LSE by head.
FLASH = {
    "defaults": dict(),
    "causal, a window": dict(causal=True, window_size=(4, -1), softcap=2.0, softmax_scale=0.3),
    "a window with a right end": dict(window_size=(3, 0)),
    "not causal, a window": dict(window_size=(3, -1)),
    "chunks": dict(causal=True, attention_chunk=8),
    "left padding": dict(causal=True, cache_leftpad=jnp.array([1, 3, 23])),
}


@pytest.mark.parametrize("paged", [False, True], ids=["rows", "pages"])
@pytest.mark.parametrize("name", FLASH)
def test_flash_attention(name, paged):
    options, lens, new = FLASH[name], np.array([0, 9, 21]), 3
    q, k, v = numbers(3, new, 4, 64), numbers(3, new, 2, 64), numbers(3, new, 2, 64)
    caches, where = [numbers(3, 32, 2, 64) for _ in range(2)], {}
    order, tables = [2, 0, 1], tables_of(3, 4, 12)
    if paged:
        pools = [numbers(12, 8, 2, 64) for _ in range(2)]
        caches, where = pools, {"page_table": tables}
    else:
        where = {"cache_batch_idx": jnp.array(order)}
    given = dict(cache_seqlens=jnp.asarray(lens), return_softmax_lse=True, **where, **options)
    out, lse, *after = flash_attention.flash_attn_with_kvcache(q, *caches, k, v, **given)
    assert lse.shape == (3, 4, new)
    scale, window = options.get("softmax_scale", 64**-0.5), options.get("window_size", (-1, -1))
    chunk, causal = options.get("attention_chunk", 0), options.get("causal", window[1] == 0)
    for s, n in enumerate(lens + new):
        rows = [
            tokens(x, tables[s], n) if paged else np.asarray(x[order[s]][:n], np.float64)
            for x in after
        ]
        for held, written in zip(rows, (k, v)):
            close(held[n - new :], written[s])
        t, j = np.arange(n - new, n)[:, None], np.arange(n)[None]
        visible = (j <= t) | (not causal)
        visible &= (j >= t - window[0]) | (window[0] < 0)
        visible &= (j // chunk == t // chunk) if chunk else True
        visible &= j >= options.get("cache_leftpad", np.zeros(3, int))[s]
        expected = attend(q[s], *rows, scale, visible, options.get("softcap"))
        close(out[s], expected[0], 3e-6)
        close(lse[s].T, expected[1], 5e-6)


@pytest.mark.parametrize("backend", ["Xla", "Triton", "Pallas"])
def test_left_padding_is_not_read(backend, restored_registry):
    """New tokens in it see nothing, and what it holds changes no bit of others, packed or not."""
    if backend != "Xla":
        ejk.register_backend(getattr(ejk, f"{backend}RaggedPageAttention")(interpret=True))
    q, caches, first = numbers(3, 4, 4, 64), [numbers(3, 8, 2, 64) for _ in range(2)], [5, 0, 9]
    junk = [x.at[0, :5].set(np.nan).at[2].set(np.nan) for x in caches]
    given = dict(causal=True, cache_leftpad=jnp.array(first), return_softmax_lse=True)
    call = functools.partial(flash_attention.flash_attn_with_kvcache, cache_seqlens=7, **given)
    out, lse = call(q, *junk)
    assert not out[0, :2].any() and not out[2].any()  # tokens 3 and 4 of 7, and all
    np.testing.assert_array_equal(jnp.isneginf(lse[:, 0]), np.arange(3, 7) < np.c_[first])
    np.testing.assert_array_equal(out, call(q, *caches)[0])
    packed = call(q.reshape(12, 4, 64), *junk, cu_seqlens_q=4 * jnp.arange(4), max_seqlen_q=4)[0]
    np.testing.assert_array_equal(packed.reshape(out.shape), out)


def test_flash_attention_of_flat_queries():
    """And of a cache that is read alone: the output is no tuple."""
    q, cache = numbers(4, 4, 64), numbers(2, 32, 2, 64)
    cu = jnp.array([0, 1, 4])
    out = flash_attention.flash_attn_with_kvcache(
        q, cache, cache, cache_seqlens=20, cu_seqlens_q=cu, max_seqlen_q=3
    )
    for s in range(2):
        rows = q[cu[s] : cu[s + 1]]
        k = np.asarray(cache[s][:20])
        close(out[cu[s] : cu[s + 1]], attend(rows, k, k, 0.125, np.ones((len(rows), 20), bool))[0])


REFUSED = [
    (dict(rotary_cos=jnp.ones((4, 8))), "rotary_cos=.*rotate q and k before"),
    (dict(k_descale=jnp.ones((2, 2))), "k_descale=.*key_scale"),
    (dict(window_size=(3, 2)), "a window ends with the token itself"),
    (dict(attention_chunk=8), "attention_chunk=8 must come with causal=True"),
]


@pytest.mark.parametrize("options, message", REFUSED)
def test_what_changes_the_answer_is_refused_by_name(options, message):
    q, cache = numbers(2, 1, 4, 64), numbers(2, 32, 2, 64)
    with pytest.raises(ejk.UnsupportedError, match=message):
        flash_attention.flash_attn_with_kvcache(q, cache, cache, **options)


def test_a_mask_that_leaves_weight_is_refused():
    pool, q, table = numbers(2, 4, 8, 64), numbers(1, 4, 64), jnp.zeros((1, 2), jnp.int32)
    with pytest.raises(ValueError, match=r"mask_value=-1\.0 must be None or at most -10000"):
        jax_tpu.paged_attention(
            q, pool, pool, jnp.array([3]), table, mask_value=-1.0, pages_per_compute_block=1
        )


NEW = dict(k=jnp.ones((2, 1, 2, 64)), v=jnp.ones((2, 1, 2, 64)), cache_seqlens=jnp.array([6, 3]))
FLAT = NEW | {x: jnp.ones((9, 2, 64)) for x in "kv"}
APPENDED = [
    (dict(k=NEW["k"]), "v=None must be an array with k"),
    (NEW | dict(cache_seqlens=None), "cache_seqlens=None must be an int or .* array .* with k"),
    (NEW | dict(k=NEW["k"][:1], v=NEW["v"][:1]), r"k.shape\[0\]=1 must be batch=2: pass one for"),
    (NEW | dict(v=NEW["v"][:1]), r"v.shape=\(1, 1, 2, 64\) must be k.shape=\(2, 1, 2, 64\) but"),
    (NEW | dict(k=NEW["k"][..., :8]), r"k.shape\[-2:\]=\(2, 8\) must be k_cache.shape.*=\(2, 64\)"),
    (FLAT | dict(cu_seqlens_k_new=jnp.arange(2)), r"cu_seqlens_k_new.*=2 must be batch \+ 1=3: "),
    (NEW | dict(cache_seqlens=32), "cache_seqlens=32 must be at most 31, for k to append 1 .* 32"),
    (NEW | dict(cache_seqlens=np.array([3, 2**40])), r"cache_seqlens\[1\]=.* must be at most 31, "),
    (
        FLAT | dict(cache_seqlens=jnp.array([3, 26]), cu_seqlens_k_new=jnp.array([0, 2, 9])),
        r"cache_seqlens\[1\]=26 must be at most 25, for k to append 7 to a cache with room for 32",
    ),
    (dict(v=jnp.ones((2, 1, 2, 64))), "v must be None with k=None"),
    (dict(cu_seqlens_k_new=jnp.arange(3)), "cu_seqlens_k_new must be None with k=None"),
    (dict(q=jnp.ones((3, 1, 4, 64))), r"k_cache.shape\[0\]=2 must be at least the batch=3"),
]


@pytest.mark.parametrize("options, message", APPENDED)
def test_flash_attention_ignores_no_array(options, message):
    q, cache = numbers(2, 1, 4, 64), numbers(2, 32, 2, 64)
    with pytest.raises(ValueError, match=message):
        flash_attention.flash_attn_with_kvcache(
            **{"q": q, "k_cache": cache, "v_cache": cache} | options
        )


def test_traced_lengths_without_room_write_what_fits():
    """As the docstring says: the last new token counts as the cache's last."""
    q, cache, new = numbers(1, 3, 4, 64), numbers(1, 8, 2, 64), numbers(1, 3, 2, 64)
    call = functools.partial(flash_attention.flash_attn_with_kvcache, q, causal=True)
    appending = jax.jit(lambda lens: call(cache, cache, new, new, cache_seqlens=lens))
    out, keys, _ = appending(jnp.array([6]))
    np.testing.assert_array_equal(keys, cache.at[:, 6:].set(new[:, :2]))
    close(out, call(keys, keys, cache_seqlens=8))
    np.testing.assert_array_equal(appending(jnp.array([5]))[1][:, 5:], new)


FOREIGN = [
    (flash_attention.flash_attn_with_kvcache, "block_table", "it is page_table here"),
    (flash_attention.flash_attn_with_kvcache, "alibi_slopes", "is an argument of ejk.page_attent"),
    (jax_tpu.paged_attention, "block_tables", "it is page_indices here"),
    (jax_gpu.paged_attention, "kv_lens", "it is lengths here"),
    (tpu_inference.ragged_paged_attention, "q", "it is queries here"),
    (ejkernel.page_attention, "sm_scale", "it is attn_scale here"),
    (vllm.reshape_and_cache_flash, "key_scale", "it is k_scale here"),
]


@pytest.mark.parametrize("function, name, mend", FOREIGN)
def test_a_keyword_of_another_library_is_answered(function, name, mend):
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{name}': .*{mend}"):
        function(**{name: None})


@pytest.mark.parametrize("dtype", [jnp.int8, jnp.uint8])
@pytest.mark.parametrize("scale", [None, 0.5])
@pytest.mark.parametrize("update", [False, True])
def test_v3_pools_of_integers_are_refused_as_by_the_original(dtype, scale, update):
    """By their own name: before, scales that were given were said to be missing."""
    args = v3_call((4, 2, 128, 32), cache=E4M3)
    new, cache = (jnp.zeros(args[i].shape, dtype) for i in (1, 3))
    with pytest.raises(ValueError, match=f"^kv_cache.dtype={dtype.__name__} must be a float's"):
        tpu_inference.ragged_paged_attention(
            args[0], new, new, cache, *args[4:], k_scale=scale, v_scale=scale,
            update_kv_cache=update,
        )  # fmt: skip


V3_SIZES = [
    (dict(sizes=(7, 2, 64, 16)), {}, r"queries.shape\[1\]=7 must be a multiple of keys.*=2"),
    ({}, {2: numbers(8, 1, 64)}, r"values.shape=\(8, 1, 64\) must be keys.shape=\(8, 2, 64\)"),
    ({}, {3: numbers(7, 16, 8, 1, 128)}, "must end in 4 words of 1, .* of each of the 2 heads"),
    ({}, {5: np.arange(7)}, r"page_indices.shape\[0\]=7 must be a multiple of kv_lens.*=3"),
]


@pytest.mark.parametrize("call, changes, message", V3_SIZES)
def test_sizes_that_padding_would_hide_are_refused(call, changes, message):
    args = v3_call(**{"sizes": (8, 2, 64, 16)} | call)
    with pytest.raises(ValueError, match=message):
        tpu_inference.ragged_paged_attention(*(changes.get(i, x) for i, x in enumerate(args)))


def test_integers_of_64_bits_are_not_cut_off():
    """2**32 + 1 tokens are all that there is room for, not one; nothing is promoted in silence."""
    q, cache = numbers(2, 1, 4, 64), numbers(2, 32, 2, 64)
    call = functools.partial(flash_attention.flash_attn_with_kvcache, q, cache, cache)
    close(call(cache_seqlens=np.array([2**32 + 1, 32])), call())
    args = v3_call((8, 2, 64, 16))
    expected = v3_expected(args)[0]
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"):
        wide = (x.astype(np.int64) if x.dtype == np.int32 else x for x in args[4:])
        close(tpu_inference.ragged_paged_attention(*args[:4], *wide)[0], expected, 3e-6)
        first = jnp.zeros(2, jnp.int64)
        close(call(cache_seqlens=jnp.array([32, 32]), causal=True, cache_leftpad=first), call())


@pytest.mark.parametrize("dtype", ["auto", "fp8", "fp8_e5m2"])
def test_vllm(dtype):
    """Bytes stay bytes; `auto` uses no scale; padding past the slots is left out."""
    key, value, slots = numbers(4, 2, 64), numbers(4, 2, 64), jnp.array([5, -1, 30])
    held = {"auto": jnp.float32, "fp8": E4M3, "fp8_e5m2": jnp.float8_e5m2}[dtype]
    pool = jnp.zeros((4, 8, 2, 64), jnp.float32 if dtype == "auto" else jnp.uint8)
    scale, other = jnp.array([0.5]), jnp.array([0.25])
    caches = vllm.reshape_and_cache_flash(key, value, pool, pool, slots, dtype, scale, other)
    for cache, rows, by in zip(caches, (key, value), (0.5, 0.25)):
        assert cache.dtype == pool.dtype
        codes = cache if dtype == "auto" else jax.lax.bitcast_convert_type(cache, held)
        codes = np.asarray(codes, np.float32).reshape(32, 2, 64)
        expected = rows if dtype == "auto" else (rows / by).astype(held)
        expected = np.asarray(expected, np.float32)
        np.testing.assert_array_equal(codes[[5, 30]], expected[[0, 2]])
        assert not codes[[i for i in range(32) if i not in (5, 30)]].any()
    other = jnp.zeros_like(pool, jnp.int8)
    with pytest.raises(ValueError, match=f"key_cache.dtype=int8 must be one of .*'{dtype}'"):
        vllm.reshape_and_cache_flash(key, value, other, other, slots, dtype, scale, scale)
    with pytest.raises(ValueError, match="kv_cache_dtype='int8' must be one of"):
        vllm.reshape_and_cache_flash(key, value, pool, pool, slots, "int8", scale, scale)


VLLM_SCALES = [
    (np.ones(1), ValueError, r"k_scale.dtype=float64 must be .* pass k_scale.astype"),
    (jnp.ones(3), ValueError, r"k_scale.shape=\(3,\) must be num_kv_heads=\(2,\), or that of one"),
    ("1", TypeError, "k_scale='1' must be a number, a floating-point array of one"),
    (np.inf, ValueError, "k_scale=inf must be a finite float32"),
]


@pytest.mark.parametrize("scale, error, message", VLLM_SCALES)
def test_vllm_scales_are_refused_by_name(scale, error, message):
    rows, pool, slots = numbers(1, 2, 64), jnp.zeros((4, 8, 2, 64), jnp.uint8), jnp.array([5])
    with pytest.raises(error, match=message):
        vllm.reshape_and_cache_flash(rows, rows, pool, pool, slots, "fp8", scale, 1.0)
    given = (rows, rows, pool, pool, slots, "fp8")
    np.testing.assert_array_equal(
        *(vllm.reshape_and_cache_flash(*given, kind(0.5), 1.0)[0] for kind in (float, np.float64))
    )


def test_vllm_caches_of_two_dtypes_are_refused():
    rows, pool, slots = numbers(1, 2, 64), jnp.zeros((4, 8, 2, 64), jnp.uint8), jnp.array([5])
    for other in (jnp.float32, E4M3):
        with pytest.raises(ValueError, match=r"value_cache.dtype=.* must be key_cache.dtype=u"):
            caches = (pool, pool.astype(other))
            vllm.reshape_and_cache_flash(rows, rows, *caches, slots, "fp8", 1.0, 1.0)
