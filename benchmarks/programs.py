"""The programs that decode attention is timed with; each is checked first."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import caches
import contenders
import jax
import jax.numpy as jnp
import numpy as np
import workloads

CALLS = 8
LAYERS = 32
CACHED = 2**28  # bytes; a program that reads less may find them in the GPU's cache
TOLERANCE = 2e-2  # of the largest value, in bfloat16; what is timed must first be right

# A workload, a contender's name, and what measures it.
Job = tuple[workloads.Workload, str, Callable[[], dict[str, Any]]]


class Checked(NamedTuple):
    """What runs a workload; a contender has been checked on it."""

    error: float
    calls: int  # calls of one `run`
    run: Callable[[], Any]


def num_layers(workload, contender) -> int:
    """Return how many layers the pool of a workload holds."""
    if contender.one_layer:
        return 1
    most = contender.most_bytes // workload.pool_bytes
    return max(1, min(LAYERS if workload.pool_bytes > 2**24 else 2 * LAYERS, most))


def prepare(workload, contender) -> tuple[Checked, Callable[[], Any]]:
    """Check one contender on one workload; return chained calls, and a step.

    A step is a program of `LAYERS` calls with all that it makes once for them.
    """
    layers = num_layers(workload, contender)
    if contender.contiguous:
        arrays = contenders.contiguous_arrays(workload)
    else:
        arrays = workloads.arrays(workload, layers, contender.cache_layout)

    def tables_of_layer(arrays, layer):
        return contenders.layer_tables(workload, arrays, layer % layers)

    def program(calls):
        def run(query, rest, tables=None):
            given = workloads.Arrays(query, *rest)
            begun = contender.begin(workload, given)
            for layer in range(calls):
                own = tables_of_layer(given, layer) if tables is None else tables[layer]
                query = contender.step(workload, given, query, begun, own)
            return query

        return run

    query, *rest = arrays
    calls = CALLS if CALLS * workload.pool_bytes > CACHED else 2 * LAYERS
    tables = [tables_of_layer(arrays, layer) for layer in range(calls)]
    error = check(workload, contender, arrays, jax.jit(program(1))(query, rest))
    run = jax.jit(program(calls))
    stack = jax.jit(program(LAYERS), donate_argnums=0)
    donated = jnp.array(query)

    def step():
        nonlocal donated
        donated = stack(donated, rest)
        return donated

    return Checked(error, calls, lambda: run(query, rest, tables)), step


def uncached_layers(workload) -> int:
    return max(2, min(2 * LAYERS, -(-2 * CACHED // workload.pool_bytes)))


def compile_calls(workload, contender, layers: int | None = None) -> Callable[[], Checked]:
    """Compile a program of one call, which needs no device; return what draws and checks.

    There are calls on the pages of so many layers: if None, of more bytes than a cache holds.
    """
    layers = layers or uncached_layers(workload)

    @jax.jit
    def draw(key):
        arrays = workloads.arrays(workload, layers, contender.cache_layout, key=key)
        return arrays, [contenders.layer_tables(workload, arrays, i) for i in range(layers)]

    @jax.jit
    def begin(arrays):
        return contender.begin(workload, arrays)

    @jax.jit
    def call(arrays, begun, tables):
        return contender.step(workload, arrays, arrays.query, begun, tables)

    def ready():
        arrays, tables = draw(jax.random.key(0))
        begun = begin(arrays)

        def run():
            return [call(arrays, begun, own) for own in tables]

        error = check(workload, contender, arrays, call(arrays, begun, tables[0]))
        return Checked(error, layers, run)

    key = jax.eval_shape(lambda: jax.random.key(0))
    arrays, tables = jax.eval_shape(draw, key)
    begun = jax.eval_shape(begin, arrays)
    draw.lower(key).compile()
    begin.lower(arrays).compile()
    call.lower(arrays, begun, tables[0]).compile()
    seq = jax.ShapeDtypeStruct((), jnp.int32)
    expected.lower(workload, contender.cache_layout, arrays, seq).compile()
    return ready


def check(workload, contender, arrays, out) -> float:
    """Compare a few sequences with float32 products over gathered keys and values."""
    options = {k: v for k, v in workload.options if k != "return_lse"}
    if options or contender.contiguous:
        return float("nan")  # the tests check options; a dense cache has no pages to gather
    worst = 0.0
    for seq in sorted({0, workload.num_seqs // 2, workload.num_seqs - 1}):
        right = np.asarray(expected(workload, contender.cache_layout, arrays, np.int32(seq)))
        own = np.asarray(out[seq], np.float32)[:, : right.shape[-1]]
        worst = max(worst, float(np.abs(own - right).max() / np.abs(right).max()))
    if not worst < TOLERANCE:
        raise AssertionError(
            f"{contender.name} is wrong on {workload.name}: relative error {worst:.1e}"
        )
    return float(f"{worst:.1e}")


@functools.partial(jax.jit, static_argnums=(0, 1))
def expected(workload, cache_layout: str, arrays, seq) -> jax.Array:
    """Return one sequence's attention in float32, without a product that a GPU would round."""
    pages = jnp.maximum(arrays.block_tables[seq], 0)
    axis = 1 if cache_layout == "KV_HEADS_FIRST" else 0
    head_axis = workloads.HEAD_AXIS[cache_layout]
    order = {"HND": (1, 0, 2, 3), "NHD": (2, 0, 1, 3), "KV_HEADS_FIRST": (0, 1, 2, 3)}

    def contiguous(codes, scale):
        if scale is not None and scale.ndim > 1:
            scale = jnp.take(scale, pages, axis=axis)
        own = caches.Pool(jnp.take(codes, pages, axis=axis), scale)
        rows = caches.dequantise(workload.held, own, head_axis).transpose(order[cache_layout])
        return rows.reshape(workload.num_kv_heads, 1, -1, workload.head_dim)

    keys = contiguous(arrays.key_cache, arrays.key_scale)  # [num_kv_heads, 1, tokens, head_dim]
    values = keys[..., : workload.value_head_dim]
    if not workload.latent:
        values = contiguous(arrays.value_cache, arrays.value_scale)
    query = arrays.query[seq].astype(jnp.float32)
    query = query.reshape(workload.num_kv_heads, -1, 1, workload.head_dim)
    logits = (query * keys).sum(-1) * workload.head_dim**-0.5
    logits = jnp.where(jnp.arange(keys.shape[2]) < arrays.context_lens[seq], logits, -jnp.inf)
    weights = jax.nn.softmax(logits, axis=-1)[..., None]
    return (weights * values).sum(2).reshape(workload.num_heads, -1)
