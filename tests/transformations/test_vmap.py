"""`vmap` of `ejk.page_attention`, on every backend: some axes fold into the batch."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from edges import LENGTHS, config
from entries import edge

import ejk
from ejk.testing.page_attention import build

OPERANDS = (
    "query", "key_cache", "value_cache", "context_lens", "block_tables",
    "attn_scale", "sliding_window", "sinks", "alibi_slopes",
)  # fmt: skip
FEATURES = frozenset({"sliding_window", "sinks", "alibi_slopes"})


def batch(count: int, features=FEATURES) -> list[dict]:
    """`count` calls that differ in every operand."""
    calls = []
    for seed in range(count):
        case = build(config(features=features), np.roll(LENGTHS, seed), window=9 + seed, seed=seed)
        case = case.replace(options={**case.options, "attn_scale": 0.05 * (1 + seed)})
        values = dict(zip(OPERANDS, case.operands())) | case.options
        calls.append({name: jnp.asarray(values[name]) for name in OPERANDS if name in values})
    return calls


def attend(names, backend, *values):
    return ejk.page_attention(**dict(zip(names, values)), return_lse=True, backend=backend)


def primitives(jaxpr) -> list[str]:
    """Name every primitive of a jaxpr, at any depth."""
    names = []
    for equation in jaxpr.eqns:
        names.append(equation.primitive.name)
        for inner in jax.tree.leaves(list(equation.params.values())):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                names += primitives(inner)
    return names


def check(entry, batched: set[str], features=FEATURES, count=3):
    """Compare a map over some operands with one call at a time; return the program's primitives."""
    calls = batch(count, features)
    names = list(calls[0])
    shared = {name: calls[0][name] for name in names if name not in batched}
    stacked = {name: jnp.stack([call[name] for call in calls]) for name in names if name in batched}
    function = functools.partial(attend, names, entry.backend)
    axes = [0 if name in batched else None for name in names]
    values = [(stacked | shared)[name] for name in names]
    mapped = jax.vmap(function, in_axes=axes)
    with entry.refusing():
        results = mapped(*values)
        for i, call in enumerate(calls):
            expected = function(*[(call | shared)[name] for name in names])
            for a, b in zip(results, expected):
                np.testing.assert_allclose(a[i], b, rtol=1e-5, atol=1e-5)
    return primitives(jax.make_jaxpr(mapped)(*values).jaxpr)


@pytest.mark.one_in(2)
@edge
@pytest.mark.parametrize(
    "batched",
    [
        {"query"},
        {"context_lens"},
        {"block_tables"},
        {"query", "block_tables"},
        {"query", "context_lens", "block_tables"},
    ],
    ids=lambda names: " and ".join(sorted(names)),
)
def test_sequences_fold_into_the_batch(entry, batched):
    """One call, no loop: the pool is not batched."""
    found = check(entry, batched)
    assert found.count("ejk") == 1
    assert not {"scan", "while"} & set(found)


@pytest.mark.one_in(3)
@edge
@pytest.mark.parametrize(
    "batched",
    [
        {"attn_scale"},
        {"sliding_window"},
        {"sinks", "alibi_slopes"},
        {"key_cache", "value_cache"},
        {"query", "key_cache", "block_tables"},
        set(OPERANDS),
    ],
    ids=lambda names: " and ".join(sorted(names)),
)
def test_other_axes_are_mapped(entry, batched):
    check(entry, batched)


@edge
def test_axes_may_lie_anywhere(entry):
    (call, other) = batch(2, frozenset())
    queries = jnp.stack([call["query"], other["query"]], axis=2)
    tables = jnp.stack([call["block_tables"]] * 2, axis=1)
    rest = (call["key_cache"], call["value_cache"], call["context_lens"])

    def run(query, tables):
        return ejk.page_attention(query, *rest, tables, backend=entry.backend)

    with entry.refusing():
        mapped = jax.vmap(run, in_axes=(2, 1), out_axes=1)(queries, tables)
        for i, query in enumerate((call["query"], other["query"])):
            expected = run(query, call["block_tables"])
            np.testing.assert_allclose(mapped[:, i], expected, rtol=1e-5, atol=1e-5)


@edge
def test_nested_maps_fold_twice(entry):
    calls = batch(4, frozenset())
    names = list(calls[0])
    pools = ("key_cache", "value_cache")
    axes = [None if name in (*pools, "attn_scale") else 0 for name in names]
    values = [
        calls[0][name]
        if axis is None
        else jnp.stack([call[name] for call in calls]).reshape(2, 2, *calls[0][name].shape)
        for name, axis in zip(names, axes)
    ]
    function = functools.partial(attend, names, entry.backend)
    mapped = jax.vmap(jax.vmap(function, in_axes=axes), in_axes=axes)
    with entry.refusing():
        out, lse = mapped(*values)
        found = primitives(jax.make_jaxpr(mapped)(*values).jaxpr)
        for i in range(4):
            one = [x if a is None else x[i // 2, i % 2] for x, a in zip(values, axes)]
            for a, b in zip((out, lse), function(*one)):
                np.testing.assert_allclose(a[i // 2, i % 2], b, rtol=1e-5, atol=1e-5)
    assert found.count("ejk") == 1 and not {"scan", "while"} & set(found)


@edge
def test_a_batch_of_one_and_of_none(entry):
    (call,) = batch(1, frozenset())
    names = list(call)
    function = functools.partial(attend, names, entry.backend)
    axes = [0 if name == "query" else None for name in names]
    for count in (0, 1):
        values = [jnp.stack([call[n]] * 2)[:count] if n == "query" else call[n] for n in names]
        with entry.refusing():
            out, lse = jax.vmap(function, in_axes=axes)(*values)
        assert out.shape == (count, *call["query"].shape) and lse.shape == out.shape[:-1]
