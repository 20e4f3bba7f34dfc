"""Runs random steps of serving for minutes: memory must stay as it is, results must stay right.

    python benchmarks/soak.py --seconds 60
    python benchmarks/soak.py --seconds 2 --tiny       interpreted on a CPU

Requests come with prompts of which some have a beginning in common, grow, fork, are cut, preempted
and end, over a pool that is too small for all. Each step copies pages, writes keys and values and
attends. Those of a token follow from the token and its position, so at any time it is known what a
pool must hold: bit for bit. Every so many steps this is compared, and attention with XLA's.
"""

import argparse
import contextlib
import functools
import gc
import json
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import ejk
from ejk.paging import OutOfPagesError, OutOfSequencesError, PageManager

# bfloat16 results of two backends, of values from a normal distribution: near 0, and by a last bit.
CLOSE = {"atol": 2e-2, "rtol": 2**-7}


class Sizes(NamedTuple):
    num_pages: int
    page_size: int
    max_seqs: int
    max_blocks: int
    heads: int
    kv_heads: int
    head_dim: int
    chunk: int  # new tokens of a step, at most
    vocabulary: int = 512


SERVING = Sizes(1024, 16, 32, 64, 32, 8, 128, 512)
TINY = Sizes(32, 8, 6, 8, 4, 2, 16, 24)


