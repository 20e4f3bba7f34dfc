"""The same call gives the same bits, 1,000 times over, and a request's bits depend on it alone.

What a property of its operation holds already is not said again here.
"""

import functools
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from edges import LENS, config
from entries import RAGGED, counted, each_of, writer_edge
from jax.sharding import NamedSharding, PartitionSpec

import ejk
from ejk.testing.bits import bits_equal
from ejk.testing.configurations import BF16, E4M3, INT8
from ejk.testing.ragged_page_attention import build_ragged
from ejk.testing.write_kv_cache import SHAPES, build

pytestmark = pytest.mark.slow

ON_GPU = bool(os.environ.get("EJK_TEST_GPU"))
SEQS, HEADS, KV_HEADS, WIDTH, PAGE, BLOCKS, PAGES, TOTAL = 5, 4, 2, 64, 16, 12, 70, 24


def arrays(dtype):
    """Long and short contexts, so that work is cut; slots and copies that meet."""
    rng = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(rng.standard_normal(shape), dtype)

    pool = PAGES, KV_HEADS, PAGE, WIDTH
    return {
        "query": normal(SEQS, HEADS, WIDTH),
        "tokens": normal(TOTAL, HEADS, WIDTH),
        "key": normal(TOTAL, KV_HEADS, WIDTH),
        "pools": (normal(*pool), normal(*pool)),
        "lens": jnp.array([192, 17, 150, 1, 90], jnp.int32),
        "tables": jnp.asarray(rng.permutation(PAGES)[: SEQS * BLOCKS].reshape(SEQS, -1), jnp.int32),
        "bounds": jnp.array([0, 9, 10, 16, 17, 24], jnp.int32),
        "ids": jnp.asarray(rng.integers(0, 30, (2, TOTAL)), jnp.int32),
    }


def decode(x, backend, **hints):
    return ejk.page_attention(
        x["query"], *x["pools"], x["lens"], x["tables"], return_lse=True, backend=backend, **hints
    )


def grouped(x, backend):
    tables = x["tables"].at[:, :2].set(x["tables"][0, :2])
    groups = jnp.zeros(SEQS, jnp.int32), jnp.array([2], jnp.int32)
    return decode(x | {"tables": tables}, backend, prefix_groups=groups)


def ragged(x, backend):
    where = x["lens"], x["tables"], x["bounds"]
    return ejk.ragged_page_attention(
        x["tokens"], *x["pools"], *where, return_lse=True, backend=backend
    )


def write(x, backend):
    return ejk.write_kv_cache(x["key"], x["key"], *x["pools"], x["ids"][0], backend=backend)


def copy(x, backend):
    return ejk.copy_kv_slots(*x["pools"], *x["ids"], backend=backend)


CALLS = {
    "decode": (decode, "PageAttention"),
    "decode, in parts": (functools.partial(decode, num_splits=3), "PageAttention"),
    "decode, groups": (grouped, "PageAttention"),
    "ragged": (ragged, "RaggedPageAttention"),
    "write": (write, "WriteKVCache"),
    "copy": (copy, "CopyKVCache"),
}
KINDS = {"Xla": 1000, "Triton": 1000 if ON_GPU else 3}
"""How often: kernels that are interpreted take what others do a hundred times over."""


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CALLS)
def test_a_call_gives_the_same_bits_every_time(name, kind):
    """Between the calls others run, and memory is used anew."""
    function, ending = CALLS[name]
    fields = {} if kind == "Xla" or ON_GPU else {"interpret": True, "num_sms": 6}
    if ending in ("WriteKVCache", "CopyKVCache"):
        fields.pop("num_sms", None)
    backend = getattr(ejk, kind + ending)(**fields)
    x = arrays(jnp.bfloat16 if ON_GPU else jnp.float32)
    run = jax.jit(lambda x: function(x, backend))
    equal = jax.jit(lambda a, b: jnp.array([jnp.array_equal(*ab) for ab in zip(a, b)]).all())

    def as_bits(results):
        return [jax.lax.bitcast_convert_type(r, f"uint{8 * r.dtype.itemsize}") for r in results]

    first = as_bits(run(x))
    others, same = [], []
    for number in range(KINDS[kind]):
        others = [*others[-3:], jnp.full(1000 + number % 7, jnp.nan)]
        same.append(equal(first, as_bits(run(x))))
    assert jnp.stack(same).all()


@each_of([entry for entry in RAGGED if not entry.slow])
@counted
def test_a_larger_pool_changes_no_bit_of_a_ragged_batch(entry):
    bounds = np.array([0, 1, 4, 4, 7, 8, 9, 10, 11, 13], np.int32)
    case = build_ragged(config(dtype=entry.dtype), LENS, bounds)
    bits_equal(entry(case), entry(case.permuted(seed=4, more_pages=5)))


@writer_edge
@pytest.mark.parametrize("cache, scales", [(INT8, "token"), (E4M3, "head"), (None, "none")])
def test_what_a_token_is_written_as_depends_on_it_alone(entry, cache, scales):
    """Not on the tokens beside it, nor on its place among them, nor on how large the pool is."""
    rng, shape = np.random.default_rng(1), SHAPES[0]
    slots = rng.permutation(shape.num_slots)[: shape.num_tokens].astype(np.int32)
    case = build(shape, BF16, "NHD", slots, cache_dtype=cache, scales=scales)
    together, order = entry(case), rng.permutation(shape.num_tokens)
    shuffled = {"key": case.key[order], "value": case.value[order], "slot_mapping": slots[order]}
    bits_equal(together, entry(case.replace(**shuffled)))

    def larger(pool):
        return np.concatenate([pool, pool[:2]]) if np.ndim(pool) > 2 else pool

    alone = case.replace(
        key_cache=larger(case.key_cache), value_cache=larger(case.value_cache),
        scales=tuple(map(larger, case.scales)),
        slot_mapping=np.where(np.arange(shape.num_tokens) == 3, slots, -1).astype(np.int32),
    )  # fmt: skip
    at = divmod(int(slots[3]), shape.page_size)
    bits_equal([x[at] for x in together], [x[at] for x in entry(alone)])


@pytest.mark.parametrize("devices", [2, 4])
def test_copies_have_the_same_bits_on_any_number_of_devices(devices):
    if jax.device_count() < devices:
        pytest.skip(f"needs {devices} devices")
    x = arrays(jnp.float32)
    pools = tuple(jnp.concatenate([pool, pool], axis=1) for pool in x["pools"])  # four KV heads
    expected = ejk.copy_kv_slots(*pools, *x["ids"])
    mesh = jax.make_mesh((devices,), ("heads",), (jax.sharding.AxisType.Auto,),
                         devices=jax.devices()[:devices])  # fmt: skip
    place = NamedSharding(mesh, PartitionSpec(None, "heads"))
    found = jax.jit(ejk.copy_kv_slots)(*jax.device_put(pools, place), *x["ids"])
    bits_equal(found, expected)
