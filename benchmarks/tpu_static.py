"""Prices TPU decode kernels by what libtpu's static profiler says of them; needs no TPU.

    python benchmarks/tpu_static.py                               all, into results/tpu_static.json
    python benchmarks/tpu_static.py --only ejk v6e "page 16"      some kernels, chips, workloads
    python benchmarks/tpu_static.py --only ejk --check            fails if worse than the results
    python benchmarks/tpu_static.py --only ejk --field pages_per_compute_block=32

Nothing here was measured on a TPU. `docs/tpu.md` has the formula and what it leaves out.
"""

import argparse
import concurrent.futures
import dataclasses
import datetime
import importlib.metadata
import itertools
import json
import sys
from pathlib import Path

import tpu_kernels
import tpu_profile
from tpu_prices import CHIPS, RESULTS, Price, bytes_a_bundle, compare, load, predict
from tpu_profile import ProfileError
from workloads import Workload

GENERATIONS = (*tpu_profile.NOT_PROFILED, *CHIPS)


def price(kernel: str, generation: str, workload: str, fields: dict | None = None) -> Price:
    """Price a kernel by the difference of two batches: what a launch costs once falls out."""
    failure = ""
    for few, many in batches(tpu_kernels.WORKLOADS[workload]):
        try:
            return price_by(few, many, kernel, generation, workload, fields=fields or {})
        except ProfileError as error:
            failure = str(error)
    return Price(kernel, generation, workload, failure=failure)


def batches(workload: Workload) -> tuple[tuple[int, int], ...]:
    """Return the sequences of two launches, large ones first where a step may take several.

    On v7x the profiler comes to an end after some fifteen steps of a grid.
    """
    return ((16, 32), (2, 4)) if workload.num_kv_heads <= 2 else ((2, 4),)


def price_by(few: int, many: int, *key: str, fields: dict) -> Price:
    """Price a kernel by launches of few and of many sequences."""

    def profile(num_seqs, copies):
        return tpu_profile.profile(*key, num_seqs=num_seqs, copies=copies, fields=fields)

    program, less = profile(few, True)
    if less is None:
        return Price(*key, **dataclasses.asdict(program))
    more, bare_less, bare_more = (
        profile(*arguments)[1] for arguments in ((many, True), (few, False), (many, False))
    )
    found = rates(few, many, less, more, bare_less, bare_more)
    check_copies(found["copied_bytes"], tpu_kernels.workload(key[-1], 1).kv_bytes)
    return Price(*key, **found, **dataclasses.asdict(program))


def rates(few, many, less, more, bare_less, bare_more) -> dict[str, int]:
    """Return what a sequence costs from runs of few and many, with and without copies."""

    def each(name, less, more):
        return round((getattr(more, name) - getattr(less, name)) / (many - few))

    bundles, compute = each("bundles", less, more), each("cycles", bare_less, bare_more)
    return dict(
        bundles=bundles,
        issue_bundles=bundles - each("bundles", bare_less, bare_more),
        compute_cycles=compute,
        start_cycles=bare_less.cycles - few * compute,
        copies=each("copies", less, more),
        copied_bytes=each("copied_bytes", less, more),
    )


def check_copies(copied: int, kv_bytes: int) -> None:
    """Fail if the profiler did not follow the kernel to what it has to read.

    On v7x it leaves out the last bundle before some jumps, which may hold a copy.
    """
    if copied < 0.9 * kv_bytes:
        raise ProfileError(
            f"the profiler saw {copied} bytes copied, of {kv_bytes} that have to be read"
        )


HEADER = (
    "| kernel | chip | workload | bytes a bundle | compute/HBM | issue/HBM | predicted us | "
    "of HBM | bound | bundles | spills v, s | VMEM KiB | compile s |"
)


def table(prices: list[Price]) -> str:
    """Write prices and predictions as a table."""
    rows = [HEADER, "|" + "---|" * HEADER.count(" |")]
    rows += ["| " + " | ".join([*price.key, *cells(price)]) + " |" for price in prices]
    return "\n".join(rows) + "\n"


def cells(price: Price) -> list[str]:
    if price.failure:
        return [f"failed: {price.failure}", *["-"] * 9]
    program = [
        f"{price.static_bundles:,}",
        f"{price.vector_spills}, {price.scalar_spills}",
        f"{price.vmem_bytes // 1024:,}",
        f"{price.compile_s:.1f}",
    ]
    if price.bundles is None:
        return [*["-"] * 6, *program]
    prediction, efficiency = predict(price), CHIPS[price.generation].efficiency
    return [
        f"{bytes_a_bundle(price):,.0f}",
        f"{prediction.compute / prediction.memory / efficiency:.2f}",
        f"{prediction.issue / prediction.memory / efficiency:.2f}",
        f"{prediction.us:,.0f}",
        f"{prediction.share:.0%}",
        prediction.bound,
        *program,
    ]


def versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in ("jax", "libtpu")}


def chosen(only: list[str]) -> list[tuple[str, ...]]:
    """Return the cases that words name: kernels, generations, workloads; all of what none names."""
    axes = [list(tpu_kernels.KERNELS), list(GENERATIONS), list(tpu_kernels.WORKLOADS)]
    if unknown := set(only) - set(itertools.chain(*axes)):
        sys.exit(f"{', '.join(sorted(unknown))}: no kernel, generation or workload of {axes}")
    cases = itertools.product(*([x for x in axis if x in only] or axis for axis in axes))
    return [case for case in cases if is_priced(*case)]


def is_priced(kernel: str, generation: str, workload: str) -> bool:
    """Say whether a case is priced: but for one kernel only where something is predicted."""
    quantised = tpu_kernels.WORKLOADS[workload].held.quantised
    chips = tpu_kernels.QUANTISED_CHIPS if quantised else GENERATIONS if kernel == "ejk" else CHIPS
    return workload in tpu_kernels.PRICED[kernel] and generation in chips


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", default=[], help="kernels, generations, workloads")
    parser.add_argument("--jobs", type=int, default=2, help="compiles at once")
    parser.add_argument("--check", action="store_true", help="against the results; writes nothing")
    parser.add_argument("--field", nargs="+", default=[], help="of the backend; writes nothing")
    parser.add_argument("--output", type=Path, default=RESULTS, help="another file of results")
    args = parser.parse_args(argv)
    fields = {name: json.loads(value) for name, value in (x.split("=") for x in args.field)}

    facts, old = load(args.output)
    if args.check and facts.get("versions") != versions():
        sys.exit(f"the results are of {facts.get('versions')}, and this is {versions()}")
    with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
        prices = list(pool.map(lambda case: price(*case, fields), chosen(args.only)))
    print(table(prices))
    if args.check:
        worse = [line for new in prices for line in compare(old.get(new.key), new)]
        sys.exit("worse than the results:\n" + "\n".join(worse) if worse else 0)
    if not fields:
        same = facts.get("versions") == versions()
        write(args.output, (old if same else {}) | {price.key: price for price in prices})


def write(path: Path, prices: dict[tuple[str, str, str], Price]) -> None:
    facts = dict(
        versions=versions(),
        date=datetime.date.today().isoformat(),
        command="python benchmarks/tpu_static.py",
        prices=[
            {name: value for name, value in dataclasses.asdict(price).items() if value is not None}
            for _, price in sorted(prices.items())
        ],
    )
    path.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
