"""`docs/errors.md` says what is raised: each row is put to the test, word for word."""

import functools
import pathlib
import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import test_errors
import test_paging_errors
import wrong_calls
from jax.sharding import PartitionSpec as P
from wrong_calls import zeros

import ejk
from ejk.compat.flash_attention import flash_attn_with_kvcache as flash
from ejk.paging import BatchInputs

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "errors.md"
ROW = re.compile(r"^\| (.+) \| `(\w+): (.+)` \|$", re.MULTILINE)
INT = np.int32


def decode(**changes):
    return functools.partial(ejk.page_attention, **wrong_calls.decode(**changes))


def ragged(**changes):
    return functools.partial(ejk.ragged_page_attention, **wrong_calls.ragged(**changes))


def write(**changes):
    return functools.partial(ejk.write_kv_cache, **wrong_calls.write(**changes))


def copy(**changes):
    return functools.partial(ejk.copy_kv_slots, **wrong_calls.RIGHT["copy_kv_slots"](**changes))


def checked_ragged(**changes):
    right = dict(context_lens=np.array([20, 5]), cu_q_lens=np.array([0, 2, 5]))
    ejk.check_ragged_page_attention_inputs(**wrong_calls.ragged(**right | changes))


def checked_write(**changes):
    ejk.check_write_kv_cache_inputs(**write(**changes).keywords)


def plan(**changes):
    return ejk.plan_page_attention(**wrong_calls.RIGHT["plan_page_attention"](**changes))


def split(**changes):
    """A call on pages of one device, inside `jax.shard_map`."""
    arguments = wrong_calls.decode() | {"axis_name": "pages"} | changes
    query = jnp.asarray(arguments.pop("query"))
    auto = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((1,), ("pages",), auto, devices=jax.devices()[:1])

    def attend(query):
        return ejk.page_attention(query, **arguments)

    return jax.shard_map(attend, mesh=mesh, in_specs=(arguments.pop("spec", P()),), out_specs=P())(
        query
    )


def paging(call):
    """A call of a page manager."""
    case = test_paging_errors.Case()
    return lambda: call(case.manager, case)


def missing(call, *names):
    return call.func(**{n: x for n, x in call.keywords.items() if n not in names})


def wide(*shape, dtype=INT):
    """An array of one element, seen often: checks are on shapes alone."""
    return np.broadcast_to(dtype(0), shape)


class Foreign:
    """Another library's array."""

    shape, dtype, ndim = (2, 4, 64), "torch.float32", 3

    def __dlpack__(self):
        raise AssertionError("nothing is converted")


Foreign.__module__ = "torch"
POOL = zeros(8, 2, 16, 64)
FUSED = zeros(8, 2, 2, 16, 64)
INT8_POOL = zeros(8, 2, 16, 64, dtype=np.int8)
LENS, TABLES = zeros(2, dtype=INT), zeros(2, 3, dtype=INT)
ELSEWHERE = {"axis_name": "pages", **wrong_calls.decode()}

