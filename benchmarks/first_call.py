"""Seconds that the first call of each operation takes in a process of its own, and the next.

    python benchmarks/first_call.py            the call, on this machine's GPU; results/first_call_*
    python benchmarks/first_call.py --lower    lowers it for an H100, on a machine without one
    python benchmarks/first_call.py --only "ragged_page_attention mosaic_gpu"

Each operation is timed twice: with Triton's cache empty, then with what that left on disk. What a
process does once for all, importing JAX and starting the device, comes before and is not in it. A
second call, of other lengths, must compile nothing.
"""

import argparse
import functools
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence

# Operations, and the backend where it is not `ejk`'s own choice.
CALLS = (
    "page_attention",
    "ragged_page_attention",
    "ragged_page_attention mosaic_gpu",
    "ragged_page_attention triton",
    "write_kv_cache",
)


def first_call(name: str, lower: bool) -> None:
    """Print how long two calls take here, and whether they imported torch."""
    import jax
    import jax.numpy as jnp

    import ejk

    operation, _, backend = name.partition(" ")
    pool, rows = jnp.ones((64, 8, 16, 128), jnp.bfloat16), jnp.ones((100, 32, 128), jnp.bfloat16)
    lens, tables = jnp.array([100, 200, 3, 256]), jnp.arange(64).reshape(4, 16)
    new, bounds = rows[:4, :8], jnp.array([0, 50, 80, 83, 100])
    slots, other_bounds = jnp.arange(4), jnp.array([0, 1, 64, 64, 99])
    arguments, others = {
        "page_attention": [(rows[:4], pool, pool, n, tables) for n in (lens, lens[::-1])],
        "ragged_page_attention": [
            (rows, pool, pool, n, tables, own)
            for n, own in ((lens, bounds), (lens[::-1], other_bounds))
        ],
        "write_kv_cache": [(new, new, pool, pool, own) for own in (slots, slots[::-1])],
    }[operation]
    jax.block_until_ready((arguments, others))
    if lower:
        ejk.register_backend(ejk.TritonPageAttention(compute_capability=90, num_sms=132))
        ejk.register_backend(ejk.TritonRaggedPageAttention(compute_capability=90, num_sms=132))
        ejk.register_backend(ejk.MosaicGpuRaggedPageAttention(compute_capability=90, num_sms=132))
        ejk.register_backend(ejk.TritonWriteKVCache(compute_capability=90))
    choice = {"backend": backend} if backend else {}
    call = jax.jit(functools.partial(getattr(ejk, operation), **choice))
    begin = time.perf_counter()
    if lower:
        call.trace(*arguments).lower(lowering_platforms=("cuda",))
    else:
        jax.block_until_ready(call(*arguments))
    first = time.perf_counter() - begin
    begin = time.perf_counter()
    if not lower:
        jax.block_until_ready(call(*others))
        if call._cache_size() != 1:
            raise AssertionError(f"new lengths compile {name} anew")
    print(first, time.perf_counter() - begin, "torch" in sys.modules)


def results(names: Sequence[str], lower: bool):
    """Yield a line for each call and state of the cache."""
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            for cache in ("empty", "on disk"):
                command = [sys.executable, __file__, "--call", name, *["--lower"] * lower]
                env = os.environ | {"TRITON_CACHE_DIR": folder}
                run = subprocess.run(command, env=env, check=True, capture_output=True, text=True)
                seconds, new_lengths, torch = run.stdout.split()[-3:]
                yield {
                    "workload": f"first call of {name}",
                    "contender": f"kernels {cache}",
                    "seconds": round(float(seconds), 2),
                    "new_lengths_seconds": round(float(new_lengths), 4),
                    "imported_torch": torch == "True",
                }


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--lower", action="store_true", help="for an H100 that is not here")
    parser.add_argument("--only", nargs="+", choices=CALLS, default=CALLS)
    parser.add_argument("--call", choices=CALLS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.call:
        return first_call(args.call, args.lower)
    if args.lower:
        for line in results(args.only, lower=True):
            print(", ".join(f"{name} {value}" for name, value in line.items()), flush=True)
        return None
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # the processes share one device
    import ragged

    return ragged.append(
        None, results(args.only, lower=False), "first_call.py", prefix="first_call_"
    )


if __name__ == "__main__":
    main()
