"""`ejk.testing.assert_backend_agrees` finds what is wrong, and lets nothing pass silently."""

import dataclasses

import hypothesis
import jax.numpy as jnp
import numpy as np
import pytest

import ejk
import ejk.testing
from ejk.testing.configurations import FEATURES

FAULTS = {
    "zeros": "] is ",  # an LSE that must be -inf
    "no window": "out[",
    "a dead slot": "must be finite, is nan",
    "a table's first row": "out[",
    "a NaN in a value": "what_is_seen_and_not_finite_is_never_lost of page_attention",
    "a NaN in a key": "what_is_seen_and_not_finite_is_never_lost of page_attention",
    "a NaN in a sink": "what_is_seen_and_not_finite_is_never_lost of page_attention",
    "another dtype": "TypeError: xla: result 0 of page_attention must be ",
    "an axis too many": "TypeError: xla: result 1 of page_attention must be float32[",
}


@dataclasses.dataclass(frozen=True)
class Faulty(ejk.XlaPageAttention):
    fault: str = ""

    def run(self, problem, operands, platform):
        if self.fault == "zeros":
            return [jnp.zeros(x.shape, x.dtype) for x in problem.results]
        if self.fault == "no window":
            operands = operands._replace(sliding_window=jnp.int32(2**31 - 1))
        if self.fault == "a dead slot":
            operands = operands._replace(context_lens=operands.context_lens + 1)
        if self.fault == "a table's first row":
            operands = operands._replace(block_tables=operands.block_tables[:1].repeat(5, axis=0))
        if name := {"a NaN in a value": "value_cache", "a NaN in a key": "key_cache",
                    "a NaN in a sink": "sinks"}.get(self.fault):  # fmt: skip
            spoilt = getattr(operands, name)
            lost = spoilt if spoilt is None else jnp.where(jnp.isnan(spoilt), 0, spoilt)
            operands = operands._replace(**{name: lost})
        out, *lse = super().run(problem, operands, platform)
        if self.fault == "another dtype":
            out = out.astype(jnp.float32 if out.dtype != jnp.float32 else jnp.bfloat16)
        if self.fault == "an axis too many":
            lse = [x[..., None] for x in lse]
        return out, *lse


def is_small(call):
    return call.shape.name == "odd pages" and call.features <= {*FEATURES} and not call.is_quantised


def check(backend, **options):
    options = {"suits": is_small, "examples": 8, "programs": 2} | options
    ejk.testing.assert_backend_agrees(backend, "page_attention", **options)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found(fault):
    def suits(call):
        holds_both = call.fused or call.cache_layout == "INTERLEAVED"
        return (
            is_small(call)
            and ("sliding_window" in call.features) == (fault == "no window")
            and ("sinks" in call.features or fault != "a NaN in a sink")
            and not (holds_both and fault == "a NaN in a value")  # the keys' pool has the values
        )

    with pytest.raises(AssertionError) as raised:
        check(Faulty(fault=fault), suits=suits, examples=40 if "NaN" in fault else 8)
    assert FAULTS[fault] in str(raised.value)
    assert "of page_attention does not hold on Faulty(" in str(raised.value)
    assert "shape='odd pages'" in str(raised.value)  # the call, in so many words


@dataclasses.dataclass(frozen=True)
class OtherBits(ejk.XlaPageAttention):
    """Rounds otherwise, or computes nothing, where the LSE is not asked for."""

    is_wrong: bool = False

    def run(self, problem, operands, platform):
        out, *lse = super().run(problem, operands, platform)
        if not problem.return_lse:
            other = jnp.where(out == 0, out, jnp.nextafter(out, jnp.ones_like(out)))
            out = out * 0 if self.is_wrong else other
        return out, *lse


def test_a_backend_may_promise_the_bound_alone():
    check(OtherBits(), equal_bits=False)
    with pytest.raises(AssertionError, match=r"asking_for_the_lse_changes_no_bit"):
        check(OtherBits())
    with pytest.raises(AssertionError, match=r"(?s)asking_for_the_lse_changes_no_bit.* is off by"):
        check(OtherBits(is_wrong=True), equal_bits=False)


@dataclasses.dataclass(frozen=True)
class Choosy(ejk.XlaPageAttention):
    name = "choosy"

    def limits(self, problem, platform):
        return ("it takes nothing",)


def test_a_refusal_for_another_reason_fails():
    with pytest.raises(AssertionError, match=r"(?s)UnsupportedError.*it takes nothing"):
        check(Choosy(), may_refuse=["does not support"])


