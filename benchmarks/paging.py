"""Times the page manager of the host, and appends a line a result to `results/`.

    python benchmarks/paging.py
    python benchmarks/paging.py --tiny --output x.jsonl   small, for the tests

A pool of 1,000,000 pages of 16 tokens, nearly all held by 10,000 sequences of 1 to 3,000 tokens. A
step appends a token to each of 256 sequences, makes the batch's arrays and commits it. `median_us`
and `p99_us` are wall times of a step, `cpu_us` and `cpu_p99_us` times of a core. Where other
programs run, as `load` says, the tail of the wall times is theirs. The parts of a step are medians
of wall times. `python docs/paging_table.py` writes the table of `docs/paging.md`.
"""

import argparse
import datetime
import json
import os
import platform
import re
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import command_line
import numpy as np

from ejk.paging import PageManager

RESULTS = Path(__file__).parent / "results"
STEP = 256  # sequences


def processor() -> str:
    """Return the name of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
        return " ".join(names[0].split())
    except (OSError, IndexError):
        return platform.processor() or platform.machine()


class Times:
    """Wall and processor times of something that is done again and again."""

    def __init__(self):
        self.wall: list[float] = []
        self.cpu: list[float] = []

    def add(self, function: Callable, *args: object):
        """Time a call, and return its result."""
        cpu, wall = time.process_time(), time.perf_counter()
        result = function(*args)
        self.wall.append(time.perf_counter() - wall)
        self.cpu.append(time.process_time() - cpu)
        return result

    def line(self, workload: str) -> dict:
        median_us, p99_us = 1e6 * np.percentile(self.wall, [50, 99])
        return {
            "workload": workload,
            "contender": "ejk.paging",
            "median_us": round(float(median_us), 1),
            "p99_us": round(float(p99_us), 1),
            "cpu_us": round(1e6 * float(np.median(self.cpu)), 1),
            "cpu_p99_us": round(1e6 * float(np.percentile(self.cpu, 99)), 1),
            "times": len(self.wall),
        }


class Bench:
    """A manager whose pool is nearly full."""

    def __init__(self, num_seqs: int, num_pages: int, longest: int):
        self.rng = np.random.default_rng(0)
        self.manager = PageManager(
            num_pages=num_pages, page_size=16, max_seqs=num_seqs + 1, max_blocks=256
        )
        lens = self.rng.integers(1, longest, num_seqs)
        lens[: 2 * STEP] += -lens[: 2 * STEP] % 16  # these fill their pages all at once
        self.seqs = np.array([self.manager.allocate(self.tokens(n)) for n in lens])
        for begin in range(0, num_seqs, STEP):
            self.manager.commit(self.manager.batch(self.seqs[begin : begin + STEP]))

    def tokens(self, size: int) -> np.ndarray:
        return self.rng.integers(0, 2**15, size, np.int32)

    def step(self, seqs: np.ndarray) -> None:
        self.manager.append(seqs, self.tokens(seqs.size))
        self.manager.commit(self.manager.batch(seqs))

    def decodes(self, repeats: int) -> Iterator[dict]:
        """Steps of a random choice of the sequences, whole and in parts."""
        whole, parts = Times(), {name: Times() for name in ("append", "batch", "commit")}
        for _ in range(repeats):
            seqs = self.rng.permutation(self.seqs[2 * STEP :])[:STEP]
            whole.add(self.step, seqs)
            parts["append"].add(self.manager.append, seqs, self.tokens(seqs.size))
            batch = parts["batch"].add(self.manager.batch, seqs)
            parts["commit"].add(self.manager.commit, batch)
        of_parts = {
            f"{name}_us": round(1e6 * float(np.median(times.wall)), 1)
            for name, times in parts.items()
        }
        yield whole.line(f"step of {STEP}") | of_parts

    def aligned(self, repeats: int) -> Iterator[dict]:
        """The worst steps: each sequence takes a page, or each fills one."""
        taking, filling = Times(), Times()
        for _ in range(repeats):
            for token in range(16):
                seqs = self.seqs[:STEP]
                before = self.manager.statistics().used_pages
                times = {0: taking, 15: filling}.get(token, Times())
                times.add(self.step, seqs)
                took = self.manager.statistics().used_pages - before
                assert took == (STEP if token == 0 else 0)
            for seq in self.seqs[:STEP].tolist():  # as long as before
                self.manager.truncate(seq, self.manager.num_tokens(seq) - 16)
        yield taking.line(f"step of {STEP}, each takes a page")
        yield filling.line(f"step of {STEP}, each fills a page")

    def evictions(self, repeats: int) -> Iterator[dict]:
        """Steps in which each sequence takes a page that has to be evicted."""
        manager = self.manager
        rest = self.seqs[2 * STEP :]
        manager.free(rest[: rest.size // 2])
        while free := manager.statistics().free_pages:
            manager.allocate(self.tokens(16 * min(free, manager.sizes.max_blocks)))
        before, evicting = manager.statistics().evictions, Times()
        for _ in range(repeats):
            evicting.add(self.step, self.seqs[STEP : 2 * STEP])
            for _ in range(15):
                self.step(self.seqs[STEP : 2 * STEP])
        assert manager.statistics().evictions - before >= repeats * STEP
        yield evicting.line(f"step of {STEP}, each evicts a page")

    def groups(self, repeats: int) -> Iterator[dict]:
        """Sequences in groups of 16 that share a prompt of 64 pages."""
        manager = PageManager(num_pages=2**14, page_size=16, max_seqs=STEP, max_blocks=128)
        seqs = []
        for _ in range(STEP // 16):
            prompt = self.tokens(1024)
            for _ in range(16):
                seqs.append(manager.allocate([*prompt, 1]))
                manager.commit(manager.batch(seqs[-1:]))
        manager.append(seqs, self.tokens(STEP))
        batch, times = manager.batch(seqs), Times()
        assert batch.prefix_groups().groups.max() == STEP // 16 - 1
        for _ in range(repeats):
            times.add(batch.prefix_groups)
        yield times.line(f"groups of a batch of {STEP}")

    def prompts(self, repeats: int) -> Iterator[dict]:
        """A prompt of 128 pages that are all known but the last, and its end."""
        prompt = self.tokens(2048)
        seq = self.manager.allocate(prompt)
        self.manager.commit(self.manager.batch([seq]))
        self.manager.free(seq)
        allocating, freeing = Times(), Times()
        for _ in range(repeats):
            seq = allocating.add(self.manager.allocate, prompt)
            assert self.manager.num_computed_tokens(seq) == 2032
            freeing.add(self.manager.free, seq)
        yield allocating.line("allocate 2,048 tokens that are known")
        yield freeing.line("free 2,048 tokens")


def results(tiny: bool) -> Iterator[dict]:
    """Yield a line for each workload; each has its own manager but shares what is built once."""
    sizes = (600, 8_000, 256) if tiny else (10_000, 1_000_000, 3000)
    repeats = 3 if tiny else 400
    bench = Bench(*sizes)
    statistics = bench.manager.statistics()
    pool = {"num_seqs": statistics.num_seqs, "used_pages": statistics.used_pages}
    yield from (line | pool for line in bench.decodes(repeats))
    yield from (line | pool for line in bench.aligned(max(repeats // 8, 2)))
    yield from bench.prompts(repeats)
    yield from bench.groups(repeats)
    yield from (line | pool for line in bench.evictions(max(repeats // 20, 2)))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    args = command_line.parsed(parser, "small, for the tests", "results/paging_<processor>.jsonl")
    device = processor()
    path = args.output or RESULTS / f"paging_{re.sub(r'[^0-9A-Za-z-]+', '_', device)}.jsonl"
    facts = {
        "device": device,
        "load": round(os.getloadavg()[0], 1),
        "cores": os.cpu_count(),
        "date": datetime.date.today().isoformat(),
        "versions": {"python": platform.python_version(), "numpy": np.__version__},
        "command": " ".join(["python", "benchmarks/paging.py", *sys.argv[1:]]),
    }
    with path.open("a") as file:
        for line in results(args.tiny):
            file.write(json.dumps(line | facts) + "\n")
            file.flush()
            print(", ".join(f"{name} {value}" for name, value in line.items()), flush=True)


if __name__ == "__main__":
    main()
