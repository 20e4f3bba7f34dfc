"""Wrong calls of the functions of `ejk.compat`, as `wrong_calls` has those of `ejk`'s own."""

import functools
import inspect
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from wrong_calls import INT8, LENS, SHAPE, TABLE, zeros

import ejk
from ejk.compat import ejkernel, flash_attention, jax_gpu, jax_tpu, tpu_inference, vllm

BOUNDS, COUNTS = zeros(3, dtype=np.int32), zeros(3, dtype=np.int32)
PAGES = zeros(2, 8, 16, 64)  # KV heads first
BY_TOKEN = zeros(8, 16, 2, 64)
ROWS, TOKENS, NEW = zeros(2, 4, 64), zeros(5, 4, 64), zeros(5, 2, 64)

V2 = ("queries", "kv_pages", "context_lens", "block_tables", "query_start_loc", "num_seqs")
V3 = (
    "queries", "keys", "values", "kv_cache", "kv_lens", "block_tables", "query_start_loc",
    "distribution",
)  # fmt: skip


def by_position(function, names, /, **given):
    """Call what takes its arrays by position alone."""
    arrays = [given.pop(name) for name in names]
    return inspect.unwrap(function)(*arrays, **given)


class DropIn(NamedTuple):
    """A function, past the import hook of the tests, and a right call of it."""

    function: Any
    right: dict[str, Any]


DROP_INS = {
    "jax_gpu.paged_attention": DropIn(
        inspect.unwrap(jax_gpu.paged_attention),
        {"q": ROWS, "k_pages": PAGES, "v_pages": PAGES, "block_tables": TABLE, "lengths": LENS},
    ),
    "jax_tpu.paged_attention": DropIn(
        inspect.unwrap(jax_tpu.paged_attention),
        {
            "q": ROWS, "k_pages": PAGES, "v_pages": PAGES, "lengths": LENS, "page_indices": TABLE,
            "pages_per_compute_block": 1,
        },
    ),
    "jax_tpu.ragged_paged_attention": DropIn(
        inspect.unwrap(jax_tpu.ragged_paged_attention),
        {
            "q": TOKENS, "kv_pages": zeros(8, 16, 4, 64), "kv_lens": LENS, "page_indices": TABLE,
            "cu_q_lens": BOUNDS, "num_seqs": COUNTS[:1],
        },
    ),
    "tpu_inference.ragged_paged_attention": DropIn(
        inspect.unwrap(tpu_inference.ragged_paged_attention),
        {
            "queries": TOKENS, "keys": NEW, "values": NEW, "kv_cache": zeros(8, 16, 2, 2, 64),
            "kv_lens": LENS, "page_indices": TABLE.reshape(-1), "cu_q_lens": BOUNDS,
            "distribution": COUNTS,
        },
    ),
    "tpu_inference.ragged_paged_attention_hd64": DropIn(
        inspect.unwrap(tpu_inference.ragged_paged_attention_hd64),
        {
            "queries": TOKENS, "keys": NEW, "values": NEW, "kv_cache": zeros(8, 16, 2, 1, 128),
            "kv_lens": LENS, "page_indices": TABLE.reshape(-1), "cu_q_lens": BOUNDS,
            "distribution": COUNTS,
        },
    ),
    "vllm.reshape_and_cache_flash": DropIn(
        inspect.unwrap(vllm.reshape_and_cache_flash),
        {
            "key": NEW[:3], "value": NEW[:3], "key_cache": BY_TOKEN, "value_cache": BY_TOKEN,
            "slot_mapping": COUNTS, "kv_cache_dtype": "auto", "k_scale": 1.0, "v_scale": 1.0,
        },
    ),
    "flash_attention.flash_attn_with_kvcache": DropIn(
        inspect.unwrap(flash_attention.flash_attn_with_kvcache),
        {"q": ROWS[:, None], "k_cache": BY_TOKEN, "v_cache": BY_TOKEN},
    ),
    "ejkernel.page_attention": DropIn(
        functools.partial(
            by_position, ejkernel.page_attention,
            ("query", "key_cache", "value_cache", "context_lens", "block_tables"),
        ),
        {
            "query": ROWS, "key_cache": zeros(*SHAPE), "value_cache": zeros(*SHAPE),
            "context_lens": LENS, "block_tables": TABLE,
        },
    ),
    "ejkernel.ragged_page_attention_v2": DropIn(
        functools.partial(by_position, ejkernel.ragged_page_attention_v2, V2),
        {
            "queries": TOKENS, "kv_pages": zeros(8, 16, 4, 64), "context_lens": LENS,
            "block_tables": TABLE, "query_start_loc": BOUNDS, "num_seqs": COUNTS[:1],
        },
    ),
    "ejkernel.ragged_page_attention_v3": DropIn(
        functools.partial(by_position, ejkernel.ragged_page_attention_v3, V3),
        {
            "queries": TOKENS, "keys": NEW, "values": NEW, "kv_cache": zeros(8, 16, 2, 2, 64),
            "kv_lens": LENS, "block_tables": TABLE.reshape(-1), "query_start_loc": BOUNDS,
            "distribution": COUNTS,
        },
    ),
}  # fmt: skip

