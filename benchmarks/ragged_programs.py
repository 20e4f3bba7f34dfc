"""The programs that ragged batches are timed with; each is checked first."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import caches
import jax
import jax.numpy as jnp
import programs
import ragged_batches
from ragged_batches import Arrays, Batch

import ejk

DENSE = "cuDNN dense, contiguous"
IN_GROUPS = "ejk triton, prefix_groups"

Step = Callable[[Batch, Arrays], jax.Array]


def contenders(batch: Batch, interpret: bool) -> dict[str, Step]:
    """What can run a batch, by name."""
    if interpret:
        return _interpreted(batch)
    found: dict[str, Step] = {
        f"ejk {name}": functools.partial(attend, name) for name in ("mosaic_gpu", "triton")
    }
    if batch.sharing is not None:
        found[IN_GROUPS] = functools.partial(attend, "triton", in_groups=True)
    if batch.total_tokens == len(batch.q_lens):
        found["ejk page_attention"] = functools.partial(_decode, "triton")
    if is_dense(batch):
        found[DENSE] = functools.partial(_dense, "cudnn")
    return found


def is_dense(batch: Batch) -> bool:
    """Say whether cuDNN's dense attention does the same, on tensors of the same shape."""
    equal = batch.q_lens == batch.context_lens and len(set(batch.q_lens)) == 1
    plain = not batch.options and batch.value_head_dim is None and batch.cache is None
    return equal and plain


def _interpreted(batch: Batch) -> dict[str, Step]:
    """What can run a batch on a CPU."""
    if batch.head_dim >= 64 and batch.value_head_dim is None:  # a kernel of Hopper's
        backend = ejk.MosaicGpuRaggedPageAttention(interpret=True, num_sms=2)
        return {"ejk mosaic_gpu": functools.partial(attend, backend)}
    backend = ejk.TritonRaggedPageAttention(interpret=True, num_sms=6)
    found: dict[str, Step] = {"ejk triton": functools.partial(attend, backend)}
    if batch.sharing is not None:
        shares = dataclasses.replace(backend, least_saved_bytes=0)
        found[IN_GROUPS] = functools.partial(attend, shares, in_groups=True)
    if batch.total_tokens == len(batch.q_lens):
        decode_backend = ejk.TritonPageAttention(interpret=True)
        found["ejk page_attention"] = functools.partial(_decode, decode_backend)
    if is_dense(batch):
        found[DENSE] = functools.partial(_dense, None)
    return found


def own_choice(batch: Batch, interpret: bool) -> Step:
    """Return what `ejk` chooses by itself; on a CPU, the kernel that runs there."""
    if interpret:
        return next(iter(_interpreted(batch).values()))
    return functools.partial(attend, None)


def attend(backend: Any, batch: Batch, given: Arrays, in_groups: bool = False) -> jax.Array:
    options: dict[str, Any] = dict(batch.options)
    if in_groups:
        options["prefix_groups"] = given.prefix_groups
    if "sinks" in options:
        options["sinks"] = jnp.full((batch.num_heads,), options["sinks"], jnp.float32)
    for name in ("key_scale", "value_scale"):
        if (scale := getattr(given, name)) is not None:
            options[name] = scale
    result = ejk.ragged_page_attention(
        *given[:6],
        max_q_len=max(batch.q_lens),
        value_head_dim=batch.value_head_dim,
        backend=backend,
        **options,
    )
    return result[0] if options.get("return_lse") else result


def _decode(backend: Any, batch: Batch, given: Arrays) -> jax.Array:
    return ejk.page_attention(*given[:5], backend=backend)


def _dense(implementation: Any, batch: Batch, given: Arrays) -> jax.Array:
    """`given` holds keys and values as `contiguous` makes them: all sequences are equally long."""
    query = given.query.reshape(len(batch.q_lens), -1, batch.num_heads, batch.head_dim)
    out = jax.nn.dot_product_attention(
        query, given.key_cache, given.value_cache, is_causal=True, implementation=implementation
    )
    return out.reshape(given.query.shape)


def contiguous(batch: Batch, given: Arrays) -> Arrays:
    """Gather the pages: `[num_seqs, tokens, num_kv_heads, head_dim]`."""

    def dense(pool):
        pages = pool[given.block_tables].transpose(0, 1, 3, 2, 4)
        pages = pages.reshape(len(batch.q_lens), -1, batch.num_kv_heads, batch.head_dim)
        return pages[:, : batch.context_lens[0]]

    return given._replace(key_cache=dense(given.key_cache), value_cache=dense(given.value_cache))


def chain(batch: Batch, step: Step, calls: int, query: jax.Array, given: Arrays) -> jax.Array:
    """Call after call, each with the queries that the one before has written."""
    for _ in range(calls):
        query = step(batch, given._replace(query=query))
    return query


