"""The fast tier, which `make test` runs, has a case of everything, and always the same ones."""

import ast
import collections
import json
import os
import pathlib
import re
import subprocess
import sys

import pytest
import tiers
from faults import BACKENDS, Fault, Planted, summary, table
from kernels import kernel_modules

from ejk.testing.configurations import LAYOUTS

pytestmark = pytest.mark.fast

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture(scope="module")
def collected():
    """What a collection of all tests finds: every fault, and the ids of the fast tier."""
    command = [sys.executable, "tests/faults.py", "--json"]
    found = subprocess.run(
        command, check=True, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=os.environ
    )
    return json.loads(found.stdout)


@pytest.fixture(scope="module")
def fast(collected):
    """The ids of the fast tier, file by file."""
    ids: dict[str, list[str]] = {}
    for node in collected["fast"]:
        path, _, name = node.partition("::")
        ids.setdefault(pathlib.Path(path).stem, []).append(name)
    return ids


@pytest.fixture(scope="module")
def planted(collected):
    return [Planted(Fault(*fault), *runs) for fault, *runs in collected["faults"]]


OPERATIONS = ("page_attention", "ragged_page_attention", "write_kv_cache", "copy_kv_cache")
POOLS = ("separate", "fused")


@pytest.mark.parametrize("pools", POOLS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("backend", ["xla", "triton", "pallas"])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_every_backend_in_every_layout(fast, operation, backend, layout, pools):
    pattern = rf"test_a_call\[{operation}-(ragged )?{backend}\b.*-{layout}-{pools}\]"
    assert any(re.fullmatch(pattern, name) for name in fast["test_every_layout"])


def test_every_page(fast):
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    missing = {f"test_code_of_a_page_runs[{page.relative_to(ROOT)}]" for page in pages}
    assert pages and not missing - {*fast["test_docs"]}


PROGRAMS = sorted(
    (path.stem, backend)
    for backend in BACKENDS
    for path in (ROOT / "ejk/backends" / backend).glob("*")
    if path.stem in OPERATIONS
)


@pytest.mark.parametrize("operation, backend", PROGRAMS)
def test_seeded_bugs_of_every_program(planted, operation, backend):
    """Of every operation on every backend, and of its gradient, in the fast tier and in all."""
    there = [x for x in planted if x.fault[:2] == (operation, backend)]
    assert len(there) >= 2 and any(x.in_fast for x in there)


@pytest.mark.parametrize("kernel", kernel_modules("triton"))
def test_a_seeded_bug_of_every_triton_kernel(fast, kernel):
    assert any(f"[{kernel}: " in case for case in fast["test_triton_seeded_bugs"])


def test_the_page_counts_the_seeded_bugs(planted):
    page = (ROOT / "docs" / "reliability.md").read_text()
    assert table(planted) in page, "stale: run `python benchmarks/reliability_report.py --bugs`"


def test_every_seeded_bug_is_run(planted):
    assert not [str(x.fault) for x in planted if not x.in_full]


def test_only_what_passed_is_caught():
    faults = [Fault("write", "xla", "test.py", bug) for bug in "abcd"]
    outcomes = {faults[0]: {"passed"}, faults[1]: {"passed", "failed"}}
    head, row, _, left, missed = summary(faults, outcomes)
    assert head.split() == ["operation", *BACKENDS, "all"] and row.split() == [
        "write",
        "1/4",
        "1/4",
    ]
    assert left == "2 were not run" and missed == "NOT CAUGHT: write, xla: b (test.py)"
    found = [Planted(fault, fault.bug == "a", fault.bug != "d") for fault in faults]
    assert table(found).splitlines()[2] == "| write | 1 / 3 / 4 |  |  |  |  |  | 1 / 3 / 4 |"


TESTS = {
    f"{path.stem}::{node.name}": (path, node)
    for path in sorted((ROOT / "tests").rglob("test_*.py"))
    for node in ast.parse(path.read_text()).body
    if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
}


def plants(path, node):
    """Say whether a test looks as if it plants faults."""
    body = ast.unparse(node)
    return (
        "bug" in [argument.arg for argument in node.args.args]
        or (node.name.endswith("caught") and "monkeypatch" in body)
        or (re.search("seeded_bugs|faults", path.stem) and "pytest.raises" in body)
    )


@pytest.mark.parametrize("name", [name for name, test in TESTS.items() if plants(*test)])
def test_every_seeded_bug_is_marked(name):
    _, node = TESTS[name]
    assert any(".fault(" in ast.unparse(mark) for mark in node.decorator_list)


@pytest.mark.parametrize(
    "file", sorted((ROOT / "tests").rglob("test_*errors.py")), ids=lambda f: f.stem
)
def test_all_error_tests(fast, file):
    nodes = ast.parse(file.read_text()).body
    functions = {node.name for node in nodes if isinstance(node, ast.FunctionDef)}
    names = {name for name in functions if name.startswith("test_")}
    assert names == {name.partition("[")[0] for name in fast[file.stem]}


Item = collections.namedtuple("Item", "nodeid")


def test_one_in_n_keeps_every_function_and_backend():
    ids = [f"f.py::test_{f}[{b}-{i}]" for f in "ab" for b in ("xla", "triton x") for i in range(30)]
    items = [Item(name) for name in (*ids, "f.py::test_c")]
    kept = [item.nodeid for item in tiers.one_in(10**9, items)]  # what is kept in any case
    assert sorted(name.split("-")[0] for name in kept) == [
        "f.py::test_a[triton x", "f.py::test_a[xla", "f.py::test_b[triton x", "f.py::test_b[xla",
        "f.py::test_c",
    ]  # fmt: skip
    assert {*kept} == {item.nodeid for item in tiers.one_in(10**9, items)}


def test_neighbours_do_not_drop_out_together():
    """Of 90 names that differ in their number alone, one in three: no long run is left out."""
    names = [Item(f"f.py::test[{i:02}]") for i in range(90)]
    kept = tiers.one_in(3, names)
    runs = "".join("x" if item in kept else "." for item in names).split("x")
    assert 20 <= len(kept) <= 40 and max(map(len, runs)) < 15


def test_a_file_that_is_moved_keeps_its_choice():
    names = [f"test_a.py::test[{i}/of 90]" for i in range(90)]
    flat, moved = ([Item(folder + name) for name in names] for folder in ("tests/", "tests/b/"))
    kept = [
        {x.nodeid.split("/", 1)[1].removeprefix("b/") for x in tiers.one_in(3, items)}
        for items in (flat, moved)
    ]
    assert kept[0] == kept[1] and 20 <= len(kept[0]) <= 40
