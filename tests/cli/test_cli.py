"""The commands, each run small: what they print, and what they say of wrong arguments."""

import importlib.util
import json
import re
import subprocess
import sys
from types import SimpleNamespace

import jax
import mosaic_offline
import pytest
from command import run
from typer.testing import CliRunner

import ejk
from ejk import _tuning
from ejk.cli import _devices, _mosaic, _pieces, _runs, _trial, bench, explain, tune
from ejk.cli._batch import CACHES, MODELS, OPERATIONS, Batch, Shape, shape_of
from ejk.cli.app import app

SMALL = "--shape 4/2/64 --batch 2 --context 64"
COMMANDS = ("doctor", "bench", "tune", "compile", "explain", "check", "repro")


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Run each program once, and time none."""

    def us(timed):
        jax.block_until_ready(timed.run())
        return 1.0

    monkeypatch.setattr(_runs.Run, "us", us)
    # What else is timed is not written for the strict promotion of the tests.
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield


@pytest.mark.fast
@pytest.mark.parametrize("command", COMMANDS)
def test_the_example_of_a_help_text_runs(command, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    said = " ".join(run(f"{command} --help").split())
    [example] = re.findall(r"Example: ejk (.*?) (?:Arguments|Options):", said)
    assert example.startswith(command)
    assert run(example, code=None if command == "doctor" else 0)


def test_no_command_prints_the_help():
    said = run("")
    assert all(command in said for command in COMMANDS)
    assert "..." not in said.split("Commands:")[1]  # no summary is cut off


def test_it_says_its_version():
    assert run("--version") == f"ejk {ejk.__version__}\n"


def test_another_number_is_not_taken_for_a_mistyped_one():
    assert "did you mean" not in run("compile sm_75", code=2)


@pytest.mark.fast
@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("bench --batch 0", "ejk bench: Invalid value for '--batch': 0 must be an integer of at"),
        ("bench --batch x", "'--batch': x must be an integer of at least 1"),
        ("bench --batch 3000000000", "'--batch': 3000000000 must be at most 2,147,483,647"),
        ("explain cpu --batch 2000000000", "'--batch': 2000000000 x --context 4096 must be at"),
        ("bench --shape 7/2/64", "num_heads=7 must be a multiple of num_kv_heads=2"),
        ("bench --shape lama-3-8b", "did you mean 'llama-3-8b'?"),
        ("bench --shape 8/1/64/128", "value_head_dim=128 must be at most head_dim=64"),
        ("bench --operation encode", "'encode' must be one of decode, ragged, write"),
        ("bench --dtype int8", "'--dtype': 'int8' must be one of bfloat16, float16, float32"),
        ("bench --cache itn4", "'--cache': 'itn4' must be one of bfloat16, float16, float32, int8, "
         "float8_e4m3fn, float8_e5m2, int4: did you mean 'int4'?"),
        ("tune x --shape 4/1/33 --cache int4", "'4/1/33': head_dim=33 must be even with --cache"),
        ("explain --shape 4/1/8/5 --cache int4", "value_head_dim=5 must be even with --cache int4"),
        ("bench --new-tokens 2", "'--new-tokens': 2 must be 1 with --operation decode"),
        ("bench --operation ragged --context 4 --new-tokens 5", "5 must be at most --context 4"),
        ("bench --bath 3", "No such option: --bath"),
        ("bench --plot x.doc", "'--plot'"),
        ("compile", "ejk compile: Missing argument 'target'"),
        ("bench --cache fp8", "int4: did you mean 'float8_e4m3fn'?"),
        ("compile h100", ": did you mean 'sm_90'?"),
        ("compile A100", ": did you mean 'sm_80'?"),
        ("compile tpu-v6e", ": did you mean 'v6e'?"),
        ("explain H100", ": did you mean 'h100'?"),
        ("compile sm_70", "'TARGET': 'sm_70' must be one of gfx942, sm_80"),
        ("compile sm_90 --set block_kv", "'--set': 'block_kv' must be name=value"),
        ("compile sm_90 --set block_kv=abc", "Invalid value for '--set': "),
        ("compile sm_90 --set block_kv=-1", "'--set': block_kv=-1 must be at least 16"),
        ("compile sm_90 --set blok_kv=64", "did you mean 'block_kv'?"),
        ("explain h300", "'DEVICE': 'h300' must be one of a100"),
        ("explain h100 --measure", "'--measure' runs on this machine's device, not on h100"),
        ("tune .", "'OUTPUT': . must be a file: it is a folder"),
        ("tune none/x.json", "'OUTPUT': the folder none must exist"),
        ("tune x.json --operation write", "'--backend': xla has no field to search for write"),
        ("tune x.json --backend triton", "'--backend': 'triton' must be one of xla"),
        ("doctor --json --issue", "'--issue': it is one form or the other: leave out --json"),
        ("doktor", "No such command 'doktor'"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_one_line(line, said, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    error = run(line, code=2)
    assert said.lower() in error.lower() and error.count("\n") == 1


@pytest.mark.fast
def test_without_the_extra_it_says_what_installs_it(tmp_path):
    """Packages that cannot be found stand in for those that are not installed."""
    code = """
