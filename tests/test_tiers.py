"""The fast tier, which `make test` runs, has a case of everything, and always the same ones."""

import ast
import collections
import os
import pathlib
import re
import subprocess
import sys

import pytest
import tiers
from kernels import kernel_modules

from ejk.testing.configurations import LAYOUTS

pytestmark = pytest.mark.fast

ROOT = pathlib.Path(__file__).parents[1]
SEEDED = "test_a_bug_is_caught|test_a_(seeded_)?fault_is_caught|test_bugs_"


@pytest.fixture(scope="module")
def fast():
    """The ids of the fast tier, file by file."""
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "--tier", "fast"]
    found = subprocess.run(
        [*command, "-p", "no:cacheprovider"],
        check=True, capture_output=True, text=True, cwd=ROOT, env=os.environ,
    ).stdout  # fmt: skip
    ids: dict[str, list[str]] = {}
    for file, name in re.findall(r"^tests/(?:\w+/)*(test_\w+)\.py::(.*)$", found, re.MULTILINE):
        ids.setdefault(file, []).append(name)
    return ids


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


# But for Triton, the file that puts bugs into each kernel or program.
MUTATED = {
    "pallas/page_attention_kernel": "test_pallas_faults",
    "pallas/ragged_page_attention_kernel": "test_ragged_pallas_interpret",
    "pallas/write_kv_cache_kernel": "test_write_pallas_interpret",
    "pallas/copy_kv_cache_kernel": "test_copy_seeded_bugs",
    "mosaic_gpu/page_attention_kernel": "test_mosaic_gpu_faults",
    "mosaic_gpu/ragged_page_attention_kernel": "test_mosaic_gpu_ragged_faults",
    "xla/page_attention": "test_seeded_bugs",
    "reverse_mode/page_attention": "test_seeded_bugs",
    "xla/ragged_page_attention": "test_ragged_seeded_bugs",
    "xla/write_kv_cache": "test_write_seeded_bugs",
    "reverse_mode/write_kv_cache": "test_write_seeded_bugs",
    "xla/copy_kv_cache": "test_copy_seeded_bugs",
    "reverse_mode/copy_kv_cache": "test_copy_seeded_bugs",
}
KERNELS = {
    f"{backend}/{name}"
    for backend in ("triton", "pallas", "mosaic_gpu")
    for name in kernel_modules(backend)
}


@pytest.mark.parametrize("kernel", sorted(KERNELS | {*MUTATED}))
def test_a_seeded_bug_of_every_kernel(fast, kernel):
    backend, name = kernel.split("/")
    if backend == "triton":
        assert any(f"[{name}: " in case for case in fast["test_triton_seeded_bugs"])
    else:
        assert any(re.match(SEEDED, case) for case in fast[MUTATED[kernel]])


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
