"""Lets the device's memory run out around live pools: errors, and nothing else.

    python benchmarks/exhaustion.py         on a GPU, of which it takes a twentieth
    python benchmarks/exhaustion.py         on a CPU, of which the process is allowed as much

Ballast leaves less than a pool. Then pools are asked for, calls that need another pool are made,
and calls whose pools were donated. Each has to raise, and a live pool keeps its bits. When the
ballast is gone, the same calls give what they gave before.
"""

import contextlib
import json
import os
import resource
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.05")

import jax
import jax.numpy as jnp
import numpy as np

import ejk

ON_GPU = jax.default_backend() == "gpu"
POOL = 2**27 if ON_GPU else 2**25  # bytes of a pool
LEFT = POOL // 2  # bytes that the ballast leaves
CPU_LIMIT = 2**29  # bytes that the process may take beyond what it has
EXHAUSTED = "RESOURCE_EXHAUSTED"
# jaxlib raises ValueError for what it allocates before it runs a program on a CPU.
ERRORS = (jax.errors.JaxRuntimeError, ValueError)
SIZES = {"num_kv_heads": 8, "page_size": 16, "head_dim": 128}


def limit_memory() -> None:
    """Let a process on a CPU take no more than `CPU_LIMIT` from here on."""
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_AS, (taken + CPU_LIMIT, hard))


@contextlib.contextmanager
def unlimited() -> Iterator[None]:
    """Lift that limit to look at results: the host's memory is none that runs out."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
    yield
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def take_the_rest() -> list[jax.Array]:
    """Return arrays that leave less than twice `LEFT` bytes. A GPU waits before it refuses one."""
    ballast: list[jax.Array] = []
    size = 2**30
    while size >= LEFT:
        try:
            ballast.append(jax.block_until_ready(jnp.zeros(size, jnp.uint8)))
        except ERRORS as error:
            if EXHAUSTED not in str(error):
                raise
            size //= 4
    if ballast[-1].nbytes == LEFT:  # room for results that are not pools
        ballast.pop()
    return ballast


def refused(call: Callable[[], Any]) -> str | None:
    """Return the first words of the error that a call raises; None if it raises none."""
    try:
        jax.block_until_ready(call())
    except ERRORS as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0][:90]}"
    return None


def main() -> None:
    pages = POOL // (2 * SIZES["num_kv_heads"] * SIZES["page_size"] * SIZES["head_dim"])
    cache = ejk.empty_kv_cache(pages, **SIZES)
    pools = tuple(
        jax.random.normal(jax.random.key(seed), cache.key_cache.shape, jnp.bfloat16)
        for seed in range(2)
    )
    del cache
    rng = np.random.default_rng(0)
    tables = jnp.asarray(rng.permutation(pages)[: 4 * 64].reshape(4, 64), jnp.int32)
    lens = jnp.asarray([1000, 17, 3, 512], jnp.int32)
    query, rows = (
        jax.random.normal(jax.random.key(seed), (4, heads, SIZES["head_dim"]), jnp.bfloat16)
        for seed, heads in ((3, 32), (4, 8))
    )
    slots = ejk.slot_mapping(tables, lens - 1, page_size=SIZES["page_size"], num_pages=pages)
    attend = jax.jit(lambda *args: ejk.page_attention(*args))
    write = jax.jit(lambda pools: ejk.write_kv_cache(rows, rows, *pools, slots))
    in_place = jax.jit(write, donate_argnums=0)
    # More results than fit, of pools that are donated.
    too_much = jax.jit(
        lambda pools: (ejk.write_kv_cache(rows, rows, *pools, slots), jnp.zeros(POOL * 2)),
        donate_argnums=0,
    )
    before = [np.asarray(x) for x in (*pools, attend(query, *pools, lens, tables))]
    jax.block_until_ready(write(pools))
    after_write = [np.asarray(x) for x in in_place(jax.tree.map(jnp.copy, pools))]
    for function in (write, in_place, too_much):  # nothing is left to compile when memory is short
        function.lower(pools).compile()
    if not ON_GPU:
        limit_memory()

    found: list[str] = []
    errors: dict[str, str] = {}
    ballast = take_the_rest()

    def expect_error(name: str, call: Callable[[], Any]) -> None:
        error = refused(call)
        errors[name] = error or "none"
        if error is None or EXHAUSTED not in error:
            found.append(f"{name}: {error or 'no error'}")

    def expect_bits(name: str, arrays: Any, expected: list[np.ndarray]) -> None:
        with unlimited():
            pairs = zip(arrays, expected, strict=True)
            if any(np.asarray(x).tobytes() != y.tobytes() for x, y in pairs):
                found.append(f"{name}: other bits")

    expect_error("pools too large", lambda: ejk.empty_kv_cache(4 * pages, **SIZES))
    expect_error("a write to pools that are kept", lambda: write(pools))
    expect_bits("pools that are kept", pools, before[:2])
    given = pools
    expect_error("a call that its pools were donated to", lambda: too_much(given))
    lost = [x.is_deleted() for x in given]
    errors["the donated pools"] = "are lost, and say so" if any(lost) else "are as before"
    if not any(lost):
        expect_bits("pools of a donated call that failed", given, before[:2])
    del ballast
    if any(lost):
        with unlimited():
            pools = tuple(jnp.asarray(x) for x in before[:2])
    expect_bits("attention after it", (attend(query, *pools, lens, tables),), before[2:])
    expect_bits("a write in place after it", in_place(pools), after_write)
    print(json.dumps({"counts": {"calls": 6}, "errors": errors, "found": found}))
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
