"""What `ejk.page_attention` computes, on every backend."""

from functools import partial

import numpy as np
import pytest
from entries import each_case, edge
from tiers import THOROUGH

import ejk
from ejk.testing import PROPERTIES
from ejk.testing.configurations import CONFIGURATIONS, MANY_CONFIGURATIONS
from ejk.testing.page_attention import cases

PROMISED = PROPERTIES["page_attention"]


@pytest.mark.smoke
@edge
def test_plain_call_is_a_softmax_over_the_tokens(entry):
    """The defaults, on clean memory, against the definition of attention."""
    rng = np.random.default_rng(0)
    query = rng.standard_normal((2, 4, 64), np.float32)
    key_cache = rng.standard_normal((8, 2, 16, 64), np.float32)
    value_cache = rng.standard_normal((8, 2, 16, 64), np.float32)
    context_lens, block_tables = np.array([20, 5], np.int32), np.array([[3, 5], [1, 0]], np.int32)

    with entry.refusing():
        out = ejk.page_attention(
            query, key_cache, value_cache, context_lens, block_tables, backend=entry.backend
        )

    for sequence, pages, length in ((0, [3, 5], 20), (1, [1], 5)):
        for head in range(4):
            keys = np.concatenate([key_cache[page, head // 2] for page in pages])[:length]
            values = np.concatenate([value_cache[page, head // 2] for page in pages])[:length]
            weights = np.exp(keys @ query[sequence, head] / np.sqrt(64))
            expected = weights @ values / weights.sum()
            np.testing.assert_allclose(out[sequence, head], expected, rtol=0, atol=4e-6)


def held(name, share=0.5):
    drawn = partial(cases, MANY_CONFIGURATIONS if THOROUGH else CONFIGURATIONS)
    return each_case(drawn, share)(PROMISED[name])


test_agrees_with_the_oracle = pytest.mark.fast(held("agrees_with_the_oracle", 2))
test_unread_memory_changes_no_bit = held("unread_memory_changes_no_bit", 1)
test_order_of_pages_changes_no_bit = held("order_of_pages_changes_no_bit")
test_alone_equals_in_a_batch = held("alone_equals_in_a_batch")
test_jit_changes_no_bit = held("jit_changes_no_bit")
test_running_twice_gives_the_same_bits = held("running_twice_gives_the_same_bits")
test_hints_change_no_more_than_last_bits = held("hints_change_no_more_than_last_bits")
test_layouts_and_fused_pools_equal_each_other = held("layouts_and_fused_pools_equal_each_other")
test_asking_for_the_lse_changes_no_bit_of_the_output = held(
    "asking_for_the_lse_changes_no_bit_of_the_output", 0.25
)
test_a_row_that_sees_nothing_is_zero = held("a_row_that_sees_nothing_is_zero", 0.25)
test_results_are_finite_on_poisoned_memory = held("results_are_finite_on_poisoned_memory", 0.25)
test_a_nan_in_a_query_is_never_lost = held("a_nan_in_a_query_is_never_lost", 0.25)
test_what_is_seen_and_not_finite_is_never_lost = held("what_is_seen_and_not_finite_is_never_lost")


def test_every_property_is_tested():
    assert {f"test_{name}" for name in PROMISED} <= {*globals()}
