"""The commands on an NVIDIA GPU: kernels run, and times are those of the device."""

import json

import pytest
from command import run

pytestmark = pytest.mark.gpu


def printed(line):
    return json.loads(run(line, code=None))


def test_doctor_runs_every_backend_of_the_platform():
    found = {(b["operation"], b["backend"]): b for b in printed("doctor --json")["backends"]}
    assert found["page_attention", "triton"]["runs"] and found["write_kv_cache", "triton"]["runs"]
    assert found["page_attention", "pallas"]["how"] == "runs on tpu, not on cuda"


@pytest.mark.parametrize("operation", ["decode", "ragged", "write"])
def test_bench_times_ways_that_agree(operation):
    found = printed(f"bench --operation {operation} --batch 16 --context 1024 --json")["results"]
    timed = {line["contender"]: line for line in found if "us" in line}
    assert {"ejk triton", "ejk xla"} <= {*timed}
    assert all(0 < line["of_ceiling"] < 1.5 for line in timed.values())
    assert all(line.get("error", 0) < 0.05 for line in timed.values())


def test_tune_finds_and_measures_on_the_device(tmp_path):
    path = tmp_path / "tuning.json"
    line = f"tune {path} --batch 4 --context 1024"
    run(line)
    trials = [json.loads(x) for x in (tmp_path / "tuning.json.trials").read_text().splitlines()]
    assert {trial["backend"] for trial in trials} == {"triton"} and len(trials) > 11
