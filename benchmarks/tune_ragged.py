"""Tries the fields of `ejk.TritonRaggedPageAttention` and prints the best of each batch.

    python benchmarks/tune_ragged.py                   pages of 16; prints a line a trial
    python benchmarks/tune_ragged.py --tiny            small batches, interpreted on a CPU

Blocks of many query rows are tried on a prefill and on chunks, blocks of few on decodes and on
verification. A trial whose output is not that of the default is
an error; one that needs more shared memory than there is, or fails to compile, is passed over.
"""

import argparse
import functools
import json
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import ragged_batches
import ragged_programs
import timing
from ragged_batches import Arrays, Batch

import ejk

# Query rows, tokens, warps and stages of blocks of many rows.
WIDE = (
    (128, 64, 8, 2),
    (128, 64, 8, 3),
    (128, 64, 8, 4),
    (128, 128, 8, 2),
    (128, 128, 8, 3),
    (128, 32, 8, 4),
    (64, 64, 4, 2),
    (64, 64, 4, 3),
    (64, 64, 4, 4),
    (64, 32, 4, 3),
    (64, 128, 4, 2),
    (64, 128, 4, 3),
    (128, 64, 4, 2),
    (128, 64, 4, 3),
    (256, 64, 16, 3),
)
# Tokens, warps and stages of blocks of few rows.
NARROW = ((128, 4, 3), (128, 4, 2), (64, 4, 3), (64, 4, 4), (128, 8, 3), (256, 4, 2), (64, 2, 3))
WIDE_FIELDS = ("block_rows", "block_kv", "num_warps", "num_stages")
NARROW_FIELDS = ("few_block_kv", "few_num_warps", "few_num_stages")
FOR_WIDE = ("prefill 8 x 4,096", "8 chunks of 512 on 16,384", "prefill 1 x 32,768")
FOR_NARROW = ("mixed: its decodes", "verification of 8 on 8,192")


def trials(name: str, tiny: bool) -> Iterator[dict[str, int]]:
    """Yield the fields to try on a batch, the default's, which is all None, first."""
    is_wide = any(name.startswith(prefix) for prefix in FOR_WIDE)
    fields, values = (WIDE_FIELDS, WIDE) if is_wide else (NARROW_FIELDS, NARROW)
    if tiny:
        values = ((32, 16, 4, 2),) if is_wide else ((16, 4, 2),)
    yield {}
    for trial in values:
        yield dict(zip(fields, trial))


def measure(batch: Batch, given: Arrays, expected, fields, tiny: bool):
    """Return the output of a trial and its device time in microseconds."""
    where = {"interpret": True, "num_sms": 6} if tiny else {}
    backend = ejk.TritonRaggedPageAttention(**fields, **where)
    call = jax.jit(functools.partial(ragged_programs.attend, backend, batch))
    out = call(given)
    if expected is not None:
        error = float(jnp.abs(out.astype(jnp.float32) - expected.astype(jnp.float32)).max())
        assert error < 2e-2 * float(jnp.abs(expected).max()), f"{fields} is off by {error:.1e}"
    found = timing.device_kernels(lambda: call(given))
    return out, timing.busy_us(found) / timing.REPEATS


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tiny", action="store_true", help="small ones, interpreted on a CPU")
    parser.add_argument("--output", type=Path, help="append a line a trial to this file")
    args = parser.parse_args()
    tuned_for = (FOR_WIDE[0], FOR_NARROW[1]) if args.tiny else (*FOR_WIDE, *FOR_NARROW)
    best = {}
    for batch in ragged_batches.each(ragged_batches.TINY if args.tiny else ragged_batches.SUITES):
        if batch.name not in [f"{prefix}, page 16" for prefix in tuned_for]:
            continue
        given, expected = ragged_batches.arrays(batch), None
        for fields in trials(batch.name, args.tiny):
            start = time.perf_counter()
            try:
                out, device_us = measure(batch, given, expected, fields, args.tiny)
            except AssertionError:
                raise
            except Exception as error:  # too much shared memory, or the compiler gives up
                print(batch.name, fields, type(error).__name__, str(error)[:200], flush=True)
                continue
            expected = out if expected is None else expected
            took_s = time.perf_counter() - start
            line = {"batch": batch.name, **fields, "device_us": round(device_us, 2)}
            print(line, f"{batch.flops / device_us / 1e6:.0f} TFLOP/s, {took_s:.1f} s", flush=True)
            best.setdefault(batch.name, []).append((device_us, fields))
            if args.output:
                with args.output.open("a") as file:
                    file.write(json.dumps(line) + "\n")
    print()
    for name, found in best.items():
        default_us = found[0][0]
        device_us, fields = min(found, key=lambda pair: pair[0])
        print(
            f"{name}: {device_us:.1f} us with {fields or 'the default'}, {default_us:.1f} without"
        )


if __name__ == "__main__":
    main()
