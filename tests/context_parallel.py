"""Calls with `axis_name` on four simulated devices, on every backend."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from entries import NO_QUANTISED, Entry, counted
from jax.sharding import AxisType, PartitionSpec
from meshes import arrays, mesh

import ejk
from ejk.backends.layouts import layout_of
from ejk.testing.configurations import E4M3, INT8, INT32_MAX, Configuration
from ejk.testing.page_attention import PageAttentionCase, build
from ejk.testing.ragged_page_attention import RaggedPageAttentionCase
from ejk.testing.shapes import Shape

DEVICES = 4
F32, BF16, F16 = map(np.dtype, (np.float32, ml_dtypes.bfloat16, np.float16))
# Contexts of a few pages on each device, and pools that four devices share.
PLAIN = Shape("pages over four", 8, 2, 32, page_size=4, max_blocks=9, num_pages=40, num_seqs=4)
ODD = Shape("odd pages over four", 3, 1, 20, 3, max_blocks=7, num_pages=28, num_seqs=3)
LATENT = Shape(
    "latent, over four", 4, 1, 24, 8, 5, 20, num_seqs=3, value_head_dim=16, latent=True
)  # fmt: skip
ALL = frozenset({"sliding_window", "attn_logits_soft_cap", "sinks", "alibi_slopes", "attn_scale"})
CONFIGURATIONS = (
    Configuration(PLAIN, F32, "HND", ALL),
    Configuration(PLAIN, BF16, "NHD", ALL - {"alibi_slopes"}, num_splits=2, fused=True),
    Configuration(ODD, F16, "KV_HEADS_FIRST", frozenset({"sinks"}), num_splits=1),
    Configuration(LATENT, BF16, "HND", frozenset({"alibi_slopes"}), num_splits=3),
    Configuration(PLAIN, F32, "INTERLEAVED", frozenset({"sinks"}), num_splits=2),
)
PER_TOKEN = (
    Configuration(PLAIN, BF16, "NHD", ALL, 1, True, INT8, "token"),
    Configuration(LATENT, F32, "KV_HEADS_FIRST", frozenset({"sinks"}), 2, False, E4M3, "token"),
)
FEW = CONFIGURATIONS[1:2]  # what every backend takes
EDGES = build(
    CONFIGURATIONS[0], np.array([0, 1, 36, 23], np.int32), window=INT32_MAX, invalid=0.2, seed=4
)  # fmt: skip
STATIC = ("cache_layout", "attn_logits_soft_cap", "value_head_dim", "num_splits", "causal")


@dataclasses.dataclass(frozen=True)
class Parallel(Entry):
    """One backend under test, its pools split over four devices."""

    def __call__(self, case, devices=DEVICES):
        given, static = split_arguments(case)
        with self.refusing():
            out, lse = program(self.backend, devices, tuple(given), static)(given)
        return np.asarray(out), np.asarray(lse)


ENTRIES = [
    Parallel("xla, pages over devices", ejk.XlaPageAttention(), examples=12, batch_invariant=False),
    Parallel(
        "triton interpreted, pages over devices",
        ejk.TritonPageAttention(interpret=True, num_sms=6),
        examples=10,
        may_refuse=NO_QUANTISED,
    ),
    Parallel(
        "pallas interpreted, pages over devices",
        ejk.PallasPageAttention(interpret=True),
        examples=3,
        may_refuse=(
            *NO_QUANTISED,
            r"float16: the matrix unit takes float32 and bfloat16",
            r"does not support axis_name with alibi_slopes",
        ),
    ),
]
XLA, TRITON, PALLAS = ENTRIES
RAGGED = [
    Parallel("ragged xla, pages over devices", ejk.XlaRaggedPageAttention(), examples=12),
    Parallel(
        "ragged xla in small blocks, pages over devices",
        ejk.XlaRaggedPageAttention(block_q=4, block_kv=8),
        examples=6,
    ),
]


def each_entry(*entries):
    """Run a test of `entry` on each of these, and count it."""

    def decorate(body):
        mark = pytest.mark.parametrize("entry", entries, ids=lambda entry: entry.name)
        return mark(counted(body))

    return decorate


def split_arguments(case: PageAttentionCase):
    """Return a call's arrays, each a program's argument, and what it is compiled for."""
    if isinstance(case, RaggedPageAttentionCase):
        names = ("query", "key_cache", "value_cache", "context_lens", "block_tables", "cu_q_lens")
        given = {n: x for n, x in zip(names, case.operands()) if x is not None}
        options = case.semantics()
    else:
        given, options = arrays(case)
    static = {name: options.pop(name) for name in STATIC if name in options}
    # A window of Python's and one of JAX's are one program.
    given |= {n: jnp.int32(x) if isinstance(x, int) else jnp.asarray(x) for n, x in options.items()}
    integers = ("context_lens", "block_tables", "cu_q_lens")
    given = {name: narrow(x) if name in integers else jnp.asarray(x) for name, x in given.items()}
    return given, tuple(static.items())


def narrow(x):
    """Make integers int32, as a caller has to who passes them to `jit`."""
    if x.dtype.kind not in "iu" or x.dtype == np.int32:
        return jnp.asarray(x)
    limits = np.iinfo(x.dtype)
    x = np.clip(x, max(limits.min, -1), min(limits.max, 2**31 - 1))
    return jnp.asarray(x.astype(np.int32))


@functools.cache
def program(backend, devices, names, static):
    """Compile for arrays of these names, the pools' pages split over so many devices."""
    function = ejk.ragged_page_attention if "cu_q_lens" in names else ejk.page_attention

    def attend(given):
        return function(
            **{"value_cache": None, **given}, **dict(static), axis_name="pages", return_lse=True,
            backend=backend,
        )  # fmt: skip

    return jax.jit(split(attend, names, dict(static)["cache_layout"], devices))


def split(function, names, layout, devices=DEVICES, kind=AxisType.Auto):
    """Run `function(given)` on each of `devices`, all checks of `shard_map` on."""
    return jax.shard_map(
        function,
        mesh=mesh(kind, pages=devices),
        in_specs=(pool_specs(names, layout),),
        out_specs=PartitionSpec(),
    )


def pool_specs(names, layout, axes="pages"):
    """Split the pages of the pools, and nothing else."""
    pages = layout_of(jnp.zeros((1,) * 4), layout).pages
    pool = PartitionSpec(*[None] * pages, axes)
    pools = ("key_cache", "value_cache", "key_scale", "value_scale")  # of tokens
    return {name: pool if name in pools else PartitionSpec() for name in names}


def on_device(case: PageAttentionCase, device_of_page) -> PageAttentionCase:
    """The same call with its pages moved to these devices: `[num_pages]` of them, evenly."""
    order = np.argsort(device_of_page, kind="stable")  # the page that comes to each place
    new = np.empty_like(order)
    new[order] = np.arange(len(order))
    valid = (case.block_tables >= 0) & (case.block_tables < len(order))
    tables = np.where(valid, new[np.where(valid, case.block_tables, 0)], case.block_tables)
    moved = {
        name: None if pool is None else pool[order]
        for name, pool in (("keys", case.keys), ("values", case.values))
    }
    return case.replace(
        **moved, block_tables=tables.astype(case.block_tables.dtype), live=case.live[order]
    )
