"""Calls that type checkers must refuse: exactly the lines that end in `# error`."""

import jax
import jax.numpy as jnp

import ejk

query, bounds = jnp.zeros((2, 4, 64)), jnp.array([0, 1, 2])
pool = jnp.zeros((8, 2, 16, 64))
lens, tables = jnp.zeros(2, int), jnp.zeros((2, 3), int)
a = (query, pool, pool, lens, tables)
axis = "pages"
sizes = {"page_size": 8, "max_blocks": 2}
xla = ejk.XlaPageAttention()

# Arguments that are missing, too many or unknown, whatever `return_lse` is.
ejk.page_attention(query, pool, pool, lens)  # error
ejk.page_attention(query, pool, pool, lens, return_lse=True)  # error
ejk.page_attention(*a, None, None, 0, "NHD")  # error
ejk.page_attention(*a, sm_scale=0.5)  # error
ejk.page_attention(*a, sm_scale=0.5, return_lse=True)  # error
ejk.ragged_page_attention(*a)  # error
ejk.ragged_page_attention(*a, return_lse=True)  # error
ejk.ragged_page_attention(*a, bounds, num_splits=2)  # error
ejk.ragged_page_attention(*a, bounds, num_splits=2, return_lse=True)  # error
ejk.page_attention(*a, axis_name=axis, axis=0, return_lse=True)  # error
ejk.ragged_page_attention(*a, axis_name=axis, return_lse=True)  # error
ejk.write_kv_cache(query, query, pool, pool)  # error
ejk.write_kv_cache(query, query, pool, pool, lens, kv_layout="NHD")  # error
ejk.plan_page_attention(lens, num_heads=4)  # error
ejk.merge_attention_states(query)  # error
ejk.paged_attention(*a)  # error

# Arguments of a wrong type.
ejk.page_attention([[[1.0]]], pool, pool, lens, tables)  # error
ejk.page_attention(query, None, pool, lens, tables)  # error
ejk.page_attention(query, (pool, pool), None, lens, tables)  # error
ejk.page_attention(query, pool, pool, [20, 1], tables)  # error
ejk.page_attention(query, pool, pool, lens, None)  # error
ejk.page_attention(*a, "auto")  # error
ejk.page_attention(*a, max_context_len=jnp.int32(5))  # error
ejk.page_attention(*a, num_splits=1.0, return_lse=True)  # error
ejk.page_attention(*a, cache_layout="nhd")  # error
ejk.page_attention(*a, cache_layout="nhd", return_lse=True)  # error
ejk.page_attention(*a, sliding_window=1.5)  # error
ejk.page_attention(*a, sliding_window=(128, 0))  # error
ejk.page_attention(*a, attn_logits_soft_cap=jnp.float32(5))  # error
ejk.page_attention(*a, sinks=1.0)  # error
ejk.page_attention(*a, value_head_dim=8.0)  # error
ejk.page_attention(*a, plan=tables)  # error
ejk.page_attention(*a, return_lse=1)  # error
ejk.page_attention(*a, backend=3)  # error
ejk.page_attention(*a, backend=ejk.XlaPageAttention)  # error
ejk.page_attention(*a, key_scale="auto")  # error
ejk.ragged_page_attention(*a, bounds, value_scale=[0.5])  # error
ejk.ragged_page_attention(*a, [0, 1, 2])  # error
ejk.ragged_page_attention(*a, bounds, max_q_len=jnp.int32(1), return_lse=True)  # error
ejk.ragged_page_attention(*a, bounds, tree_mask=[[True]])  # error
ejk.page_attention(*a, axis_name=0)  # error
ejk.page_attention(*a, axis_name=axis, page_offset=0.5, return_lse=True)  # error
ejk.plan_page_attention(20, num_heads=4, num_kv_heads=2, head_dim=8, **sizes)  # error
ejk.write_kv_cache(query, query, pool, pool, [0, 1])  # error
ejk.write_kv_cache(query, query, pool, pool, lens, key_scale=(0.5,))  # error
ejk.check_page_attention_inputs(*a, cache_layout="BTNH")  # error
ejk.register_backend("triton")  # error
ejk.XlaPageAttention(block_q=16)  # error

# Results that are taken for something else.
pair: tuple[jax.Array, jax.Array] = ejk.page_attention(*a)  # error
out: jax.Array = ejk.page_attention(*a, return_lse=True)  # error
ejk.page_attention(*a, return_lse=True).astype(int)  # error
ejk.page_attention(*a, return_lse=bool(lens[0])).astype(int)  # error
ejk.write_kv_cache(query, query, pool, pool, lens).update()  # error
xla.block_kv = 3  # error
