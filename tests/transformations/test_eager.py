"""An un-jitted call traces, lowers and compiles once: the second is `jax.jit`'s own fast path."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ejk
from ejk import _dispatch

POOL = np.ones((8, 2, 4, 16), np.float32)
QUERY, ROWS = np.ones((3, 4, 16), np.float32), np.ones((3, 2, 16), np.float32)
LENS, TABLES = np.array([3, 4, 1], np.int32), np.zeros((3, 2), np.int32)
CALLS = {
    "page_attention": (ejk.page_attention, (QUERY, POOL, POOL, LENS, TABLES)),
    "ragged_page_attention": (
        ejk.ragged_page_attention, (QUERY, POOL, POOL, LENS, TABLES, np.arange(4, dtype=np.int32)),
    ),
    "write_kv_cache": (ejk.write_kv_cache, (ROWS, ROWS, POOL, POOL, LENS)),
}  # fmt: skip


@pytest.mark.parametrize("kind", [np.asarray, jnp.asarray], ids=["NumPy", "JAX"])
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_a_second_call_traces_nothing(call, kind, monkeypatch):
    function, arrays = call
    arrays = [kind(x) for x in arrays]
    calls, events = [], []
    inner = _dispatch.call

    def counted(*args):
        calls.append(args)
        return inner(*args)

    def listen(event, *_, **__):
        events.append(event)

    monkeypatch.setattr(_dispatch, "call", counted)
    jax.clear_caches()
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        function(*arrays)
        assert calls and events, "the counters count"
        calls.clear()
        events.clear()
        function(*arrays)
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert not calls and not events


def aligned(x):
    """Copy to where `jax.jit` on a CPU reads an argument in place."""
    memory = np.empty(x.nbytes + 64, np.uint8)
    start = -memory.ctypes.data % 64
    copy = memory[start : start + x.nbytes].view(x.dtype).reshape(x.shape)
    copy[...] = x
    return copy


@jax.jit
def late(x):
    """Return `x` after a while."""
    m = jax.lax.fori_loop(0, 50, lambda _, m: jnp.tanh(m @ m), jnp.full((300, 300), 0.01))
    return x + m[0, 0].astype(x.dtype) * 0


def plan_page_attention(lens):
    sizes = dict(num_heads=4, num_kv_heads=2, head_dim=16, page_size=4, max_blocks=100)
    return ejk.plan_page_attention(lens, **sizes).work


LATE = CALLS | {"plan_page_attention": (plan_page_attention, (LENS,))}


@pytest.mark.parametrize("name", LATE)
def test_arrays_of_numpy_may_be_changed_while_a_call_runs(name):
    """A step's tables are the next one's, written in place."""
    function, arrays = LATE[name]
    if name == "plan_page_attention":
        arrays = (np.arange(2**16, dtype=np.int32),)  # takes a while itself
        wanted = function(*arrays)
    else:
        pools = [i for i, x in enumerate(arrays) if x is POOL]
        arrays = [jnp.asarray(x) if i in pools else x for i, x in enumerate(arrays)]
        wanted = function(*arrays)
    given = [x if isinstance(x, jax.Array) else aligned(x) for x in arrays]
    called = [late(x) if isinstance(x, jax.Array) else x for x in given]
    results = function(*called)
    for x in given:
        if not isinstance(x, jax.Array):
            x[...] = 0 if x.dtype == np.float32 else -1
    for a, b in zip(jax.tree.leaves(results), jax.tree.leaves(wanted)):
        np.testing.assert_array_equal(a, b)
