"""Predicts TPU decode kernels from what libtpu's static profiler says; needs no TPU.

    python -m benchmarks.tpu_static                               all, into results/tpu_static.json
    python -m benchmarks.tpu_static --only ejk v6e "page 16"      some kernels, chips, workloads
    python -m benchmarks.tpu_static --only ejk --check            fails if worse than the results
    python -m benchmarks.tpu_static --only ejk --field pages_per_compute_block=32

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

from benchmarks import tpu_kernels, tpu_profile
from benchmarks.tpu_compile import TOPOLOGIES
from benchmarks.workloads import Workload

RESULTS = Path(__file__).parent / "results" / "tpu_static.json"
TOLERANCE = 0.03


@dataclasses.dataclass(frozen=True)
class Chip:
    """What a prediction needs to know of a generation.

    Attributes:
        ghz: the clock, from published products a second over those of a cycle.
        hbm_bytes: that the memory can hand out in a cycle, to all cores.
        efficiency: the share of it that large copies reach.
        cores: that share the memory, and among which a launch may be split.
    """

    ghz: float
    hbm_bytes: int
    efficiency: float
    cores: int = 1


CHIPS = {
    "v5e": Chip(ghz=1.50, hbm_bytes=546, efficiency=0.90),
    "v5p": Chip(ghz=1.75, hbm_bytes=1579, efficiency=0.79, cores=2),
    "v6e": Chip(ghz=1.75, hbm_bytes=937, efficiency=0.82),
    "v7x": Chip(ghz=2.20, hbm_bytes=1677, efficiency=0.86),  # half a chip: one device
}


@dataclasses.dataclass(frozen=True)
class Price:
    """What one core pays for a sequence of a workload; more is worse.

    Of v4 only the program is known. Of a kernel that could not be priced, why.
    """

    kernel: str
    generation: str
    workload: str
    failure: str | None = None
    bundles: int | None = None  # executed
    issue_bundles: int | None = None  # of them, for starting copies and waiting for them
    compute_cycles: int | None = None  # with the copies left out
    start_cycles: int | None = None  # of the launch, once
    copies: int | None = None
    copied_bytes: int | None = None
    static_bundles: int | None = None
    vector_spills: int | None = None
    scalar_spills: int | None = None
    vmem_bytes: int | None = None
    compile_s: float | None = None

    @property
    def key(self) -> tuple[str, str, str]:
        return self.kernel, self.generation, self.workload


CHECKED = (
    "bundles", "issue_bundles", "compute_cycles", "start_cycles", "copies", "copied_bytes",
    "static_bundles", "vector_spills", "scalar_spills", "vmem_bytes",
)  # fmt: skip


def price(kernel: str, generation: str, workload: str, fields: dict | None = None) -> Price:
    """Price a kernel by the difference of two batches: what a launch costs once falls out."""
    key = (kernel, generation, workload)
    few, many = batches(tpu_kernels.WORKLOADS[workload])

    def profile(num_seqs, copies):
        return tpu_profile.profile(*key, num_seqs=num_seqs, copies=copies, fields=fields or {})

    try:
        program, less = profile(few, True)
        if less is None:
            return Price(*key, **dataclasses.asdict(program))
        more, bare_less, bare_more = (
            profile(*arguments)[1] for arguments in ((many, True), (few, False), (many, False))
        )
        found = rates(few, many, less, more, bare_less, bare_more)
        check_copies(found["copied_bytes"], tpu_kernels.workload(workload, 1).kv_bytes)
    except tpu_profile.ProfileError as error:
        return Price(*key, failure=str(error))
    return Price(*key, **found, **dataclasses.asdict(program))


def batches(workload: Workload) -> tuple[int, int]:
    """Return the sequences of two launches, enough of them where a step may take several."""
    return (8, 16) if workload.num_kv_heads <= 2 else (2, 4)


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
        raise tpu_profile.ProfileError(
            f"the profiler saw {copied} bytes copied, of {kv_bytes} that have to be read"
        )


@dataclasses.dataclass(frozen=True)
class Prediction:
    """Cycles of a whole launch, on as many cores as the kernel uses."""

    hbm: float
    core: float
    start: float

    @property
    def cycles(self) -> float:
        return max(self.hbm, self.core) + self.start

    @property
    def bound(self) -> str:
        return "memory" if self.hbm >= self.core else "core"


def predict(price: Price, num_seqs: int, kv_bytes: int) -> Prediction:
    """Predict a launch of `num_seqs` sequences that reads `kv_bytes`.

    A core starts its copies and computes in one stream of instructions, so the two add up, and
    the memory works beside it.
    """
    chip = CHIPS[price.generation]
    cores = chip.cores if price.kernel in tpu_kernels.SPLIT else 1
    reach = chip.hbm_bytes * cores / chip.cores
    each = price.compute_cycles + price.issue_bundles
    seqs = -(-num_seqs // cores)
    return Prediction(kv_bytes / (chip.efficiency * reach), seqs * each, price.start_cycles)


def compare(old: Price | None, new: Price) -> list[str]:
    """List in what `new` is worse than `old`."""
    name = ", ".join(new.key)
    if old is None:
        return [f"{name}: not in the results"]
    if new.failure or old.failure:
        return [f"{name}: {new.failure}"] if new.failure and not old.failure else []
    worse = []
    for field in CHECKED:
        before, after = getattr(old, field), getattr(new, field)
        if (before is None) != (after is None):
            worse.append(f"{name}: {field} was {before}, is {after}")
        elif before is not None and after > before + TOLERANCE * abs(before):
            worse.append(f"{name}: {field} was {before:,}, is {after:,}")
    return worse


def table(prices: list[Price]) -> str:
    """Write prices and predictions as a table."""
    rows = [HEADER, "|" + "---|" * HEADER.count(" |")]
    for price in prices:
        rows.append("| " + " | ".join([*price.key, *cells(price)]) + " |")
    return "\n".join(rows) + "\n"


HEADER = (
    "| kernel | chip | workload | bytes a bundle | compute/HBM | issue/HBM | predicted us | "
    "of HBM | bound | bundles | spills v, s | VMEM KiB | compile s |"
)


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
    chip, workload = CHIPS[price.generation], tpu_kernels.WORKLOADS[price.workload]
    prediction = predict(price, workload.num_seqs, workload.kv_bytes)
    each = workload.kv_bytes / workload.num_seqs
    floor = each / (chip.hbm_bytes / chip.cores)  # cycles of a core's share of the memory
    return [
        f"{each / price.bundles:,.0f}",
        f"{price.compute_cycles / floor:.2f}",
        f"{price.issue_bundles / floor:.2f}",
        f"{prediction.cycles / chip.ghz / 1e3:,.0f}",
        f"{workload.kv_bytes / prediction.cycles / chip.hbm_bytes:.0%}",
        prediction.bound,
        *program,
    ]


def versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in ("jax", "libtpu")}


def load(path: Path) -> tuple[dict, dict[tuple[str, str, str], Price]]:
    """Read how results came about, and each price."""
    if not path.exists():
        return {}, {}
    facts = json.loads(path.read_text())
    prices = [Price(**price) for price in facts.pop("prices")]
    return facts, {price.key: price for price in prices}


def chosen(only: list[str]) -> list[tuple[str, str, str]]:
    """Return the cases that words name: kernels, generations, workloads; all of what none names."""
    axes = [list(tpu_kernels.KERNELS), list(TOPOLOGIES), list(tpu_kernels.WORKLOADS)]
    if unknown := set(only) - set(itertools.chain(*axes)):
        sys.exit(f"{', '.join(sorted(unknown))}: no kernel, generation or workload of {axes}")
    return list(itertools.product(*([x for x in axis if x in only] or axis for axis in axes)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", default=[], help="kernels, generations, workloads")
    parser.add_argument("--jobs", type=int, default=2, help="compiles at once")
    parser.add_argument("--check", action="store_true", help="against the results; writes nothing")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--field", nargs="+", default=[], help="of ejk's backend; writes nothing")
    args = parser.parse_args()
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
    if fields:
        return
    kept = old if facts.get("versions") == versions() else {}
    found = kept | {price.key: price for price in prices}
    facts = dict(
        versions=versions(),
        date=datetime.date.today().isoformat(),
        command="python -m benchmarks.tpu_static",
        prices=[dataclasses.asdict(found[key]) for key in sorted(found)],
    )
    args.output.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