def row_error(
    batch: Batch, given: Arrays, out: jax.Array, seq: jax.Array, row: jax.Array, token: jax.Array
) -> jax.Array:
    """Compare one row, a new token, with sums in float32; of products a GPU would round some."""
    options, pages = dict(batch.options), jnp.maximum(given.block_tables[seq], 0)

    def own(codes, scale):  # [num_kv_heads, 1, tokens, head_dim]
        if scale is not None and scale.ndim > 1:
            scale = scale[pages]
        tokens = caches.dequantise(batch.pages.held, caches.Pool(codes[pages], scale), 1)
        return tokens.transpose(1, 0, 2, 3).reshape(batch.num_kv_heads, 1, -1, batch.head_dim)

    keys = own(given.key_cache, given.key_scale)
    values = keys if given.value_cache is None else own(given.value_cache, given.value_scale)
    query = given.query[row].astype(jnp.float32)
    query = query.reshape(batch.num_kv_heads, -1, 1, batch.head_dim)
    logits = (query * keys).sum(-1) * batch.head_dim**-0.5
    if cap := options.get("attn_logits_soft_cap"):
        logits = cap * jnp.tanh(logits / cap)
    distance = token - jnp.arange(keys.shape[2])
    logits = jnp.where((distance >= 0) & (distance < batch.window), logits, -jnp.inf)
    sink = jnp.full((*logits.shape[:2], 1), options.get("sinks", -jnp.inf))
    weights = jax.nn.softmax(jnp.concatenate([logits, sink], -1), axis=-1)[..., :-1, None]
    right = (weights * values[..., : batch.value_head_dim]).sum(2).reshape(batch.num_heads, -1)
    return jnp.abs(out[row].astype(jnp.float32) - right).max() / jnp.abs(right).max()


class Tools(NamedTuple):
    """What a batch is drawn, gathered and checked with, compiled."""

    draw: Callable[[], Arrays]
    gather: Callable[[Arrays], Arrays]
    row_error: Callable[..., jax.Array]


class Program(NamedTuple):
    """A contender on a batch, compiled."""

    batch: Batch
    is_dense: bool
    call: Callable[[jax.Array, Arrays], jax.Array]
    chained: Callable[[jax.Array, Arrays], jax.Array]  # `batch.calls` calls


class Ready(NamedTuple):
    """A program that was checked."""

    batch: Batch
    error: float
    run: Callable[[], jax.Array]


def shapes_of(batch: Batch) -> Arrays:
    return jax.eval_shape(functools.partial(ragged_batches.arrays, batch))


def compile_tools(batch: Batch) -> Tools:
    """Compile, which needs no device, what every contender on a batch needs."""
    given, number = shapes_of(batch), jax.ShapeDtypeStruct((), jnp.int32)
    width = batch.value_head_dim or batch.head_dim
    out = jax.ShapeDtypeStruct((*given.query.shape[:2], width), given.query.dtype)
    gather = functools.partial(contiguous, batch) if is_dense(batch) else lambda given: given
    return Tools(
        jax.jit(functools.partial(ragged_batches.arrays, batch)).lower().compile(),
        jax.jit(gather).lower(given).compile(),
        jax.jit(functools.partial(row_error, batch))
        .lower(given, out, number, number, number)
        .compile(),
    )


def compile_program(batch: Batch, step: Step, dense: bool = False) -> Program:
    """Compile one contender on one batch."""
    given = shapes_of(batch)
    if dense:
        given = jax.eval_shape(functools.partial(contiguous, batch), given)
    call, *several = (
        jax.jit(functools.partial(chain, batch, step, calls)).lower(given.query, given).compile()
        for calls in sorted({1, batch.calls})
    )
    return Program(batch, dense, call, several[0] if several else call)


def prepare(program: Program, tools: Tools, given: Arrays) -> Ready:
    """Check a program; what is right may be timed."""
    own = tools.gather(given) if program.is_dense else given
    error = check(program.batch, tools, given, program.call(own.query, own))
    return Ready(program.batch, error, lambda: program.chained(own.query, own))


def check(batch: Batch, tools: Tools, given: Arrays, out: jax.Array) -> float:
    """Compare a few rows of a few sequences."""
    worst = 0.0
    for seq in sorted({0, len(batch.q_lens) // 2, len(batch.q_lens) - 1}):
        q_len, n = batch.q_lens[seq], batch.context_lens[seq]
        for i in sorted({0, q_len // 3, q_len - 1}):
            where = seq, sum(batch.q_lens[:seq]) + i, n - q_len + i
            worst = max(worst, float(tools.row_error(given, out, *map(jnp.int32, where))))
    if not worst < programs.TOLERANCE:
        raise AssertionError(f"wrong on {batch.name}: relative error {worst:.1e}")
    return float(f"{worst:.1e}")
