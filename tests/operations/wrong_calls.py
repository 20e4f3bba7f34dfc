"""Wrong calls of every operation: what is changed of a right one, and how the error begins.

`test_wrong_calls` makes each of them on every backend, and holds its message to what a message
must have. Those that `docs/errors.md` shows are made in `test_error_page`.
"""

import atexit
import pathlib
import shutil
import tempfile
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np


def zeros(*shape, dtype=np.float32):
    return np.zeros(shape, dtype)


NUM_SEQS, NUM_HEADS, HEAD_DIM, NUM_PAGES, KV_HEADS, PAGE = 2, 4, 64, 8, 2, 16
SHAPE = (NUM_PAGES, KV_HEADS, PAGE, HEAD_DIM)
OF_TOKENS = SHAPE[:-1]
INT8, INT4, E4M3 = np.int8, np.uint8, ml_dtypes.float8_e4m3fn
INT8_POOL, SCALES = zeros(*SHAPE, dtype=INT8), zeros(*OF_TOKENS)
LENS, TABLE = zeros(NUM_SEQS, dtype=np.int32), zeros(NUM_SEQS, 3, dtype=np.int32)


def decode(**changes):
    """A right call of `ejk.page_attention`, changed. `pool=` changes both caches."""
    pool = changes.pop("pool", zeros(*SHAPE))
    right = {
        "query": zeros(NUM_SEQS, NUM_HEADS, HEAD_DIM),
        "key_cache": pool,
        "value_cache": pool,
        "context_lens": LENS,
        "block_tables": TABLE,
    }
    return right | changes


def ragged(**changes):
    """The same of `ejk.ragged_page_attention`, of five new tokens."""
    right = {"query": zeros(5, NUM_HEADS, HEAD_DIM), "cu_q_lens": zeros(3, dtype=np.int32)}
    return decode(**right | changes)


def write(**changes):
    """The same of `ejk.write_kv_cache`, of three tokens. `rows=` changes both rows."""
    pool, rows = changes.pop("pool", zeros(*SHAPE)), changes.pop("rows", zeros(3, 2, 64))
    right = {"key": rows, "value": rows, "key_cache": pool, "value_cache": pool}
    return right | {"slot_mapping": zeros(3, dtype=np.int32)} | changes


def copy(unit, **changes):
    """The same of three copies; `sources` and `targets` are of the unit."""
    pool, ids = changes.pop("pool", zeros(*SHAPE)), zeros(3, dtype=np.int32)
    given = {"sources": ids, "targets": ids} | changes
    ends = {f"{end}_{unit}s": given.pop(f"{end}s") for end in ("source", "target")}
    return {"key_cache": pool, "value_cache": pool, **ends, **given}


SIZES = dict(num_heads=4, num_kv_heads=2, head_dim=64, page_size=16, max_blocks=3)
RIGHT = {
    "page_attention": decode,
    "ragged_page_attention": ragged,
    "write_kv_cache": write,
    "copy_kv_slots": lambda **changes: copy("slot", **changes),
    "copy_kv_pages": lambda **changes: copy("page", **changes),
    "plan_page_attention": lambda **changes: {"context_lens": LENS} | SIZES | changes,
    "merge_attention_states": lambda **changes: {
        "outs": zeros(3, 4, 2, 8), "lses": zeros(3, 4, 2)
    } | changes,
    "slot_mapping": lambda **changes: {
        "block_tables": TABLE, "positions": LENS, "page_size": 4, "num_pages": 8
    } | changes,
    "ragged_slot_mapping": lambda **changes: {
        "block_tables": TABLE, "context_lens": LENS, "cu_q_lens": zeros(3, dtype=np.int32),
        "total_tokens": 3, "page_size": 4, "num_pages": 8,
    } | changes,
    "layer_block_tables": lambda **changes: {
        "block_tables": TABLE, "layer": 1, "num_pages": 8
    } | changes,
    "layer_slot_mapping": lambda **changes: {
        "slot_mapping": LENS, "layer": 1, "num_pages": 8, "page_size": 4
    } | changes,
    "dense_block_tables": lambda **changes: {
        "indptr": zeros(3, dtype=np.int32), "indices": LENS, "max_blocks": 3
    } | changes,
    "accepted_slots": lambda **changes: {
        "slot_mapping": LENS, "accepted": TABLE, "cu_q_lens": zeros(3, dtype=np.int32)
    } | changes,
    "empty_kv_cache": lambda **changes: {
        "num_pages": 3, "num_kv_heads": 2, "page_size": 4, "head_dim": 8
    } | changes,
}  # fmt: skip
"""By operation, its right call, changed."""
TUNING = pathlib.Path(tempfile.mkdtemp(prefix="ejk-tuning-"), "none.json")
atexit.register(shutil.rmtree, TUNING.parent)
TUNING.write_text('{"version": 1, "entries": []}')
for use in ("load_tuning", "tuning"):
    RIGHT[use] = lambda **changes: {"path": TUNING} | changes


def fused(*shape, **changes):
    return write(key_cache=zeros(*shape), value_cache=None, **changes)


