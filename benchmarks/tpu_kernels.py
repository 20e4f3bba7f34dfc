"""What `tpu_static` prices: the workloads, `ejk` and the kernels of JAX itself."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from caches import E4M3, INT8, INT8_TOKEN
from workloads import Workload, uniform

import ejk

POOL_BYTES = 2**30  # far more than fits next to a core, where XLA would put smaller ones

_PAGE_16 = uniform("page 16", 32, 8, 128, 16, 2048, 16)
_PAGE_32 = uniform("page 32", 32, 8, 128, 16, 2048, 32)
_PAGE_128 = uniform("page 128", 32, 8, 128, 16, 2048, 128)

QUANTISED = tuple(
    dataclasses.replace(workload, name=f"{name}, {workload.name}", cache=cache)
    for name, cache, workload in (
        ("int8", INT8, _PAGE_16),
        ("int8", INT8, _PAGE_128),
        ("int8 per token", INT8_TOKEN, _PAGE_128),
        ("e4m3", E4M3, _PAGE_16),
        ("e4m3", E4M3, _PAGE_32),
        ("e4m3", E4M3, _PAGE_128),
    )
)
QUANTISED_CHIPS = ("v6e", "v7x")

WORKLOADS = {
    workload.name: workload
    for workload in (
        _PAGE_16,
        _PAGE_128,
        uniform("4,096 tokens", 32, 8, 128, 16, 4096, 16),
        uniform("2 KV heads", 8, 2, 128, 16, 2048, 64),
        uniform("1 KV head", 8, 1, 128, 16, 2048, 128),
        uniform("window", 32, 8, 128, 16, 32768, 16, sliding_window=1024),
        uniform("head dimension 64", 32, 8, 64, 16, 2048, 16),
        uniform("head dimension 96", 32, 8, 96, 16, 2048, 16),
        uniform("head dimension 192", 32, 8, 192, 16, 2048, 16),
        uniform("head dimension 256", 32, 8, 256, 16, 2048, 16),
        dataclasses.replace(uniform("float32", 32, 8, 128, 16, 2048, 16), dtype="float32"),
        dataclasses.replace(uniform("drafts of 8", 32, 8, 128, 16, 4096, 16), new_tokens=8),
        dataclasses.replace(uniform("chunks of 128", 32, 8, 128, 16, 4096, 16), new_tokens=128),
        *QUANTISED,
    )
}

SPLIT_WORKLOADS = ("page 16", "1 KV head", "window", "head dimension 64", "head dimension 96",
                   "head dimension 192", "head dimension 256", "float32",
                   *(workload.name for workload in QUANTISED))  # fmt: skip
FUSED_WORKLOADS = ("page 16", "page 128", "4,096 tokens", "2 KV heads")
RAGGED_WORKLOADS = ("drafts of 8", "chunks of 128")
PEER_WORKLOADS = ("page 16", "page 128", "2 KV heads", "1 KV head", "window", "head dimension 64",
                  "float32")  # fmt: skip
PEER_BLOCK = 2048
"""Tokens that a step of JAX's kernels takes: the best of 512, 1,024 and 2,048 on v5e and v6e."""


def workload(name: str, num_seqs: int) -> Workload:
    """Return a workload of as many sequences, all alike."""
    chosen = WORKLOADS[name]
    return dataclasses.replace(chosen, context_lens=chosen.context_lens[:1] * num_seqs)


def _num_pages(w: Workload) -> int:
    return POOL_BYTES // (w.page_size * w.token_bytes)


def _ejk(w: Workload, where: jax.sharding.Sharding, fused: bool = False, **fields: Any) -> None:
    """Lower the public call; the backend is run on arrays of which it knows the values."""
    options = dict(w.options)
    known = _known(w)
    if "sliding_window" in options:
        known["sliding_window"] = np.full((), options["sliding_window"], np.int32)

    class Known(ejk.PallasPageAttention):
        def run(self, problem, operands, platform):
            with jax.ensure_compile_time_eval():
                return super().run(problem, _concrete(operands, known), platform)

    backend = Known(**fields)
    arrays = _arrays(w, where, fused)
    scales = {}
    if w.held.scales != "none":
        shape = (w.num_kv_heads,) if w.held.scales == "head" else arrays[1].shape[:-1]
        scale = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=where)
        scales = dict(key_scale=scale, value_scale=scale)
    jax.jit(functools.partial(ejk.page_attention, backend=backend, **options)).lower(
        *arrays, **scales
    )


