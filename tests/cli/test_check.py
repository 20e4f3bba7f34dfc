"""`ejk check` and `ejk repro`: a planted fault is found, made small, and repeated by its line."""

import collections
import json
import os
import re
import shlex
import signal
import subprocess
import sys

import hypothesis
import pytest
from command import run

import ejk
from ejk.testing import drawn_recipes, fuzzer, recipes
from ejk.testing.case import OPERATIONS
from ejk.testing.verdicts import Verdict, backends_of

COPY = {
    "operation": "copy_kv_pages",
    "backend": "xla",
    "call": {
        "shape": {
            "num_kv_heads": 1, "head_dim": 4, "value_head_dim": 4, "page_size": 2, "num_pages": 3,
        },
        "sources": [0, 1],
        "targets": [2, 0],
    },
}  # fmt: skip


def found(line: str):
    """Run `check` with a planted fault; return the recipe, its line and what is said of it."""
    said = run(f"check --seed 0 {line}", code=1)
    message, command = re.findall(r": (.*)\n  python -m ejk (repro .*)", said)[0]
    return recipes.parse(shlex.split(command)[1]), command, message


def test_a_planted_fault_is_found_made_small_and_repeated():
    options = "--seconds 10 --operation copy_kv_slots --backend planted:DropsACopy"
    recipe, command, message = found(options)
    call = recipe.call
    assert "differs in" in message and "the oracle says" in message
    assert len(call["sources"]) <= 2 and call["shape"]["num_kv_heads"] == 1
    assert call["shape"]["head_dim"] * call["shape"]["page_size"] <= 4
    assert recipe.composition == "plain" and call["cache_layout"] == "HND"
    assert len(str(recipe)) < 500

    assert "fails" in run(f"{command} --backend planted:DropsACopy", code=1)
    assert "agrees with the oracle" in run(f"{command} --backend xla")
    assert "--backend module:Class" in run(command, code=2)  # which it does not know by itself


def test_a_lost_device_ends_the_run_with_the_call_that_lost_it():
    operations = "--operation copy_kv_slots --operation copy_kv_pages"
    said = run(f"check --seconds 20 --seed 0 {operations} --backend planted:LosesTheDevice", 1)
    [text] = re.findall(r"python -m ejk repro (.*)", said)
    assert len(recipes.parse(shlex.split(text)[0]).call["sources"]) > 2
    assert "CUDA_ERROR_ILLEGAL_ADDRESS" in said


class Clock:
    """Time that passes by calls alone: eight seconds for a program's first, one for another."""

    def __init__(self, outcome):
        self.now, self.calls, self.outcome = 0.0, collections.Counter(), outcome

    def monotonic(self):
        return self.now

    def judge(self, recipe, backend):
        self.calls[recipe.program] += 1
        self.now += 8 if self.calls[recipe.program] == 1 else 1
        return Verdict(self.outcome, "why")


@pytest.mark.parametrize(("outcome", "most"), [("agrees", 9), ("refused", 1)])
@pytest.mark.parametrize("operation", ["page_attention", "copy_kv_slots"])
def test_calls_of_a_program_take_as_long_as_its_first_and_of_a_refused_one_there_is_one(
    operation, outcome, most, monkeypatch
):
    clock = Clock(outcome)
    monkeypatch.setattr(fuzzer, "time", clock)
    monkeypatch.setattr(fuzzer, "judge", clock.judge)
    backend = backends_of(operation)["xla"]
    tally = fuzzer.Tally(operation, backend, ["plain", "jit"])
    for seed in range(3):
        fuzzer.hunt(tally, seed, 1e9)
    counts = list(clock.calls.values())
    # Of each draw of the same program the first three, however long they take.
    assert most <= max(counts) <= most + (fuzzer.FEW if most > 1 else 0) * 3
    assert counts.count(most) >= 3
    if outcome == "agrees":
        assert len(tally.programs) == len(counts) and tally.examples == sum(counts)
    else:
        assert not tally.programs and tally.refused == {"why": len(counts)}


