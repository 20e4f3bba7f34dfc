"""What is said of arguments that `ejk.ragged_page_attention` alone takes, or takes otherwise."""

import re

import jax.numpy as jnp
import numpy as np
import pytest
from test_errors import zeros

import ejk

pytestmark = pytest.mark.fast


def arguments(**changes):
    """A right call, changed."""
    pool = zeros(8, 2, 16, 64)
    right = {
        "query": zeros(5, 4, 64),
        "key_cache": pool,
        "value_cache": pool,
        "context_lens": zeros(2, dtype=np.int32),
        "block_tables": zeros(2, 3, dtype=np.int32),
        "cu_q_lens": zeros(3, dtype=np.int32),
    }
    return right | changes


RANK_AND_KIND = {
    "query of rank 2": (
        {"query": zeros(5, 64)},
        "query=float32[5, 64] must be a floating-point array [total_tokens, num_heads, head_dim]",
    ),
    "bounds of floats": (
        {"cu_q_lens": zeros(3)},
        "cu_q_lens=float32[3] must be an integer array [num_seqs + 1]",
    ),
    "bounds of rank 2": ({"cu_q_lens": zeros(1, 3, dtype=int)}, "cu_q_lens=int64[1, 3] must be"),
    "positions of floats": (
        {"positions": zeros(5)},
        "positions=float32[5] must be an integer array [total_tokens] or None",
    ),
    "a mask of numbers": (
        {"tree_mask": zeros(5, 2)},
        "tree_mask=float32[5, 2] must be a boolean array [total_tokens, max_q_len] or None",
    ),
    "a mask of rank 1": ({"tree_mask": zeros(5, dtype=bool)}, "tree_mask=bool[5] must be"),
    "groups alone": (
        {"prefix_groups": zeros(2, dtype=np.int32)},
        "prefix_groups=int32[2] must be a pair of integer arrays, groups [num_seqs] and num_pages "
        "[num_groups] or None; pass (groups, num_pages), two integer arrays",
    ),
    "groups in a list": (
        {"prefix_groups": [zeros(2, dtype=np.int32), zeros(1, dtype=np.int32)]},
        "prefix_groups=[int32[2], int32[1]] must be a pair of integer arrays, groups [num_seqs] "
        "and num_pages [num_groups] or None; pass (groups, num_pages), two integer arrays",
    ),
    "a number for a truth": ({"causal": 0}, "causal=0 must be a bool"),
    "a bound on the device": ({"max_q_len": jnp.int32(1)}, "max_q_len="),
    "a truth as bound": ({"max_q_len": True}, "max_q_len=True must be an int"),
}

MISFIT_AND_RANGE = {
    "bounds of other sequences": (
        {"cu_q_lens": zeros(2, dtype=np.int32)},
        "cu_q_lens.shape[0]=2 must be num_seqs + 1=3",
    ),
    "tables of other sequences": (
        {"block_tables": zeros(3, 3, dtype=np.int32)},
        "block_tables.shape[0]=3 must be num_seqs=2",
    ),
    "positions of other tokens": (
        {"positions": zeros(4, dtype=np.int32)},
        "positions.shape[0]=4 must be total_tokens=5",
    ),
    "a mask of other tokens": (
        {"tree_mask": zeros(6, 5, dtype=bool)},
        "tree_mask.shape[0]=6 must be total_tokens=5",
    ),
    "less than no tokens": ({"max_q_len": -1}, "max_q_len=-1 must be at least 0"),
    "less than no context": ({"max_context_len": -1}, "max_context_len=-1 must be at least 0"),
    "heads that no group divides": (
        {"query": zeros(5, 7, 64)},
        "num_heads=7 must be a multiple of num_kv_heads=2",
    ),
    "a tree that is not causal": (
        {"tree_mask": zeros(5, 2, dtype=bool), "causal": False},
        "causal=False must come without tree_mask, which says itself what new tokens see",
    ),
    "groups of other sequences": (
        {"prefix_groups": (zeros(3, dtype=np.int32), zeros(2, dtype=np.int32))},
        "prefix_groups[0].shape[0]=3 must be num_seqs=2: the group of each sequence, -1 for none",
    ),
    "a window of nothing": ({"sliding_window": 0}, "sliding_window=0 must be at least 1"),
}


@pytest.mark.parametrize("change, message", RANK_AND_KIND.values(), ids=RANK_AND_KIND)
def test_wrong_ranks_and_dtype_kinds_are_type_errors(change, message):
    with pytest.raises(TypeError, match="^" + re.escape(message)):
        ejk.ragged_page_attention(**arguments(**change))


@pytest.mark.parametrize("change, message", MISFIT_AND_RANGE.values(), ids=MISFIT_AND_RANGE)
def test_misfits_and_values_out_of_range_are_value_errors(change, message):
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        ejk.ragged_page_attention(**arguments(**change))


def test_the_right_call_is_right():
    """Or the tables above would prove nothing."""
    assert ejk.ragged_page_attention(**arguments()).shape == (5, 4, 64)


def test_a_backend_of_another_operation_is_refused_by_name():
    with pytest.raises(ejk.UnsupportedError, match="pallas: is a backend of page_attention, not"):
        ejk.ragged_page_attention(**arguments(), backend=ejk.PallasPageAttention())
