"""What `wrong_calls` does not hold of errors: fields of backends, refusals, checks of values."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from wrong_calls import HEAD_DIM, KV_HEADS, NUM_HEADS, NUM_PAGES, NUM_SEQS, PAGE, ragged, zeros
from wrong_calls import decode as arguments

import ejk

pytestmark = pytest.mark.fast


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


def test_a_backend_of_another_operation_is_refused_by_name():
    with pytest.raises(ejk.UnsupportedError, match="pallas: is a backend of page_attention, not"):
        ejk.ragged_page_attention(**ragged(), backend=ejk.PallasPageAttention())


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