def test_a_backend_that_refuses_everything_fails():
    with pytest.raises(AssertionError, match=r"Choosy.*refused every call .*takes nothing"):
        check(Choosy(), may_refuse=["takes nothing"])


@dataclasses.dataclass(frozen=True)
class WideWindow(ejk.XlaRaggedPageAttention):
    """Knows few options, and its window shows a token too many."""

    name = "wide"
    features = frozenset({"return_lse", 'cache_layout="NHD"', "sliding_window"})

    def run(self, problem, operands, platform):
        window = None if operands.sliding_window is None else operands.sliding_window + 1
        return super().run(problem, operands._replace(sliding_window=window), platform)


def test_a_feature_that_no_call_has_is_warned_of():
    """No configuration of the list has this backend's features and no others."""
    shape = ejk.testing.Shape("mine", num_heads=2, num_kv_heads=1, head_dim=8, page_size=3)
    plain = ejk.testing.Configuration(shape, np.dtype(np.float32), "NHD")
    windowed = dataclasses.replace(plain, features=frozenset({"sliding_window"}))
    options = {"may_refuse": ["cache_layout", "fused_pools", "tree_mask", "positions"]}

    def check(*configurations):
        ejk.testing.assert_backend_agrees(
            WideWindow(), "ragged_page_attention", configurations=configurations, examples=4,
            programs=None, **options,
        )  # fmt: skip

    with pytest.warns(UserWarning, match=r"WideWindow\(.* declares sliding_window, which no "):
        check(plain)
    with pytest.raises(AssertionError, match=r"^agrees_with_the_oracle of ragged"):
        check(plain, windowed)


def test_one_expression_is_no_list_of_them():
    with pytest.raises(TypeError, match=r"may_refuse='nothing' must be a list .*: \['nothing'\]"):
        check(Choosy(), may_refuse="nothing")


def test_what_cannot_be_drawn_is_an_error():
    with pytest.raises(ValueError, match=r"operation='page_atention' .*mean 'page_attention'"):
        ejk.testing.calls("page_atention")
    with pytest.raises(ValueError, match="suits= must let one of the configurations"):
        ejk.testing.calls("write_kv_cache", suits=lambda call: False)
    with pytest.raises(ValueError, match="programs=0 must be at least 1, or None for all"):
        ejk.testing.calls("write_kv_cache", programs=0)


def test_a_property_is_given_calls_that_it_concerns(monkeypatch):
    given = []
    properties = {"chunks_equal_one_shot": lambda subject, case: given.append(case)}
    monkeypatch.setitem(ejk.testing.PROPERTIES, "ragged_page_attention", properties)
    for seed in range(4):
        ejk.testing.assert_backend_agrees(
            "xla", "ragged_page_attention", examples=2, programs=1, seed=seed
        )
    assert len(given) >= 4
    assert not [case for case in given if {"positions", "tree_mask", "causal"} & {*case.options}]


def test_configurations_may_be_ones_own():
    shape = ejk.testing.Shape("mine", num_heads=2, num_kv_heads=1, head_dim=8, page_size=64)
    mine = ejk.testing.Configuration(shape, np.dtype(np.float16), "NHD")
    drawn = ejk.testing.calls("page_attention", configurations=[mine], programs=1)
    case = hypothesis.find(drawn, lambda case: True)
    assert (case.shape, case.dtype, case.cache_layout) == (shape, np.float16, "NHD")


@pytest.mark.parametrize("operation", [x for x in ejk.testing.PROPERTIES if "attention" not in x])
def test_xla_agrees(operation):
    ejk.testing.assert_backend_agrees("xla", operation, examples=2, programs=1)


@pytest.mark.parametrize("operation", ejk.testing.PROPERTIES)
def test_what_draws_calls_is_printed_as_its_call(operation):
    assert repr(ejk.testing.calls(operation)) == f"calls({operation!r})"
    drawn = ejk.testing.calls(operation, programs=2, seed=3)
    assert repr(drawn) == f"calls({operation!r}, programs=2, seed=3)"
    again = eval(repr(drawn), {"calls": ejk.testing.calls})
    first, same = (hypothesis.find(x, lambda case: True) for x in (drawn, again))
    assert repr(first) == repr(same)


@pytest.mark.parametrize("operation", ejk.testing.PROPERTIES)
def test_a_case_is_printed_in_a_few_lines(operation):
    case = hypothesis.find(ejk.testing.calls(operation, programs=1), lambda case: True)
    assert operation in repr(case) and len(repr(case)) < 4000