DECODE_KINDS = {
    "query of rank 2": (
        {"query": zeros(4, 64)},
        "query=float32[4, 64] must be a floating-point array [num_seqs, num_heads, head_dim]",
    ),
    "query of integers": ({"query": zeros(2, 4, 64, dtype=np.int32)}, "query=int32[2, 4, 64]"),
    "query of float64": (
        {"query": zeros(2, 4, 64, dtype=np.float64)},
        "query.dtype=float64 must be one of float32, bfloat16, float16",
    ),
    "query of complex numbers": ({"query": zeros(2, 4, 64, dtype=np.complex64)}, "query=complex64"),
    "query as a list": ({"query": [[[1.0]]]}, "query=[[[1.0]]] must be"),
    "keys of rank 3": (
        {"key_cache": zeros(2, 16, 64)},
        "key_cache=float32[2, 16, 64] must be a numeric array of four axes, or five of fused "
        "pools, as cache_layout says",
    ),
    "keys of rank 6": ({"key_cache": zeros(1, 8, 2, 2, 16, 64)}, "key_cache=float32[1, 8,"),
    "values of rank 3": ({"value_cache": zeros(2, 16, 64)}, "value_cache=float32[2, 16, 64]"),
    "keys as None": ({"key_cache": None}, "key_cache=None must be"),
    "lengths of floats": (
        {"context_lens": zeros(2)},
        "context_lens=float32[2] must be an integer array [num_seqs]",
    ),
    "keys of random numbers as lengths": (
        {"context_lens": jax.random.split(jax.random.key(0), 2)},
        "context_lens=key<fry>[2] must be an integer array [num_seqs]",
    ),
    "lengths of booleans": ({"context_lens": zeros(2, dtype=bool)}, "context_lens=bool[2]"),
    "lengths of rank 2": (
        {"context_lens": zeros(2, 1, dtype=np.int32)},
        "context_lens=int32[2, 1]",
    ),
    "tables of rank 1": (
        {"block_tables": zeros(6, dtype=np.int32)},
        "block_tables=int32[6] must be an integer array [num_seqs, max_blocks]",
    ),
    "tables of floats": ({"block_tables": zeros(2, 3)}, "block_tables=float32[2, 3]"),
    "a scale a head": ({"attn_scale": zeros(4)}, "attn_scale=float32[4] must be"),
    "a scale in words": ({"attn_scale": "auto"}, "attn_scale='auto' must be"),
    "a complex scale": ({"attn_scale": np.complex64(1j)}, "attn_scale=complex64[] must be"),
    "a truth as scale": ({"attn_scale": True}, "attn_scale=True must be a number"),
    "a truth as cap": ({"attn_logits_soft_cap": True}, "attn_logits_soft_cap=True must be"),
    "a window a sequence": (
        {"sliding_window": zeros(2, dtype=np.int32)},
        "sliding_window=int32[2] must be",
    ),
    "a window in fractions": ({"sliding_window": 1.5}, "sliding_window=1.5 must be"),
    "a truth as window": ({"sliding_window": True}, "sliding_window=True must be an int"),
    "a traced cap": ({"attn_logits_soft_cap": jnp.float32(5)}, "attn_logits_soft_cap="),
    "sinks of integers": ({"sinks": zeros(4, dtype=np.int32)}, "sinks=int32[4] must be"),
    "one sink": ({"sinks": 1.0}, "sinks=1.0 must be"),
    "slopes of rank 2": ({"alibi_slopes": zeros(1, 4)}, "alibi_slopes=float32[1, 4] must be"),
    "splits in fractions": ({"num_splits": 1.0}, "num_splits=1.0 must be"),
    "splits on the device": ({"num_splits": jnp.int32(1)}, "num_splits="),
    "a truth as splits": ({"num_splits": True}, "num_splits=True must be an int"),
    "a bound on the device": ({"max_context_len": jnp.int32(1)}, "max_context_len="),
    "a width in fractions": ({"value_cache": None, "value_head_dim": 8.0}, "value_head_dim=8.0"),
    "a backend that is none": ({"backend": 3}, "backend=3 must be"),
    "a module as backend": ({"backend": np}, "backend=module must be"),
}