def _ejk_ragged(w: Workload, where: jax.sharding.Sharding, **fields: Any) -> None:
    """The same of a ragged batch, and of its launches of blocks of several tokens alone."""
    bounds = w.new_tokens * np.arange(w.num_seqs + 1, dtype=np.int32)
    known = _known(w) | dict(cu_q_lens=bounds)

    class Known(ejk.PallasRaggedPageAttention):
        def run(self, problem, operands, platform):
            operands = _concrete(operands, known)
            with jax.ensure_compile_time_eval():  # rows are put in blocks before the launch
                operands = operands._replace(query=jnp.asarray(operands.query))
                return super().run(problem, operands, platform)

        def _sizes(self, problem):
            return super()._sizes(problem)[-1:]

    backend = Known(**fields)
    jax.jit(
        functools.partial(ejk.ragged_page_attention, backend=backend, max_q_len=w.new_tokens)
    ).lower(
        *_arrays(w, where, fused=True),
        jax.ShapeDtypeStruct(bounds.shape, jnp.int32, sharding=where),
    )


def _known(w: Workload) -> dict[str, np.ndarray]:
    return dict(
        context_lens=np.array(w.context_lens, np.int32),
        attn_scale=np.full((), w.head_dim**-0.5, np.float32),
    )


def _concrete(operands: Any, known: dict[str, np.ndarray]) -> Any:
    """Put known numbers in the place of operands that are being traced, and zeros."""
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), operands)
    return zeros._replace(**known)


def _arrays(w: Workload, where: jax.sharding.Sharding, fused: bool) -> list[Any]:
    """Return the types of the arguments that all attention to pages has."""

    def array(shape, dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=where)

    halves = (2,) if fused else ()
    pool_shape = (_num_pages(w), *halves, w.num_kv_heads, w.page_size, w.head_dim)
    pool = array(pool_shape, w.held.held_as)
    return [
        array((w.num_seqs * w.new_tokens, w.num_heads, w.head_dim), w.dtype),
        pool,
        None if fused else pool,
        array((w.num_seqs,), jnp.int32),
        array((w.num_seqs, w.max_blocks), jnp.int32),
    ]


def _paged_attention(w: Workload, where: Any, **fields: Any) -> None:
    from jax.experimental.pallas.ops.tpu.paged_attention import paged_attention

    _refuse_options(w)
    pool = np.zeros((w.num_kv_heads, _num_pages(w), w.page_size, w.head_dim), w.dtype)
    paged_attention.__wrapped__(
        np.zeros((w.num_seqs, w.num_heads, w.head_dim), w.dtype),
        pool,
        pool,
        np.array(w.context_lens, np.int32),
        np.zeros((w.num_seqs, w.max_blocks), np.int32),
        **dict(pages_per_compute_block=PEER_BLOCK // w.page_size) | fields,
    )


def _ragged_paged_attention(w: Workload, where: Any, **fields: Any) -> None:
    from jax.experimental.pallas.ops.tpu.ragged_paged_attention import ragged_paged_attention

    rows = 4  # of a block of queries; with more of them it computes more that is not asked for
    tokens = -(-w.num_seqs // rows) * rows
    ragged_paged_attention.__wrapped__(
        np.zeros((tokens, w.num_heads, w.head_dim), w.dtype),
        np.zeros((_num_pages(w), w.page_size, 2 * w.num_kv_heads, w.head_dim), w.dtype),
        np.array(w.context_lens, np.int32),
        np.zeros((w.num_seqs, w.max_blocks), np.int32),
        np.arange(w.num_seqs + 1, dtype=np.int32),
        np.array([w.num_seqs], np.int32),
        num_queries_per_block=rows,
        vmem_limit_bytes=64 * 2**20,
        **dict(num_kv_pages_per_block=PEER_BLOCK // w.page_size) | dict(w.options) | fields,
    )


def _refuse_options(w: Workload) -> None:
    if w.options:
        raise ValueError(f"takes no {w.options[0][0]}")


KERNELS = {
    "ejk": _ejk,
    "ejk, fused pools": functools.partial(_ejk, fused=True),
    "ejk ragged, fused pools": _ejk_ragged,
    "jax paged_attention": _paged_attention,
    "jax ragged_paged_attention": _ragged_paged_attention,
}
"""Each launches one core's share of a workload."""

PRICED = {
    "ejk": SPLIT_WORKLOADS,
    "ejk, fused pools": FUSED_WORKLOADS,
    "ejk ragged, fused pools": RAGGED_WORKLOADS,
    "jax paged_attention": PEER_WORKLOADS,
    "jax ragged_paged_attention": PEER_WORKLOADS,
}

ONE_CORE = ("jax ragged_paged_attention",)
"""Those that leave a chip's second core idle."""
