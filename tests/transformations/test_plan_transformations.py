"""A plan as an argument: which calls it fits, and how it goes through JAX's transformations."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compilations import CompilationCounter
from entries import edge
from planned import TRITON, long_case

import ejk
from ejk.testing.bits import bits_equal
from ejk.testing.bounds import assert_close

MISFITS = {
    "num_seqs": (7, 6),
    "num_heads": (2, 4),
    "num_kv_heads": (1, 2),
    "head_dim": (64, 32),
    "page_size": (48, 24),
    "max_blocks": (48, 13),
    "sliding_window": (9, 10),
    "sliding_window, none planned": (9, None),
    "sliding_window, one planned": (None, 9),
}


@edge
@pytest.mark.parametrize("name", MISFITS)
def test_a_plan_for_another_call_is_refused(entry, name):
    fact, (called, planned) = name.split(",")[0], MISFITS[name]
    case = long_case(features=frozenset())
    lens, changes = case.context_lens, {}
    if fact == "sliding_window":
        case = case.replace(options={} if called is None else {fact: called})
        changes = {fact: planned}
    elif fact == "num_seqs":
        lens = lens[:planned]
    else:
        changes = {fact: planned} | ({"num_heads": 4} if fact == "num_kv_heads" else {})
    plan = case.plan(entry.backend, context_lens=lens, **changes)
    first = "num_heads" if fact == "num_kv_heads" else fact
    called, planned = (2, 4) if fact == "num_kv_heads" else (called, planned)
    message = f"plan was made for {first}={planned}; the call has {called}"
    with pytest.raises(ValueError, match="^" + re.escape(message) + "$"):
        entry(case, plan=plan)


@edge
@pytest.mark.parametrize("planned, called", [(9, jnp.int32(9)), (jnp.int32(9), 9)])
def test_a_window_may_be_known_to_the_device_alone(entry, planned, called):
    case = long_case(features=frozenset()).replace(options={"sliding_window": called})
    plan = case.plan(entry.backend, context_lens=case.context_lens, sliding_window=planned)
    assert_close(case, *entry(case, plan=plan))


def test_something_else_for_a_plan_is_a_type_error():
    with pytest.raises(TypeError, match=r"^plan="):
        TRITON(long_case(), plan=long_case().plan(TRITON.backend).work)


@edge
def test_a_plan_goes_through_jit_scan_and_donation(entry):
    case = long_case(features=frozenset())
    keywords = dict(cache_layout="NHD", backend=entry.backend)
    plan_facts = functools.partial(case.plan, entry.backend)
    arrays = case.arguments()

    @jax.jit
    def attend(plan, query):
        return ejk.page_attention(query, *arrays[1:], **keywords, plan=plan)

    @jax.jit
    def layers(lens, query):
        def layer(carry, _):
            plan, x = carry
            return (plan, attend(plan, x)), None

        return jax.lax.scan(layer, (plan_facts(lens), query), None, length=2)[0][1]

    with entry.refusing():
        expected = [attend(plan_facts(), arrays[0])]
        expected.append(attend(plan_facts(), expected[0]))
        made = jax.jit(plan_facts)(context_lens=case.context_lens)
        bits_equal([np.asarray(attend(made, arrays[0]))], [np.asarray(expected[0])])
        bits_equal([np.asarray(layers(arrays[3], arrays[0]))], [np.asarray(expected[1])])
        donated = jax.jit(lambda plan: (plan, attend(plan, arrays[0])), donate_argnums=0)
        again, out = donated(plan_facts())
    bits_equal([np.asarray(out)], [np.asarray(expected[0])])
    assert (again.problem, again.facts) == (made.problem, made.facts)


def test_new_lengths_with_a_plan_do_not_recompile():
    @jax.jit
    def run(arrays):
        plan = long_case().plan(TRITON.backend, context_lens=arrays[3])
        return ejk.page_attention(*arrays, cache_layout="NHD", plan=plan, backend=TRITON.backend)

    first, *others = (long_case(seed).arguments() for seed in range(4))
    run(first)
    with CompilationCounter() as compiled:
        results = [np.asarray(run(arrays)) for arrays in others]
    assert compiled.count == 0 and all(x.any() for x in results)


@pytest.mark.one_in(2)
@edge
@pytest.mark.parametrize("batched", ["query", "attn_scale"])
def test_a_map_with_one_plan_for_all(entry, batched):
    """Queries fold into the batch, which makes its own plan; scales are mapped, with this one."""
    case = long_case(features=frozenset())
    query, *rest = case.arguments()
    plan = case.plan(entry.backend)

    def run(query, scale):
        return ejk.page_attention(
            query, *rest, scale, cache_layout="NHD", plan=plan, backend=entry.backend
        )

    queries, scales = jnp.stack([query, 2 * query]), jnp.array([0.3, 0.1])
    axes = (0, None) if batched == "query" else (None, 0)
    given = (queries, scales[0]) if batched == "query" else (query, scales)
    with entry.refusing():
        mapped = jax.vmap(run, axes)(*given)
        for i in range(2):
            one = [x if axis is None else x[i] for x, axis in zip(given, axes)]
            np.testing.assert_allclose(mapped[i], run(*one), rtol=1e-5, atol=1e-5)


@edge
def test_gradients_with_a_plan(entry):
    case = long_case(features=frozenset())
    query, keys, values, *rest = case.arguments()

    def loss(floats, plan):
        out, lse = ejk.page_attention(
            *floats, *rest, cache_layout="NHD", plan=plan, return_lse=True, backend=entry.backend
        )
        return (out**2).sum() + jnp.where(lse > -jnp.inf, lse, 0).sum()

    with entry.refusing():
        plan = case.plan(entry.backend)
        expected, actual = (jax.grad(loss)((query, keys, values), p) for p in (None, plan))
    for a, b in zip(actual, expected):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
        assert np.isfinite(a).all() and a.any()


@pytest.mark.parametrize("explicit", [False, True])
def test_exports_for_cuda(explicit, jax_triton):
    """Two layers: each attends and combines, and plans for itself if nobody did for both."""
    backend = ejk.TritonPageAttention(compute_capability=90, num_sms=12)
    case = long_case()

    def run(*arrays):
        plan = case.plan(backend, context_lens=arrays[3]) if explicit else None
        keywords = dict(**case.semantics(), backend=backend, plan=plan)
        query = ejk.page_attention(*arrays, **keywords)
        return ejk.page_attention(query, *arrays[1:], **keywords)

    exported = jax.export.export(
        jax.jit(run), platforms=("cuda",), disabled_checks=ejk.export_disabled_checks()
    )(*case.arguments())
    again = jax.export.deserialize(exported.serialize())
    found = re.findall(r"custom_call @triton_kernel_call", again.mlir_module())
    assert len(found) == (5 if explicit else 6)