@pytest.mark.parametrize("operation", ["page_attention", "ragged_page_attention"])
def test_most_calls_that_are_drawn_fit_what_a_backend_declares(operation):
    """Of a kernel of Hopper too, which takes few of all calls."""
    classes = {"page_attention": ejk.MosaicGpuPageAttention}
    kernel = classes.get(operation, ejk.MosaicGpuRaggedPageAttention)
    backend = kernel(compute_capability=90, num_sms=132)
    fit: collections.Counter[bool] = collections.Counter()

    @hypothesis.seed(0)
    @hypothesis.settings(max_examples=60, database=None, phases=[hypothesis.Phase.generate],
                         suppress_health_check=list(hypothesis.HealthCheck))  # fmt: skip
    @hypothesis.given(drawn_recipes.recipes(operation, backend, ("plain",)))
    def draw(drawn):
        case = recipes.build_case(operation, drawn[0].call)
        report = ejk.backend_report(
            *case.arguments(), operation=getattr(ejk, operation), platform="cuda",
            backend=backend, **case.keywords(backend),
        )  # fmt: skip
        fit[not report.refusals.get(backend.name)] += 1

    draw()
    assert fit[True] > 2 * fit[False], fit


@pytest.mark.skipif(os.name != "posix", reason="a signal takes the process")
def test_a_crash_leaves_the_line_of_its_call(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.chdir(os.path.dirname(__file__))
    check = [sys.executable, "-m", "ejk", "check", "--operation", "copy_kv_slots", "--seed", "0"]
    crash = [*check, "--seconds", "20", "--backend", "planted:Crashes"]
    done = subprocess.run(crash, capture_output=True, text=True)
    assert done.returncode == -signal.SIGSEGV
    [path] = tmp_path.glob("ejk-check-*.txt")
    line = path.read_text().strip()
    assert f"the call in flight: {path}\n" in done.stdout
    recipe = recipes.parse(shlex.split(line)[-1])
    assert recipe.backend == "crashes" and len(recipe.call["sources"]) > 1  # `vmap` doubles them

    next_run = [*check, "--seconds", "1", "--backend", "xla", "--json"]
    told = subprocess.run(next_run, capture_output=True, text=True)
    assert f"died in this call, which it left in {path}:\n  {line}\n" in told.stderr
    assert json.loads(told.stdout)["failures"] == 0 and not [*tmp_path.glob("ejk-check-*")]


@pytest.mark.slow
def test_a_fault_of_attention_shrinks_to_one_token():
    options = "--seconds 10 --operation page_attention --backend planted:LosesTheLast"
    recipe, command, message = found(options)
    shape = recipe.call["shape"]
    assert re.search(r"out\[0, 0\] .*; (out|lse)\[0, 0.*\] is .*, the oracle says", message)
    assert len(recipe.call["lens"]) == 1 and not recipe.call["features"]
    assert shape["num_heads"] * shape["head_dim"] * shape["page_size"] * shape["max_blocks"] <= 32
    assert "agrees with the oracle" in run(f"{command} --backend xla")


@pytest.mark.parametrize("backends", ["xla", "triton --interpret"])
def test_all_operations_agree_for_two_seconds(backends):
    said = json.loads(run(f"check --seconds 2 --seed 1 --json --backend {backends}"))
    assert said["failures"] == 0 and said["examples"] >= said["programs"] > 0
    assert {row["operation"] for row in said["results"]} == set(OPERATIONS)


def test_a_check_that_compares_nothing_fails_and_counts_what_was_refused():
    line = "check --seconds 1 --operation copy_kv_slots --backend planted:RefusesAll"
    said = run(line, code=1)
    assert "Nothing was compared of copy_kv_slots on refuses" in said and "agrees" not in said
    [row] = json.loads(run(f"{line} --json", code=1))["results"]
    assert row["examples"] == 0 and row["refused"]["has no room"] > 0


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("check --seconds 0", "'--seconds': 0.0 must be above 0"),
        ("check --operation copy_kv_page", "did you mean 'copy_kv_pages'?"),
        ("check --backend tritn", "did you mean 'triton'?"),
        ("check --backend triton", "add --interpret"),
        (
            "check --backend mosaic_gpu --operation write_kv_cache",
            "must be one of xla, pallas, triton",
        ),
        ("check --backend planted:Nothing", "has no attribute 'Nothing'"),
        ("check --backend planted:NoBackend", "must be a subclass of ejk.Backend"),
    ],
)
def test_wrong_arguments_are_told_in_a_line(line, said):
    [told] = run(line, code=2).splitlines()
    assert said in told