import sys
sys.modules["typer"] = sys.modules["rich"] = None
from ejk.__main__ import main
main()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2 and not done.stdout
    assert done.stderr == 'rich is not installed: pip install "ejk[cli]"\n'


def test_explain_of_an_h100():
    answer = json.loads(run("explain h100 --json"))
    assert answer["chosen"] == "triton"
    assert answer["refusals"]["pallas"] == ["runs on tpu, not on cuda"]
    pieces = {piece["kernel"]: piece for piece in answer["pieces"]}
    assert pieces["page_attention_kernel"]["programs"] >= 132
    assert answer["moved_bytes"] == 64 * 4096 * 2 * 8 * 128 * 2 + 2 * 64 * 32 * 128 * 2
    assert answer["floor_us"] == round(answer["moved_bytes"] / 3350e3, 2)
    said = explain.text(explain.Answer(**answer), _devices.DEVICES["h100"])
    [heads] = [line.split() for line in said.splitlines() if line.startswith("kernel ")]
    # No splits, as a plan cuts the contexts, and no pages, which the blocks' lines do not count.
    assert heads == ["kernel", "programs", "waves", "warps", "stages", "block_group", "block_kv"]


def test_explain_of_hoppers_own_kernel_and_of_a_prefill():
    answer = json.loads(run("explain h100 --operation ragged --batch 4 --json"))
    assert answer["chosen"] == "mosaic_gpu"
    assert answer["floor_us"] == round(answer["flops"] / 989e6, 2)  # products, not memory
    [own] = [piece for piece in answer["pieces"] if piece["warps"] is None]
    assert own["programs"] == 132 and own["waves"] == 1
    device = _devices.DEVICES["h100"]
    assert "(products at the data sheet's" in explain.text(explain.Answer(**answer), device)


@pytest.mark.parametrize(
    ("kind", "capability", "floor"),
    [
        ("NVIDIA H100 80GB HBM3", "9.0", 40.1),
        ("NVIDIA H100 PCIe", "9.0", None),
        ("NVIDIA L40", "8.9", None),  # no L4
        ("NVIDIA GH200 480GB", "9.0", None),  # no H200
        ("Tesla T4", "7.5", None),
    ],
)
def test_a_board_that_is_not_in_the_table_is_a_gpu_without_a_floor(kind, capability, floor):
    here = SimpleNamespace(device_kind=kind, compute_capability=capability, core_count=100)
    device = _devices.device_of(here, "cuda")
    answer = explain.answered(Batch("decode", "", Shape(32, 8, 128), 8, 4096), kind, device)
    assert answer.floor_us == floor and answer.refusals["pallas"] == ["runs on tpu, not on cuda"]
    assert ("peaks of this board are not known" in explain.text(answer, device)) is (floor is None)


def test_explain_of_a_cpu_and_of_a_gpu_that_has_to_be_asked_for():
    assert "xla runs it" in run(f"explain cpu {SMALL}")
    assert "triton runs it" in run(f"explain a100 {SMALL} --cache int4")
    said = run(f"explain mi300x {SMALL}")
    assert "xla runs it" in said and "triton: runs on rocm where it is asked for by name" in said
    assert "measured here" in run(f"explain --measure {SMALL}")