DECODE_VALUES = {
    "heads that no group divides": (
        {"query": zeros(2, 7, 64)},
        "num_heads=7 must be a multiple of num_kv_heads=2",
    ),
    "fewer heads than KV heads": (
        {"query": zeros(2, 1, 64)},
        "num_heads=1 must be a multiple of num_kv_heads=2",
    ),
    "no heads": ({"query": zeros(2, 0, 64)}, "num_heads=0 must be at least 1"),
    "no KV heads": ({"pool": zeros(8, 0, 16, 64)}, "num_kv_heads=0 must be at least 1"),
    "no head dimension": (
        {"query": zeros(2, 4, 0), "pool": zeros(8, 2, 16, 0)},
        "head_dim=0 must be at least 1",
    ),
    "pages without slots": ({"pool": zeros(8, 2, 0, 64)}, "page_size=0 must be at least 1"),
    "keys of another width": (
        {"key_cache": zeros(8, 2, 16, 32)},
        "key_cache.shape[3]=32 must be the query's head_dim=64",
    ),
    "keys of integers": ({"pool": zeros(8, 2, 16, 64, dtype=np.int16)}, "key_cache.dtype=int16"),
    "values of another dtype": (
        {"value_cache": zeros(8, 2, 16, 64, dtype=np.float16)},
        "value_cache.dtype=float16 must be key_cache.dtype=float32: pass value_cache.astype(",
    ),
    "values of fewer pages": (
        {"value_cache": zeros(7, 2, 16, 64)},
        "value_cache.shape=(7, 2, 16, 64) must be key_cache.shape=(8, 2, 16, 64)",
    ),
    "values of other pages": ({"value_cache": zeros(8, 2, 8, 64)}, "value_cache.shape="),
    "values of no width": ({"value_cache": zeros(8, 2, 16, 0)}, "value_cache.shape[3]=0"),
    "no values": ({"value_cache": None}, "value_cache=None must come with value_head_dim"),
    "values and a width": (
        {"value_head_dim": 64},
        "value_head_dim=64 must be None where a value_cache is given",
    ),
    "a width of nothing": (
        {"value_cache": None, "value_head_dim": 0},
        "value_head_dim=0 must be at least 1",
    ),
    "a width past the keys": (
        {"value_cache": None, "value_head_dim": 65},
        "value_head_dim=65 must be at most head_dim=64",
    ),
    "lengths of other sequences": (
        {"context_lens": zeros(3, dtype=np.int32)},
        "context_lens.shape[0]=3 must be num_seqs=2",
    ),
    "tables of other sequences": (
        {"block_tables": zeros(3, 3, dtype=np.int32)},
        "block_tables.shape[0]=3 must be num_seqs=2",
    ),
    "another layout's axes": (
        {"cache_layout": "NHD"},
        "num_heads=4 must be a multiple of num_kv_heads=16 "
        "(key_cache[8, 2, 16, 64], cache_layout='NHD')",
    ),
    "an unknown layout": (
        {"cache_layout": "HDN"},
        "cache_layout='HDN' must be one of 'HND', 'NHD', 'KV_HEADS_FIRST'",
    ),
    "a window of nothing": ({"sliding_window": 0}, "sliding_window=0 must be at least 1"),
    "a window of less": ({"sliding_window": np.int32(-1)}, "sliding_window=-1 must be at least 1"),
    "a cap of nothing": ({"attn_logits_soft_cap": 0.0}, "attn_logits_soft_cap=0.0 must be above 0"),
    "a cap past any float": (
        {"attn_logits_soft_cap": 10**5000},
        "attn_logits_soft_cap=2**16609 must be above 0 and a float32",
    ),
    "a window of far less": (
        {"sliding_window": -(10**400)},
        "sliding_window=-10000000000000000...0000000000000000000 must be at least 1",
    ),
    "far less than no splits": ({"num_splits": -(10**5000)}, "num_splits=-2**16609 must be at lea"),
    "a scale past any float": ({"attn_scale": 10**5000}, "attn_scale=2**16609 must be a finite"),
    "a cap of less": ({"attn_logits_soft_cap": -5}, "attn_logits_soft_cap=-5 must be above 0"),
    "an infinite cap": ({"attn_logits_soft_cap": np.inf}, "attn_logits_soft_cap=inf must be"),
    "a cap of NaN": ({"attn_logits_soft_cap": np.nan}, "attn_logits_soft_cap=nan must be"),
    "sinks of other heads": ({"sinks": zeros(3)}, "sinks.shape[0]=3 must be num_heads=4"),
    "slopes of other heads": (
        {"alibi_slopes": zeros(5)},
        "alibi_slopes.shape[0]=5 must be num_heads=4",
    ),
    "slopes of 64 bits": (
        {"alibi_slopes": zeros(4, dtype=np.float64)},
        "alibi_slopes.dtype=float64 must be float32",
    ),
    "less than no splits": ({"num_splits": -1}, "num_splits=-1 must be at least 0"),
    "less than no tokens": ({"max_context_len": -1}, "max_context_len=-1 must be at least 0"),
    "an unknown backend": (
        {"backend": "cuda"},
        "backend='cuda' must be one of 'mosaic_gpu', 'triton', 'pallas', 'xla', a backend object "
        "or None",
    ),
    "positions of 64 bits": (
        # An array of one element, seen 2**27 times: the check is on shapes alone.
        {"block_tables": np.broadcast_to(np.int32(0), (2, 2**27))},
        "max_blocks * page_size=2147483648 must be below 2**31",
    ),
    "pages of 64 bits": (
        {"pool": np.broadcast_to(np.float32(0), (2**31, KV_HEADS, PAGE, HEAD_DIM))},
        "num_pages=2147483648 must be below 2**31: ids of pages are 32-bit",
    ),
}

RAGGED_KINDS = {
    "query of rank 2": (
        {"query": zeros(5, 64)},
        "query=float32[5, 64] must be a floating-point array [total_tokens, num_heads, head_dim]",
    ),
    "bounds of floats": (
        {"cu_q_lens": zeros(3)},
        "cu_q_lens=float32[3] must be an integer array [num_seqs + 1]",
    ),
    "bounds of rank 2": ({"cu_q_lens": zeros(1, 3, dtype=int)}, "cu_q_lens=int64[1, 3] must be"),
    "positions of floats": (
        {"positions": zeros(5)},
        "positions=float32[5] must be an integer array [total_tokens] or None",
    ),
    "a mask of numbers": (
        {"tree_mask": zeros(5, 2)},
        "tree_mask=float32[5, 2] must be a boolean array [total_tokens, max_q_len] or None",
    ),
    "a mask of rank 1": ({"tree_mask": zeros(5, dtype=bool)}, "tree_mask=bool[5] must be"),
    "groups alone": (
        {"prefix_groups": zeros(2, dtype=np.int32)},
        "prefix_groups=int32[2] must be a pair of integer arrays, groups [num_seqs] and num_pages "
        "[num_groups] or None; pass (groups, num_pages), two integer arrays",
    ),
    "groups in a list": (
        {"prefix_groups": [zeros(2, dtype=np.int32), zeros(1, dtype=np.int32)]},
        "prefix_groups=[int32[2], int32[1]] must be a pair of integer arrays, groups [num_seqs] "
        "and num_pages [num_groups] or None; pass (groups, num_pages), two integer arrays",
    ),
    "a number for a truth": ({"causal": 0}, "causal=0 must be a bool"),
    "a bound on the device": ({"max_q_len": jnp.int32(1)}, "max_q_len="),
    "a truth as bound": ({"max_q_len": True}, "max_q_len=True must be an int"),
}

