"""The scripts of `benchmarks/` that only a GPU can time run, small, wherever the tests do."""

import json
import pathlib
import subprocess
import sys

import pytest

FOLDER = pathlib.Path(__file__).parents[2] / "benchmarks"


def run(script: str, *arguments: str) -> str:
    command = [sys.executable, str(FOLDER / script), "--tiny", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def lines_of(path: pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_ragged_batches_are_checked_and_timed(tmp_path):
    path = tmp_path / "ragged.jsonl"
    batches = [f"{name}, page 16" for name in ("mixed", "mixed: its decodes", "prefill 8 x 4,096")]
    run("ragged.py", "--output", str(path), "--batch", *batches)
    found = {(line["workload"], line["contender"]) for line in lines_of(path)}
    assert found == {
        *((batch, "ejk") for batch in batches),
        (batches[1], "ejk page_attention"),
        (batches[2], "cuDNN dense, contiguous"),
    }
    for line in lines_of(path):
        assert line["device_us"] > 0 and line["error"] < 1e-2


def test_writes_are_checked_and_timed(tmp_path):
    path = tmp_path / "write.jsonl"
    run("write.py", "--output", str(path))
    assert [line["workload"] for line in lines_of(path)] == [
        "write 16, HND",
        "write 16, NHD",
        "write 3, HND",
        "write 3, NHD",
    ]


def test_splits_are_checked_and_timed(tmp_path):
    path = tmp_path / "scaling.jsonl"
    run("scaling.py", "--output", str(path))
    lines = {(line["workload"], line["contender"]): line for line in lines_of(path)}
    assert set(lines) == {
        *(("scaling link", f"{name} over 2") for name in ("all_gather", "psum")),
        ("scaling link", "merge of 32 heads of 128 over 2"),
        *(("scaling 4 x 64", name) for name in ("one device", "heads over 2", "sequences over 2")),
        *(("scaling 1 x 512", name) for name in ("one device", "pages over 2")),
    }
    assert not [line for line in lines.values() if "failed" in line or not line["wall_us"] > 0]
    moved = {contender: line.get("collectives") for (_, contender), line in lines.items()}
    assert moved["heads over 2"] == moved["sequences over 2"] == 0 and moved["pages over 2"] == 1


def test_ragged_tuning_names_the_best_of_each_batch():
    printed = run("tune_ragged.py")
    assert "prefill 8 x 4,096, page 16: " in printed.split("\n\n")[-1]
    assert "verification of 8 on 8,192, page 16: " in printed.split("\n\n")[-1]


def test_checkouts_are_compared_in_turn(tmp_path):
    """This one with itself: what is timed is this checkout's own `ejk`, twice."""
    path, name = tmp_path / "compare.jsonl", "mixed: its decodes, page 16"
    arguments = ("--output", str(path), "--rounds", "2", "--only", name)
    run("compare.py", str(FOLDER.parent), *arguments)
    [line] = lines_of(path)
    assert line["workload"] == name
    assert line["before_us"] > 0 and line["after_us"] > 0 and line["ratio"] > 0


def test_a_first_call_is_timed():
    command = [sys.executable, str(FOLDER / "first_call.py")]
    command += ["--lower", "--operation", "write_kv_cache"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    seconds, imported_torch = printed.split()[-2:]
    assert float(seconds) > 0 and imported_torch == "False"


@pytest.fixture
def report(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    import report

    return report


def test_tables_of_ragged_batches_and_writes(report):
    def line(us, **more):
        return {"device_us": us, "tflops": 400.0, "of_matmul": 0.5, "matmul_tflops": 777.0, **more}

    lines = {
        ("prefill 8 x 4,096, page 16", "ejk"): line(2000.0),
        ("prefill 8 x 4,096, page 16", "cuDNN dense, contiguous"): line(1800.0),
        ("mixed, page 16", "ejk"): line(630.0),
        ("mixed: its chunks, page 16", "ejk"): line(300.0),
        ("mixed: its decodes, page 16", "ejk"): line(420.0),
        ("mixed: its decodes, page 16", "ejk page_attention"): line(400.0),
        ("write 64, HND", "ejk"): {"device_us": 3.5, "gb_per_s": 100.0, "of_ceiling": 0.25},
    }
    assert "777 TFLOP/s" in report.ragged_table(lines)
    assert "| prefill 8 x 4,096, page 16 | 2,000.0 | 400 | 50.0% | 90.0% |" in (
        report.ragged_table(lines)
    )
    assert "| mixed, page 16 | 630.0 | 300.0 + 400.0 | 0.90 |" in report.against_parts_table(lines)
    assert "verification" not in report.against_parts_table(lines).split("|---")[-1]
    assert "| write 64, HND | 3.50 | 100 | 25.0% |" in report.write_table(lines)


def test_table_of_splits(report):
    lines = {
        ("scaling link", "all_gather over 2"): {"wall_us": 800.0, "link_gb_per_s": 331.4},
        ("scaling link", "merge of 32 heads of 128 over 2"): {"wall_us": 11.5},
        ("scaling link", "psum over 2"): {"failed": "why"},
        ("scaling 64 x 8,192", "one device"): {"device_us": 700.0, "wall_us": 704.0},
        ("scaling 64 x 8,192", "heads over 2"): {
            "device_us": None, "speedup": None, "wall_us": 360.0, "wall_speedup": 1.956,
        },
        ("scaling 1 x 1,048,576", "pages over 2"): {"failed": "why"},
    }  # fmt: skip
    table = report.scaling_table(lines)
    assert "| 64 x 8,192 | one device | 700.0 | - | 704.0 | - |" in table
    assert "| 64 x 8,192 | heads over 2 | - | - | 360.0 | 1.96 |" in table
    assert "all_gather over 2 331 GB/s, merge of 32 heads of 128 over 2 11.5 us." in table
    assert "pages" not in table.split("|---")[-1] and "psum" not in table
    line = {"date": "2026-11-26", "versions": {"jax": "0.11.2"}}
    only = {name: more | line for name, more in lines.items()}
    assert "Measured on 2026-11-26 with jax 0.11.2" in report.page("A device", only)


def test_what_was_not_measured_has_no_table(report):
    assert report.ragged_table({}) == report.against_parts_table({}) == report.write_table({}) == ""
    assert report.scaling_table({}) == ""


def test_the_page_is_what_the_results_say():
    """But for the plot, which needs matplotlib."""
    command = [sys.executable, str(FOLDER / "report.py"), "--check"]
    subprocess.run(command, check=True)