@pytest.mark.slow
def test_libtpu_does_not_warn_that_no_tpu_is_here():
    pytest.importorskip("libtpu")
    line = [sys.executable, "-m", "ejk", "explain", "tpu-v6e", "--json"]
    done = subprocess.run(line, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["chosen"] == "pallas"
    assert "TPU_ACCELERATOR_TYPE" not in done.stderr


@pytest.mark.slow
def test_explain_and_compile_for_a_tpu():
    pytest.importorskip("libtpu")
    answer = json.loads(run("explain tpu-v6e --json"))
    assert answer["chosen"] == "pallas" and answer["pieces"][0]["programs"] > 1
    kernels = json.loads(run("compile v6e --shape 8/2/128 --batch 2 --context 64 --json"))[
        "kernels"
    ]
    assert kernels[0]["vmem_bytes"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_compile_reads_what_a_kernel_takes(target):
    [kernel] = json.loads(run(f"compile {target} {SMALL} --json"))["kernels"]
    assert kernel["kernel"] == "page_attention_kernel" and kernel["tensor_core"] > 0
    assert 0 < kernel["registers"] <= 512 and kernel["shared_bytes"] > 0


LATENT = "--shape 128/1/576/512 --batch 2 --context 64"


@pytest.mark.slow
@pytest.mark.skipif(bool(mosaic_offline.missing()), reason=str(mosaic_offline.missing()))
def test_compile_reads_what_a_mosaic_kernel_takes(monkeypatch):
    """It is what runs by itself; Triton's is compiled where it is asked for."""
    library = _mosaic.plugin(mosaic_offline.PLUGINS)
    monkeypatch.setattr(_mosaic, "plugin", lambda folders=(): library)
    *_, kernel = json.loads(run(f"compile sm_90 {LATENT} --json"))["kernels"]
    assert kernel["kernel"] == "ejk_latent_attention"
    assert kernel["registers"] == 168 and kernel["spilled_bytes"] <= 512
    assert 223_232 < kernel["shared_bytes"] <= 227 * 1024 and kernel["tensor_core"] > 0
    kernels = json.loads(run(f"compile sm_90 {LATENT} --json --backend triton"))["kernels"]
    assert kernels[0]["kernel"] == "page_attention_kernel"


@pytest.mark.parametrize("lacks, said", [
    ("triton", r'triton is not installed: pip install "ejk\[triton\]"'),
    ("plugin", r'is not installed: pip install --no-deps "jax-cuda13-plugin==.*" "jax-cuda13-pjrt'),
    ("compiler", "there is no C compiler.*: apt-get install gcc; or leave it to --backend triton"),
])  # fmt: skip
def test_compile_says_what_a_mosaic_kernel_lacks(lacks, said, monkeypatch, jax_triton):
    if lacks == "triton":
        spec = importlib.util.find_spec
        hidden = lambda name, *rest: None if name == "triton" else spec(name, *rest)  # noqa: E731
        monkeypatch.setattr(importlib.util, "find_spec", hidden)
    else:
        monkeypatch.setattr(_mosaic, "plugin", lambda folders=(): "library.so")
        monkeypatch.setattr(_mosaic, lacks, lambda *_: None)
    result = CliRunner().invoke(app, ["compile", "sm_90", *LATENT.split()], prog_name="ejk")
    assert result.exit_code == 1
    assert re.search(said, result.stderr) and result.stderr.count("\n") == 1


def test_compile_names_the_backends_of_a_target():
    said = run(f"compile sm_90 {SMALL} --backend xla", code=2)
    assert "'--backend': 'xla' must be one of mosaic_gpu, triton" in said
    said = run(f"compile gfx942 {SMALL} --backend mosaic_gpu", code=2)
    assert "'--backend': 'mosaic_gpu' must be one of triton" in said
    assert "must be one of pallas" in run(f"compile v5e {SMALL} --backend triton", code=2)
    result = CliRunner().invoke(app, f"compile sm_80 {LATENT} --backend mosaic_gpu".split())
    assert result.exit_code == 1 and "compute_capability=80 must be 90" in result.stderr


def test_a_launch_is_what_the_backend_would_hand_over():
    """Names and types in the kernel's order, or it would not compile."""
    batch = Batch("decode", "", Shape(8, 2, 64), 3, 300, cache_dtype="int8")
    call, target = _pieces.traced(batch), _devices.gpu_target("sm_90")
    triton = next(b for b in call.backends if b.name == "triton")
    for launch in _pieces.launches(triton, target, call):
        names = [parameter.name for parameter in launch.kernel.params]
        assert names == [*launch.pointers, *(n for n in names if n in launch.constants)]
    kernel = next(x for x in _pieces.launches(triton, target, call) if "key_ptr" in x.pointers)
    assert kernel.pointers["key_ptr"] == "int8" and kernel.pointers["query_ptr"] == "bfloat16"


def test_bench_compares_all_ways_and_draws_them(tmp_path):
    found = json.loads(run(f"bench {SMALL} --shape 8/8/32 --json"))
    names = [line["contender"] for line in found["results"]]
    assert names == 2 * ["ejk xla", "gather and einsum", "dot_product_attention, contiguous cache"]
    assert [line["failed"] for line in found["results"] if "failed" in line] == []
    assert all("error" in line for line in found["results"] if line["contender"] != "ejk xla")
    assert "on a CPU: XLA runs" in run(f"bench {SMALL}")
    pytest.importorskip("matplotlib")
    run(f"bench {SMALL} --plot {tmp_path / 'times.svg'}")
    assert "microseconds" in (tmp_path / "times.svg").read_text()


@pytest.mark.fast
@pytest.mark.parametrize("cache", CACHES)
def test_a_batch_has_the_pools_that_a_cache_of_its_type_has(cache):
    shape = Shape(8, 2, 64)
    batch = Batch("decode", "", shape, 3, 30, cache_dtype=cache)
    pools = ejk.empty_kv_cache(batch.num_pages, 2, 16, 64, dtype=cache)
    given = batch.types()
    assert batch.pool_bytes == pools.nbytes
    for name in ("key_cache", "value_cache", "key_scale", "value_scale"):
        made, own = getattr(pools, name), given.get(name)
        assert (made is None) == (own is None)
        assert own is None or (made.shape, made.dtype) == (own.shape, own.dtype)


BATCHES = [f"--operation {x}" for x in ("write", "ragged")]
BATCHES += ["--cache int8", *(f"--operation {x} --cache int4" for x in OPERATIONS)]


@pytest.mark.parametrize("options", BATCHES)
def test_bench_of_every_operation(options):
    [first, *_] = json.loads(run(f"bench {SMALL} {options} --json"))["results"]
    assert first["contender"] == "ejk xla" and first["us"] > 0


def test_bench_says_which_way_is_wrong(monkeypatch):
    wrong = {"a peer": lambda: _runs.Run(1, lambda: [jax.numpy.full((2, 4, 64), 3.0)])}
    monkeypatch.setattr(bench._runs, "peers", lambda batch: wrong)
    assert re.search(r"a peer +is wrong: off by \d", run(f"bench {SMALL}"))
    monkeypatch.setattr(_runs, "own", lambda batch, name: 1 / 0)
    assert "ZeroDivisionError" in run(f"bench {SMALL}", code=1)


def test_tune_searches_goes_on_and_writes_what_is_loaded(monkeypatch, tmp_path):
    tried, path = [], tmp_path / "tuning.json"

    def us(fields):
        tried.append(fields)
        return {64: 5.0, 256: None}.get(fields.get("block_kv"), 10.0)

    monkeypatch.setattr(tune.Trials, "_measure", lambda self, fields: us(fields))
    monkeypatch.setattr(_runs.Run, "us", lambda self: next(turns))
    turns = iter([10.0, 5.0] * 5)
    assert "{'block_kv': 64}: 5.0 us instead of 10.0" in run(f"tune {path} {SMALL}")
    assert len(tried) == 7  # the default and six values, none of them twice
    turns = iter([10.0, 5.0] * 5)
    run(f"tune {path} {SMALL}")  # nothing is tried again, and the entry is replaced
    assert len(tried) == 7
    trials = tmp_path / "tuning.json.trials"
    trials.write_text(trials.read_text()[:-9])  # stopped while it wrote
    turns = iter([10.0, 5.0] * 5)
    run(f"tune {path} {SMALL}")
    assert len(tried) == 8
    [entry] = json.loads(path.read_text())["entries"]
    assert entry["fields"] == {"block_kv": 64} and entry["device_kind"] == "cpu"
    call = _pieces.traced(Batch("decode", "", Shape(4, 2, 64), 2, 64))
    from ejk._load_tuning import _read

    tuned = _tuning.tuned((_read(path),), call.backends[-1], call.problem, "cpu")
    assert tuned.block_kv == 64


def test_tune_writes_nothing_that_does_not_pay_and_refuses_another_file(monkeypatch, tmp_path):
    path = tmp_path / "tuning.json"
    assert "is as fast as all" in run(f"tune {path} {SMALL}")
    assert not path.exists()
    path.write_text('{"version": 2}')
    assert f"{path}: version=2 must be 1" in run(f"tune {path} {SMALL}", code=2)


def test_two_searches_extend_one_file(monkeypatch, tmp_path):
    """What another one has written since this one started stays."""
    path = tmp_path / "tuning.json"

    def us(trials, fields):
        if not path.exists():  # another search ends while this one is busy
            tune.write_entry(path, other)
        return {64: 5.0}.get(fields.get("block_kv"), 10.0)

    names = {"operation": "page_attention", "backend": "xla", "device_kind": "another"}
    other = {**names, "facts": {}, "fields": {"block_kv": 32}}
    monkeypatch.setattr(tune.Trials, "_measure", us)
    monkeypatch.setattr(_runs.Run, "us", lambda self: next(turns))
    turns = iter([10.0, 5.0] * 5)
    run(f"tune {path} {SMALL}")
    assert [entry["device_kind"] for entry in json.loads(path.read_text())["entries"]] == [
        "another", "cpu",
    ]  # fmt: skip
    assert sorted(x.name for x in tmp_path.iterdir() if x.suffix != ".py") == [
        "tuning.json", "tuning.json.trials",
    ]  # fmt: skip


def test_tune_says_what_cannot_be_written_before_it_searches(monkeypatch, tmp_path):
    def us(*_):
        raise AssertionError("it searched")

    monkeypatch.setattr(tune.Trials, "us", us)
    (tmp_path / "link.json").symlink_to(tmp_path / "none" / "x.json")
    error = run(f"tune {tmp_path / 'link.json'} {SMALL}", code=2)
    assert "cannot be written: No such file" in error and error.count("\n") == 1
    assert "must be a file" in run(f"tune /dev/null {SMALL}", code=2)
    (tmp_path / "x.json.trials").mkdir()
    assert "must be a file: it is a folder" in run(f"tune {tmp_path / 'x.json'} {SMALL}", code=2)
    assert not (tmp_path / "x.json").exists()


@pytest.mark.parametrize("line", ["garbage", "[1]", "\xff"])
def test_tune_says_which_line_of_trials_it_cannot_read(line, tmp_path):
    (tmp_path / "x.json.trials").write_bytes(line.encode("latin-1") + b"\n")
    error = run(f"tune {tmp_path / 'x.json'} {SMALL}", code=2)
    assert "x.json.trials:1 is no line of a search" in error and error.count("\n") == 1


def test_a_trial_tells_a_wrong_result_an_error_and_a_refusal(monkeypatch):
    xla, off = ejk.XlaPageAttention(), ejk.XlaPageAttention(block_kv=16)
    run_as_it_is = ejk.XlaPageAttention.run

    def wrong(self, problem, operands, platform):
        out, *rest = run_as_it_is(self, problem, operands, platform)
        return (out * (3 if self.block_kv == 16 else 1), *rest)

    monkeypatch.setattr(ejk.XlaPageAttention, "run", wrong)
    assert _trial.trial("page_attention", xla, True).runs
    found = _trial.trial("page_attention", off, True)
    assert "is wrong" in found.how and found.failed
    monkeypatch.setattr(_trial, "refusal", lambda batch, backend: 1 / 0)
    found = _trial.trial("page_attention", xla, True)
    assert found.how == "ZeroDivisionError: division by zero" and found.failed


@pytest.mark.parametrize("model", MODELS)
def test_every_named_model_is_a_shape_that_can_be_traced(model):
    batch = Batch("decode", model, shape_of(model), 2, 64)
    assert _pieces.traced(batch).problem.num_heads == MODELS[model].num_heads