RAGGED_VALUES = {
    "bounds of other sequences": (
        {"cu_q_lens": zeros(2, dtype=np.int32)},
        "cu_q_lens.shape[0]=2 must be num_seqs + 1=3",
    ),
    "tables of other sequences": (
        {"block_tables": zeros(3, 3, dtype=np.int32)},
        "block_tables.shape[0]=3 must be num_seqs=2",
    ),
    "positions of other tokens": (
        {"positions": zeros(4, dtype=np.int32)},
        "positions.shape[0]=4 must be total_tokens=5",
    ),
    "a mask of other tokens": (
        {"tree_mask": zeros(6, 5, dtype=bool)},
        "tree_mask.shape[0]=6 must be total_tokens=5",
    ),
    "less than no tokens": ({"max_q_len": -1}, "max_q_len=-1 must be at least 0"),
    "less than no context": ({"max_context_len": -1}, "max_context_len=-1 must be at least 0"),
    "heads that no group divides": (
        {"query": zeros(5, 7, 64)},
        "num_heads=7 must be a multiple of num_kv_heads=2",
    ),
    "a tree that is not causal": (
        {"tree_mask": zeros(5, 2, dtype=bool), "causal": False},
        "causal=False must come without tree_mask, which says itself what new tokens see",
    ),
    "groups of other sequences": (
        {"prefix_groups": (zeros(3, dtype=np.int32), zeros(2, dtype=np.int32))},
        "prefix_groups[0].shape[0]=3 must be num_seqs=2: the group of each sequence, -1 for none",
    ),
    "a window of nothing": ({"sliding_window": 0}, "sliding_window=0 must be at least 1"),
}

WRITE_KINDS = {
    "keys of rank 2": (
        {"key": zeros(3, 64)},
        "key=float32[3, 64] must be a floating-point array [num_tokens, num_kv_heads, head_dim]",
    ),
    "keys of integers": ({"key": zeros(3, 2, 64, dtype=np.int8)}, "key=int8[3, 2, 64] must be"),
    "keys as a list": ({"key": [[[1.0]]]}, "key=[[[1.0]]] must be"),
    "no keys": ({"key": None}, "key=None must be"),
    "keys of float64": (
        {"key": zeros(3, 2, 64, dtype=np.float64)},
        "key.dtype=float64 must be one of float32, bfloat16, float16",
    ),
    "values of rank 4": ({"value": zeros(3, 1, 2, 64)}, "value=float32[3, 1, 2, 64] must be"),
    "a pool of rank 3": ({"key_cache": zeros(2, 16, 64)}, "key_cache=float32[2, 16, 64] must be"),
    "no pool": ({"key_cache": None}, "key_cache=None must be"),
    "a value pool of rank 3": ({"value_cache": zeros(2, 16, 64)}, "value_cache=float32[2, 16, 64]"),
    "slots of floats": (
        {"slot_mapping": zeros(3)},
        "slot_mapping=float32[3] must be an integer array [num_tokens]",
    ),
    "slots of booleans": ({"slot_mapping": zeros(3, dtype=bool)}, "slot_mapping=bool[3] must be"),
    "slots of rank 2": ({"slot_mapping": zeros(3, 1, dtype=int)}, "slot_mapping=int64[3, 1] must"),
    "slots as a list": ({"slot_mapping": [1, 2, 3]}, "slot_mapping=[1, 2, 3] must be"),
    "a backend that is none": ({"backend": 3}, "backend=3 must be"),
}

WRITE_VALUES = {
    "an unknown layout": (
        {"cache_layout": "HDN"},
        "cache_layout='HDN' must be one of 'HND', 'NHD', 'KV_HEADS_FIRST'",
    ),
    "another layout's axes": (
        {"cache_layout": "NHD"},
        "key.shape[1]=2 must be num_kv_heads=16 (key_cache[8, 2, 16, 64], cache_layout='NHD')",
    ),
    "other heads": (
        {"rows": zeros(3, 4, 64)},
        "key.shape[1]=4 must be num_kv_heads=2 (key_cache[8, 2, 16, 64], cache_layout='HND')",
    ),
    "keys of another width": (
        {"rows": zeros(3, 2, 32)},
        "key_cache.shape[3]=64 must be the keys' head_dim=32",
    ),
    "a pool of no type that a cache has": (
        {"pool": zeros(8, 2, 16, 64, dtype=np.int16)},
        "key_cache.dtype=int16 must be one of float32, bfloat16, float16, int8,",
    ),
    "a quantised pool of values": (
        {"value_cache": zeros(8, 2, 16, 64, dtype=np.int8)},
        "value_cache.dtype=int8 must be key_cache.dtype=float32: write both with ejk.write",
    ),
    "values of another dtype": (
        {"value": zeros(3, 2, 64, dtype=np.float16)},
        "value.dtype=float16 must be the keys' dtype float32",
    ),
    "values of other tokens": (
        {"value": zeros(4, 2, 64)},
        "value.shape=(4, 2, 64) must be key.shape=(3, 2, 64) but for the last axis",
    ),
    "values of another width": (
        {"value": zeros(3, 2, 32)},
        "value_cache.shape[3]=64 must be the values' value_head_dim=32",
    ),
    "values of no width": (
        {"value": zeros(3, 2, 0), "value_cache": zeros(8, 2, 16, 0)},
        "value_cache.shape[3]=0 must be at least 1",
    ),
    "values of fewer pages": (
        {"value_cache": zeros(7, 2, 16, 64)},
        "value_cache.shape=(7, 2, 16, 64) must be key_cache.shape=(8, 2, 16, 64) but for the last",
    ),
    "no place for values": (
        {"value_cache": None},
        "value_cache=None must be an array, or value and value_cache both None: latent attention",
    ),
    "no values": ({"value": None}, "value=None must be an array, or value and value_cache both"),
    "fused pools and no values": (
        fused(8, 2, 2, 16, 64, value=None),
        "value=None must be an array with a key_cache of five axes",
    ),
    "fused pools and another": (
        {"key_cache": zeros(8, 2, 2, 16, 64)},
        "value_cache=float32[8, 2, 16, 64] must be None with a key_cache of five axes",
    ),
    "fused pools of one half": (
        fused(8, 1, 2, 16, 64),
        "key_cache.shape[1]=1 must be 2, keys and values "
        "(key_cache[8, 1, 2, 16, 64], cache_layout='HND')",
    ),
    "fused pools and values of another width": (
        fused(8, 2, 2, 16, 64, value=zeros(3, 2, 32)),
        "key_cache.shape[4]=64 must be the values' value_head_dim=32",
    ),
    "slots of other tokens": (
        {"slot_mapping": zeros(4, dtype=np.int32)},
        "slot_mapping.shape[0]=4 must be num_tokens=3",
    ),
    "no KV heads": (
        {"pool": zeros(8, 0, 16, 64), "rows": zeros(3, 0, 64)},
        "num_kv_heads=0 must be at least 1 (key_cache[8, 0, 16, 64], cache_layout='HND')",
    ),
    "no head dimension": (
        {"pool": zeros(8, 2, 16, 0), "rows": zeros(3, 2, 0), "value": None, "value_cache": None},
        "head_dim=0 must be at least 1",
    ),
    "pages without slots": ({"pool": zeros(8, 2, 0, 64)}, "page_size=0 must be at least 1"),
    "slots of 64 bits": (
        # An array of one element, seen 2**27 times: the check is on shapes alone.
        {"pool": np.broadcast_to(np.float32(0), (2**27, 2, 16, 64))},
        "num_pages * page_size=2147483648 must be below 2**31: slots are 32-bit "
        "(key_cache[134217728, 2, 16, 64], cache_layout='HND')",
    ),
    "an unknown backend": ({"backend": "cuda"}, "backend='cuda' must be one of "),
}

