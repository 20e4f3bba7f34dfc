"""Times batches under plans made by hand, and fits the model of `makespan.py` to these times.

    python benchmarks/plan_cost.py           time every batch under every plan, then fit: 5 minutes
    python benchmarks/plan_cost.py --workload "17 x 8192" "4 x 8192"      some batches
    python benchmarks/plan_cost.py --fit     fit what is in results/plan_cost_<device>.jsonl alone

Pieces start with the longest, as the planner's do. Each batch is timed whole and, where the call
takes a plan, as `ejk.plan_page_attention` deals it out; those of `CUT` with each context in equal
parts and with their last contexts cut, too. What each plan returns is compared with
the first one's. Times are those of the attention kernel and of the combination apart, means over
eight chained calls. What is fitted are contexts of 1,024 tokens or more: shorter ones have smaller
blocks, several on a multiprocessor.
"""

import argparse
import functools
import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import decode
import jax
import jax.numpy as jnp
import makespan
import numpy as np
import ragged
import scipy.optimize
import timing
import workloads

import ejk
from ejk.backends.page_attention_plan import PageAttentionPlan, PlanFacts, PlanProblem
from ejk.backends.triton.page_attention.sizes import SHORT_TOKENS

CALLS = 8
GRANULE = 128
FITTED = 8  # granules of the longest context, or more
SLOTS = 132
TOLERANCE = 2e-2  # of the largest value, in bfloat16: parts round otherwise than wholes

_uniform = workloads.uniform
UNIFORM = [
    _uniform(f"{seqs} x {n}", 16, 4, 128, seqs, n, 16)
    for seqs in (16, 20, 24, 33, 66)
    for n in (128, 256, 512, 1024, 2048, 4096, 8192)
]
CUT = [
    _uniform("17 x 8192", 32, 8, 128, 17, 8192, 16),
    _uniform("20 x 8192", 32, 8, 128, 20, 8192, 16),
    _uniform("9 x 4096, 32 KV heads", 32, 32, 128, 9, 4096, 16),
    _uniform("100 x 8192, 1 KV head", 8, 1, 128, 100, 8192, 16),
    _uniform("4 x 8192", 32, 8, 128, 4, 8192, 16),
    _uniform("10 x 32768", 32, 8, 128, 10, 32768, 16),
    workloads.Workload("3 unequal", 32, 8, 128, (131072, 5000, 300), 16, 131072),
]


