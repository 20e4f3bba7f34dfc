"""Prices of TPU kernels, and what a launch is predicted to take: pure functions, no compiler."""

import dataclasses
import json
from pathlib import Path

import tpu_kernels

RESULTS = Path(__file__).parent / "results" / "tpu_static.json"
TOLERANCE = 0.03


@dataclasses.dataclass(frozen=True)
class Chip:
    """What a prediction needs to know of a generation.

    Attributes:
        ghz: the clock, from published products a second over those of a cycle.
        hbm_bytes: that the memory can hand out in a cycle, to all cores.
        efficiency: the share of it that large copies reach: by libtpu's model of copies, but for
            v7x, where it is what arXiv:2604.15464 reports of a kernel.
        mxu_flops: that a core's matrix units take in a cycle, in bfloat16, from published rates.
        cores: that share the memory, and among which a launch may be split.
    """

    ghz: float
    hbm_bytes: int
    efficiency: float
    mxu_flops: int
    cores: int = 1


CHIPS = {
    "v5e": Chip(ghz=1.50, hbm_bytes=546, efficiency=0.90, mxu_flops=2**17),
    "v5p": Chip(ghz=1.75, hbm_bytes=1579, efficiency=0.79, mxu_flops=2**17, cores=2),
    "v6e": Chip(ghz=1.75, hbm_bytes=937, efficiency=0.82, mxu_flops=2**19),
    "v7x": Chip(
        ghz=2.20, hbm_bytes=1677, efficiency=0.86, mxu_flops=2**19
    ),  # one of a chip's two devices
}


@dataclasses.dataclass(frozen=True)
class Price:
    """What one core pays for a sequence of a workload; more is worse.

    Of v4 only the program is known; of a kernel that could not be priced, why.
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


@dataclasses.dataclass(frozen=True)
class Prediction:
    """A whole launch, on as many cores as the kernel uses.

    Attributes:
        memory: cycles of reading what is copied.
        compute: cycles of the busiest core, were its copies free.
        issue: cycles that its copies take of the core.
        start: cycles before the first block is computed and after the last one.
        us: the time of all, in microseconds.
        share: of the bandwidth of the chip's memory.
        useful: share of the products that the matrix units of all cores can take in the time.
    """

    memory: float
    compute: float
    issue: float
    start: float
    us: float
    share: float
    useful: float

    @property
    def bound(self) -> str:
        return "memory" if self.memory >= self.compute + self.issue else "core"

    @property
    def load(self) -> float:
        """The core's time over the memory's: below 1 the core keeps up."""
        return (self.compute + self.issue) / self.memory


def predict(price: Price) -> Prediction:
    """Predict a workload's launch from the price of a sequence.

    A core computes and starts its copies in one stream of instructions, so the two add up; the
    memory works beside it. One core of several draws its share of the memory at most.
    """
    chip, workload = CHIPS[price.generation], tpu_kernels.WORKLOADS[price.workload]
    cores = 1 if price.kernel in tpu_kernels.ONE_CORE else chip.cores
    seqs = -(-workload.num_seqs // cores)
    copied = max(workload.kv_bytes, workload.num_seqs * price.copied_bytes)
    memory = copied / (chip.efficiency * chip.hbm_bytes * cores / chip.cores)
    compute, issue = seqs * price.compute_cycles, seqs * price.issue_bundles
    cycles = max(memory, compute + issue) + price.start_cycles
    return Prediction(
        memory=memory,
        compute=compute,
        issue=issue,
        start=price.start_cycles,
        us=cycles / chip.ghz / 1e3,
        share=workload.kv_bytes / cycles / chip.hbm_bytes,
        useful=workload.flops / cycles / (chip.mxu_flops * chip.cores),
    )


def bytes_a_bundle(price: Price) -> float:
    """Return how many bytes of keys and values a core takes in for each instruction."""
    workload = tpu_kernels.WORKLOADS[price.workload]
    return workload.kv_bytes / workload.num_seqs / price.bundles


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


def load(path: Path = RESULTS) -> tuple[dict, dict[tuple[str, str, str], Price]]:
    """Read how results came about, and each price."""
    if not path.exists():
        return {}, {}
    facts = json.loads(path.read_text())
    prices = [Price(**price) for price in facts.pop("prices")]
    return facts, {price.key: price for price in prices}