COPY_KINDS = {
    "a pool of rank 3": ({"key_cache": zeros(2, 16, 64)}, "key_cache=float32[2, 16, 64] must be"),
    "no pool": ({"key_cache": None}, "key_cache=None must be"),
    "sources of floats": (
        {"sources": zeros(3)},
        "source_{unit}s=float32[3] must be an integer array [num_copies]",
    ),
    "targets of booleans": ({"targets": zeros(3, dtype=bool)}, "target_{unit}s=bool[3] must be"),
    "targets as a list": ({"targets": [1, 2, 3]}, "target_{unit}s=[1, 2, 3] must be"),
    "a backend that is none": ({"backend": 3}, "backend=3 must be"),
}

COPY_VALUES = {
    "an unknown layout": ({"cache_layout": "HDN"}, "cache_layout='HDN' must be one of 'HND',"),
    "other targets": (
        {"targets": zeros(4, dtype=np.int32)},
        "target_{unit}s.shape[0]=4 must be num_copies=3",
    ),
    "a pool of no type that a cache has": (
        {"pool": zeros(8, 2, 16, 64, dtype=np.int16)},
        "key_cache.dtype=int16 must be one of float32, bfloat16, float16, int8,",
    ),
    "values of another type": (
        {"value_cache": INT8_POOL},
        "value_cache.dtype=int8 must be key_cache.dtype=float32: write both with ejk.write",
    ),
    "values of fewer pages": (
        {"value_cache": zeros(7, 2, 16, 64)},
        "value_cache.shape=(7, 2, 16, 64) must be key_cache.shape=(8, 2, 16, 64) but for the last",
    ),
    "values of no width": (
        {"value_cache": zeros(8, 2, 16, 0)},
        "value_cache.shape[3]=0 must be at least 1",
    ),
    "fused pools and another": (
        {"key_cache": zeros(8, 2, 2, 16, 64)},
        "value_cache=float32[8, 2, 16, 64] must be None with a key_cache of five axes",
    ),
    "pages without slots": ({"pool": zeros(8, 2, 0, 64)}, "page_size=0 must be at least 1"),
    "codes without scales": (
        {"pool": INT8_POOL},
        "key_cache.dtype=int8 must come with key_scale and value_scale",
    ),
    "scales of the keys alone": (
        {"pool": INT8_POOL, "key_scale": SCALES},
        "value_scale=None must be a scale per token and head, [8, 2, 16]",
    ),
    "scales of 16 bits": (
        {"key_scale": SCALES.astype(np.float16), "value_scale": SCALES.astype(np.float16)},
        "key_scale.dtype=float16 must be float32 to be written in place",
    ),
    "scales of the values of latent pools": (
        {"value_cache": None, "key_scale": SCALES, "value_scale": SCALES},
        "value_scale=float32[8, 2, 16] must be None: the values are those of the keys",
    ),
    "slots of 64 bits": (
        {"pool": np.broadcast_to(np.float32(0), (2**27, 2, 16, 64))},
        "num_pages * page_size=2147483648 must be below 2**31: slots are 32-bit",
    ),
    "an unknown backend": ({"backend": "cuda"}, "backend='cuda' must be one of "),
}

