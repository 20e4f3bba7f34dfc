"""Microseconds of Python that an un-jitted call takes: `python benchmarks/eager.py [backend]`.

The last line is what `jax.jit` itself takes of a call with as many arrays. On an H100's machine
they were 142, 119, 113 and 34.
"""

import sys
import time

import jax
import jax.numpy as jnp

import ejk


def microseconds(function, repeat=20, calls=50):
    """Return the best mean time between calls, without waiting for what they compute."""
    for _ in range(3):
        jax.block_until_ready(function())
    best = float("inf")
    for _ in range(repeat):
        begin = time.perf_counter()
        for _ in range(calls):
            results = function()
        best = min(best, (time.perf_counter() - begin) / calls)
        jax.block_until_ready(results)
    return best * 1e6


def main():
    backend = sys.argv[1] if len(sys.argv) > 1 else None
    pool, query = jnp.ones((8, 2, 16, 64)), jnp.ones((3, 4, 64))
    lens, tables = jnp.array([3, 4, 1]), jnp.zeros((3, 2), jnp.int32)
    rows, bounds = jnp.ones((3, 2, 64)), jnp.arange(4)
    paged = (query, pool, pool, lens, tables)
    empty = jax.jit(lambda *args: args[0])
    calls = {
        "page_attention": lambda: ejk.page_attention(*paged, backend=backend),
        "ragged_page_attention": lambda: ejk.ragged_page_attention(*paged, bounds, backend=backend),
        "write_kv_cache": lambda: ejk.write_kv_cache(rows, rows, pool, pool, lens, backend=backend),
        "jax.jit alone": lambda: empty(*paged),
    }
    print(jax.devices()[0].device_kind)
    for name, call in calls.items():
        print(f"{name:24}{microseconds(call):8.0f} us")


if __name__ == "__main__":
    main()