# Of each function: the argument, what is given instead, the error, and how it begins.
WRONG = {
    "jax_gpu.paged_attention": [
        ("q", ROWS[0], TypeError, "q=float32[4, 64] must be a floating-point array [batch, "),
        ("k_pages", None, TypeError, "k_pages=None must be a numeric array [num_kv_heads, num_p"),
        ("block_tables", None, TypeError, "block_tables=None must be an integer array [batch, "),
        ("lengths", [1, 2], TypeError, "lengths=[1, 2] must be an integer array [batch] or None"),
        ("lengths", zeros(2), TypeError, "lengths=float32[2] must be an integer array [batch]"),
        ("mask_value", -1.0, ValueError, "mask_value=-1.0 must be None or at most -10000"),
    ],
    "jax_tpu.paged_attention": [
        ("q", zeros(2, 4, 64, dtype=INT8), TypeError, "q=int8[2, 4, 64] must be a floating-point"),
        ("v_pages", PAGES[0], TypeError, "v_pages=float32[8, 16, 64] must be a numeric array"),
        ("lengths", TABLE, TypeError, "lengths=int32[2, 3] must be an integer array [batch]"),
        ("page_indices", LENS, TypeError, "page_indices=int32[2] must be an integer array [batch"),
        ("mask_value", 0.0, ValueError, "mask_value=0.0 must be None or at most -10000"),
    ],
    "jax_tpu.ragged_paged_attention": [
        ("q", None, TypeError, "q=None must be a floating-point array [total_tokens, num_heads"),
        ("kv_pages", [], TypeError, "kv_pages=[] must be a numeric array [num_pages, page_size"),
        ("cu_q_lens", [0, 1, 2], TypeError, "cu_q_lens=[0, 1, 2] must be an integer array [num"),
        ("cu_q_lens", None, TypeError, "cu_q_lens=None must be an integer array [num_seqs + 1]"),
        ("num_seqs", None, TypeError, "num_seqs=None must be an int or an integer array [1]"),
        ("num_seqs", LENS, TypeError, "num_seqs=int32[2] must be an int or an integer array [1]"),
        ("sliding_window", 0, ValueError, "sliding_window=0 must be positive: None is no wi"),
    ],
    "tpu_inference.ragged_paged_attention": [
        ("queries", [], TypeError, "queries=[] must be a numeric array [total_tokens, num_heads"),
        ("keys", NEW[None], TypeError, "keys=float32[1, 5, 2, 64] must be a numeric array [tota"),
        ("values", NEW[..., :8], ValueError, "values.shape=(5, 2, 8) must be keys.shape="),
        ("kv_cache", None, TypeError, "kv_cache=None must be a numeric array [num_pages, page_s"),
        ("kv_lens", TABLE, TypeError, "kv_lens=int32[2, 3] must be an integer array [batch]"),
        ("page_indices", TABLE, TypeError, "page_indices=int32[2, 3] must be an integer array ["),
        ("cu_q_lens", zeros(3), TypeError, "cu_q_lens=float32[3] must be an integer array [num_"),
        ("distribution", None, TypeError, "distribution=None must be an integer array [3]"),
        ("distribution", LENS, TypeError, "distribution=int32[2] must be an integer array [3]"),
        ("skip_kv_mask", True, ValueError, "skip_kv_mask=True must come with use_causal_mask=F"),
    ],
    "tpu_inference.ragged_paged_attention_hd64": [
        ("queries", None, TypeError, "queries=None must be a numeric array [total_tokens, num_he"),
        ("keys", [], TypeError, "keys=[] must be a numeric array [total_tokens, num_kv_heads, he"),
        ("kv_cache", None, TypeError, "kv_cache=None must be a numeric array [num_pages, page_s"),
        ("distribution", None, TypeError, "distribution=None must be an integer array [3]"),
    ],
    "vllm.reshape_and_cache_flash": [
        ("key", None, TypeError, "key=None must be a floating-point array [num_tokens, num_kv_he"),
        ("value", NEW[0], TypeError, "value=float32[2, 64] must be a floating-point array [num_t"),
        ("key_cache", [], TypeError, "key_cache=[] must be a numeric array [num_pages, page_size"),
        ("slot_mapping", None, TypeError, "slot_mapping=None must be an integer array [num_toke"),
        ("kv_cache_dtype", "int8", ValueError, "kv_cache_dtype='int8' must be one of 'auto', "),
        (
            "value_cache", BY_TOKEN.astype(np.float16), ValueError,
            "value_cache.dtype=float16 must be key_cache.dtype=float32: make both alike",
        ),
    ],
    "flash_attention.flash_attn_with_kvcache": [
        ("q", ROWS, TypeError, "q=float32[2, 4, 64] must be a floating-point array [batch, seql"),
        ("k_cache", None, TypeError, "k_cache=None must be a numeric array [num_pages, page_siz"),
        ("cache_seqlens", 1.5, TypeError, "cache_seqlens=1.5 must be an int or a 0-d integer ar"),
        ("page_table", LENS, TypeError, "page_table=int32[2] must be an integer array [batch, p"),
        ("cu_seqlens_q", [0, 1], TypeError, "q=float32[2, 1, 4, 64] must be a floating-point"),
        ("v", NEW, TypeError, "v=float32[5, 2, 64] must be a floating-point array [batch, seqlen"),
        ("softcap", -1.0, ValueError, "softcap=-1.0 must be 0 or, in float32, from 1.2e-38 to 3."),
        ("softcap", "1", TypeError, "softcap='1' must be a number or None"),
        ("attention_chunk", -1, ValueError, "attention_chunk=-1 must be at least 0: 0 is off"),
        ("window_size", None, TypeError, "window_size=None must be a pair of ints, (left, right):"),
        ("window_size", 5, TypeError, "window_size=5 must be a pair of ints, (left, right): -1 is"),
        ("window_size", [3], TypeError, "window_size=(3,) must be a pair of ints, (left, right):"),
        ("window_size", (None, None), TypeError, "window_size=(None, None) must be a pair of ints"),
        ("window_size", (-2, 0), ValueError, "window_size=(-2, 0) must be at least -1 on either s"),
        ("cache_seqlens", BOUNDS, ValueError, "cache_seqlens.shape[0]=3 must be batch=2: pass one"),
        ("cache_leftpad", BOUNDS, ValueError, "cache_leftpad.shape[0]=3 must be batch=2: pass one"),
        ("cache_batch_idx", BOUNDS, ValueError, "cache_batch_idx.shape[0]=3 must be batch=2: pass"),
        ("page_table", TABLE[:1], ValueError, "page_table.shape[0]=1 must be batch=2: pass one fo"),
    ],
    "ejkernel.page_attention": [
        ("query", ROWS[0], TypeError, "query=float32[4, 64] must be a floating-point array [num"),
        ("context_lens", [1], TypeError, "context_lens=[1] must be an integer array [num_seqs]"),
        ("num_splits", -1, ValueError, "num_splits=-1 must be at least 0"),
    ],
    "ejkernel.ragged_page_attention_v2": [
        ("queries", None, TypeError, "queries=None must be a floating-point array [total_tokens"),
        ("query_start_loc", [0], TypeError, "query_start_loc=[0] must be an integer array [num_"),
        ("num_seqs", 1.5, TypeError, "num_seqs=1.5 must be an int or an integer array [1]"),
    ],
    "ejkernel.ragged_page_attention_v3": [
        ("queries", None, TypeError, "queries=None must be a numeric array [total_tokens, num_hea"),
        ("block_tables", TABLE, TypeError, "block_tables=int32[2, 3] must be an integer array ["),
        ("query_start_loc", None, TypeError, "query_start_loc=None must be an integer array [nu"),
    ],
}  # fmt: skip

