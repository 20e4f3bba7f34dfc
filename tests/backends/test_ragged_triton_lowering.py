"""`ejk.ragged_page_attention` lowered for an H100 that is not here: its kernels, and in place."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from edges import LENS, config
from test_dispatch import kernels
from test_triton_lowering import carried, custom_calls
from test_write_lowering import aliases
from test_write_programs import struct

import ejk
from ejk.testing.bounds import assert_close
from ejk.testing.ragged_page_attention import build_ragged

H100 = {"compute_capability": 90, "num_sms": 132}
ATTENTION, COMBINATION = b"ragged_page_attention_kernel", b"ragged_combine_kernel"


@pytest.fixture(autouse=True)
def for_an_h100(restored_registry, jax_triton):
    ejk.register_backend(ejk.TritonRaggedPageAttention(**H100))


def lower(total_tokens, **keywords):
    """Lower a call of 4 sequences, 32/8/128 and pages of 16, for CUDA."""
    pool = struct(4096, 8, 16, 128)
    arguments = (
        struct(total_tokens, 32, 128),
        pool,
        pool,
        struct(4, dtype=jnp.int32),
        struct(4, 1024, dtype=jnp.int32),
        struct(5, dtype=jnp.int32),
    )
    function = functools.partial(ejk.ragged_page_attention, **keywords)
    return jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()


def names(text):
    known = (b"ragged_plan_kernel", ATTENTION, COMBINATION)
    return [next(name for name in known if name in call) for call in carried(text)]


def test_a_mixed_batch_is_one_plan_and_two_kinds_of_blocks():
    text = lower(2048)
    assert names(text)[0] == b"ragged_plan_kernel"
    assert sorted(names(text)[1:]) == sorted([ATTENTION, COMBINATION] * 2)


@pytest.mark.parametrize(("max_context_len", "threads"), [(4096, 256), (None, 512)])
def test_blocks_of_many_rows_are_held_to_their_registers(max_context_len, threads):
    text = lower(2048, max_context_len=max_context_len)
    _, wide = (call for call in carried(text) if ATTENTION in call)
    assert b".maxnreg 128" in wide and b".reqntid %d" % threads in wide


def test_every_option_lowers():
    heads = jnp.zeros(32, jnp.float32)
    text = lower(
        64, sliding_window=100, attn_logits_soft_cap=30.0, sinks=heads, alibi_slopes=heads,
        positions=jnp.zeros(64, jnp.int32), tree_mask=jnp.zeros((64, 8), bool), return_lse=True,
    )  # fmt: skip
    assert names(text).count(ATTENTION) == 2


def test_a_batch_of_few_new_tokens_leaves_out_wide_blocks():
    assert names(lower(32, max_q_len=8)) == [b"ragged_plan_kernel", ATTENTION, COMBINATION]


def test_results_and_parts_are_written_in_place_one_kernel_after_the_other():
    """Outputs come after inputs, as jaxlib hands buffers out, and are the inputs before them."""
    text = lower(2048)
    calls = custom_calls(text)
    assert len(calls) == 5
    for name, (_, operands, results) in zip(names(text), calls):
        operands, results = operands.split(", "), results.split(", ")
        # Output and LSE; before them parts and their LSE.
        assert len(results) == {ATTENTION: 4, COMBINATION: 2}.get(name, 1)
        if len(operands) > 14 or name == COMBINATION:  # not the plan, nor the first attention
            assert operands[-len(results) :] == results
    found = aliases(text)
    assert [result for result, _ in found] == [0, 1, 0, 1, 2, 3, 0, 1]
    assert [operand for _, operand in found] == [4, 5, 14, 15, 16, 17, 4, 5]


def test_layers_have_one_plan_and_no_result_in_common():
    """Or XLA would copy whole results, and memory for parts, in front of each layer's kernels."""
    pool = struct(4096, 8, 16, 128)
    integers = (struct(4, dtype=jnp.int32), struct(4, 1024, dtype=jnp.int32))

    def step(query, pool, lens, tables, bounds):
        for _ in range(2):
            query = ejk.ragged_page_attention(query, pool, pool, lens, tables, bounds)
        return query

    arguments = (struct(2048, 32, 128), pool, *integers, struct(5, dtype=jnp.int32))
    text = jax.jit(step).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
    plans = [call for call, name in zip(custom_calls(text), names(text)) if b"plan" in name]
    assert {results.count("tensor") for *_, results in plans} == {1}


def test_one_export_holds_the_kernel_and_the_cpu_program():
    case = build_ragged(config(), LENS, np.array([0, 5, 5, 9, 10, 11, 12, 13, 13, 13]))
    exported = jax.export.export(
        jax.jit(functools.partial(ejk.ragged_page_attention, return_lse=True)),
        platforms=("cpu", "cuda"),
        disabled_checks=ejk.export_disabled_checks(),
    )(*case.operands())
    assert kernels(exported.mlir_module()) == {"cuda"}
    again = jax.export.deserialize(exported.serialize())
    if jax.default_backend() == "cpu":
        assert_close(case, *map(np.asarray, again.call(*case.operands())))
