"""Calls whose arrays are split over eight simulated devices, and what their programs move."""

import math
import re

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import ejk
from ejk.backends.layouts import layout_of
from ejk.testing.configurations import Configuration
from ejk.testing.page_attention import build
from ejk.testing.shapes import Shape

MANY_DEVICES = jax.device_count() >= 8
SPLIT = Shape("split", 16, 4, 32, page_size=16, num_seqs=8, num_pages=30)
LENGTHS = np.array([0, 1, 15, 16, 17, 47, 48, 33], np.int32)
NAMES = ("query", "key_cache", "value_cache", "context_lens", "block_tables", "sinks",
         "alibi_slopes", "key_scale", "value_scale")  # fmt: skip
COLLECTIVE = re.compile(
    r"= (\S+|\(.*?\)) (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter|"
    r"collective-broadcast)(?:-start)?\("
)
ARRAY = re.compile(r"(?:[a-z]+(\d+)\w*|pred)\[([\d,]*)\]")


def mesh(kind=AxisType.Auto, **sizes):
    sizes = sizes or {"data": 2, "model": 4}
    count = math.prod(sizes.values())
    axes = tuple(sizes)
    return jax.make_mesh(
        tuple(sizes.values()), axes, axis_types=(kind,) * len(axes), devices=jax.devices()[:count]
    )


def split_case(shape=SPLIT, lengths=LENGTHS, dtype=np.float32, layout="HND", fused=False,
               features=("sinks", "alibi_slopes"), **changes):  # fmt: skip
    cache = {name: changes.pop(name) for name in ("cache_dtype", "scales") if name in changes}
    config = Configuration(
        shape, np.dtype(dtype), layout, frozenset(features), changes.pop("num_splits", 0), fused,
        **cache,
    )  # fmt: skip
    return build(config, lengths, **changes)


def arrays(case):
    """The arrays of a call by name, and what else it is given."""
    named = dict(zip(NAMES, case.operands())) | case.semantics()
    given = {name: named.pop(name) for name in NAMES if named.get(name) is not None}
    named.pop("value_cache", None)
    return given, {"num_splits": case.num_splits, **named}


def specs(given, layout, *, seqs=None, kv_heads=None, heads=None):
    """How each array is split, with sequences and heads over these mesh axes."""
    pool = given["key_cache"]
    of_pool = [None] * pool.ndim
    of_pool[layout_of(pool, layout).kv_heads] = kv_heads
    heads = kv_heads if heads is None else heads
    every = dict(
        query=(seqs, heads), key_cache=of_pool, value_cache=of_pool, context_lens=(seqs,),
        block_tables=(seqs,), sinks=(heads,), alibi_slopes=(heads,),
    )  # fmt: skip
    for name in ("key_scale", "value_scale"):
        if name in given:
            every[name] = of_pool[:-1] if given[name].ndim > 1 else (kv_heads,)
    return {name: PartitionSpec(*every.get(name, ())) for name in given}


def put(on, given, placed):
    return {
        name: jax.device_put(x, NamedSharding(on, placed.get(name, PartitionSpec())))
        for name, x in given.items()
    }


def tpus(kind):
    """A mesh of eight chips that nobody has to have."""
    pytest.importorskip("libtpu")
    topologies = pytest.importorskip("jax.experimental.topologies")
    devices = np.array(topologies.get_topology_desc("v5e:2x4", "tpu").devices).reshape(2, 4)
    return jax.sharding.Mesh(devices, ("data", "model"), axis_types=(kind,) * 2)


def types(on, given, placed):
    """What `put` would place, without arrays."""
    return {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(on, placed[name]))
        for name, x in given.items()
    }


def attend(backend, options):
    def function(given):
        return ejk.page_attention(
            **{"value_cache": None, **given}, **options, return_lse=True, backend=backend
        )

    return function


def run(function, given):
    """Compile for arrays as they are split; return the results, and the program's text."""
    compiled = jax.jit(function).lower(given).compile()
    return compiled(given), compiled.as_text()


def collectives(program: str) -> list[tuple[str, int]]:
    """Each collective that a program holds, with the bytes of its result on a device."""
    return [
        (match[2], sum(map(_bytes, ARRAY.finditer(match[1]))))
        for match in COLLECTIVE.finditer(program)
    ]


def makers(program: str, shape) -> set[str]:
    """The instructions that make an array of this shape."""
    sizes = ",".join(map(str, shape))
    found = re.findall(rf"= \w+\[{sizes}\]\S* ([\w-]+)\(", program)
    return set(found) - {"parameter", "get-tuple-element"}


def _bytes(match) -> int:
    return int(match[1] or 8) // 8 * math.prod(int(n) for n in match[2].split(",") if n)