def granules_of(workload: workloads.Workload) -> list[int]:
    return [-(-n // GRANULE) for n in workload.context_lens]


def plans(workload: workloads.Workload) -> Iterator[tuple[str, list[int]]]:
    """Say in how many pieces each context is cut, under the name of each plan."""
    granules = granules_of(workload)
    yield "whole", [1] * len(granules)
    if workload not in CUT:
        return
    for parts in (2, 3, 4, 8, 16):
        yield f"in {parts}", [min(parts, count) for count in granules]
    for tail in (1, 4):
        for size in (4, 8):
            cut = [1] * max(0, len(granules) - tail) + [-(-n // size) for n in granules[-tail:]]
            yield f"last {tail} in pieces of {size}", cut


def equal(workload: workloads.Workload, pieces: Sequence[int]) -> list[list[int]]:
    """Cut each context in so many equal pieces."""
    contexts = zip(granules_of(workload), pieces, strict=True)
    return [makespan.equal_pieces(*context) for context in contexts]


def planned(workload: workloads.Workload, cut: Sequence[Sequence[float]]) -> PageAttentionPlan:
    """Write a plan of pieces of such sizes down by hand, see `PlanProblem`."""
    w = workload
    facts = PlanFacts(
        w.num_seqs, w.num_heads, w.num_kv_heads, w.head_dim, w.page_size, w.max_blocks, None
    )
    rows, splits = [], []
    for seq, sizes in enumerate(cut):
        begins = (np.cumsum([0, *sizes[:-1]]) * GRANULE).astype(int)
        ends = [*begins[1:], facts.capacity]
        if len(sizes) > 1:
            splits.append((seq, len(rows), len(sizes), 0))
        for begin, end in zip(begins, ends, strict=True):
            rows.append((seq, begin, end, len(rows) if len(sizes) > 1 else -1))
    sizes = [size for context in cut for size in context]
    rows = [rows[i] for i in sorted(range(len(rows)), key=lambda i: (-sizes[i], i))]
    problem = PlanProblem(
        w.num_seqs, facts.capacity, False, max(len(rows) - w.num_seqs, len(splits)), GRANULE
    )
    work = np.zeros(problem.results[0].shape, np.int32)
    work[0, :2] = len(rows), len(splits)
    work[1 : 1 + len(rows)] = rows
    if splits:
        work[1 + problem.max_pieces :][: len(splits)] = splits
    return PageAttentionPlan(jnp.asarray(work), problem, facts)


def own_plan(
    workload: workloads.Workload, lens: jax.Array
) -> tuple[PageAttentionPlan, list[list[float]]]:
    """Return the planner's plan, and the sizes of each context's pieces."""
    w = workload
    plan = ejk.plan_page_attention(
        lens, num_heads=w.num_heads, num_kv_heads=w.num_kv_heads, head_dim=w.head_dim,
        page_size=w.page_size, max_blocks=w.max_blocks,
    )  # fmt: skip
    work = np.asarray(plan.work)
    cut: list[list[float]] = [[] for _ in w.context_lens]
    own = plan.problem.granule
    for seq, begin, end, _ in sorted(work[1 : 1 + work[0, 0]].tolist()):
        cut[seq].append(-(-(min(end, w.context_lens[seq]) - begin) // own) * own / GRANULE)
    return plan, cut


def measure(workload: workloads.Workload) -> Iterator[dict]:
    """Time a batch under each of its plans."""
    layers = max(1, min(CALLS, 2**29 // workload.pool_bytes))
    arrays = workloads.arrays(workload, layers)
    step = workload.num_pages
    tables = [
        jnp.where(arrays.block_tables < 0, -1, arrays.block_tables + layer % layers * step)
        for layer in range(CALLS)
    ]

    @jax.jit
    def run(query, pools, tables, plan):
        for table in tables:
            query = ejk.page_attention(query, *pools, arrays.context_lens, table, plan=plan)
        return query

    by_hand = [(name, equal(workload, pieces)) for name, pieces in plans(workload)]
    each = [(name, planned(workload, cut), cut) for name, cut in by_hand]
    if max(workload.context_lens) > SHORT_TOKENS:  # or the call is whole, whatever its plan
        each.append(("planner's", *own_plan(workload, arrays.context_lens)))
    expected = None
    for name, plan, cut in each:
        given = arrays.query, (arrays.key_cache, arrays.value_cache), tables, plan
        out = np.asarray(run(*given), np.float32)
        expected = out if expected is None else expected
        error = float(np.abs(out - expected).max() / np.abs(expected).max())
        if not error < TOLERANCE:
            raise AssertionError(f"{workload.name}, {name}: differs by {error:.1e}")
        kernels = timing.kernels(lambda given=given: run(*given))
        us = {"page_attention": 0.0, "combine": 0.0}
        for kernel in kernels:
            for part in us:
                if part in kernel.name:
                    us[part] += (kernel.end_us - kernel.begin_us) / timing.REPEATS / CALLS
        yield {
            "workload": workload.name,
            "plan": name,
            "attention_us": round(us["page_attention"], 2),
            "combine_us": round(us["combine"], 2),
            "programs": workload.num_kv_heads,
            "granules": _shortened(granules_of(workload)),
            "pieces": _shortened([len(sizes) for sizes in cut]),
            "sizes": _shortened([size for sizes in cut for size in sizes]),
            "error": float(f"{error:.1e}"),
        }


def _shortened(counts: Sequence[int]) -> list[list[int]]:
    """Write runs of equal numbers as number and length."""
    return [[count, len(list(run))] for count, run in itertools.groupby(counts)]


def _written_out(runs: Sequence[Sequence[int]]) -> list[int]:
    return [count for count, length in runs for _ in range(length)]


def _cut(line: dict) -> list[list[int]]:
    """Return the sizes of each context's pieces. Those of lines that do not say are equal."""
    granules, pieces = (_written_out(line[key]) for key in ("granules", "pieces"))
    if "sizes" not in line:
        return [makespan.equal_pieces(*context) for context in zip(granules, pieces, strict=True)]
    sizes = iter(_written_out(line["sizes"]))
    return [list(itertools.islice(sizes, count)) for count in pieces]


def fit(lines: Sequence[dict]) -> dict:
    """Return the constants of the model that best fit the kernel's times, and how well they do."""
    cases = []
    for line in lines:
        if max(_written_out(line["granules"])) >= FITTED:
            cases.append((_cut(line), line["programs"], line["attention_us"]))
    measured = np.log([case[-1] for case in cases])

    def errors(constants):
        granule_us, launch_us, start, speed = constants
        model = [makespan.cut_batch(*case[:2], SLOTS, start, speed) for case in cases]
        return np.log(np.maximum(launch_us + granule_us * np.array(model), 0.1)) - measured

    def squares(constants):
        return float(np.sum(errors(constants) ** 2))

    best = scipy.optimize.minimize(
        squares, (2.8, 5.0, makespan.START, makespan.SPEED), method="Nelder-Mead"
    )
    off = np.abs(errors(best.x))
    names = ("granule_us", "launch_us", "start", "speed")
    cut = [line["combine_us"] for line in lines if max(_written_out(line["pieces"])) > 1]
    idle = [
        line["combine_us"]
        for line in lines
        if line["combine_us"] and max(_written_out(line["pieces"])) == 1
    ]
    return {
        "fit": {name: round(float(value), 3) for name, value in zip(names, best.x)},
        "combine_us": round(float(np.median(cut)), 2) if cut else None,
        "combine_nothing_us": round(float(np.median(idle)), 2) if idle else None,
        "median_error": round(float(np.median(off)), 4),
        "largest_error": round(float(off.max()), 4),
        "of": len(cases),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--fit", action="store_true", help="no measurement")
    parser.add_argument("--workload", nargs="+", help="names")
    parser.add_argument("--output", type=Path, help="instead of results/plan_cost_<device>.jsonl")
    args = parser.parse_args()
    device = jax.devices()[0].device_kind.replace(" ", "_")
    path = args.output or decode.RESULTS / f"plan_cost_{device}.jsonl"
    append = functools.partial(ragged.append, path, script="plan_cost.py")
    if not args.fit:
        chosen = [w for w in (*UNIFORM, *CUT) if not args.workload or w.name in args.workload]
        append(itertools.chain.from_iterable(map(measure, chosen)))
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    append([fit([line for line in lines if "attention_us" in line])])


if __name__ == "__main__":
    main()
