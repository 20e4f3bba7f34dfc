"""Shared prefixes: the same batch with its groups named and without, in turns: `decode.py`.

Large groups run a third way, too: what they share as a prefill, the rest as decode, then merged.

Of each batch the plans are made before and timed apart, as a model makes them once for all layers.
What counts is device time: `of_base` is that with groups over that without.
"""

import dataclasses
import functools
import statistics
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import programs
import timing
import workloads

import ejk

OWN_TOKENS = 256
PREFIXES = (0, 512, 2048, 8192, 32768)
MEMBERS = (1, 2, 4, 16, 64, 256)
MOST_BYTES = 3 * 2**34  # that a plain call reads
LARGE_GROUP = 32  # sequences whose prefix is a prefill, too


@dataclasses.dataclass(frozen=True)
class Shared(workloads.Workload):
    """A batch whose sequences share `prefix` tokens in each of `num_groups` groups."""

    prefix: int = 0
    num_groups: int = 1

    @property
    def groups(self) -> np.ndarray:
        return np.arange(self.num_seqs, dtype=np.int32) % self.num_groups

    @property
    def prefix_pages(self) -> int:
        return self.prefix // self.page_size

    @property
    def group_size(self) -> int:
        return self.num_seqs // self.num_groups

    @property
    def is_in_calls(self) -> bool:
        return self.prefix > 0 and self.group_size >= LARGE_GROUP

    @property
    def num_pages(self) -> int:
        return super().num_pages - self.prefix_pages * (self.num_seqs - self.num_groups)

    @property
    def kv_bytes(self) -> int:
        """Bytes that have to be read, each once."""
        return super().kv_bytes - self.prefix * self.token_bytes * (self.num_seqs - self.num_groups)


def shared(seqs: int, prefix: int, num_groups: int = 1) -> Shared:
    context = prefix + OWN_TOKENS
    name = f"{seqs} in {num_groups} on {prefix:,}"
    lens = (context,) * seqs
    return Shared(name, 32, 8, 128, lens, 16, context, prefix=prefix, num_groups=num_groups)


TARGETS = (shared(64, 16384), shared(128, 4096, 8))
PREFIX = (
    *TARGETS,
    *(
        found
        for seqs in MEMBERS
        for prefix in PREFIXES
        if seqs * (prefix + OWN_TOKENS) * TARGETS[0].token_bytes <= MOST_BYTES
        for found in (shared(seqs, prefix),)
    ),
)


def block_tables(batch: Shared) -> np.ndarray:
    """Lay the batch out on random pages, those of a group's prefix once."""
    pages = np.random.default_rng(0).permutation(batch.num_pages).astype(np.int32)
    first = batch.prefix_pages
    prefixes, own = np.split(pages, [first * batch.num_groups])
    prefixes = prefixes.reshape(batch.num_groups, first)[batch.groups]
    return np.concatenate([prefixes, own.reshape(batch.num_seqs, -1)], axis=1)