def spelled(**changes) -> str:
    return json.dumps({**COPY, **changes})


def sized(**changes) -> str:
    return spelled(call={**COPY["call"], "shape": {**COPY["call"]["shape"], **changes}})


def attention(call=None, **changes) -> str:
    shape = {"num_heads": 1, "num_kv_heads": 1, "head_dim": 4, "page_size": 2, **changes}
    given = {"shape": shape, "lens": [1] * 99, **(call or {})}
    return spelled(operation="page_attention", call=given)


PACKED = str(recipes.Recipe("copy_kv_pages", "xla", COPY["call"] | {"seed": 2**31}, "x" * 99))
WRONG = {
    "hallo": "is its end missing?",
    "{": "it is not JSON",
    "[]": "is its end missing?",
    PACKED[:-9]: "is its end missing?",
    "{}": "it must have operation, backend, call",
    PACKED: "composition='xxx",
    spelled(operation="copy_kv_page"): "did you mean 'copy_kv_pages'?",
    spelled(colour="red"): "it has 'colour', which is unknown",
    spelled(call=3): "call must be dict, not int",
    spelled(backend="trition"): "backend='trition' must be one of",
    spelled(fields={"no": 1}): "fields: ",
    spelled(call={**COPY["call"], "source": [1]}): "did you mean 'sources'?",
    spelled(call={**COPY["call"], "sources": [1.5, 2]}): "sources has 1.5",
    spelled(call={**COPY["call"], "sources": [2**31, 2]}): "must be an integer of int32",
    spelled(composition="plan"): "composition='plan' must be one of plain, jit, vmap of pools",
    sized(num_pages=2**24): "num_pages=",
    sized(num_pages=2**19, head_dim=512): "shape makes a pool of 536870912 values",
    sized(num_pages=2**19, value_head_dim=512): "shape makes a pool of",
    sized(page_size=2**19, num_pages=1, head_dim=2**7): "shape makes rows of",  # of two pages
    sized(pages=1): "'pages'",
    attention(num_heads=2**19): "shape makes rows of",
    attention(max_blocks=2**19, page_size=2**8): "shape makes logits of",
    attention({"features": ["sink"]}): "did you mean 'sinks'?",
    attention({"features": 3}): "call builds nothing",
    spelled(call={**COPY["call"], "dtype": "object"}): "call builds nothing",
    "nowhere.npz": "nowhere.npz cannot be read",
}


@pytest.mark.fast
@pytest.mark.parametrize(("text", "said"), WRONG.items(), ids=range(len(WRONG)))
def test_a_text_that_is_no_recipe_is_told_why(text, said):
    [told] = run(f"repro {shlex.quote(text)}", code=2).splitlines()
    assert said in told


@pytest.mark.fast
def test_a_recipe_survives_its_text():
    short = recipes.parse(spelled())
    long = recipes.Recipe("page_attention", "xla", {"lens": [*range(300)]}, "jit", {"block_kv": 16})
    assert recipes.parse(str(long)) == long and "{" not in str(long)
    assert recipes.parse(str(short)) == short


def test_without_hypothesis_one_line_says_what_installs_it(monkeypatch):
    for name in [name for name in sys.modules if name.startswith("ejk.testing")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "hypothesis", None)
    for line in ("check", "repro x"):
        [told] = run(line, code=2).splitlines()
        assert 'hypothesis is not installed: pip install "ejk[testing]"' in told
