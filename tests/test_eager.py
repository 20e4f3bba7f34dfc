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