def measure(
    batch: Shared, tiny: bool = False, lock: str | None = None, backend: Any = None
) -> dict[str, Any]:
    """Compile, then check that both ways agree and time them in turns, on pools of several layers.

    What compiles needs no device; drawing and timing wait for the lock.
    """
    if tiny:
        backend = ejk.TritonPageAttention(interpret=True, num_sms=4, least_saved_bytes=0)
    layers = 1 if tiny else max(2, min(16, -(-2 * programs.CACHED // batch.pool_bytes)))
    groups = batch.groups, np.full(batch.num_groups, batch.prefix_pages, np.int32)

    @functools.partial(jax.jit, static_argnums=2)
    def make(lens, table, is_grouped):
        named = {"prefix_groups": groups, "block_tables": table} if is_grouped else {}
        return ejk.plan_page_attention(
            lens, num_heads=batch.num_heads, num_kv_heads=batch.num_kv_heads,
            head_dim=batch.head_dim, page_size=batch.page_size, max_blocks=table.shape[1],
            backend=backend, **named,
        )  # fmt: skip

    @jax.jit
    def call(given, table, plan):
        return ejk.page_attention(*given, table, plan=plan, backend=backend)

    draw = jax.jit(functools.partial(drawn, batch, layers))
    given = jax.eval_shape(draw)
    table = jax.ShapeDtypeStruct((batch.num_seqs, batch.max_blocks), jnp.int32)
    apart = in_calls(batch, backend)
    own = jax.ShapeDtypeStruct((batch.num_seqs, batch.max_blocks - batch.prefix_pages), jnp.int32)
    ways = [(call, table, False), (call, table, True)]
    for way, planned, is_grouped in ways + [(apart, own, False)] * batch.is_in_calls:
        plan = jax.eval_shape(functools.partial(make, is_grouped=is_grouped), given[3], planned)
        make.lower(given[3], planned, is_grouped).compile()
        way.lower(given, table, plan).compile()

    with timing.exclusive(lock):
        given = draw()
        first = block_tables(batch)
        tables = [jnp.asarray(first + i * batch.num_pages) for i in range(layers)]
        plans = [make(given[3], tables[0], is_grouped) for is_grouped in (False, True)]

        def run_with(call, plan):
            return lambda: [call(given, table, plan) for table in tables]

        runs = [run_with(call, plan) for plan in plans]
        if batch.is_in_calls:
            plan = make(given[3] - batch.prefix, tables[0][:, batch.prefix_pages :], False)
            runs.append(run_with(apart, plan))
        plain, *others = (jnp.float32(run()[0]) for run in runs)
        error = max(float(jnp.abs(x - plain).max() / jnp.abs(plain).max()) for x in others)
        if not error < programs.TOLERANCE:
            raise ArithmeticError(f"with groups the result is off by {error:.2g}")
        base_us, device_us, *in_calls_us = (
            statistics.median(map(timing.busy_us, turns)) / layers
            for turns in timing.interleaved(runs)
        )
        plan_us = timing.busy_us(timing.device_kernels(lambda: make(given[3], tables[0], True)))
    line = {
        "device_us": round(device_us, 2),
        "base": "without groups",
        "base_us": round(base_us, 2),
        "of_base": round(device_us / base_us, 4),
        "plan_us": round(plan_us / timing.REPEATS, 2),
        "error": error,
    }
    if in_calls_us:
        line["in_calls_us"] = round(in_calls_us[0], 2)
    return {batch.name: line}


def in_calls(batch: Shared, backend: Any) -> Any:
    """Attend to what groups share by a call of its own, in which they are the sequences."""
    first, size = batch.prefix_pages, batch.group_size
    order = np.argsort(batch.groups, kind="stable")
    places = np.argsort(order)
    bounds = np.arange(batch.num_groups + 1, dtype=np.int32) * size
    lens = np.full(batch.num_groups, batch.prefix, np.int32)

    @jax.jit
    def call(given, table, plan):
        query, keys, values, context_lens = given
        shared = ejk.ragged_page_attention(
            query[order], keys, values, lens, table[order[::size], :first], bounds,
            causal=False, max_q_len=size, return_lse=True,
        )  # fmt: skip
        own = ejk.page_attention(
            query, keys, values, context_lens - batch.prefix, table[:, first:], plan=plan,
            return_lse=True, backend=backend,
        )  # fmt: skip
        outs, lses = (jnp.stack([x[places], y]) for x, y in zip(shared, own))
        return ejk.merge_attention_states(outs, lses)[0].astype(query.dtype)

    return call


def drawn(batch: Shared, layers: int) -> tuple[jax.Array, ...]:
    """Draw a query, pools of so many layers, and lengths."""
    shape = (layers * batch.num_pages, batch.num_kv_heads, batch.page_size, batch.head_dim)
    keys = jax.random.split(jax.random.key(0), 3)
    pools = (jax.random.normal(key, shape, jnp.dtype(batch.dtype)) for key in keys[:2])
    query = (batch.num_seqs, batch.num_heads, batch.head_dim)
    query = 1.5 * jax.random.normal(keys[2], query, jnp.dtype(batch.dtype))
    return query, *pools, jnp.asarray(batch.context_lens, jnp.int32)
