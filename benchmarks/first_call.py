"""Seconds that the first call of each operation takes in a process of its own.

    python benchmarks/first_call.py            the call, on this machine's GPU; results/first_call_*
    python benchmarks/first_call.py --lower    lowers it for an H100, on a machine without one

Each operation is timed twice: with Triton's cache empty, then with what that left on disk. What a
process does once for all, importing JAX and starting the device, comes before and is not in it.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time

OPERATIONS = ("page_attention", "ragged_page_attention", "write_kv_cache")


def first_call(operation: str, lower: bool) -> None:
    """Print how long the first call takes here, and whether it imported torch."""
    import jax
    import jax.numpy as jnp

    import ejk

    pool, rows = jnp.ones((64, 8, 16, 128), jnp.bfloat16), jnp.ones((100, 32, 128), jnp.bfloat16)
    lens, tables = jnp.array([100, 200, 3, 256]), jnp.arange(64).reshape(4, 16)
    new, bounds = rows[:4, :8], jnp.array([0, 50, 80, 83, 100])
    arguments = {
        "page_attention": (rows[:4], pool, pool, lens, tables),
        "ragged_page_attention": (rows, pool, pool, lens, tables, bounds),
        "write_kv_cache": (new, new, pool, pool, jnp.arange(4)),
    }[operation]
    jax.block_until_ready(arguments)
    if lower:
        ejk.register_backend(ejk.TritonPageAttention(compute_capability=90, num_sms=132))
        ejk.register_backend(ejk.TritonRaggedPageAttention(compute_capability=90, num_sms=132))
        ejk.register_backend(ejk.TritonWriteKVCache(compute_capability=90))
    begin = time.perf_counter()
    traced = jax.jit(getattr(ejk, operation)).trace(*arguments)
    if lower:
        traced.lower(lowering_platforms=("cuda",))
    else:
        jax.block_until_ready(traced.lower().compile()(*arguments))
    print(time.perf_counter() - begin, "torch" in sys.modules)


def results(lower: bool):
    """Yield a line for each operation and state of the cache."""
    for operation in OPERATIONS:
        with tempfile.TemporaryDirectory() as folder:
            for cache in ("empty", "on disk"):
                command = [sys.executable, __file__, "--operation", operation, *["--lower"] * lower]
                env = os.environ | {"TRITON_CACHE_DIR": folder}
                run = subprocess.run(command, env=env, check=True, capture_output=True, text=True)
                seconds, torch = run.stdout.split()[-2:]
                yield {
                    "workload": f"first call of {operation}",
                    "contender": f"kernels {cache}",
                    "seconds": round(float(seconds), 2),
                    "imported_torch": torch == "True",
                }


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--lower", action="store_true", help="for an H100 that is not here")
    parser.add_argument("--operation", choices=OPERATIONS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.operation:
        return first_call(args.operation, args.lower)
    if args.lower:
        for line in results(lower=True):
            print(", ".join(f"{name} {value}" for name, value in line.items()), flush=True)
        return None
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # the processes share one device
    import ragged

    return ragged.append(None, results(lower=False), "first_call.py", prefix="first_call_")


if __name__ == "__main__":
    main()