LATENT = {"value_cache": None, "value_head_dim": 32}
CACHES = {
    "a type that no cache has": (
        dict(cache=np.int16),
        "key_cache.dtype=int16 must be one of float32, bfloat16, float16, int8, float8_e4m3fn, "
        "float8_e5m2, uint8, of which uint8 holds int4",
    ),
    "doubles": (dict(cache=np.float64), "key_cache.dtype=float64 must be one of float32, "),
    "another float8": (
        dict(cache=ml_dtypes.float8_e4m3b11fnuz),
        "key_cache.dtype=float8_e4m3b11fnuz must be one of float32, ",
    ),
    "int4 that is not packed": (
        dict(cache=ml_dtypes.int4),
        "key_cache.dtype=int4 must be one of float32, bfloat16, float16, int8, float8_e4m3fn, "
        "float8_e5m2, uint8, of which uint8 holds int4: int4 has two values a byte",
    ),
    "integers without scales": (
        dict(cache=INT8),
        "key_cache.dtype=int8 must come with key_scale and value_scale: a number, one per KV "
        "head, or one per token and head",
    ),
    "int4 without scales": (
        dict(cache=INT4, width=32),
        "key_cache.dtype=uint8 (int4) must come with key_scale and value_scale: a number, one "
        "per KV head, or one per token and head, which int4 needs",
    ),
    "int4 with one scale": (
        dict(cache=INT4, width=32, key_scale=0.1),
        "key_scale=0.1 must be a scale per token and head, [8, 2, 16], with int4, held as uint8",
    ),
    "int4 of twice the width": (
        dict(cache=INT4, width=64),
        "key_cache.shape[3]=64 must be half of the ",
    ),
    "scales of other heads": (
        dict(cache=INT8, key_scale=zeros(3)),
        "key_scale.shape=(3,) must be (), num_kv_heads=(2,) or, of a scale per token and head, "
        "(8, 2, 16): the cache's but for the last axis",
    ),
    "scales of tokens in another layout": (
        dict(cache=INT8, key_scale=zeros(8, 16, 2), value_scale=zeros(8, 16, 2)),
        "key_scale.shape=(8, 16, 2) must be (), num_kv_heads=(2,) or, of a scale per token and",
    ),
    "scales of the tokens' keys alone": (
        dict(cache=INT8, key_scale=zeros(*OF_TOKENS)),
        "value_scale=None must be a scale per token and head, [8, 2, 16], as that of the keys is",
    ),
    "one scale for the keys of tokens": (
        dict(cache=E4M3, key_scale=0.5, value_scale=zeros(*OF_TOKENS)),
        "key_scale=0.5 must be a scale per token and head, [8, 2, 16], as that of the values is",
    ),
    "scales of doubles": (
        dict(cache=INT8, key_scale=zeros(2, dtype=np.float64)),
        "key_scale.dtype=float64 must be float32, bfloat16 or float16: "
        "pass key_scale.astype(jnp.float32)",
    ),
    "a scale past float32": (
        dict(cache=INT8, key_scale=1e39),
        "key_scale=1e+39 must be a finite float32, at most 3.4e38",
    ),
    "an infinite scale": (
        dict(cache=INT8, value_scale=-np.inf),
        "value_scale=-inf must be a finite float32, at most 3.4e38",
    ),
    "a scale that is no number": (
        dict(cache=INT8, key_scale=np.float32(np.nan)),
        "key_scale=nan must be a finite float32, at most 3.4e38",
    ),
    "values of another type": (
        dict(cache=E4M3, value_cache=zeros(*SHAPE, dtype=ml_dtypes.float8_e5m2)),
        "value_cache.dtype=float8_e5m2 must be key_cache.dtype=float8_e4m3fn: write both with",
    ),
    "scales of both in fused pools": (
        dict(
            cache=INT8, of=(8, 2, 2, 16), ways={"value_cache": None},
            key_scale=zeros(8, 2, 2, 16), value_scale=zeros(8, 2, 2, 16),
        ),
        "value_scale=float32[8, 2, 2, 16] must be None with scales per token of fused pools: "
        "key_scale holds those of keys and values",
    ),
    "scales of values that are the keys": (
        dict(cache=INT8, ways=LATENT, key_scale=0.5, value_scale=0.5),
        "value_scale=0.5 must be None: the values are those of the keys, which key_scale is for",
    ),
    "latent integers without scales": (
        dict(cache=INT8, ways=LATENT),
        "key_cache.dtype=int8 must come with key_scale: a number",
    ),
}  # fmt: skip

WRITTEN_SCALES = {
    "scales of tokens, of a cache that has none computed": (
        dict(key_scale=zeros(*OF_TOKENS), value_scale=zeros(*OF_TOKENS)),
        "key_scale=float32[8, 2, 16] must be a number or one per KV head with "
        "key_cache.dtype=float32: scales per token are computed for quantised caches",
    ),
    "scales that cannot be written in place": (
        dict(
            cache=E4M3,
            key_scale=zeros(*OF_TOKENS, dtype=np.float16),
            value_scale=zeros(*OF_TOKENS, dtype=np.float16),
        ),
        "key_scale.dtype=float16 must be float32 to be written in place: "
        "pass key_scale.astype(jnp.float32)",
    ),
}


PLAN_KINDS = {
    "lengths of floats": ({"context_lens": zeros(2)}, "context_lens=float32[2] must be"),
    "lengths of rank 2": ({"context_lens": TABLE}, "context_lens=int32[2, 3] must be"),
    "lengths as a list": ({"context_lens": [3, 4]}, "context_lens=[3, 4] must be"),
    "a window a sequence": ({"sliding_window": LENS}, "sliding_window=int32[2] must be"),
    "a window in fractions": ({"sliding_window": 1.5}, "sliding_window=1.5 must be"),
    "a page in fractions": ({"page_size": 1.5}, "page_size=1.5 must be an int"),
    "heads on the device": ({"num_heads": jnp.int32(4)}, "num_heads=int32[] must be an int"),
    "a backend that is none": ({"backend": 3}, "backend=3 must be"),
}
PLAN_VALUES = {
    "no heads": ({"num_heads": 0}, "num_heads=0 must be at least 1"),
    "no KV heads": ({"num_kv_heads": 0}, "num_kv_heads=0 must be at least 1"),
    "no head dimension": ({"head_dim": 0}, "head_dim=0 must be at least 1"),
    "no slots": ({"page_size": 0}, "page_size=0 must be at least 1"),
    "less than no blocks": ({"max_blocks": -1}, "max_blocks=-1 must be at least 0"),
    "no values": ({"value_head_dim": 0}, "value_head_dim=0 must be at least 1"),
    "a window of nothing": (
        {"sliding_window": 0},
        "sliding_window=0 must be at least 1: None is no window",
    ),
    "a window of less": ({"sliding_window": np.int8(-3)}, "sliding_window=-3 must be at least 1"),
    "heads that no group divides": (
        {"num_heads": 5},
        "num_heads=5 must be a multiple of num_kv_heads=2",
    ),
    "positions of 64 bits": (
        {"max_blocks": 2**27},
        "max_blocks * page_size=2147483648 must be below 2**31",
    ),
    "an unknown backend": ({"backend": "cuda"}, "backend='cuda' must be one of"),
}

