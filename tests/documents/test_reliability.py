"""`docs/reliability.md` says what the results say, and what CI runs."""

import json
import os
import pathlib
import re
import subprocess
import sys

import gpus
import planned
import pytest

sys.path.append(str(pathlib.Path(__file__).parents[2] / "benchmarks"))
import reliability
import reliability_report
import sanitizer
import variants

ROOT = reliability.ROOT
PAGE = reliability_report.PAGE.read_text(encoding="utf-8")


@pytest.mark.fast
def test_the_figures_are_those_of_the_results():
    parts = {"figures": reliability_report.figures(), "trainer": reliability_report.trainer()}
    made = reliability_report.replaced(PAGE, parts)
    assert made == PAGE, "stale: run `python benchmarks/reliability_report.py`"


def test_every_part_is_on_the_page():
    parts = reliability_report.PARTS
    made = [{*reliability.jobs(device, True, 1, 1)} for device in ("cpu", "gpu")]
    assert made == [{*reliability_report.ON_A_CPU}, {*reliability_report.ON_A_GPU}]
    assert made[0] | made[1] == {*parts}
    assert not [x for x in reliability_report.ON_A_GPU if parts[x] not in PAGE.replace("\n", " ")]


def test_the_commands_of_the_page_are_those_of_the_makefile_and_of_ci():
    targets = re.findall(r"^make ([\w-]+)", PAGE, re.MULTILINE)
    makefile = (ROOT / "Makefile").read_text()
    assert targets == ["test", "test-all", "reliability", "gpu"]
    assert all(re.search(rf"^{target}: ", makefile, re.MULTILINE) for target in targets)
    ci = (ROOT / ".ci" / "run").read_text().splitlines()
    assert ci[-2:] == ["make test", 'make test-all ARGS="--tier rest"']


LINE = {
    "part": "memory", "device": "a GPU", "platform": "gpu", "cores": 16, "date": "2026-11-29",
    "versions": {"jax": "0.11.2"}, "command": "python x.py", "seconds": 12.3, "found": [],
    "counts": {"calls": 6},
}  # fmt: skip


def test_rows_of_what_a_gpu_has_shown():
    errors = {"a write": "XlaRuntimeError: RESOURCE_EXHAUSTED: ", "the donated pools": "are lost"}
    memory = {name: {"bytes_in_use": n * 2**20} for name, n in (("a", 3), ("at the end", 4))}
    buffers = {"on": {"recorded": 2, "launched": 6}, "off": {"recorded": 0, "launched": 0}}
    lines = {
        "memory": LINE | {"errors": errors},
        "soak": LINE | {"memory": memory, "found": ["step 3: other | bits", "more"]},
        "replay": LINE | {"buffers": buffers, "date": "2026-11-28"},
        "sanitizer": LINE | {"counts": {}, "missing": "there is none", "others": {}},
    }
    text = reliability_report.table("a GPU", lines)
    assert "**a GPU**, 16 cores, 2026-11-28 to 2026-11-29, with jax 0.11.2. By `python" in text
    said = "6 calls; the donated pools are lost; raised: XlaRuntimeError, with RESOURCE_EXHAUSTED"
    assert f"| memory runs out | {said} | none | 12 |" in text
    assert "3.0 MiB in use after a fifth of the time, 4.0 at the end | **2**: step 3: oth" in text
    assert "with command buffers on: 2 in the program, 6 launched in 3 steps; with" in text
    assert "| compute-sanitizer | not run: there is none |" in text
    assert "drawn calls and compositions |" not in text
    assert "Not run yet there: tests of the real kernels, drawn calls and compositions, ho" in text


def test_what_the_parts_print_is_read():
    failure = {"said": "off by 2", "repro": "ejk repro x"}
    row = {"backend": "xla", "interpret": False, "examples": 5, "failures": [failure]}
    printed = {"examples": 5, "programs": 2, "refused": 1, "results": [row]}
    before = "module {\n  %0 = {x}\n}\n"
    assert reliability.fuzzed(before + json.dumps(printed, indent=2)) == {
        "counts": {"examples": 5, "programs": 2, "refused": 1, "on xla": 5},
        "found": ["off by 2 ejk repro x"],
    }  # fmt: skip
    found = reliability.hostile("300 calls of write on xla\n20 calls of copy, int8 on triton\n")
    assert found["counts"] == {"calls": 320, "on xla": 300, "on triton": 20}
    with pytest.raises(ValueError, match="no calls"):
        reliability.hostile("")
    found = reliability.bugs("operation xla all\n  all  14/85  2/3  16/88\nNOT CAUGHT: x\n")
    assert found == {"counts": {"caught": 16, "planted": 88}, "found": ["NOT CAUGHT: x"]}
    printed = "FAILED tests/test_x.py::test_y - off\ntriton on gpu, writing: 7 examples passed\n"
    kernels = reliability.kernels(f"{printed}1 failed, 300 passed, 2 warnings in 9.00s\n")
    assert kernels == {
        "counts": {
            "passed": 300, "failed": 1, "skipped": 0, "examples on triton": 7
        },
        "found": ["FAILED tests/test_x.py::test_y - off"],
    }  # fmt: skip
    whole = reliability.merged([found, {"counts": {"caught": 1}, "found": [], "more": 3}])
    assert whole == {
        "counts": {"caught": 17, "planted": 88}, "found": ["NOT CAUGHT: x"], "more": 3,
    }  # fmt: skip


