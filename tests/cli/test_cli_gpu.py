"""The commands on an NVIDIA GPU: kernels run, and times are those of the device."""

import json
import shlex

import pytest
from typer.testing import CliRunner

from ejk.cli.app import app

pytestmark = pytest.mark.gpu


def run(line):
    result = CliRunner().invoke(app, shlex.split(line), prog_name="ejk")
    assert result.exit_code in (0, 1), result.output
    return json.loads(result.stdout)


def test_doctor_runs_every_backend_of_the_platform():
    found = {(b["operation"], b["backend"]): b for b in run("doctor --json")["backends"]}
    assert found["page_attention", "triton"]["runs"] and found["write_kv_cache", "triton"]["runs"]
    assert found["page_attention", "pallas"]["how"] == "runs on tpu, not on cuda"


@pytest.mark.parametrize("operation", ["decode", "ragged", "write"])
def test_bench_times_ways_that_agree(operation):
    found = run(f"bench --operation {operation} --batch 16 --context 1024 --json")["results"]
    timed = {line["contender"]: line for line in found if "us" in line}
    assert {"ejk triton", "ejk xla"} <= {*timed}
    assert all(0 < line["of_ceiling"] < 1.5 for line in timed.values())
    assert all(line.get("error", 0) < 0.05 for line in timed.values())


def test_tune_finds_and_measures_on_the_device(tmp_path):
    path = tmp_path / "tuning.json"
    line = f"tune {path} --batch 4 --context 1024"
    assert CliRunner().invoke(app, shlex.split(line)).exit_code == 0
    trials = [json.loads(x) for x in (tmp_path / "tuning.json.trials").read_text().splitlines()]
    assert {trial["backend"] for trial in trials} == {"triton"} and len(trials) > 11
