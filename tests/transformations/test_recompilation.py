"""New lengths, tables and numbers run the same program: nothing is traced or compiled again."""

import jax
import jax.numpy as jnp
import numpy as np
from compilations import CompilationCounter
from edges import LENGTHS, SMALL, config
from entries import edge

import ejk
from ejk.testing.page_attention import build


def calls():
    """Calls of one shape that differ in every number."""
    features = frozenset({"sliding_window", "sinks", "alibi_slopes"})
    for seed, lens in enumerate((LENGTHS, LENGTHS[::-1], np.zeros(9, int), np.full(9, 48))):
        case = build(config(features=features), lens.astype(np.int32), seed=seed, as_jax=True)
        options = {**case.options, "sliding_window": jnp.int32(1 + 20 * seed)}
        yield case.replace(options={**options, "attn_scale": 0.01 * (1 + seed)})


@edge
def test_eager_calls_compile_once(entry):
    first, *others = calls()
    for _ in range(
        2
    ):  # what puts arrays on the device is compiled for those that are there already
        entry(first)
    with CompilationCounter() as compiled:
        for case in others:
            entry(case)
    assert compiled.count == 0


@edge
def test_windows_that_are_numbers_compile_few_programs(entry):
    """A window sizes work as a bound does: rounded up."""
    case = build(config(features=frozenset({"sliding_window"})), LENGTHS, as_jax=True)
    for window in (1, 1):  # see above
        entry(case, sliding_window=window)
    with CompilationCounter() as compiled:
        for window in (2, 33, np.int64(47), np.array(48), 64, 1000):
            entry(case, sliding_window=window)
    assert compiled.count == 0


@edge
def test_jit_traces_once(entry):
    traced = 0

    @jax.jit
    def run(arrays, options):
        nonlocal traced
        traced += 1
        return ejk.page_attention(*arrays, **options, backend=entry.backend)

    first, *others = calls()
    options = [{n: jnp.asarray(x) for n, x in case.options.items()} for case in (first, *others)]
    with entry.refusing():
        run(first.arguments(), options[0])
    with CompilationCounter() as compiled:
        for case, given in zip(others, options[1:]):
            run(case.arguments(), given)
    assert traced == 1 and compiled.count == 0


@edge
def test_the_counter_counts(entry):
    """A shape that no other test has is compiled, or the tests above would prove nothing."""
    table = np.zeros((1, 5 + len(entry.name)), np.int32)
    pool = np.zeros((3, SMALL.num_kv_heads, SMALL.page_size, SMALL.head_dim), np.float32)
    query = np.zeros((1, SMALL.num_heads, SMALL.head_dim), np.float32)
    with CompilationCounter() as compiled, entry.refusing():
        ejk.page_attention(query, pool, pool, np.array([7]), table, backend=entry.backend)
    assert compiled.count > 0