HELPER_KINDS = {
    "merge_attention_states": {
        "LSEs of one part": ({"lses": zeros(4, 2)}, "lses=float32[4, 2] must be"),
        "outputs of one part": ({"outs": zeros(4, 2, 8)}, "outs=float32[4, 2, 8] must be"),
        "LSEs of integers": (
            {"lses": zeros(3, 4, 2, dtype=int)},
            "lses=int64[3, 4, 2] must be a floating-point array",
        ),
    },
    "slot_mapping": {
        "positions of floats": ({"positions": zeros(2)}, "positions=float32[2] must be"),
        "a table as a list": ({"block_tables": [[3], [5]]}, "block_tables=[[3], [5]] must be"),
        "pages on the device": ({"num_pages": jnp.int32(8)}, "num_pages=int32[] must be an int"),
    },
    "ragged_slot_mapping": {
        "bounds of floats": ({"cu_q_lens": zeros(3)}, "cu_q_lens=float32[3] must be"),
        "a number of tokens in fractions": ({"total_tokens": 1.5}, "total_tokens=1.5 must be"),
    },
    "layer_block_tables": {
        "a layer in fractions": ({"layer": 0.5}, "layer=0.5 must be an int or a 0-d integer array"),
        "a truth as layer": ({"layer": True}, "layer=True must be"),
    },
    "layer_slot_mapping": {
        "slots of rank 2": ({"slot_mapping": TABLE}, "slot_mapping=int32[2, 3] must be"),
    },
    "dense_block_tables": {
        "ids of floats": ({"indices": zeros(4)}, "indices=float32[4] must be an integer array"),
        "a width of None": ({"max_blocks": None}, "max_blocks=None must be an int"),
    },
    "accepted_slots": {
        "a path of one sequence": ({"accepted": LENS}, "accepted=int32[2] must be an integer"),
        "paths of truths": ({"accepted": zeros(2, 3, dtype=bool)}, "accepted=bool[2, 3] must be"),
    },
    "empty_kv_cache": {
        "pages in fractions": ({"num_pages": 1.5}, "num_pages=1.5 must be an int"),
        "a truth as pages": ({"num_pages": True}, "num_pages=True must be an int"),
        "a number as a truth": ({"fused": 1}, "fused=1 must be a bool"),
        "heads on the device": ({"num_kv_heads": jnp.int32(4)}, "num_kv_heads=int32[] must be"),
    },
}
PATHS = {
    "no path": ({"path": None}, "path=None must be a str or an os.PathLike"),
    "a file that is open": ({"path": 3}, "path=3 must be a str or an os.PathLike"),
    "a truth": ({"path": True}, "path=True must be a str or an os.PathLike"),
    "bytes": ({"path": b"tuning.json"}, "path=bytes must be a str or an os.PathLike"),
    "what a file holds": (
        {"path": {"version": 1, "entries": []}},
        "path={'entries': [], 'version': 1} must be a str or an os.PathLike",
    ),
    "an array": ({"path": LENS}, "path=int32[2] must be a str or an os.PathLike"),
}
HELPER_VALUES = {
    "merge_attention_states": {
        "LSEs of other parts": (
            {"lses": zeros(2, 4, 2)},
            "lses.shape=(2, 4, 2) must be outs.shape[:3]=(3, 4, 2)",
        ),
    },
    "slot_mapping": {
        "positions of other sequences": (
            {"positions": LENS[:1]},
            "positions.shape[0]=1 must be num_seqs=2",
        ),
        "no slots": ({"page_size": 0}, "page_size=0 must be at least 1"),
        "less than no pages": ({"num_pages": -1}, "num_pages=-1 must be at least 0"),
        "slots of 64 bits": (
            {"num_pages": 2**29},
            "num_pages * page_size=2147483648 must be below 2**31: slots are 32-bit",
        ),
    },
    "ragged_slot_mapping": {
        "lengths of the new tokens": (
            {"cu_q_lens": LENS},
            "cu_q_lens.shape[0]=2 must be num_seqs + 1=3",
        ),
        "lengths of other sequences": (
            {"context_lens": zeros(3, dtype=int)},
            "context_lens.shape[0]=3 must be num_seqs=2",
        ),
        "less than no tokens": ({"total_tokens": -1}, "total_tokens=-1 must be at least 0"),
    },
    "layer_block_tables": {
        "a layer before the first": ({"layer": -1}, "layer=-1 must be at least 0"),
        "less than no pages": ({"num_pages": -1}, "num_pages=-1 must be at least 0"),
    },
    "layer_slot_mapping": {
        "slots of 64 bits": (
            {"layer": 2**20, "num_pages": 2**10},
            "(layer + 1) * num_pages * page_size=4294971392 must be below 2**31",
        ),
        "no slots": ({"page_size": 0}, "page_size=0 must be at least 1"),
    },
    "dense_block_tables": {
        "no bounds": ({"indptr": LENS[:0]}, "indptr.shape[0]=0 must be num_seqs + 1, at least 1"),
        "less than no blocks": ({"max_blocks": -1}, "max_blocks=-1 must be at least 0"),
    },
    "accepted_slots": {
        "paths of other sequences": (
            {"cu_q_lens": zeros(4, dtype=int)},
            "cu_q_lens.shape[0]=4 must be num_seqs + 1=3",
        ),
    },
    "empty_kv_cache": {
        "a type that is none": (
            {"dtype": "int3"},
            "dtype='int3' must be one of float32, bfloat16, float16, int8, float8_e4m3fn, "
            "float8_e5m2, int4: did you mean 'int8'",
        ),
        "a type that no cache has": ({"dtype": np.int32}, "dtype=int32"),
        "slots of 64 bits": (
            {"num_layers": 2**30},
            "num_layers * num_pages * page_size=12884901888 must be below 2**31: slots are 32-bit",
        ),
        "no layers": ({"num_layers": 0}, "num_layers=0 must be at least 1"),
        "an unknown layout": ({"cache_layout": "NDH"}, "cache_layout='NDH' must be one of 'HND'"),
        "fused and latent": (
            {"fused": True, "latent": True},
            "fused=True must not come with latent=True",
        ),
        "fused, and values of a width": (
            {"fused": True, "value_head_dim": 4},
            "value_head_dim=4 must be None with fused=True",
        ),
        "interleaved and fused": (
            {"cache_layout": "INTERLEAVED", "fused": True},
            "fused=True must not come with",
        ),
        "scales of floats": (
            {"token_scales": True},
            "token_scales=True must come with a quantised",
        ),
        "int4 without scales": (
            {"dtype": "int4", "token_scales": False},
            "token_scales=False must not come with int4",
        ),
        "values of half a byte": (
            {"dtype": "int4", "value_head_dim": 3},
            "value_head_dim=3 must be even with int4",
        ),
    },
}