class Service:
    """Requests, and the pools that hold their tokens."""

    def __init__(self, sizes: Sizes, seed: int = 0):
        self.sizes, self.rng = sizes, np.random.default_rng(seed)
        self.manager = PageManager(
            num_pages=sizes.num_pages, page_size=sizes.page_size, max_seqs=sizes.max_seqs,
            max_blocks=sizes.max_blocks,
        )  # fmt: skip
        self.table = jax.random.normal(
            jax.random.key(seed),
            (sizes.vocabulary, sizes.heads + 2 * sizes.kv_heads, sizes.head_dim),
            jnp.bfloat16,
        )
        cache = ejk.empty_kv_cache(sizes.num_pages, sizes.kv_heads, sizes.page_size, sizes.head_dim)
        self.pools: Any = cache[:2]
        self.system = [self.tokens(3 * sizes.page_size) for _ in range(3)]
        self.seqs: list[int] = []
        self.compiled: set[tuple[bool, bool]] = set()  # decode or more, alone or with XLA's
        self.out: Any = None
        interpret = jax.default_backend() == "cpu"
        write = ejk.TritonWriteKVCache(interpret=interpret)
        copy = ejk.TritonCopyKVCache(interpret=interpret)
        self.copy = jax.jit(functools.partial(copy_pages, backend=copy), donate_argnums=0)
        self.write = jax.jit(functools.partial(write_step, backend=write), donate_argnums=0)
        own = ejk.TritonPageAttention(interpret=interpret)
        many = ejk.TritonRaggedPageAttention(interpret=interpret)
        self.attend = {
            name: (jax.jit(functools.partial(decode, backend=one)),
                   jax.jit(functools.partial(ragged, backend=other)))
            for name, one, other in (("ejk", own, many), ("xla", "xla", "xla"))
        }  # fmt: skip

    def tokens(self, count: int) -> np.ndarray:
        return self.rng.integers(0, self.sizes.vocabulary, count, np.int32)

    def random_event(self) -> None:
        """Let a request come, fork, be cut, preempted or end; what has no room does not happen."""
        rng, manager = self.rng, self.manager
        event = rng.random()
        with contextlib.suppress(OutOfPagesError, OutOfSequencesError):
            if event < 0.3 or not self.seqs:
                longest = self.sizes.max_blocks * self.sizes.page_size // 2
                prompt = self.tokens(int(rng.integers(1, longest)))
                if rng.random() < 0.5:
                    prompt = np.append(self.system[rng.integers(3)], prompt)[:longest]
                self.seqs.append(manager.allocate(prompt))
                return
            done = [s for s in self.seqs if self.is_computed(s)]
            if event < 0.6 and done:
                self.seqs.append(manager.fork(done[rng.integers(len(done))]))
                return
            seq = self.seqs[rng.integers(len(self.seqs))]
            computed = manager.num_computed_tokens(seq)
            if event < 0.75 and computed > 1:
                manager.truncate(seq, int(rng.integers(1, computed)))
            elif event < 0.85:
                self.seqs.remove(seq)
                self.seqs.append(manager.allocate(manager.preempt(seq)))
            else:
                self.seqs.remove(seq)
                manager.free(seq)

    def is_computed(self, seq: int) -> bool:
        return self.manager.num_computed_tokens(seq) == self.manager.num_tokens(seq)

    def next_tokens(self) -> None:
        """Give a token to each sequence that has none to compute; without room, one ends."""
        most = self.sizes.max_blocks * self.sizes.page_size
        for seq in list(self.seqs):
            if self.is_computed(seq):
                try:
                    if self.manager.num_tokens(seq) < most:
                        self.manager.append(seq, self.tokens(1))
                        continue
                except OutOfPagesError:
                    pass
                self.seqs.remove(seq)
                self.manager.free(seq)

    def step(self, check: bool) -> int:
        """Compute waiting tokens, decodes first; return how many. `check` compares with XLA."""
        manager, sizes = self.manager, self.sizes
        self.next_tokens()
        waiting = {s: manager.num_tokens(s) - manager.num_computed_tokens(s) for s in self.seqs}
        left, lens = sizes.chunk, {}
        for seq in sorted(waiting, key=lambda s: waiting[s])[: sizes.max_seqs]:
            if left and waiting[seq]:
                lens[seq] = min(waiting[seq], left)
                left -= lens[seq]
        if not lens:
            return 0
        many = max(lens.values()) > 1
        batch = manager.batch(
            [*lens], [*lens.values()], min_seqs=sizes.max_seqs, min_blocks=sizes.max_blocks,
            min_tokens=sizes.chunk if many else 1,
        )  # fmt: skip
        if batch.copies.size:  # padded to one shape
            rows = np.full((sizes.max_seqs, 2), -1, np.int32)
            rows[: len(batch.copies)] = batch.copies
            self.pools = self.copy(self.pools, rows)
        self.pools, query = self.write(self.pools, self.table, batch.inputs)
        self.out = out = self.attend["ejk"][many](query, self.pools, batch.inputs)
        self.compiled.add((many, check))
        manager.commit(batch)
        if check:
            other = self.attend["xla"][many](query, self.pools, batch.inputs)
            np.testing.assert_allclose(
                np.asarray(out, np.float32), np.asarray(other, np.float32), **CLOSE
            )
            self.check_pools()
        return int(batch.q_lens.sum())

    def check_pools(self) -> None:
        """Every computed token of every sequence is in its page, bit for bit."""
        keys, values = (np.asarray(pool).view(np.uint16) for pool in self.pools)
        table = np.asarray(self.table).view(np.uint16)
        page, heads = self.sizes.page_size, self.sizes.heads
        for seq in self.seqs:
            positions = np.arange(self.manager.num_computed_tokens(seq))
            tokens = self.manager.tokens(seq)[: len(positions)]
            pages = self.manager.block_table(seq)[positions // page]
            rows = table[row_of(tokens, positions, len(table))][:, heads:]
            for pool, expected in zip((keys, values), np.split(rows, 2, axis=1)):
                np.testing.assert_array_equal(pool[pages, :, positions % page], expected)


def row_of(tokens: Any, positions: Any, vocabulary: int) -> Any:
    """Say which row of the table a token has at a position."""
    return (tokens + 7 * positions) % vocabulary


def copy_pages(pools: Any, copies: Any, *, backend: Any) -> Any:
    return ejk.copy_kv_pages(*pools, copies[:, 0], copies[:, 1], backend=backend)


def write_step(pools: Any, table: Any, inputs: Any, *, backend: Any) -> Any:
    """Write the new tokens; return the pools and the queries."""
    rows = table[row_of(inputs.tokens, inputs.positions, len(table))]
    kv_heads = pools[0].shape[1]
    heads = rows.shape[1] - 2 * kv_heads
    query, key, value = jnp.split(rows, (heads, heads + kv_heads), axis=1)
    return ejk.write_kv_cache(key, value, *pools, inputs.slot_mapping, backend=backend), query


def decode(query: Any, pools: Any, inputs: Any, *, backend: Any) -> Any:
    return ejk.page_attention(
        query, *pools, inputs.context_lens, inputs.block_tables, backend=backend
    )


def ragged(query: Any, pools: Any, inputs: Any, *, backend: Any) -> Any:
    lens, tables = inputs.context_lens, inputs.block_tables
    return ejk.ragged_page_attention(query, *pools, lens, tables, inputs.cu_q_lens, backend=backend)


def memory() -> dict[str, int]:
    """Bytes in use: of the device where it counts them, of live arrays, of the process."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    found = {
        "arrays": sum(x.nbytes for x in jax.live_arrays()),
        "process": pages * 4096,
    }
    stats = jax.local_devices()[0].memory_stats() or {}
    names = ("bytes_in_use", "peak_bytes_in_use")
    return found | {name: stats[name] for name in names if name in stats}


def soak(sizes: Sizes, seconds: float, check_every: int, seed: int) -> dict[str, Any]:
    """Run steps; compare the memory of a tenth of the time with that of each later one."""
    service = Service(sizes, seed)
    steps = tokens = checks = 0
    for number in range(4 if sizes is TINY else 200):  # compiles what will be needed
        service.random_event()
        service.step(check=number % 2 == 0)
        if len(service.compiled) == 4 and number >= 24:
            break
    rows = np.full((sizes.max_seqs, 2), -1, np.int32)
    service.pools = service.copy(service.pools, rows)
    seen: list[dict[str, int]] = []
    begin = time.perf_counter()
    for tenth in range(1, 11):
        while time.perf_counter() - begin < seconds * tenth / 10:
            for _ in range(service.rng.integers(3)):
                service.random_event()
            check = steps % check_every == 0
            tokens += service.step(check)
            checks += check
            steps += 1
        # What is in flight holds memory, too; the newest result is of one size or another.
        jax.block_until_ready((service.pools, service.out))
        service.out = None
        seen.append(memory())
    # The device's own count, if it has one: on a GPU JAX at times listed two pools more, donated
    # ones, of which the device knew nothing.
    name = "bytes_in_use" if "bytes_in_use" in seen[0] else "arrays"
    found = [
        f"{name}: {seen[1][name]:,} bytes after a fifth of the time, then {tenth[name]:,}"
        for tenth in seen[2:]
        if tenth[name] != seen[1][name]
    ]
    statistics = service.manager.statistics()
    return {
        "counts": {
            "steps": steps, "tokens": tokens, "checks": checks,
            "evictions": statistics.evictions, "forks": statistics.forks,
            "copies": statistics.copies, "preemptions": statistics.preemptions,
        },
        "memory": {"after a fifth": seen[1], "at the end": seen[-1]},
        "found": found,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    sizes, every = (TINY, 5) if args.tiny else (SERVING, 50)
    try:
        result = soak(sizes, args.seconds, every, args.seed)
    except AssertionError as error:
        result = {"counts": {}, "found": [f"seed {args.seed}: {error}"]}
    print(json.dumps(result))
    sys.exit(bool(result["found"]))


if __name__ == "__main__":
    main()