# What is done, as the page has it, and a call that does it.
MISTAKES = {
    # Names
    "a keyword of another library": decode(sm_scale=0.5),
    "the same, and arguments are missing": lambda: ejk.page_attention(softmax_scale=0.5),
    "a window to the left of the token": decode(window_left=127),
    "the same as a pair": decode(window_size=(127, 0)),
    "a number that hides logits": decode(mask_value=-1e30),
    "a causal mask": decode(causal=True),
    "a pool of both": decode(kv_cache=FUSED),
    "rows of pages": decode(kv_indptr=LENS),
    "the size of a page": decode(page_size=16),
    "the type of the result": decode(out_dtype=jnp.float32),
    "tuning": decode(num_warps=4),
    "scales of a quantised cache": decode(k_scale=1.0),
    "an argument of another operation": decode(cu_q_lens=LENS),
    "a name that is nearly right": decode(block_tabels=TABLES),
    "a name that nothing here has": lambda: ejk.merge_attention_states(base=2),
    "the same of a drop-in, here FlashAttention 2's": lambda: flash(block_table=TABLES),
    "an argument that a drop-in does not take": lambda: flash(alibi_slopes=zeros(4)),
    "an argument that is missing": lambda: missing(decode(), "block_tables"),
    "an argument given twice": lambda: ejk.page_attention(zeros(2, 4, 64), **decode().keywords),
    "too many by position": lambda: ejk.merge_attention_states(1, 2, 3),
    "an operation of another library": lambda: ejk.paged_attention,
    "somebody who hands out pages": lambda: ejk.BlockManager,
    "a name that is nearly right, of the package": lambda: ejk.PageAttention,
    # Arrays
    "a wrong number of axes": decode(query=zeros(4, 64)),
    "a batch of queries of several tokens": decode(query=zeros(2, 1, 4, 64)),
    "tuning that is no path": lambda: ejk.load_tuning(3),
    "bytes of another machine": decode(query=zeros(2, 4, 64, dtype=">f4")),
    "a list where an array is needed": decode(context_lens=[20, 1]),
    "a list of rows of several lengths": decode(block_tables=[[3, 5], [1]]),
    "a list of arrays": decode(query=[zeros(4, 64), zeros(4, 64)]),
    "an array of another library": decode(query=Foreign()),
    "a shape alone": decode(query=jax.ShapeDtypeStruct((2, 4, 64), jnp.float32)),
    "a float where an integer is needed": decode(context_lens=zeros(2)),
    "the tables before the lengths": decode(context_lens=TABLES, block_tables=LENS),
    "a table of one sequence, or a flat one": decode(block_tables=zeros(3, dtype=INT)),
    "values forgotten": lambda: ejk.page_attention(zeros(2, 4, 64), POOL, LENS, TABLES),
    "a pair of pools as one": decode(key_cache=(POOL, POOL), value_cache=None),
    "what `ejk.empty_kv_cache` returns": decode(key_cache=ejk.KVCache(POOL, POOL)),
    "all of an `ejk.KVCache`, `*cache`": lambda: ejk.page_attention(
        zeros(2, 4, 64), *ejk.KVCache(POOL, POOL), LENS, TABLES
    ),
    "the same of one that has scales of tokens": lambda: ejk.page_attention(
        zeros(2, 4, 64), *ejk.KVCache(POOL, POOL, *[zeros(8, 2, 16)] * 2), LENS, TABLES
    ),
    "either, of what takes no more by position": lambda: ejk.write_kv_cache(
        zeros(2, 2, 64), zeros(2, 2, 64), *ejk.KVCache(POOL, POOL), LENS
    ),
    "the inputs of a batch": lambda: ejk.ragged_page_attention(
        zeros(2, 4, 64), POOL, POOL, BatchInputs(*[LENS] * 6)
    ),
    "a pool for each layer": decode(key_cache=[POOL] * 3),
    "a fused pool of all layers": decode(key_cache=zeros(5, 8, 2, 2, 16, 64), value_cache=None),
    "a class where an object is needed": decode(backend=ejk.XlaPageAttention),
    # Traced and static
    "an array as `max_context_len`": decode(max_context_len=jnp.int32(20)),
    "an array as `num_splits`": decode(num_splits=jnp.int32(2)),
    "None as `num_splits`": decode(num_splits=None),
    "a traced soft cap": lambda: jax.jit(lambda cap: decode(attn_logits_soft_cap=cap)())(5.0),
    "a traced width": lambda: jax.jit(lambda n: decode(value_cache=None, value_head_dim=n)())(32),
    "a traced `return_lse`": lambda: jax.jit(lambda lse: decode(return_lse=lse)())(True),
    # Pools
    "a query of another float type": decode(query=zeros(2, 4, 64, dtype=np.float64)),
    "a cache of a type that none has": decode(pool=zeros(8, 2, 16, 64, dtype=np.int16)),
    "a wrong layout, or heads that do not group": decode(cache_layout="NHD"),
    "a layout in lower case": decode(cache_layout="nhd"),
    "vLLM's name of a type": lambda: ejk.empty_kv_cache(8, 2, 16, 64, dtype="fp8"),
    "an unknown layout": decode(cache_layout="BTNH"),
    "keys of another width than the query": decode(query=zeros(2, 4, 32)),
    "a pool of `[2, num_pages, ...]`": decode(key_cache=zeros(2, 8, 2, 16, 64), value_cache=None),
    "a pool of all layers": decode(pool=zeros(5, 8, 2, 16, 64)),
    "fused pools, and a value cache": decode(key_cache=FUSED),
    "fused pools, and latent attention": decode(
        key_cache=FUSED, value_cache=None, value_head_dim=32
    ),
    "values that do not fit the keys": decode(value_cache=zeros(4, 2, 16, 64)),
    "no values, no latent attention and no fused pools": decode(value_cache=None),
    "`value_head_dim` with a value cache": decode(value_head_dim=32),
    # Quantised caches
    "int8 without scales": decode(pool=INT8_POOL),
    "int4 that is not packed": decode(pool=zeros(8, 2, 16, 64, dtype=ml_dtypes.int4)),
    "int4 of two bytes a pair, or bytes of float8": decode(
        pool=zeros(8, 2, 16, 64, dtype=np.uint8)
    ),
    "int4 with scales of heads": decode(
        pool=zeros(8, 2, 16, 32, dtype=np.uint8), key_scale=zeros(2), value_scale=zeros(2)
    ),
    "an odd head dimension with int4": decode(
        query=zeros(2, 4, 33), pool=zeros(8, 2, 16, 16, dtype=np.uint8)
    ),
    "scales of another shape": decode(pool=INT8_POOL, key_scale=zeros(8, 16, 2)),
    "scales per token of the keys alone": decode(pool=INT8_POOL, key_scale=zeros(8, 2, 16)),
    "scales of the values of fused pools": decode(
        key_cache=FUSED, value_cache=None, key_scale=zeros(8, 2, 2, 16), value_scale=0.5
    ),
    "scales of the values of latent attention": decode(
        value_cache=None, value_head_dim=32, key_scale=0.5, value_scale=0.5
    ),
    "scales of 64 bits": decode(pool=INT8_POOL, key_scale=zeros(2, dtype=np.float64)),
    "a list of scales": decode(pool=INT8_POOL, key_scale=[0.5, 0.5]),
    "a gradient of codes": lambda: jax.grad(
        lambda pool: decode(key_cache=pool, value_cache=pool)().sum()
    )(jnp.zeros((8, 2, 16, 64), jnp.float8_e4m3fn)),
    "a write of scales per token to a float cache": write(
        key_scale=zeros(8, 2, 16), value_scale=zeros(8, 2, 16)
    ),
    "a write of scales of 16 bits": write(
        pool=INT8_POOL,
        key_scale=zeros(8, 2, 16, dtype=np.float16),
        value_scale=zeros(8, 2, 16, dtype=np.float16),
    ),
    "a gradient through a write of codes": lambda: jax.grad(
        lambda key: write(key=key, pool=INT8_POOL, key_scale=0.5)()[0].astype(jnp.float32).sum()
    )(jnp.zeros((3, 2, 64))),
    # Values
    "another number of sequences": decode(block_tables=zeros(1, 3, dtype=INT)),
    "-1 as a window": decode(sliding_window=-1),
    "a window for each sequence": decode(sliding_window=LENS),
    "a pair as a window": decode(sliding_window=(128, 0)),
    "a pair that is no window": decode(sliding_window=(-1, -1)),
    "negative splits": decode(num_splits=-1),
    "sinks or slopes of 64 bits": decode(sinks=zeros(4, dtype=np.float64)),
    "sinks or slopes of another length": decode(sinks=zeros(3)),
    "2^31 positions or more": decode(block_tables=wide(2, 2**27)),
    "2^31 pages or more": decode(pool=wide(2**31, 2, 16, 64, dtype=np.float32)),
    "a backend that nobody has": decode(backend="cudnn"),
    "groups that are no pair": decode(prefix_groups=LENS),
    "groups of other sequences": decode(prefix_groups=(zeros(3, dtype=INT), LENS)),
    "a plan for groups, without the tables": lambda: plan(prefix_groups=(LENS, LENS)),
    "a plan for another batch or model": lambda: decode(plan=plan(num_heads=32))(),
    "a field out of range": lambda: ejk.TritonPageAttention(block_kv=24),
    "a kernel for an accelerator, where a CPU is all there is": decode(backend="pallas"),
    "a backend that cannot run the call": decode(backend=test_errors.Picky(), sinks=zeros(4)),
    # Ragged
    "bounds that are no integers": ragged(cu_q_lens=zeros(3)),
    "lengths of the new tokens as bounds": ragged(cu_q_lens=LENS),
    "positions or a mask of other rows": ragged(positions=zeros(4, dtype=INT)),
    "a mask that is no bool": ragged(tree_mask=zeros(5, 2)),
    "a tree mask beside `causal=False`": ragged(tree_mask=zeros(5, 2, dtype=bool), causal=False),
    "a negative `max_q_len`": ragged(max_q_len=-1),
    "a backend of another operation": ragged(backend=ejk.PallasPageAttention()),
    # Pages split over devices
    "an axis that is not there": lambda: split(axis_name="seqs"),
    "a call outside `jax.shard_map`": lambda: ejk.page_attention(**ELSEWHERE),
    "a query that is split over the axis": lambda: split(spec=P("pages")),
    "a negative offset": lambda: split(page_offset=-1),
    "an offset without an axis": decode(page_offset=3),
    "a plan": lambda: split(plan=plan(), backend="xla"),
    # Writes
    "a batch of new tokens": write(key=zeros(1, 3, 2, 64)),
    "slots of a batch": write(slot_mapping=zeros(1, 3, dtype=INT)),
    "slots that are no integers": write(slot_mapping=zeros(3)),
    "new tokens of integers": write(key=zeros(3, 2, 64, dtype=np.int8)),
    "new tokens with the heads first": write(rows=zeros(2, 3, 64)),
    "other heads than the pools'": write(cache_layout="NHD"),
    "keys of another width than the pools": write(key=zeros(3, 2, 32)),
    "values of other tokens": write(value=zeros(4, 2, 64)),
    "values and no pool for them, or the reverse": write(value_cache=None),
    "fused pools without values": write(key_cache=FUSED, value_cache=None, value=None),
    "another number of slots": write(slot_mapping=zeros(4, dtype=INT)),
    # Copies
    "more sources than targets": copy(targets=zeros(2, dtype=INT)),
    "pages of a batch, `[copies, 2]`": lambda: ejk.copy_kv_pages(
        POOL, POOL, zeros(3, 2, dtype=INT), zeros(3, dtype=INT)
    ),
    "codes without the scales that move with them": copy(
        key_cache=INT8_POOL, value_cache=INT8_POOL
    ),
    "a gradient through copies of codes": lambda: jax.grad(
        lambda pool: copy(key_cache=pool, value_cache=pool)()[0].astype(jnp.float32).sum()
    )(jnp.zeros((8, 2, 16, 64), jnp.float8_e4m3fn)),
    "paths of other sequences": lambda: ejk.accepted_slots(
        zeros(3, dtype=INT), TABLES, zeros(2, dtype=INT)
    ),
    # Checks
    "a length past the table": lambda: ejk.check_page_attention_inputs(
        **wrong_calls.decode(context_lens=np.array([20, 49]))
    ),
    "a page that is none": lambda: ejk.check_page_attention_inputs(
        **wrong_calls.decode(context_lens=LENS + 20, block_tables=TABLES - np.array([0, 1, 0]))
    ),
    "bounds that fall": lambda: checked_ragged(cu_q_lens=np.array([0, 4, 2])),
    "more new tokens than tokens": lambda: checked_ragged(context_lens=np.array([1, 2])),
    "a position below 0": lambda: checked_ragged(positions=np.array([0, 0, -1, 1, 2])),
    "a token that does not see itself": lambda: checked_ragged(
        tree_mask=~np.eye(5, 3, k=-2, dtype=bool)
    ),
    "a slot outside the pool": lambda: checked_write(slot_mapping=np.array([0, 128, 5])),
    "two tokens for one slot": lambda: checked_write(slot_mapping=np.array([5, -1, 5])),
    "a slot of a page that no sequence has": lambda: checked_write(
        slot_mapping=np.array([0, 1, 32]), block_tables=TABLES
    ),
    # Pages on the host
    "a size below 1": lambda: test_paging_errors.Case(page_size=0),
    "too many slots": lambda: test_paging_errors.Case(num_pages=2**29),
    "a prompt without tokens": paging(lambda m, c: m.allocate([])),
    "a token that is none": paging(lambda m, c: m.allocate([1, -1])),
    "a sequence that is too long": paging(lambda m, c: m.allocate(range(13))),
    "more pages than there are": paging(lambda m, c: m.append([0, 1], [1] * 10, [2, 8])),
    "more sequences than there are rows": paging(lambda m, c: m.allocate([1])),
    "a sequence that has ended": paging(lambda m, c: m.free(7)),
    "a sequence twice": paging(lambda m, c: m.free([0, 1, 0])),
    "several tokens each without their numbers": paging(lambda m, c: m.append([0, 1], [1, 2, 3])),
    "numbers that leave tokens over": paging(lambda m, c: m.append([0, 1], [1, 2, 3], [1, 1])),
    "a fork of what is not computed": paging(lambda m, c: m.fork(c.waiting)),
    "cut to more than there is": paging(lambda m, c: m.truncate(0, 6)),
    "cut behind the window": lambda: test_paging_errors.windowed().truncate(0, 8),
    "a step without tokens": paging(lambda m, c: m.batch([0])),
    "a step of too many tokens": paging(lambda m, c: m.batch([1], [3])),
    "a batch committed twice": paging(lambda m, c: m.commit(c.batch)),
    "a batch of another manager": paging(
        lambda m, c: m.commit(test_paging_errors.Case().manager.batch([1]))
    ),
}
ROWS = {mistake: (error, said) for mistake, error, said in ROW.findall(PAGE.read_text())}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_what_is_raised_is_what_the_page_says(mistake):
    with pytest.raises(Exception) as info:
        MISTAKES[mistake]()
    error, said = ROWS[mistake]
    text = " ".join(str(info.value).split())
    assert len(text) < 2000
    assert type(info.value).__name__ == error
    assert text.startswith(said[: -len(" ...")]) if said.endswith(" ...") else text == said


def test_the_page_says_nothing_else():
    assert set(ROWS) == set(MISTAKES)
    assert PAGE.read_text().count("Error: ") == len(ROWS)


class Large:
    """An array on a device."""

    shape, dtype, ndim = (10**6,), np.dtype(np.float32), 1

    def __repr__(self):
        raise AssertionError("it would be copied from the device")


@pytest.mark.parametrize("argument", ["query", "cache_layout", "num_splits", "backend", "plan"])
@pytest.mark.parametrize(
    "value",
    [
        Large(),
        zeros(4, 100, 100).tolist(),
        [[[Large()] * 100] * 100] * 100,
        {f"layer {i}": [Large()] * 100 for i in range(100)},
        ("page" * 10**5,),
    ],
    ids=["array", "numbers", "arrays", "dictionary", "words"],
)
def test_no_message_is_long_or_copies_an_array(argument, value):
    with pytest.raises((TypeError, ValueError)) as info:
        decode(**{argument: value})()
    assert len(str(info.value)) < 2000
