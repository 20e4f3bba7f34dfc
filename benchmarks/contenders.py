"""Who is timed: `ejk`, and what else decodes over a cache in JAX.

A contender reads arrays in the layout it wants, all from the same draws, with one function
`step(workload, arrays, query, begun, tables)` that every layer of a program calls.
"""

import dataclasses
import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import timing  # noqa: F401  it says where `ejk.cli` is
import workloads
from workloads import Workload

import ejk
from ejk.cli import _peers


@dataclasses.dataclass(frozen=True)
class Contender:
    """How to run a workload.

    Attributes:
        name: in results and tables.
        cache_layout: of the pool that it reads.
        begin: what is made once a program, given workload and arrays: a plan, or nothing.
        step: one layer's attention, given what was begun and the layer's own block tables.
        can_run: says why it does not take a workload, or returns None.
        contiguous: it reads one dense cache instead of pages.
        one_layer: it takes no pool that holds more pages than one layer's.
        most_bytes: of the pools that are made for it.
    """

    name: str
    step: Callable[[Workload, Any, jax.Array, Any, jax.Array], jax.Array]
    cache_layout: str = "HND"
    begin: Callable[[Workload, Any], Any] = lambda workload, arrays: None
    can_run: Callable[[Workload], str | None] = lambda workload: None
    contiguous: bool = False
    one_layer: bool = False
    most_bytes: int = 8 * 2**30


def layer_tables(workload: Workload, arrays: Any, layer: int) -> jax.Array:
    """The block tables of one layer of a pool that holds several."""
    tables = arrays.block_tables
    return jnp.where(tables >= 0, tables + layer * workload.num_pages, -1)


def _plan(backend, workload, arrays):
    if workload.num_seqs == 1:
        return None
    # Not of 16 bits: `compare.py` also times an `ejk` whose plans do not take it.
    dtype = arrays.key_cache.dtype
    cache = {"cache_dtype": dtype} if dtype not in (jnp.bfloat16, jnp.float16) else {}
    return ejk.plan_page_attention(
        arrays.context_lens,
        num_heads=workload.num_heads,
        num_kv_heads=workload.num_kv_heads,
        head_dim=workload.head_dim,
        page_size=workload.page_size,
        max_blocks=workload.max_blocks,
        sliding_window=dict(workload.options).get("sliding_window"),
        value_head_dim=workload.value_head_dim,
        backend=backend,
        **cache,
    )


def _ejk(backend, workload, arrays, query, plan, tables):
    options = dict(workload.options)
    for name in ("sinks", "alibi_slopes"):
        if name in options:
            options[name] = jnp.full((workload.num_heads,), options[name], jnp.float32)
    for name in ("key_scale", "value_scale"):
        if (scale := getattr(arrays, name)) is not None:
            options[name] = scale
    result = ejk.page_attention(
        query,
        arrays.key_cache,
        arrays.value_cache,
        arrays.context_lens,
        tables,
        plan=plan,
        value_head_dim=workload.value_head_dim,
        backend=backend,
        **options,
    )
    return result[0] if options.get("return_lse") else result


def ejk_contender(name: str, backend: Any) -> Contender:
    begin, step = functools.partial(_plan, backend), functools.partial(_ejk, backend)
    return Contender(name, step, begin=begin)


def _cudnn_paged(workload, arrays, query, _, tables):
    from jax._src.cudnn.fused_attention_stablehlo import MaskType, paged_attention

    tables = jnp.maximum(tables, 0)[:, None, :, None]
    one = jnp.ones((workload.num_seqs,), jnp.int32)
    out = paged_attention(
        query[:, :, None],
        arrays.key_cache,
        arrays.value_cache,
        one,
        arrays.context_lens,
        tables,
        tables,
        scale=workload.head_dim**-0.5,
        mask_type=MaskType.PADDING,
        qkv_layout="BNTH",
    )
    return out.reshape(query.shape)


def _cudnn_paged_refusal(workload):
    if workload.num_pages != workload.num_seqs * workload.max_blocks:
        return "wants a pool of exactly as many pages as its table has entries"
    return "head dimension above 128" if workload.head_dim > 128 else None


def _cudnn_dense(workload, arrays, query, _, tables):
    return _peers.dense(workload, arrays, query, "cudnn")


def contenders(tiny: bool = False) -> list[Contender]:
    """`ejk` first, then the others, as far as they are installed; or `ejk` alone, interpreted."""
    if tiny:
        return [ejk_contender("ejk", ejk.TritonPageAttention(interpret=True, num_sms=6))]
    found = [
        ejk_contender("ejk", None),
        Contender("ejk without a plan", functools.partial(_ejk, None)),
        ejk_contender("ejk xla", "xla"),
        Contender("gather and einsum", _peers.gather),
        Contender("Pallas GPU paged_attention", _peers.pallas_gpu, cache_layout="KV_HEADS_FIRST"),
        Contender(
            "cuDNN paged (private)", _cudnn_paged, can_run=_cudnn_paged_refusal, one_layer=True
        ),
        Contender("cuDNN dense, contiguous cache", _cudnn_dense, contiguous=True, one_layer=True),
    ]
    if importlib.util.find_spec("ejkernel"):
        found.append(Contender("ejkernel", _ejkernel))
    if importlib.util.find_spec("flash_attn3_jax"):
        found.append(
            Contender("flash-attn3-jax", _flash_attn3, "NHD", can_run=_flash_attn3_refusal)
        )
    return found


def _ejkernel(workload, arrays, query, _, tables):
    from ejkernel.kernels._triton.page_attention import page_attention

    return page_attention(
        query,
        arrays.key_cache,
        arrays.value_cache,
        arrays.context_lens,
        jnp.maximum(tables, 0),
        attn_scale=workload.head_dim**-0.5,
        max_context_len=workload.max_context_len,
    )


def _flash_attn3(workload, arrays, query, _, tables):
    from flash_attn3_jax import flash_mha_with_kvcache

    # It has no rule of its own: as many splits as give every multiprocessor a program.
    programs = workload.num_seqs * workload.num_kv_heads
    out = flash_mha_with_kvcache(
        query[:, None],
        arrays.key_cache,
        arrays.value_cache,
        cache_seqlens=arrays.context_lens,
        page_table=jnp.maximum(tables, 0),
        num_splits=max(1, jax.devices()[0].core_count // programs),
    )
    return out[:, 0]


def _flash_attn3_refusal(workload):
    return None if workload.head_dim == 128 else "its wheel has head dimension 128 alone"


def contiguous_arrays(workload: Workload, seed: int = 0) -> workloads.Arrays:
    """The same draws as `workloads.arrays` in one dense cache, `[seqs, tokens, heads, dim]`."""
    paged = workloads.arrays(workload, layers=1, seed=seed)

    @jax.jit
    def dense(pool):
        pages = pool[jnp.maximum(paged.block_tables, 0)].transpose(0, 1, 3, 2, 4)
        return pages.reshape(workload.num_seqs, -1, workload.num_kv_heads, workload.head_dim)

    return paged._replace(key_cache=dense(paged.key_cache), value_cache=dense(paged.value_cache))
