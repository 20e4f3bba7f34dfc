"""Every wrong argument and what is said of it: the argument, its value and the rule."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ejk

pytestmark = pytest.mark.fast

NUM_SEQS, NUM_HEADS, HEAD_DIM, NUM_PAGES, KV_HEADS, PAGE = 2, 4, 64, 8, 2, 16


def zeros(*shape, dtype=np.float32):
    return np.zeros(shape, dtype)


def arguments(**changes):
    """A right call, changed. `pool=` changes both caches."""
    pool = changes.pop("pool", zeros(NUM_PAGES, KV_HEADS, PAGE, HEAD_DIM))
    right = {
        "query": zeros(NUM_SEQS, NUM_HEADS, HEAD_DIM),
        "key_cache": pool,
        "value_cache": pool,
        "context_lens": zeros(NUM_SEQS, dtype=np.int32),
        "block_tables": zeros(NUM_SEQS, 3, dtype=np.int32),
    }
    return right | changes


RANK_AND_KIND = {
    "query of rank 2": (
        {"query": zeros(4, 64)},
        "query=float32[4, 64] must be a floating-point array [num_seqs, num_heads, head_dim]",
    ),
    "query of integers": ({"query": zeros(2, 4, 64, dtype=np.int32)}, "query=int32[2, 4, 64]"),
    "query of float64": (
        {"query": zeros(2, 4, 64, dtype=np.float64)},
        "query.dtype=float64 must be one of float32, bfloat16, float16",
    ),
    "query of complex numbers": ({"query": zeros(2, 4, 64, dtype=np.complex64)}, "query=complex64"),
    "query as a list": ({"query": [[[1.0]]]}, "query=[[[1.0]]] must be"),
    "keys of rank 3": (
        {"key_cache": zeros(2, 16, 64)},
        "key_cache=float32[2, 16, 64] must be a numeric array of four axes, or five of fused "
        "pools, as cache_layout says",
    ),
    "keys of rank 6": ({"key_cache": zeros(1, 8, 2, 2, 16, 64)}, "key_cache=float32[1, 8,"),
    "values of rank 3": ({"value_cache": zeros(2, 16, 64)}, "value_cache=float32[2, 16, 64]"),
    "keys as None": ({"key_cache": None}, "key_cache=None must be"),
    "lengths of floats": (
        {"context_lens": zeros(2)},
        "context_lens=float32[2] must be an integer array [num_seqs]",
    ),
    "keys of random numbers as lengths": (
        {"context_lens": jax.random.split(jax.random.key(0), 2)},
        "context_lens=key<fry>[2] must be an integer array [num_seqs]",
    ),
    "lengths of booleans": ({"context_lens": zeros(2, dtype=bool)}, "context_lens=bool[2]"),
    "lengths of rank 2": (
        {"context_lens": zeros(2, 1, dtype=np.int32)},
        "context_lens=int32[2, 1]",
    ),
    "tables of rank 1": (
        {"block_tables": zeros(6, dtype=np.int32)},
        "block_tables=int32[6] must be an integer array [num_seqs, max_blocks]",
    ),
    "tables of floats": ({"block_tables": zeros(2, 3)}, "block_tables=float32[2, 3]"),
    "a scale a head": ({"attn_scale": zeros(4)}, "attn_scale=float32[4] must be"),
    "a scale in words": ({"attn_scale": "auto"}, "attn_scale='auto' must be"),
    "a complex scale": ({"attn_scale": np.complex64(1j)}, "attn_scale=complex64[] must be"),
    "a truth as scale": ({"attn_scale": True}, "attn_scale=True must be a number"),
    "a truth as cap": ({"attn_logits_soft_cap": True}, "attn_logits_soft_cap=True must be"),
    "a window a sequence": (
        {"sliding_window": zeros(2, dtype=np.int32)},
        "sliding_window=int32[2] must be",
    ),
    "a window in fractions": ({"sliding_window": 1.5}, "sliding_window=1.5 must be"),
    "a truth as window": ({"sliding_window": True}, "sliding_window=True must be an int"),
    "a traced cap": ({"attn_logits_soft_cap": jnp.float32(5)}, "attn_logits_soft_cap="),
    "sinks of integers": ({"sinks": zeros(4, dtype=np.int32)}, "sinks=int32[4] must be"),
    "one sink": ({"sinks": 1.0}, "sinks=1.0 must be"),
    "slopes of rank 2": ({"alibi_slopes": zeros(1, 4)}, "alibi_slopes=float32[1, 4] must be"),
    "splits in fractions": ({"num_splits": 1.0}, "num_splits=1.0 must be"),
    "splits on the device": ({"num_splits": jnp.int32(1)}, "num_splits="),
    "a truth as splits": ({"num_splits": True}, "num_splits=True must be an int"),
    "a bound on the device": ({"max_context_len": jnp.int32(1)}, "max_context_len="),
    "a width in fractions": ({"value_cache": None, "value_head_dim": 8.0}, "value_head_dim=8.0"),
    "a backend that is none": ({"backend": 3}, "backend=3 must be"),
    "a module as backend": ({"backend": np}, "backend=module must be"),
}

MISFIT_AND_RANGE = {
    "heads that no group divides": (
        {"query": zeros(2, 7, 64)},
        "num_heads=7 must be a multiple of num_kv_heads=2",
    ),
    "fewer heads than KV heads": (
        {"query": zeros(2, 1, 64)},
        "num_heads=1 must be a multiple of num_kv_heads=2",
    ),
    "no heads": ({"query": zeros(2, 0, 64)}, "num_heads=0 must be at least 1"),
    "no KV heads": ({"pool": zeros(8, 0, 16, 64)}, "num_kv_heads=0 must be at least 1"),
    "no head dimension": (
        {"query": zeros(2, 4, 0), "pool": zeros(8, 2, 16, 0)},
        "head_dim=0 must be at least 1",
    ),
    "pages without slots": ({"pool": zeros(8, 2, 0, 64)}, "page_size=0 must be at least 1"),
    "keys of another width": (
        {"key_cache": zeros(8, 2, 16, 32)},
        "key_cache.shape[3]=32 must be the query's head_dim=64",
    ),
    "keys of integers": ({"pool": zeros(8, 2, 16, 64, dtype=np.int16)}, "key_cache.dtype=int16"),
    "values of another dtype": (
        {"value_cache": zeros(8, 2, 16, 64, dtype=np.float16)},
        "value_cache.dtype=float16 must be key_cache.dtype=float32",
    ),
    "values of fewer pages": (
        {"value_cache": zeros(7, 2, 16, 64)},
        "value_cache.shape=(7, 2, 16, 64) must be key_cache.shape=(8, 2, 16, 64)",
    ),
    "values of other pages": ({"value_cache": zeros(8, 2, 8, 64)}, "value_cache.shape="),
    "values of no width": ({"value_cache": zeros(8, 2, 16, 0)}, "value_cache.shape[3]=0"),
    "no values": ({"value_cache": None}, "value_cache=None must come with value_head_dim"),
    "values and a width": (
        {"value_head_dim": 64},
        "value_head_dim=64 must be None where a value_cache is given",
    ),
    "a width of nothing": (
        {"value_cache": None, "value_head_dim": 0},
        "value_head_dim=0 must be at least 1",
    ),
    "a width past the keys": (
        {"value_cache": None, "value_head_dim": 65},
        "value_head_dim=65 must be at most head_dim=64",
    ),
    "lengths of other sequences": (
        {"context_lens": zeros(3, dtype=np.int32)},
        "context_lens.shape[0]=3 must be num_seqs=2",
    ),
    "tables of other sequences": (
        {"block_tables": zeros(3, 3, dtype=np.int32)},
        "block_tables.shape[0]=3 must be num_seqs=2",
    ),
    "another layout's axes": (
        {"cache_layout": "NHD"},
        "num_heads=4 must be a multiple of num_kv_heads=16 "
        "(key_cache[8, 2, 16, 64], cache_layout='NHD')",
    ),
    "an unknown layout": (
        {"cache_layout": "HDN"},
        "cache_layout='HDN' must be one of 'HND', 'NHD', 'KV_HEADS_FIRST'",
    ),
    "a window of nothing": ({"sliding_window": 0}, "sliding_window=0 must be at least 1"),
    "a window of less": ({"sliding_window": np.int32(-1)}, "sliding_window=-1 must be at least 1"),
    "a cap of nothing": ({"attn_logits_soft_cap": 0.0}, "attn_logits_soft_cap=0.0 must be above 0"),
    "a cap of less": ({"attn_logits_soft_cap": -5}, "attn_logits_soft_cap=-5 must be above 0"),
    "an infinite cap": ({"attn_logits_soft_cap": np.inf}, "attn_logits_soft_cap=inf must be"),
    "a cap of NaN": ({"attn_logits_soft_cap": np.nan}, "attn_logits_soft_cap=nan must be"),
    "sinks of other heads": ({"sinks": zeros(3)}, "sinks.shape[0]=3 must be num_heads=4"),
    "slopes of other heads": (
        {"alibi_slopes": zeros(5)},
        "alibi_slopes.shape[0]=5 must be num_heads=4",
    ),
    "slopes of 64 bits": (
        {"alibi_slopes": zeros(4, dtype=np.float64)},
        "alibi_slopes.dtype=float64 must be float32",
    ),
    "less than no splits": ({"num_splits": -1}, "num_splits=-1 must be at least 0"),
    "less than no tokens": ({"max_context_len": -1}, "max_context_len=-1 must be at least 0"),
    "an unknown backend": (
        {"backend": "cuda"},
        "backend='cuda' must be one of 'mosaic_gpu', 'triton', 'pallas', 'xla', a backend object "
        "or None",
    ),
    "positions of 64 bits": (
        # An array of one element, seen 2**27 times: the check is on shapes alone.
        {"block_tables": np.broadcast_to(np.int32(0), (2, 2**27))},
        "max_blocks * page_size=2147483648 must be below 2**31",
    ),
}


@pytest.mark.parametrize("change, message", RANK_AND_KIND.values(), ids=RANK_AND_KIND)
def test_wrong_ranks_and_dtype_kinds_are_type_errors(change, message):
    with pytest.raises(TypeError, match="^" + re.escape(message)):
        ejk.page_attention(**arguments(**change))


@pytest.mark.parametrize("change, message", MISFIT_AND_RANGE.values(), ids=MISFIT_AND_RANGE)
def test_misfits_and_values_out_of_range_are_value_errors(change, message):
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        ejk.page_attention(**arguments(**change))


@pytest.mark.parametrize(
    "change, said",
    [
        ({"backend": ["xla"]}, "backend=['xla'] must be str or Backend or None"),
        ({"attn_scale": [0.5]}, "attn_scale=[0.5] must be a number or a 0-d array or None"),
    ],
)
def test_nothing_is_advised_that_would_fail_again(change, said):
    with pytest.raises(TypeError, match=f"^{re.escape(said)}$"):
        ejk.page_attention(**arguments(**change))


def test_what_numpy_makes_by_default_is_told_which_types_there_are():
    wide = zeros(NUM_PAGES, KV_HEADS, PAGE, HEAD_DIM, dtype=np.float64)
    query = zeros(NUM_SEQS, NUM_HEADS, HEAD_DIM, dtype=np.float64)
    with pytest.raises(TypeError, match=r"keep the pools in one of float32, bfloat16, float16$"):
        ejk.page_attention(**arguments(query=query, pool=wide))


def check_fields(backend, **fields):
    """Set fields past `__init__`, whose types the import hook of the tests would check."""
    for name, value in fields.items():
        object.__setattr__(backend, name, value)
    backend.__post_init__()
    return backend


@pytest.mark.parametrize(
    "kind",
    [
        ejk.TritonPageAttention,
        ejk.TritonRaggedPageAttention,
        ejk.TritonWriteKVCache,
        ejk.PallasPageAttention,
        ejk.PallasRaggedPageAttention,
        ejk.PallasWriteKVCache,
    ],
)
@pytest.mark.parametrize("value", ["cpu", 1, None])
def test_a_truth_says_whether_to_interpret(kind, value):
    with pytest.raises(TypeError, match=f"^interpret={value!r} must be a bool"):
        check_fields(kind(), interpret=value)
    assert check_fields(kind(), interpret=np.True_) == kind(interpret=True)


@pytest.mark.parametrize("value", ["9.0", "sm_90", 9.0, (9, 0)])
def test_how_a_compute_capability_is_written_is_said(value):
    said = f"compute_capability={value!r} must be an int: 90 is sm_90, a device's '9.0'"
    with pytest.raises(TypeError, match=f"^{re.escape(said)}$"):
        check_fields(ejk.TritonPageAttention(), compute_capability=value)


def test_the_right_call_is_right():
    """Or the tables above would prove nothing."""
    assert ejk.page_attention(**arguments()).shape == (NUM_SEQS, NUM_HEADS, HEAD_DIM)


def test_numbers_may_be_those_of_numpy():
    number, python = np.int64(3), 3
    names = ("max_context_len", "num_splits", "sliding_window")
    cap = {"attn_logits_soft_cap": np.float32(5), "attn_scale": np.float64(0.5)}
    of_numpy = ejk.page_attention(**arguments(**dict.fromkeys(names, number), **cap))
    cap = {"attn_logits_soft_cap": 5.0, "attn_scale": 0.5}
    of_python = ejk.page_attention(**arguments(**dict.fromkeys(names, python), **cap))
    np.testing.assert_array_equal(of_numpy, of_python)


def test_optional_arguments_after_the_eighth_are_by_keyword_only():
    with pytest.raises(TypeError, match="by position, not 9 arguments; by keyword: cache_layout"):
        ejk.page_attention(*arguments().values(), None, None, 0, "HND")


@pytest.mark.parametrize("name", ["sinks", "alibi_slopes"])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_what_each_head_has_may_be_of_16_bits(name, dtype):
    given = arguments(context_lens=np.array([20, 3]))
    narrow = jnp.array([0.5, -1.25, 3.0, 0.0]).astype(dtype)

    def loss(x):
        return jnp.sum(ejk.page_attention(**given | {name: x}, return_lse=True)[1])

    assert loss(narrow) == loss(narrow.astype(jnp.float32))
    gradient, wide = jax.grad(loss)(narrow), jax.grad(loss)(narrow.astype(jnp.float32))
    assert gradient.dtype == dtype
    np.testing.assert_array_equal(gradient, wide.astype(dtype))


@dataclasses.dataclass(frozen=True)
class Picky(ejk.PageAttentionBackend):
    """Supports next to nothing."""

    name = "picky"
    features = frozenset({'cache_layout="HND"'})
    platforms = ("cpu", "tpu")

    def limits(self, problem, platform):
        return (f"head_dim={problem.head_dim} is odd to it", f"{platform} is tired")

    def run(self, problem, operands, platform):
        raise AssertionError("it refuses everything")


def test_a_refusal_names_every_reason_at_once():
    with pytest.raises(ejk.UnsupportedError) as info:
        ejk.page_attention(
            **arguments(sinks=zeros(4), sliding_window=3), return_lse=True, backend=Picky()
        )
    assert isinstance(info.value, NotImplementedError)
    assert str(info.value).splitlines()[1:] == [
        "  picky: does not support return_lse",
        "  picky: does not support sinks",
        "  picky: does not support sliding_window",
        "  picky: head_dim=64 is odd to it",
        "  picky: cpu is tired",
        "  picky: tpu is tired",
    ]


@pytest.mark.parametrize("lens", [[5, -1], [49, 5]])
def test_check_inputs_names_the_sequence_of_a_wrong_length(lens):
    lens = np.array(lens)
    wrong = int(np.argmax((lens < 0) | (lens > 48)))
    message = f"context_lens[{wrong}]={lens[wrong]} must be in [0, 48]"
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        ejk.check_page_attention_inputs(**arguments(context_lens=lens))


@pytest.mark.parametrize("entry", [-1, 8, 2**31 - 1, 2**32])
def test_check_inputs_names_the_entry_that_is_no_page(entry):
    lens, tables = np.array([48, 17]), np.zeros((2, 3), np.int64)
    tables[1, 2] = entry  # not needed: 17 tokens end in entry 1
    ejk.check_page_attention_inputs(**arguments(context_lens=lens, block_tables=tables))
    tables[1, 1] = entry
    with pytest.raises(
        ValueError, match=re.escape(f"block_tables[1, 1]={entry} must be in [0, 8)")
    ):
        ejk.check_page_attention_inputs(**arguments(context_lens=lens, block_tables=tables))


def test_check_inputs_names_a_value_above_int64():
    lens = np.array([5, 2**64 - 1], np.uint64)
    with pytest.raises(ValueError, match=re.escape(f"context_lens[1]={2**64 - 1} must be in")):
        ejk.check_page_attention_inputs(**arguments(context_lens=lens))


def test_check_inputs_minds_the_window():
    lens, tables = np.array([48, 48]), np.array([[-1, 0, 0], [-1, -1, 0]])
    given = arguments(context_lens=lens, block_tables=tables)
    ejk.check_page_attention_inputs(**given, sliding_window=16)
    with pytest.raises(ValueError, match=re.escape("block_tables[1, 1]=-1 must be in [0, 8)")):
        ejk.check_page_attention_inputs(**given, sliding_window=17)
    with pytest.raises(ValueError, match=re.escape("sliding_window=0 must be at least 1")):
        ejk.check_page_attention_inputs(**given, sliding_window=jnp.int32(0))