def test_a_process_that_dies_is_found():
    def job(code, limit_s=60):
        return reliability.Job([sys.executable, "-c", code], reliability.last_line, limit_s)

    assert not reliability.run(job('print(\'{"counts": {}, "found": []}\')'))["found"]
    for code in ("1 / 0", 'print(\'{"counts": {}, "found": []}\'); 1 / 0'):
        [said] = reliability.run(job(code))["found"]
        assert "ZeroDivisionError" in said
    assert "not done after 1 s" in reliability.run(job("while True: pass", 1))["found"][0]


@pytest.mark.fast
def test_each_process_has_a_gpu_of_its_own_and_sees_all(monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4, GPU-ab,7")
    assert gpus.visible() == ["4", "GPU-ab", "7"]
    orders = [gpus.environment(i, gpus.visible())["CUDA_VISIBLE_DEVICES"] for i in range(4)]
    assert orders == ["4,GPU-ab,7", "GPU-ab,7,4", "7,4,GPU-ab", "4,GPU-ab,7"]
    code = "import os; print(__import__('json').dumps({'counts': {}, 'found': "
    code += "[os.environ['CUDA_VISIBLE_DEVICES']]}))"
    job = reliability.Job([sys.executable, "-c", code], reliability.last_line)
    assert reliability.run(job, 1)["found"] == orders[1:2]
    for none in ("", "-1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", none)
        assert gpus.environment(1, gpus.visible()) == {}

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(gpus.glob, "glob", lambda pattern: ["/dev/nvidia3", "/dev/nvidia5"])
    assert gpus.visible() == ["0", "1"]  # CUDA counts those that are here
    monkeypatch.setattr(gpus.glob, "glob", lambda pattern: [])
    assert gpus.visible() == []
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f"#!{sys.executable}\nprint('GPU 0: H200\\n  MIG 1g\\nGPU 1: H200')\n")
    tool.chmod(0o755)
    assert gpus.visible() == ["0", "1"]


@pytest.mark.parametrize(("worker", "first"), [("gw0", "0"), ("gw3", "1"), (None, "0")])
def test_workers_of_the_tests_take_gpus_in_turn(worker, first):
    """In a process of its own: before JAX is imported `conftest.py` chooses."""
    environment = os.environ | {"EJK_TEST_GPU": "1", "CUDA_VISIBLE_DEVICES": "0,1"}
    environment |= {"PYTHONPATH": os.pathsep.join(map(str, (ROOT / "tests", ROOT / "benchmarks")))}
    environment.pop("PYTEST_XDIST_WORKER", None)
    environment |= {"PYTEST_XDIST_WORKER": worker} if worker else {}
    code = "import conftest, os; print(os.environ['CUDA_VISIBLE_DEVICES'])"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    assert done.stdout.split()[-1].split(",")[0] == first


REPORT = """========= Invalid __global__ read of size 2 bytes
=========     at page_attention_kernel+0x1a0 in kernel.py:10
========= Error: Race reported between Write access at void fusion_3(float *)+0x10
=========     and Read access at ejk_ragged_attention+0x20
========= {} SUMMARY: {} {}
"""


def test_what_the_sanitizer_prints_is_read():
    named = {"page_attention_kernel": 1, "fusion_3": 1, "ejk_ragged_attention": 1}
    assert sanitizer.read(REPORT.format("ERROR", 2, "errors")) == (2, named)
    hazards = REPORT.format("RACECHECK", 3, "hazards displayed (3 errors, 0 warnings)")
    assert sanitizer.read(hazards) == (3, named)
    assert [sanitizer.is_own(name) for name in named] == [True, False, True]
    with pytest.raises(ValueError, match="no summary"):
        sanitizer.read("killed")


def test_variants_run_under_the_sanitizer(tmp_path, monkeypatch, errors=1):
    """One that runs the program, and tells of as many errors."""
    tool = tmp_path / "compute-sanitizer"
    said = "========= at write_kv_cache_kernel+0x1\n" * errors
    end = f"========= ERROR SUMMARY: {errors} errors"
    tool.write_text(f'#!/bin/sh\nwhile [ "$1" != "{sys.executable}" ]; do shift; done\n"$@"\n'
                    f'echo "{said}{end}"\n')  # fmt: skip
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    result = sanitizer.run("memcheck", "triton", "0/1", ["write: fused"], tmp_path)
    assert result["calls"] == 1 and result["errors"] == errors, result
    assert result["kernels"] == ({"write_kv_cache_kernel": 1} if errors else {})
    assert end in (tmp_path / "memcheck_triton_0_of_1.log").read_text()


def test_variants_launch_every_kernel_of_triton():
    """But for what copies quantised pages for the prefill kernel of Hopper."""
    made = {name: make for name, make in variants.chosen([""], "0/1", xla=False)}
    names = (
        "decode: planned, one prefix for all",
        "ragged: mixed",
        "write: fused",
        "copy slots: fused",
        "copy pages: by a table",
    )
    calls = [made[name]() for name in names]
    launched = planned.launches(lambda: [call.function(*call.arguments) for call in calls])
    assert {f"{name}_kernel" for name in launched} == {
        name for name in sanitizer.own_kernels()
        if name not in ("widen_pages_kernel", "latent_attention_kernel", "ragged_attention_kernel")
    }  # fmt: skip


@pytest.mark.fast
def test_a_word_of_no_variant_fails_in_one_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["variants.py", "--only", "write: fused", "wirte"])
    with pytest.raises(SystemExit) as exit:
        variants.main()
    assert exit.value.code == 2
    assert capsys.readouterr() == (
        "", "--only 'wirte' is in the name of no variant that runs here\n",
    )  # fmt: skip
