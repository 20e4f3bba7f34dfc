"""Times ragged batches, checks them first, and appends a line a result to `results/`.

    python benchmarks/ragged.py                        every batch and contender
    python benchmarks/ragged.py --batch "prefill 8 x 4,096, page 16"
    python benchmarks/ragged.py --tiny --output x.jsonl   small batches, interpreted on a CPU

Prefills, chunks of prefills, mixed batches with their parts alone, and verified drafts with the
decode call for the same contexts. Yardsticks of the same run: the rate of a bfloat16 product of
8,192 x 8,192 matrices, and cuDNN's dense causal attention to contiguous tensors.

Device time is how long the device was busy with a program of chained calls, over their number, from
CUPTI through `jax.profiler`: the mean of five runs. The plan, of which XLA makes one for all calls
of a program, is not in it.
"""

import argparse
import dataclasses
import datetime
import functools
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import ceiling
import decode
import jax
import jax.numpy as jnp
import numpy as np
import programs
import timing
import workloads

import ejk

CALLS = 4


@dataclasses.dataclass(frozen=True)
class Batch:
    """`q_lens` new tokens on contexts of `context_lens`, which count them."""

    name: str
    q_lens: tuple[int, ...]
    context_lens: tuple[int, ...]
    page_size: int
    num_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 128
    value_head_dim: int | None = None  # of latent attention

    @property
    def total_tokens(self) -> int:
        return sum(self.q_lens)

    @property
    def flops(self) -> int:
        """Of both products, each token with those up to itself."""
        seen = sum(q * (n - q) + q * (q + 1) // 2 for q, n in zip(self.q_lens, self.context_lens))
        return 2 * self.num_heads * (self.head_dim + (self.value_head_dim or self.head_dim)) * seen

    @property
    def pages(self) -> workloads.Workload:
        """The contexts as a decode batch has them."""
        return workloads.Workload(
            self.name, self.num_heads, self.num_kv_heads, self.head_dim, self.context_lens,
            self.page_size, max(self.context_lens), value_head_dim=self.value_head_dim,
        )  # fmt: skip


def _batches(page_size: int, scale: int = 1) -> list[Batch]:
    """Everything that is timed with pages of one size; a `scale` makes it that much smaller."""

    def batch(name, parts):
        lens = [(q, n) for count, q, n in parts for _ in range(count)]
        q_lens, context_lens = zip(*((q // scale or q, n // scale) for q, n in lens))
        return Batch(f"{name}, page {page_size}", q_lens, context_lens, page_size)

    chunks, decodes = (4, 512, 4096), (60 if scale == 1 else 3, 1, 4096)
    return [
        batch("prefill 8 x 4,096", [(8 if scale == 1 else 2, 4096, 4096)]),
        batch("prefill 1 x 32,768", [(1, 32768, 32768)]),
        batch("8 chunks of 512 on 16,384", [(8 if scale == 1 else 2, 512, 16384)]),
        batch("mixed", [chunks, decodes]),
        batch("mixed: its chunks", [chunks]),
        batch("mixed: its decodes", [decodes]),
        batch("verification of 8 on 8,192", [(32 if scale == 1 else 3, 8, 8192)]),
        batch("verification: its decode", [(32 if scale == 1 else 3, 1, 8192)]),
    ]


def _drafts(own: workloads.Workload) -> Batch:
    """Four drafted tokens of each sequence of a decode batch."""
    shape = own.page_size, own.num_heads, own.num_kv_heads, own.head_dim, own.value_head_dim
    return Batch(f"{own.name}: verification of 4", (4,) * own.num_seqs, own.context_lens, *shape)


BATCHES = [batch for page_size in (16, 64) for batch in _batches(page_size)]
BATCHES += map(_drafts, workloads.LATENT)
# As many kinds of blocks, a hundredth of the work.
TINY = [
    dataclasses.replace(batch, num_heads=4, num_kv_heads=2, head_dim=16)
    for batch in _batches(16, scale=128)
]
TINY.append(_drafts(workloads.latent("latent", 16, 2, 20, 16)))


class Arrays(NamedTuple):
    """The arguments of a ragged call, and the same keys and values without pages."""

    query: jax.Array  # [total_tokens, num_heads, head_dim]
    key_cache: jax.Array  # [num_pages, num_kv_heads, page_size, head_dim]
    value_cache: jax.Array | None  # None of latent attention
    context_lens: jax.Array
    block_tables: jax.Array
    cu_q_lens: jax.Array


def arrays(batch: Batch) -> Arrays:
    paged = workloads.arrays(batch.pages, 1)
    shape = (batch.total_tokens, batch.num_heads, batch.head_dim)
    query = 1.5 * jax.random.normal(jax.random.key(9), shape, jnp.bfloat16)
    bounds = jnp.asarray(np.cumsum((0, *batch.q_lens)), jnp.int32)
    return Arrays(query, *paged[1:], bounds)


Step = Callable[[Batch, Arrays], jax.Array]


def contenders(batch: Batch, interpret: bool) -> dict[str, Step]:
    """What can run a batch, by name."""
    ragged = ejk.TritonRaggedPageAttention(interpret=True, num_sms=6) if interpret else "triton"
    found: dict[str, Step] = {"ejk": functools.partial(attend, ragged)}
    if batch.total_tokens == len(batch.q_lens):
        decode_backend = ejk.TritonPageAttention(interpret=True) if interpret else "triton"
        found["ejk page_attention"] = functools.partial(_decode, decode_backend)
    if batch.q_lens == batch.context_lens:
        found["cuDNN dense, contiguous"] = functools.partial(_dense, None if interpret else "cudnn")
    return found


def attend(backend: Any, batch: Batch, given: Arrays) -> jax.Array:
    return ejk.ragged_page_attention(
        *given,
        max_q_len=max(batch.q_lens),
        value_head_dim=batch.value_head_dim,
        backend=backend,
    )


def _decode(backend: Any, batch: Batch, given: Arrays) -> jax.Array:
    return ejk.page_attention(*given[:-1], backend=backend)


def _dense(implementation: Any, batch: Batch, given: Arrays) -> jax.Array:
    """`given` holds keys and values as `contiguous` makes them: all sequences are equally long."""
    query = given.query.reshape(len(batch.q_lens), -1, batch.num_heads, batch.head_dim)
    out = jax.nn.dot_product_attention(
        query, given.key_cache, given.value_cache, is_causal=True, implementation=implementation
    )
    return out.reshape(given.query.shape)


@functools.partial(jax.jit, static_argnums=0)
def contiguous(batch: Batch, given: Arrays) -> Arrays:
    """Gather the pages: `[num_seqs, tokens, num_kv_heads, head_dim]`."""

    def dense(pool):
        pages = pool[given.block_tables].transpose(0, 1, 3, 2, 4)
        pages = pages.reshape(len(batch.q_lens), -1, batch.num_kv_heads, batch.head_dim)
        return pages[:, : batch.context_lens[0]]

    return given._replace(key_cache=dense(given.key_cache), value_cache=dense(given.value_cache))


def check(batch: Batch, given: Arrays, out: jax.Array) -> float:
    """Compare a few rows with float32 products over gathered keys and values."""
    worst = 0.0
    for seq in sorted({0, len(batch.q_lens) // 2, len(batch.q_lens) - 1}):
        q_len, n = batch.q_lens[seq], batch.context_lens[seq]
        pages = given.block_tables[seq, : -(-n // batch.page_size)]
        own = [
            pool[pages].transpose(1, 0, 2, 3).reshape(batch.num_kv_heads, -1, batch.head_dim)
            for pool in (given.key_cache, given.value_cache)
            if pool is not None
        ]
        keys, values = own[0], own[-1][..., : batch.value_head_dim]
        for i in sorted({0, q_len // 3, q_len - 1}):
            row = int(given.cu_q_lens[seq]) + i
            expected = _attend_row(given.query[row], keys, values, n - q_len + i)
            error = jnp.abs(out[row].astype(jnp.float32) - expected).max()
            worst = max(worst, float(error / jnp.abs(expected).max()))
    if not worst < programs.TOLERANCE:
        raise AssertionError(f"wrong on {batch.name}: relative error {worst:.1e}")
    return float(f"{worst:.1e}")


@jax.jit
def _attend_row(query, keys, values, last) -> jax.Array:
    q = query.astype(jnp.float32).reshape(keys.shape[0], -1, keys.shape[2])
    keys, values = keys.astype(jnp.float32), values.astype(jnp.float32)
    logits = jnp.einsum("kgd,ktd->kgt", q, keys, precision="highest") * keys.shape[2] ** -0.5
    logits = jnp.where(jnp.arange(keys.shape[1]) <= last, logits, -jnp.inf)
    weights = jax.nn.softmax(logits, axis=-1)
    out = jnp.einsum("kgt,ktd->kgd", weights, values, precision="highest")
    return out.reshape(query.shape[0], -1)


def prepare(batch: Batch, name: str, step: Step) -> tuple[float, Callable[[], Any]]:
    """Check one contender on one batch; return the error and the program that is timed."""
    given = arrays(batch)
    own = contiguous(batch, given) if name.startswith("cuDNN") else given
    error = check(batch, given, jax.jit(step, static_argnums=0)(batch, own))

    @jax.jit
    def run(given):
        for _ in range(CALLS):
            given = given._replace(query=step(batch, given))
        return given.query

    if batch.value_head_dim is not None:  # the output is narrower than a query: no chain
        call = jax.jit(functools.partial(step, batch))
        return error, lambda: [call(own) for _ in range(CALLS)]

    return error, lambda: run(own)


def measure(batch: Batch, name: str, step: Step, matmul_tflops: float) -> dict:
    """Check, then time one contender on one batch."""
    error, run = prepare(batch, name, step)
    device_us, plan_us = timing.device_time(CALLS, run)
    tflops = batch.flops / device_us / 1e6
    return {
        "device_us": round(device_us, 2),
        "tflops": round(tflops, 1),
        "of_matmul": round(tflops / matmul_tflops, 4),
        "plan_us": round(statistics.median(plan_us), 2) if plan_us else None,
        "error": error,
    }


def append(path: Path | None, lines, script: str, prefix: str = "") -> None:
    """Append each result with where and how it came about, and print it."""
    device = jax.devices()[0].device_kind
    path = path or decode.RESULTS / f"{prefix}{device.replace(' ', '_')}.jsonl"
    facts = {
        "device": device,
        "date": datetime.date.today().isoformat(),
        "versions": decode.versions(),
        "command": " ".join(["python", f"benchmarks/{script}", *sys.argv[1:]]),
    }
    with path.open("a") as file:
        for line in lines:
            file.write(json.dumps(line | facts) + "\n")
            file.flush()
            print(", ".join(f"{name} {value}" for name, value in line.items()), flush=True)


def results(batches: list[Batch], tiny: bool):
    """Yield a line for each batch and contender."""
    matmul_tflops = ceiling.matmul_rate(256 if tiny else ceiling.MATMUL)
    for batch in batches:
        for name, step in contenders(batch, interpret=tiny).items():
            line = {"workload": batch.name, "contender": name}
            try:
                line |= measure(batch, name, step, matmul_tflops)
            except Exception as error:  # one that fails must not cost the others their turn
                if tiny:
                    raise
                line["failed"] = f"{type(error).__name__}: {str(error).splitlines()[:1]}"[:300]
            yield line | {"matmul_tflops": round(matmul_tflops, 1)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--batch", nargs="+", help="names, instead of all")
    parser.add_argument("--tiny", action="store_true", help="small ones, interpreted on a CPU")
    parser.add_argument("--output", type=Path, help="instead of results/<device>.jsonl")
    args = parser.parse_args()
    if args.tiny and args.output is None:
        parser.error("--tiny needs --output: it measures nothing that is to be kept")
    batches = [
        b for b in (TINY if args.tiny else BATCHES) if not args.batch or b.name in args.batch
    ]
    append(args.output, results(batches, args.tiny), "ragged.py")


if __name__ == "__main__":
    main()
