"""Bugs put into merges, slots and XLA's plans: the properties of each, sound there, catch them."""

import importlib

import mutants
import pytest
import test_merge
import test_plan
import test_slots

import ejk
from ejk.backends.xla.page_attention_plan import XlaPlan


def merges():
    test_merge.test_agrees_with_the_oracle()


def ragged_slots():
    test_slots.test_slots_at_the_ends_of_a_ragged_batch()


def plan():
    lens = [5000, 3, 900, 900, 0]
    assert test_plan.check("xla", lens, capacity=6000, window=4000, resident=10)


BUGS = {
    "merge": {
        "parts weigh the same": (
            "jnp.exp(jnp.where(saw, lses - m[None], 0.0))", "1.0", merges,
        ),
        "the last part is lost": ("total = weights.sum(0)", "total = weights[:-1].sum(0)", merges),
        "the maximum is not taken off": (
            "jnp.where(saw, lses - m[None], 0.0)", "jnp.where(saw, lses, 0.0)", merges,
        ),
        "what saw nothing is multiplied by zero": (
            "jnp.where(saw[..., None], outs.astype(jnp.float32), 0.0)",
            "outs.astype(jnp.float32)", merges,
        ),
        "the LSE of the largest part": ("m + jnp.log(safe_total)", "m", merges),
    },
    "slots": {
        "the page before": ("page_size + positions % page_size, -1)", "page_size, -1)",
            ragged_slots),
        "entries past the pool are slots": (
            "is_inside & (page >= 0) & (page < pool)", "is_inside & (page >= 0)", ragged_slots,
        ),
        "positions past the table are in its last page": (
            "(positions >= 0) & (positions // page_size < max_blocks)", "(positions >= 0)",
            ragged_slots,
        ),
        "new tokens come one later": (
            "(bounds[seqs + 1] - rows)", "(bounds[seqs + 1] - rows - 1)", ragged_slots,
        ),
        "bounds may fall": ("bounds = jax.lax.cummax(bounds)", "pass", ragged_slots),
    },
}  # fmt: skip
MODULES = {
    "merge": "_merge_attention_states",
    "slots": "_slot_mapping",
}


@pytest.mark.fast(3)
@pytest.mark.parametrize(
    ("helper", "bug"),
    [
        pytest.param(helper, bug, marks=pytest.mark.fault(helper, "shared"))
        for helper in BUGS
        for bug in BUGS[helper]
    ],
)
def test_a_bug_is_caught(helper, bug, monkeypatch, tmp_path):
    old, new, holds = BUGS[helper][bug]
    sound = importlib.import_module(f"ejk.{MODULES[helper]}")
    faulty = mutants.load(sound, old, new, tmp_path)
    for name in {*vars(ejk)} & {*vars(faulty)}:
        if getattr(getattr(faulty, name), "__module__", "") == faulty.__name__:
            monkeypatch.setattr(ejk, name, getattr(faulty, name))
    with pytest.raises(AssertionError):
        holds()


PLANS = {
    "the shortest come first": ("num_pieces, -size, 1)", "num_pieces, size, 2**30)"),
    "of equal ones the last come first": (
        "jnp.argsort(jnp.where(slot < num_pieces, -size, 1), stable=True)",
        "jnp.argsort(jnp.where(slot < num_pieces, -size, 1)[::-1], stable=True)",
    ),
    "parts begin one place on": ("splits = jnp.stack([named[split], number[split],",
        "splits = jnp.stack([named[split], number[split] + 1,"),
    "every piece is the first": ("piece = slot - number[owner]", "piece = 0 * slot"),
    "each context is cut by itself": ("(until - granules) % share", "0 * until"),
    "the last share is longer": (
        "_ceil_div(until[-1], problem.shares)", "until[-1] // problem.shares",
    ),
    "the window is one too short": (
        "jnp.maximum(operands.sliding_window, 0), 0)\n    granules",
        "jnp.maximum(operands.sliding_window, 0) + 1, 0)\n    granules",
    ),
    "the last piece ends where it begins": (
        "jnp.where(is_last, last_end, first", "jnp.where(is_last, begin, first",
    ),
}  # fmt: skip


@pytest.mark.fault("plan", "xla")
@pytest.mark.fast(3)
@pytest.mark.parametrize("bug", PLANS)
def test_a_bug_of_a_plan_is_caught(bug, monkeypatch, tmp_path):
    module = importlib.import_module(XlaPlan.__module__)
    monkeypatch.setattr(test_plan, "XlaPlan", mutants.load(module, *PLANS[bug], tmp_path).XlaPlan)
    with pytest.raises(AssertionError):
        plan()
