"""Calls that type checkers must accept, with the types that they must infer."""

from typing import assert_type

import jax
import jax.numpy as jnp
import numpy as np

import ejk

Pair = tuple[jax.Array, jax.Array]

query, bounds = jnp.zeros((2, 4, 64)), jnp.array([0, 1, 2])
pool = jnp.zeros((8, 2, 16, 64))
lens, tables = np.zeros(2, np.int32), np.zeros((2, 3), np.int64)
of_numpy, lse = np.int64(4), bool(lens[0])

# What is returned follows from `return_lse`.
assert_type(ejk.page_attention(query, pool, pool, lens, tables), jax.Array)
assert_type(ejk.page_attention(query, pool, pool, lens, tables, return_lse=False), jax.Array)
assert_type(ejk.page_attention(query, pool, pool, lens, tables, return_lse=True), Pair)
assert_type(ejk.page_attention(query, pool, pool, lens, tables, return_lse=lse), jax.Array | Pair)
ejk.page_attention(query, pool, pool, lens, tables, return_lse=np.bool_(True))
assert_type(ejk.ragged_page_attention(query, pool, pool, lens, tables, bounds), jax.Array)
assert_type(
    ejk.ragged_page_attention(query, pool, pool, lens, tables, bounds, return_lse=True), Pair
)
assert_type(
    ejk.ragged_page_attention(query, pool, pool, lens, tables, bounds, return_lse=lse),
    jax.Array | Pair,
)
assert_type(ejk.page_attention(query, pool, pool, lens, tables, axis_name="pages"), jax.Array)
assert_type(
    ejk.page_attention(
        query, pool, pool, lens, tables, axis_name=("data", "pages"), return_lse=True
    ),
    Pair,
)
assert_type(
    ejk.page_attention(query, pool, pool, lens, tables, axis_name="pages", return_lse=lse),
    jax.Array | Pair,
)
assert_type(
    ejk.ragged_page_attention(query, pool, pool, lens, tables, bounds, axis_name="pages"),
    jax.Array,
)
assert_type(
    ejk.ragged_page_attention(
        query, pool, pool, lens, tables, bounds, axis_name="pages", return_lse=True
    ),
    Pair,
)
assert_type(
    ejk.ragged_page_attention(
        query, pool, pool, lens, tables, bounds, axis_name="pages", return_lse=lse
    ),
    jax.Array | Pair,
)

# Integers may be NumPy's, numbers may be traced, None leaves out.
ejk.page_attention(query, pool, pool, lens, tables, np.float32(0.5), of_numpy, of_numpy)
ejk.page_attention(query, pool, pool, lens, tables, jnp.float32(0.5), None, 2)
ejk.page_attention(query, pool, pool, lens, tables, sliding_window=of_numpy)
ejk.page_attention(query, pool, pool, lens, tables, sliding_window=jnp.int32(3))
ejk.page_attention(query, pool, pool, lens, tables, attn_logits_soft_cap=np.float64(30))
ejk.page_attention(query, pool, None, lens, tables, value_head_dim=of_numpy)
ejk.page_attention(query, pool, pool, lens, tables, cache_layout="NHD", backend="triton")
ejk.page_attention(query, pool, pool, lens, tables, backend=ejk.XlaPageAttention(block_kv=128))
ejk.page_attention(np.zeros((2, 4, 64), np.float32), pool, pool, lens, tables, sinks=np.zeros(4))
plan = ejk.plan_page_attention(
    lens,
    num_heads=of_numpy,
    num_kv_heads=of_numpy,
    head_dim=of_numpy,
    page_size=of_numpy,
    max_blocks=of_numpy,
    value_head_dim=of_numpy,
)
assert_type(plan, ejk.PageAttentionPlan)
ejk.page_attention(query, pool, pool, lens, tables, plan=plan)
written = ejk.write_kv_cache(query, query, pool, pool, lens)
assert_type(written, tuple[jax.Array, jax.Array | None])
ejk.write_kv_cache(query, None, pool, None, lens)
copied = ejk.copy_kv_slots(pool, None, lens, lens)
ejk.copy_kv_pages(copied[0], copied[1], lens, lens, cache_layout="NHD")
assert_type(ejk.merge_attention_states(jnp.zeros((2, 1, 4, 8)), jnp.zeros((2, 1, 4))), Pair)

# Scales are numbers or arrays; what a write returns follows from them, as far as types can say.
codes, scales = pool.astype(jnp.int8), jnp.ones((8, 2, 16))
ejk.page_attention(query, codes, codes, lens, tables, key_scale=0.5, value_scale=np.float32(2))
ejk.page_attention(query, codes, codes, lens, tables, key_scale=scales, value_scale=scales)
ejk.ragged_page_attention(query, codes, codes, lens, tables, bounds, key_scale=scales[0, :, 0])
rows, slots = jnp.ones((3, 2, 64)), np.zeros(3, np.int32)
assert_type(
    ejk.write_kv_cache(rows, rows, codes, codes, slots, key_scale=0.5),
    tuple[jax.Array, jax.Array | None],
)
_, _, new_key_scale, new_value_scale = ejk.write_kv_cache(
    rows, rows, codes, codes, slots, key_scale=scales, value_scale=scales
)