for name, (_, right) in DROP_INS.items():  # and each array with its bytes the other way round
    for argument, x in right.items():
        if isinstance(x, np.ndarray):
            swapped = x.astype(x.dtype.newbyteorder())
            begins = f"{argument}.dtype={swapped.dtype.str!r} must be of this machine's byte order"
            WRONG[name].append((argument, swapped, TypeError, begins))


def split(operation, given, backend=None):
    """Call an operation on the pages of one device, inside `jax.shard_map`."""
    auto = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((1,), ("pages",), auto, devices=jax.devices()[:1])
    whole = jax.sharding.PartitionSpec()

    def attend(query):
        given_here = {"axis_name": "pages", **given, "query": query, "backend": backend}
        return getattr(ejk, operation)(**given_here)

    return jax.shard_map(attend, mesh=mesh, in_specs=(whole,), out_specs=whole)(
        jnp.asarray(given["query"])
    )


SPLIT: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "another axis": (
        {"axis_name": "seqs"}, ValueError,
        "axis_name='seqs' must be of the jax.shard_map around the call, whose axes are 'pages'",
    ),
    "no axis": ({"axis_name": ()}, ValueError, "axis_name=() must name one axis or several, each"),
    "an axis twice": (
        {"axis_name": ("pages", "pages")}, ValueError,
        "axis_name=('pages', 'pages') must name one axis or several, each once",
    ),
    "a number": ({"axis_name": 3}, TypeError, "axis_name=3 must be the name of a mesh axis, or a"),
    "an offset before the first page": (
        {"page_offset": -1}, ValueError, "page_offset=-1 must be at least 0",
    ),
    "an offset in fractions": (
        {"page_offset": 1.5}, TypeError, "page_offset=1.5 must be an int or a 0-d integer array",
    ),
    "an offset without an axis": (
        {"axis_name": None, "page_offset": 3}, ValueError,
        "page_offset=3 must come with axis_name: it moves the pages that a device finds to be its",
    ),
    "heads that do not fit": (
        {"query": zeros(2, 3, 64)}, ValueError,
        "num_heads=3 must be a multiple of num_kv_heads=2",
    ),
}  # fmt: skip
"""Calls on pages that are split over devices: what is changed, the error, and how it begins."""
