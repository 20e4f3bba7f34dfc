"""Other ways to decode over a cache in JAX that `ejk` is timed beside; each needs JAX alone.

A peer is `peer(batch, arrays, query, begun, tables)`: `batch` has the sizes, `arrays` the pools and
the lengths, in the layout that the peer wants. Nothing is begun for any of them.
"""

import warnings
from typing import Any

import jax
import jax.numpy as jnp


def gather(batch: Any, arrays: Any, query: Any, begun: Any, tables: Any) -> Any:
    """Gather every page, einsum, softmax: what one writes without a kernel."""
    tables = jnp.maximum(tables, 0)
    heads = (batch.num_seqs, batch.num_kv_heads)
    keys, values = (
        pool[tables].transpose(0, 2, 1, 3, 4).reshape(*heads, -1, batch.head_dim)
        for pool in (arrays.key_cache, arrays.value_cache)
    )
    q = query.reshape(*heads, -1, batch.head_dim)
    logits = jnp.einsum("skgd,sktd->skgt", q, keys, preferred_element_type=jnp.float32)
    visible = jnp.arange(keys.shape[2]) < arrays.context_lens[:, None]
    logits = jnp.where(visible[:, None, None], logits * batch.head_dim**-0.5, -jnp.inf)
    weights = jax.nn.softmax(logits, axis=-1).astype(values.dtype)
    return jnp.einsum("skgt,sktd->skgd", weights, values).reshape(query.shape)


def pallas_gpu(batch: Any, arrays: Any, query: Any, begun: Any, tables: Any) -> Any:
    """Call JAX's own paged attention for GPUs, over pools of `"KV_HEADS_FIRST"`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        from jax.experimental.pallas.ops.gpu.paged_attention import paged_attention

    tables = jnp.maximum(tables, 0)
    # Its default of 16 splits, where the table allows it.
    splits = next(n for n in (16, 8, 4, 2, 1) if tables.shape[1] % (8 * n) == 0 or n == 1)
    return paged_attention(
        query * jnp.bfloat16(batch.head_dim**-0.5),
        arrays.key_cache,
        arrays.value_cache,
        tables,
        arrays.context_lens,
        k_splits=splits,
        pages_per_compute_block=min(8, tables.shape[1]),
    )


def dense(batch: Any, arrays: Any, query: Any, implementation: Any) -> Any:
    """Call `jax.nn.dot_product_attention` on a contiguous cache, `[seqs, tokens, heads, dim]`."""
    out = jax.nn.dot_product_attention(
        query[:, None],
        arrays.key_cache,
        arrays.value_cache,
        query_seq_lengths=jnp.ones((batch.num_seqs,), jnp.int32),
        key_value_seq_lengths=arrays.context_lens,
        implementation=implementation,
    )
    return out[:, 0]