SCALE_KINDS = {
    "a list of scales": (
        {"key_scale": [1.0, 2.0]},
        "key_scale=[1.0, 2.0] must be a number, or a floating-point array without",
    ),
    "scales of integers": ({"key_scale": np.ones(2, np.int32)}, "key_scale=int32[2] must be"),
    "a truth as scale of codes": ({"key_scale": True}, "key_scale=True must be a number"),
    "a scale of codes in words": ({"key_scale": "auto"}, "key_scale='auto' must be a number"),
}


def with_cache(operation, *, cache=np.float32, width=64, of=OF_TOKENS, ways=None, **changes):
    """Return the changes that give a call pools of another type; `ways` are how values are held."""
    ways = dict(ways or {})
    if operation == "write_kv_cache" and ways.pop("value_head_dim", None):
        ways["value"] = None
    pool = zeros(*of, width, dtype=cache)
    return {"key_cache": pool, "value_cache": pool} | ways | changes


class Wrong(NamedTuple):
    """A wrong call: what is changed of the operation's right one, and what is raised."""

    operation: str
    changes: dict[str, Any]
    error: type[Exception]
    begins: str


def _each():
    tables = [
        (["page_attention"], DECODE_KINDS, DECODE_VALUES),
        (["ragged_page_attention"], RAGGED_KINDS, RAGGED_VALUES),
        (["write_kv_cache"], WRITE_KINDS, WRITE_VALUES),
        (["copy_kv_slots", "copy_kv_pages"], COPY_KINDS, COPY_VALUES),
        (["plan_page_attention"], PLAN_KINDS, PLAN_VALUES),
        (["page_attention", "ragged_page_attention", "write_kv_cache"], SCALE_KINDS, CACHES),
        (["write_kv_cache"], {}, WRITTEN_SCALES),
        (["load_tuning", "tuning"], PATHS, {}),
        *(([name], HELPER_KINDS.get(name, {}), HELPER_VALUES[name]) for name in HELPER_VALUES),
    ]
    for operation, right in RIGHT.items():
        for name, x in right().items():
            if isinstance(x, np.ndarray):
                swapped = x.astype(x.dtype.newbyteorder())
                begins = f"{name}.dtype={swapped.dtype.str!r} must be of this machine's byte order"
                wrong = Wrong(operation, {name: swapped}, TypeError, begins)
                yield f"{operation}: {name} of swapped bytes", wrong
    for operations, kinds, values in tables:
        for error, table in ((TypeError, kinds), (ValueError, values)):
            for name, (changes, begins) in table.items():
                for operation in operations:
                    begins_here = begins.replace("{unit}", operation[len("copy_kv_") : -1])
                    if table in (CACHES, WRITTEN_SCALES):
                        changes_here = with_cache(operation, **changes)
                    else:
                        changes_here = changes
                    wrong = Wrong(operation, changes_here, error, begins_here)
                    yield f"{operation}: {name}", wrong


WRONG: dict[str, Wrong] = dict(_each())


def placed(kind, shape=(NUM_PAGES, 4, PAGE, HEAD_DIM), **specs):
    """Place the arrays of calls on eight devices, each split by its spec or on all of them."""
    mesh = jax.make_mesh((2, 4), ("data", "model"), (kind,) * 2)
    rows = {"query": zeros(NUM_SEQS, 8, HEAD_DIM), "key": zeros(3, *shape[1::2])}
    rows |= {"value": rows["key"], "key_cache": zeros(*shape), "value_cache": zeros(*shape)}

    def put(operation):
        given = {n: rows.get(n, x) for n, x in RIGHT[operation]().items()}
        of = {n: jax.NamedSharding(mesh, jax.P(*specs.get(n, ()))) for n in given}
        return {n: jax.device_put(x, of[n]) for n, x in given.items()}

    return put


SPLIT_WRONG = {
    "keys by pages": (
        {"key_cache": ("data",)},
        "key_cache.sharding.spec=P('data', None, None, None) must split only its KV heads, axis 1",
    ),
    "values by slots": (
        {"value_cache": (None, None, "data")},
        "value_cache.sharding.spec=P(None, None, 'data', None) must split only its KV heads, axis",
    ),
    "keys alone": (
        {"key_cache": (None, "model")},
        "value_cache.sharding.spec=P(None, None, None, None) must split its KV heads as "
        "key_cache.sharding.spec=P(None, 'model', None, None) does: keep all pools over the same",
    ),
}
"""How the pools of a call are split under plain `jit`, and how the error begins."""
