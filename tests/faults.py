"""Seeded bugs as a score: which faults are planted in the code, and how many a run has caught.

A test that plants faults is marked `fault(operation, backend)`, where the backend is a folder of
`ejk/backends/`, or `shared` for code that no backend owns. Each value of its parameter `bug` is one
fault, however many cases try it. A run has caught a fault if a case of it has passed, and none
failed: mutation analysis (DeMillo, Lipton, Sayward 1978), its mutants chosen by hand.

python tests/faults.py           the table of docs/reliability.md, from collection alone
python tests/faults.py --json    every fault and the ids of the fast tier, for tests/test_tiers.py
"""

import collections
import contextlib
import io
import json
import pathlib
import sys
from collections.abc import Iterable
from typing import NamedTuple

import pytest
import tiers

BACKENDS = ("xla", "triton", "pallas", "mosaic_gpu", "reverse_mode", "shared")


class Fault(NamedTuple):
    """One fault: the operation and the backend it is planted in, the test, and what it is."""

    operation: str
    backend: str
    test: str
    bug: str

    def __str__(self) -> str:
        return f"{self.operation}, {self.backend}: {self.bug} ({self.test})"


class Planted(NamedTuple):
    """A fault, and which runs have a case of it."""

    fault: Fault
    in_fast: bool
    in_full: bool


planted: dict[Fault, None] = {}  # in the order of collection
outcomes: dict[Fault, set[str]] = collections.defaultdict(set)


def fault_of(item: pytest.Item) -> Fault | None:
    """Say which fault a case plants."""
    mark = item.get_closest_marker("fault")
    if mark is None:
        return None
    operation, backend = mark.args
    if backend not in BACKENDS:
        raise pytest.UsageError(f"{item.nodeid}: fault({operation!r}, {backend!r}) must name a "
                                f"backend of {', '.join(BACKENDS)}")  # fmt: skip
    test, _, _ = item.nodeid.partition("[")
    name = test.rpartition("::")[2].removeprefix("test_").replace("_", " ")
    return Fault(operation, backend, test, str(item.callspec.params.get("bug", name)))


# What pytest calls: tests/conftest.py registers this module.
@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Before anything is left out: what is not run is not caught."""
    for item in items:
        if fault := fault_of(item):
            planted[fault] = None
            item.user_properties.append(("fault", tuple(fault)))


def pytest_runtest_logreport(report):
    """Under pytest-xdist in the controller, too."""
    if report.failed or (report.when == "call" and report.passed):
        for name, fault in report.user_properties:
            if name == "fault":
                outcomes[Fault(*fault)].add(report.outcome)


def pytest_sessionfinish(session):
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["faults"] = [tuple(fault) for fault in planted]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    for fault in getattr(node, "workeroutput", {}).get("faults", ()):
        planted[Fault(*fault)] = None


def pytest_terminal_summary(terminalreporter):
    if planted and outcomes:
        terminalreporter.section("seeded bugs: caught of planted")
        for line in summary(planted, outcomes):
            terminalreporter.line(line)


def summary(planted: Iterable[Fault], outcomes: dict[Fault, set[str]]) -> list[str]:
    """Return the lines of a run: its table, what was not run, and each fault not caught."""
    caught = {fault for fault in planted if outcomes.get(fault) == {"passed"}}
    missed = [fault for fault in planted if "failed" in outcomes.get(fault, ())]
    cells = _cells(planted, lambda own: f"{len(caught.intersection(own))}/{len(own)}")
    widths = [max(map(len, column)) for column in zip(*cells)]
    lines = ["  ".join(x.rjust(n) for x, n in zip(row, widths)) for row in cells]
    left = len([*planted]) - len(caught) - len(missed)
    return [*lines, f"{left} were not run", *(f"NOT CAUGHT: {fault}" for fault in missed)]


def table(found: Iterable[Planted]) -> str:
    """Return the table of the faults as Markdown: the fast tier's, the full run's, all."""
    of_fault = {each.fault: each for each in found}

    def cell(faults):
        runs = [of_fault[fault] for fault in faults]
        return f"{sum(x.in_fast for x in runs)} / {sum(x.in_full for x in runs)} / {len(runs)}"

    head, *rows = (f"| {' | '.join(row)} |" for row in _cells(of_fault, cell))
    return "\n".join([head, "|---" * (len(BACKENDS) + 2) + "|", *rows])


def _cells(faults, cell):
    """Rows of operations by columns of backends, with sums, `cell` of the faults of each."""
    faults = [*faults]
    operations = [*dict.fromkeys(fault.operation for fault in faults)]
    rows = [["operation", *BACKENDS, "all"]]
    for operation in (*operations, "all"):
        row = [fault for fault in faults if operation in (fault.operation, "all")]
        columns = [[x for x in row if x.backend == name] for name in BACKENDS]
        rows.append([operation, *(cell(x) if x else "" for x in (*columns, row))])
    return rows


class Collector:
    """Keeps every test that is collected, before any is left out."""

    def __init__(self):
        self.items: list[pytest.Item] = []

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_modifyitems(self, items):
        self.items = [*items]


def collect() -> tuple[list[Planted], list[str]]:
    """Collect every test; return the faults, and the ids of the fast tier."""
    collector, said = Collector(), io.StringIO()
    tests = str(pathlib.Path(__file__).parent)
    with contextlib.redirect_stdout(said):
        arguments = ["--collect-only", "-q", "-p", "no:cacheprovider", tests]
        if pytest.main(arguments, plugins=[collector]):
            raise SystemExit(said.getvalue())
    full = tiers.full(collector.items)
    fast, is_full = tiers.fast(full), {*full}
    cases = collections.defaultdict(list)
    for item in collector.items:
        if fault := fault_of(item):
            cases[fault].append(item)
    found = [
        Planted(fault, not fast.isdisjoint(own), not is_full.isdisjoint(own))
        for fault, own in cases.items()
    ]
    return found, [item.nodeid for item in collector.items if item in fast]


if __name__ == "__main__":
    faults, fast = collect()
    print(json.dumps({"faults": faults, "fast": fast}) if "--json" in sys.argv else table(faults))
