"""The scripts of `benchmarks/` that only a GPU can time run, small, wherever the tests do."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ejk._cache_types import cache_type_of
from ejk.backends.mosaic_gpu._installed import missing

FOLDER = pathlib.Path(__file__).parents[2] / "benchmarks"


def run(script: str, *arguments: str) -> str:
    """Run a script; what it compiles is optimised no more than what the tests compile."""
    command = [sys.executable, str(FOLDER / script), "--tiny", *arguments]
    unoptimised = str(int(jax.config.values["jax_disable_most_optimizations"]))
    environment = os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": unoptimised}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    return done.stdout


def lines_of(path: pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_importing_the_scripts_changes_no_setting_of_jax():
    """Tests import some of them, and what those tests start inherits the environment."""
    code = f"""
import importlib, os, pathlib, sys
import jax
folder = pathlib.Path({str(FOLDER)!r})
sys.path.append(str(folder))
def settings():
    found = {{name: x for name, x in os.environ.items() if name.startswith(("JAX", "XLA_FLAGS"))}}
    return found | jax.config.values
before = settings()
for path in sorted(folder.glob("*.py")):
    importlib.import_module(path.stem)
assert settings() == before, set(settings().items()) ^ set(before.items())
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_ragged_batches_are_checked_and_timed(tmp_path):
    path = tmp_path / "ragged.jsonl"
    batches = [f"{name}, page 16" for name in ("mixed", "mixed: its decodes", "prefill 8 x 4,096")]
    batches += [f"{batches[2]}, soft cap", "latent: verification of 4"]
    batches += ["4 new, one group on 16,384, page 16"]
    run("ragged.py", "--output", str(path), "--batch", *batches)
    lines = {(line["workload"], line["contender"]): line for line in lines_of(path)}
    dense = batches[2], "cuDNN dense, contiguous"
    assert set(lines) == {
        *((batch, "ejk triton") for batch in batches),
        *((f"{batch}: layers", "ejk triton") for batch in batches[2:3]),
        (batches[1], "ejk page_attention"),
        (batches[5], "ejk triton, prefix_groups"),
        dense,
    }
    assert lines.pop((f"{batches[2]}: layers", "ejk triton"))["wall_us_per_layer"] > 0
    for line in lines.values():
        assert line["device_us"] > 0 and line["error"] < 1e-2
    ours = lines[batches[2], "ejk triton"]
    assert ours["of_cudnn"] == round(lines[dense]["device_us"] / ours["device_us"], 4)
    assert lines[batches[3], "ejk triton"]["base_us"] == ours["device_us"]


@pytest.mark.skipif(missing(interpret=True) is not None, reason="its interpreter is not here")
def test_the_kernel_of_hopper_is_checked_and_timed(tmp_path):
    path = tmp_path / "ragged.jsonl"
    run("ragged.py", "--output", str(path), "--batch", "Hopper, page 16")
    [line] = lines_of(path)
    assert line["contender"] == "ejk mosaic_gpu"
    assert line["device_us"] > 0 and line["error"] < 1e-2


def test_gradients_are_checked_and_timed(tmp_path):
    path = tmp_path / "gradients.jsonl"
    run("gradients.py", "--output", str(path))
    lines = {line["contender"]: line for line in lines_of(path)}
    assert [*lines] == ["ejk", "XLA dense"]
    for line in lines.values():
        assert line["device_us"] > 0 and line["forward_us"] > 0 and line["error"] < 1e-2


def test_writes_are_checked_and_timed(tmp_path):
    path = tmp_path / "write.jsonl"
    run("write.py", "--output", str(path))
    lines = {line["workload"]: line for line in lines_of(path)}
    names = [f"write {n}, {layout}" for n in (16, 3) for layout in ("HND", "NHD")]
    kinds = ("bfloat16", "e4m3 per head", "int4 per token")
    assert list(lines) == [*names, *(f"{names[0]}: {kind}" for kind in kinds)]
    for line in list(lines.values())[5:]:
        assert line["base_us"] == lines[f"{names[0]}: bfloat16"]["device_us"]


def test_copies_are_checked_and_timed(tmp_path):
    path = tmp_path / "copy_kv.jsonl"
    run("copy_kv.py", "--output", str(path))
    lines = {(line["workload"], line["contender"]): line for line in lines_of(path)}
    names = ("copy 3 pages, HND", "copy 5 slots, NHD", "copy 4 slots, HND, in conflict")
    assert [*lines] == [(name, of) for name in names for of in ("ejk", "xla")]
    assert all(line["device_us"] > 0 for line in lines.values())


def test_steps_of_the_page_manager_are_timed(tmp_path):
    path = tmp_path / "paging.jsonl"
    run("paging.py", "--output", str(path))
    lines = {line["workload"]: line for line in lines_of(path)}
    assert {"step of 256", "step of 256, each evicts a page", "groups of a batch of 256"} < {*lines}
    assert all(line["median_us"] > 0 and line["cpu_us"] > 0 for line in lines.values())


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


def test_quantised_caches_are_timed_beside_bfloat16(tmp_path):
    path = tmp_path / "decode.jsonl"
    run("decode.py", "--suite", "quantised", "--output", str(path))
    first, *others = lines_of(path)
    assert first["workload"] == "tiny: bfloat16" and "of_base" not in first
    assert [line["workload"] for line in others] == [
        f"tiny: {name}" for name in ("e4m3 per head", "int4 per token")
    ]
    for line in others:
        assert line["base_us"] == first["device_us"] > 0 and line["error"] < 1e-2
        assert line["of_base"] == round(line["device_us"] / line["base_us"], 4)


def test_shared_prefixes_are_timed_beside_the_plain_call():
    import prefix
    import side_by_side

    batch = prefix.Shared("tiny", 2, 1, 16, (520,) * 32, 16, 528, prefix=512)
    [line] = side_by_side.measure(batch, True, None).values()
    assert 0 < line["error"] < 0.01, "packs change last bits"
    assert line["of_base"] == pytest.approx(line["device_us"] / line["base_us"], rel=1e-3)
    assert line["in_calls_us"] > 0


def test_prefills_over_quantised_caches_are_timed_beside_bfloat16(tmp_path):
    path = tmp_path / "ragged.jsonl"
    run("ragged.py", "--suite", "quantised", "--output", str(path))
    first, *others = lines_of(path)
    assert first["workload"].endswith(": bfloat16") and len(others) == 2
    for line in others:
        assert line["base_us"] == first["device_us"] > 0 and line["error"] < 1e-2
        assert line["of_base"] == round(line["device_us"] / line["base_us"], 4)


def test_what_reliability_is_counted_by(tmp_path):
    path = tmp_path / "reliability.jsonl"
    parts = ("repeats", "soak", "replay", "memory")
    run("reliability.py", "--platform", "cpu", "--output", str(path), "--only", *parts)
    lines = {line["part"]: line for line in lines_of(path)}
    assert tuple(lines) == parts and not [line for line in lines.values() if line["found"]]
    assert lines["repeats"]["counts"] == {"variants": 1, "calls": 3}
    assert lines["soak"]["counts"]["tokens"] > 0 and lines["soak"]["counts"]["checks"] > 0
    assert lines["replay"]["counts"] == {"steps": 3}
    assert lines["memory"]["errors"]["the donated pools"]


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


def test_a_map_is_checked_and_timed_by_several_processes(tmp_path):
    path = tmp_path / "map.jsonl"
    run("decode.py", "--suite", "map", "--output", str(path))
    shapes = [line["workload"].split(",")[0] for line in lines_of(path)]
    assert shapes == ["map 71/1/64", "map latent 128"]
    for line in lines_of(path):
        assert line["contender"] == "ejk" and line["device_us"] > 0 and line["error"] < 1e-2


def test_latent_batches_are_compared_in_turn(tmp_path):
    path, name = tmp_path / "compare.jsonl", "map latent 128, 3 x 20, page 16"
    run("compare.py", str(FOLDER.parent), "--output", str(path), "--rounds", "1", "--only", name)
    [line] = lines_of(path)
    assert line["workload"] == name and line["before_us"] > 0 and line["after_us"] > 0


def test_a_first_call_is_timed():
    command = [sys.executable, str(FOLDER / "first_call.py")]
    command += ["--lower", "--call", "write_kv_cache"]
    printed = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    seconds, _, imported_torch = printed.split()[-3:]
    assert float(seconds) > 0 and imported_torch == "False"


@pytest.fixture(autouse=True)
def scripts(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))


@pytest.fixture
def report():
    import report

    return report


def test_a_wrong_result_is_no_measurement():
    import contenders
    import programs
    import workloads

    for workload in (workloads.uniform("plain", 4, 2, 16, 3, 40, 16), *workloads.TINY_MAP[-1:]):
        [own] = contenders.contenders(tiny=True)
        given = workloads.arrays(workload, 1)
        right = [programs.expected(workload, "HND", given, seq) for seq in range(3)]
        assert programs.check(workload, own, given, right) < 1e-6
        wrong = [*right[:2], right[2].at[1].multiply(1.1)]
        with pytest.raises(AssertionError, match=f"ejk is wrong on {workload.name}"):
            programs.check(workload, own, given, wrong)


def test_a_failure_on_the_map_fails_the_script():
    import decode
    import workloads

    def job():
        raise AssertionError("ejk is wrong\nand more")

    [line] = decode.results([(workloads.MAP[0], "ejk", job)])
    assert line["failed"] == "AssertionError: ejk is wrong"
    with pytest.raises(SystemExit, match=f"failed: {workloads.MAP[0].name}"):
        decode.judge({(line["workload"], "ejk"): line})
    decode.judge({})


def test_the_floor_of_latent_attention_is_the_larger_of_two():
    import ceiling
    import workloads

    few, *_, many = workloads.LATENT
    assert few.kv_bytes == many.kv_bytes == 64 * 4096 * 576 * 2
    assert many.flops == 8 * few.flops == 2 * 128 * (576 + 512) * 64 * 4096
    reading_us, products_us = many.kv_bytes / 3000e3, many.flops / 600e6
    assert reading_us < products_us
    yardsticks = ceiling.Yardsticks([3000.0] * len(ceiling.SIZES), 600.0)
    share = yardsticks.shares(many, 2 * products_us)
    assert share["of_floor"] == 0.5 and share["of_ceiling"] < 0.5
    share = yardsticks.shares(few, 2 * reading_us)
    assert share["of_floor"] == share["of_ceiling"] == 0.5
    assert "of_floor" not in yardsticks.shares(workloads.NAMED[0], 360.0)
    rising = ceiling.Yardsticks([1000.0, 2000.0, 3000.0, 3100.0, 3120.0, 3130.0], 600.0)
    found = [rising.shares(w, 1.0)["ceiling_gb_per_s"] for w in workloads.NAMED]
    assert found[6] == 1000.0 and min(found[:6]) > 3100.0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--suite waves --workload W1a", "--suite waves has no W1a"),
        ("--suite named map --contender cuDNN", "map, quantised, prefix are timed by ejk alone"),
        ("--tiny --suite map", "--tiny needs --suite map, or quantised, and --output"),
    ],
)
def test_what_is_not_timed_is_refused(arguments, said, monkeypatch, capsys):
    import decode

    monkeypatch.setattr(sys, "argv", ["decode.py", *arguments.split()])
    with pytest.raises(SystemExit):
        decode.main()
    assert said in capsys.readouterr().err


def test_the_map_covers_what_it_says():
    import workloads

    found = workloads.MAP
    assert len({w.name for w in found}) == len(found)
    assert {w.num_seqs for w in found} == {*workloads.BATCHES}
    assert {w.max_context_len for w in workloads.EQUAL} == {*workloads.CONTEXTS}
    assert {w.page_size for w in found} == {16, 64}
    shapes = {(w.head_dim, w.num_kv_heads) for w in workloads.EQUAL}
    assert shapes == {(w.head_dim, w.num_kv_heads) for w in found if w not in workloads.EQUAL}
    assert shapes == {
        *((dim, kv) for dim in (64, 128, 256) for kv in (1, 2, 4, 8, 16, 32)),
        (576, 1),
    }
    assert max(w.pool_bytes for w in found) < 4 * 2**30
    assert sum(w.kv_bytes > 2**28 for w in found) > len(found) / 2


def test_the_worst_places_of_the_map(report):
    import map_report
    import workloads

    def place(shape, least_bytes=2**28):
        return next(w for w in workloads.MAP if w.kv_bytes > least_bytes and shape in w.name)

    plain, heads_16, heads_128 = (place(s) for s in ("/8/128", "latent 16,", "latent 128,"))
    small = min(workloads.MAP, key=lambda w: w.kv_bytes)
    line = {"device_us": 200.0, "gb_per_s": 2000.0}
    lines = {
        (plain.name, "ejk"): {**line, "of_ceiling": 0.85},
        (heads_16.name, "ejk"): {**line, "of_ceiling": 0.89, "of_floor": 0.95},
        (heads_128.name, "ejk"): {**line, "of_ceiling": 0.6, "of_floor": 0.76},
        (small.name, "ejk"): {**line, "of_ceiling": 0.1},
    }
    table = map_report.worst_table(lines)
    assert "Of 3 batches" in table and "2 are below 90%" in table
    assert [row.split(" | ")[0] for row in table.splitlines()[-2:]] == [
        f"| {w.name.removeprefix('map ')}" for w in (plain, heads_16)
    ]
    lines[heads_128.name, "ejk"]["of_floor"] = 0.74
    assert "3 are below" in map_report.worst_table(lines)
    assert "(performance_map_A_GPU.svg)" in map_report.section("A GPU", lines)
    assert map_report.worst_table({}) == map_report.section("A GPU", {}) == ""


def test_tables_of_small_and_latent_batches(report):
    def line(**more):
        return {"device_us": 120.0, "gb_per_s": 2500.0, "of_ceiling": 0.8, **more}

    lines = {
        ("W6", "ejk"): line(wall_us_per_layer=6.5),
        ("1 x 256", "ejk"): line(wall_us_per_layer=6.1),
        ("1 x 256", "ejk without a plan"): line(wall_us_per_layer=6.2),
        ("latent, 64 heads", "ejk"): line(tflops=500.0, of_floor=0.83, matmul_tflops=777.0),
        ("17 x 8,192", "ejk"): line(),
    }
    small = report.small_table(lines)
    assert "| ejk | 6.5 | 6.1 |" in small and "| ejk without a plan | - | 6.2 |" in small
    assert report.small_table({("W6", "ejk"): line(wall_us_per_layer=6.5)}) == ""
    assert report.contenders_of(lines, ["1 x 256"]) == ["ejk"]
    latent = report.latent_table(lines)
    assert "777 TFLOP/s" in latent and "| 64 | 120.0 | 2,500 | 500 | 83.0% |" in latent
    assert "| 17 x 8,192 | 120.0 | 2,500 | 80.0% |" in report.own_table(lines, "waves", "Waves")


def test_a_table_of_gradients(report):
    assert report.gradients_table({}) == ""
    own = {"device_us": 4821.0, "wall_us": 6088.0, "forward_us": 310.0}
    lines = {
        ("gradients 64 x 256", "ejk"): own | {"of_cudnn": 0.22},
        ("gradients 64 x 256", "XLA dense"): own,
        ("gradients 64 x 256", "cuDNN dense"): {"failed": "it is not here"},
    }
    table = report.gradients_table(lines)
    assert "| 64 x 256 | ejk | 4,821 | 6,088 | 310 | 22.0% |" in table
    assert "| 64 x 256 | XLA dense | 4,821 | 6,088 | 310 | - |" in table
    assert "cuDNN dense" not in table


def test_tables_of_prefills():
    import ragged_report

    def line(us, of_cudnn=None, **more):
        return {
            "device_us": us,
            "tflops": 400.0,
            "matmul_tflops": 777.0,
            "of_cudnn": of_cudnn,
            **more,
        }

    plain, small = "prefill 8 x 4,096, page 16", "prefill 8 x 4,096, 32/8/64, page 16"
    far, window = f"{plain}, window far away", "prefill 1 x 32,768, page 16, window of 1,024"
    lines = {
        (plain, "ejk mosaic_gpu"): line(2000.0, 0.976),
        (plain, "ejk triton"): line(2500.0, 0.7),
        (plain, "cuDNN dense, contiguous"): line(1950.0, 1.0),
        (small, "ejk mosaic_gpu"): line(1000.0, 1.01),
        ("24 unequal prompts, page 16", "ejk mosaic_gpu"): line(1200.0, base_us=2000.0),
        (far, "ejk mosaic_gpu"): line(2020.0, base_us=2000.0),
        (window, "ejk triton"): line(1320.0, base_us=17400.0),
        (f"{plain}: layers", "ejk mosaic_gpu"): {"wall_us_per_layer": 2010.5},
    }
    text = ragged_report.section(lines)
    assert "up to 777 TFLOP/s" in text
    assert "| 8 x 4,096, page 16 | 32/8/128 | 2,000 | 400 | 0.976 | 400 | 0.700 | 400 |" in text
    assert "| 8 x 4,096, page 16 | 32/8/64 | 1,000 | 400 | 1.010 | - | - | - |" in text
    assert "behind cuDNN:\n\n- 8 x 4,096, page 16: 97.6% of cuDNN's rate.\n\n" in text
    assert "| 24 unequal prompts, page 16 | 1,200 | 400 | - | - | 0.93 |" in text
    assert "| 8 x 4,096, page 16, window far away | 1.000 | 2,020 | 1.010 | - | - |" in text
    assert "window of 1,024 | 0.069 | - | - | 1,320 | 1.100 |" in text
    assert f"| {plain} | 2,000.0 | 2,010.5 | 2,500.0 | - |" in text
    lines[plain, "ejk mosaic_gpu"]["of_cudnn"] = 1.02
    assert "nowhere in this table" in ragged_report.behind(lines)


def test_tables_of_ragged_batches_and_writes(report):
    import ragged_report

    def line(us, **more):
        return {"device_us": us, **more}

    lines = {
        ("mixed, page 16", "ejk mosaic_gpu"): line(540.0),
        ("mixed, page 16", "ejk triton"): line(630.0),
        ("mixed: its chunks, page 16", "ejk triton"): line(300.0),
        ("mixed: its decodes, page 16", "ejk triton"): line(420.0),
        ("mixed: its decodes, page 16", "ejk page_attention"): line(400.0),
        ("latent, 16 heads", "ejk"): line(100.0),
        ("latent, 16 heads: verification of 4", "ejk triton"): line(120.0),
        ("write 64, HND", "ejk"): {"device_us": 3.5, "gb_per_s": 100.0, "of_ceiling": 0.25},
        ("copy 64 slots, HND", "ejk"): line(2.5, gb_per_s=1200.0, of_ceiling=0.5),
        ("copy 64 slots, HND", "xla"): line(4.0),
        ("copy 16 pages, HND", "ejk"): {"failed": "ValueError: too large"},
    }
    table = ragged_report.against_parts_table(lines)
    assert "| mixed, page 16 | 540.0 | 630.0 | 300.0 + 400.0 | 0.77 |" in table
    assert "| latent, 16 heads: verification of 4 | - | 120.0 | 100.0 | 1.20 |" in table
    assert "verification of 8" not in table.split("|---")[-1]
    assert "| write 64, HND | 3.50 | 100 | 25.0% |" in report.write_table(lines)
    assert "| copy 64 slots, HND | 2.50 | 1,200 | 50.0% | 4.0 |" in report.copy_table(lines)
    assert "copy 16" not in report.copy_table(lines) and report.copy_table({}) == ""


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


def test_tables_of_quantised_caches(report):
    import quantised_report

    def line(us, of_base=None, **more):
        return {"device_us": us, "of_base": of_base, **more}

    shape, prefill = "64 x 4,096, page 16", "prefill 8 x 4,096, page 16"
    lines = {
        (f"{shape}: bfloat16", "ejk"): line(360.0),
        (f"{shape}: int8 per head", "ejk"): line(185.0, 0.5139),
        (f"{shape}: int4 per token", "ejk"): line(108.0, 0.3),
        ("float32 queries, 64 x 4,096: float32", "ejk"): line(720.0),
        ("float32 queries, 64 x 4,096: bfloat16", "ejk"): line(365.0, 0.507),
        (f"{prefill}: int8 per token", "ejk triton"): line(2600.0, 1.04),
        ("write 8192, HND", "ejk"): line(29.0, gb_per_s=2322.0, of_ceiling=0.8),
        ("write 8192, HND: int8 per token", "ejk"): line(
            22.5, 0.776, gb_per_s=2300.0, of_ceiling=0.79
        ),
    }
    text = quantised_report.section(lines)
    assert "| of the queries' type | bfloat16 | int8 per head | int4 per token |" in text
    assert f"| {shape} | bfloat16: 360.0 | - | 0.514 | 0.300 |" in text
    assert "| float32 queries, 64 x 4,096 | float32: 720.0 | 0.507 | - | - |" in text
    assert "| 8 x 4,096, page 16: int8 per token | - | - | 2,600 | 1.040 |" in text
    assert "| write 8192, HND: int8 per token | 22.50 | 2,300 | 79.0% | 0.776 |" in text
    assert "int8" not in report.write_table(lines) and "| write 8192, HND | 29" not in text


def test_what_a_time_is_compared_with_took_turns_with_it():
    import side_by_side

    found = {"a": {"device_us": 200.0}, "b": {"device_us": 101.0}, "c": ValueError("why")}
    found = side_by_side.with_ratios(found, "a")
    assert found["b"] == {"device_us": 101.0, "base": "a", "base_us": 200.0, "of_base": 0.505}
    assert found["a"] == {"device_us": 200.0} and isinstance(found["c"], ValueError)
    found = side_by_side.with_ratios({"a": ValueError(), "b": {"device_us": 101.0}}, "a")
    assert found["b"] == {"device_us": 101.0}


def test_what_a_cache_holds_is_what_ejk_writes():
    """Codes and scales of the yardstick that timed caches are checked against."""
    import caches

    import ejk

    rows = jax.random.normal(jax.random.key(0), (5, 3, 16))
    for cache in caches.ALL:
        pool = caches.quantise(cache, rows, head_axis=1)
        cache_type = cache_type_of(pool.codes.dtype)
        empty = jnp.zeros((5, 3, 1, pool.codes.shape[-1]), pool.codes.dtype)
        scales = dict.fromkeys(("key_scale", "value_scale"), pool.scale)
        if cache.scales == "token":
            scales = dict.fromkeys(scales, jnp.zeros(empty.shape[:-1]))
        codes, _, *stored = ejk.write_kv_cache(rows, rows, empty, empty, jnp.arange(5), **scales)
        # A quotient of the yardstick may be the product with a reciprocal: the last bit is free.
        assert (codes[:, :, 0] == pool.codes).mean() > 0.98
        if stored:
            np.testing.assert_allclose(stored[0][..., 0], pool.scale, rtol=1e-6)
        near = caches.dequantise(cache, pool, head_axis=1)
        assert (
            0 < jnp.abs(near - rows).max() < (0.5 if cache in (caches.INT4, caches.E5M2) else 0.3)
        )
        assert caches.LARGEST.get(cache.dtype) == cache_type.largest
        row_bytes = 16 // cache_type.per_element * pool.codes.dtype.itemsize
        assert cache.row_bytes(16) == row_bytes + 4 * len(stored[:1])


def test_caches_that_are_coarser_are_further_from_float64(monkeypatch):
    import quantised_accuracy

    monkeypatch.setattr(quantised_accuracy, "SEQS", 2)
    monkeypatch.setattr(quantised_accuracy, "TOKENS", 32)
    found = quantised_accuracy.measure(["normal", "keys with a large mean"])
    for errors in found.values():
        fine, coarse = errors["int8 per token"], errors["int4 per token"]
        assert 0 < errors["bfloat16"] < fine < errors["e4m3"] < errors["e5m2"] < coarse
    assert found["keys with a large mean"]["e4m3"] > 2 * found["normal"]["e4m3"]


def test_what_was_not_measured_has_no_table(report):
    import quantised_report
    import ragged_report

    assert ragged_report.section({}) == report.write_table({}) == quantised_report.section({}) == ""
    assert report.scaling_table({}) == report.small_table({}) == report.latent_table({}) == ""


def test_the_pages_are_what_the_results_say():
    """But for the plots, which need matplotlib."""
    command = [sys.executable, str(FOLDER / "report.py"), "--check"]
    subprocess.run(command, check=True)


def test_the_figures_of_the_readme_are_what_was_measured(report):
    lines = report.load()["NVIDIA H100 80GB HBM3"]
    rows = (FOLDER.parent / "README.md").read_text().splitlines()
    decode, prefill = (
        next(r for r in rows if r.startswith(f"| {n} ")) for n in ("decode", "prefill")
    )
    pallas, paged = "Pallas GPU paged_attention", "cuDNN paged (private)"
    for contender in ("ejk", pallas, paged, "cuDNN dense, contiguous cache"):
        assert f" {lines['W1a', contender]['device_us']:.0f} us" in decode
    for contender in ("ejk mosaic_gpu", "cuDNN dense, contiguous"):
        rate = lines["prefill 8 x 4,096, page 16", contender]["tflops"]
        assert f" {rate:.0f} TFLOP/s" in prefill


def test_where_ejk_loses_is_what_was_measured(report):
    page = " ".join(report.PAGE.read_text().split())
    dense, paged = "cuDNN dense, contiguous cache", "cuDNN paged (private)"
    h100, h200 = "NVIDIA H100 80GB HBM3", "NVIDIA H200"
    said = {
        (h100, dense): (6, "{} to {} % faster in six of the nine decode workloads on an H100"),
        (h200, dense): (5, "{} to {} % faster in five on an H200"),
        (h100, paged): (2, "{} to {} % faster in two of them on an H100"),
        (h200, paged): (0, "and in none on an H200"),
    }
    for (device, contender), (count, text) in said.items():
        lines = report.load()[device]
        ratios = [
            lines[name, "ejk"]["device_us"] / lines[name, contender]["device_us"]
            for name in report.names(lines, "named")
            if lines.get((name, contender), {}).get("device_us")
        ]
        ahead = sorted(100 * (ratio - 1) for ratio in ratios if ratio > 1)
        assert len(ahead) == count
        assert text.format(*(f"{ahead[i]:.1f}" for i in (0, -1) if ahead)) in page


def test_what_shared_prefixes_gain_is_what_was_measured(report):
    page = " ".join(report.PAGE.read_text().split())
    found = {
        name: line
        for (name, contender), line in report.load()["NVIDIA H200"].items()
        if contender == "ejk" and "plan_us" in line and " in 1 on " in name
    }
    some, many = (
        1 / found[name]["of_base"] for name in ("64 in 1 on 16,384", "256 in 1 on 32,768")
    )
    text = f"64 sequences on 16,384 tokens {some:.1f} times as fast, 256 on 32,768 {many:.1f} times"
    assert text in page
    apart = {
        name: line["device_us"] / line["in_calls_us"]
        for name, line in found.items()
        if line.get("in_calls_us")
    }
    of_256 = [ratio for name, ratio in apart.items() if name.startswith("256 ")]
    text = f"512 tokens or more {min(of_256):.2f} to {max(of_256):.1f} times, 64 on 16,384"
    assert f"{text} {apart['64 in 1 on 16,384']:.2f} times" in page
    packed = [line["plan_us"] for line in found.values() if line["of_base"] < 0.9]
    assert f"packs takes {min(packed):.0f} to {max(packed):.0f} us" in page


def test_what_the_pages_recommend_is_what_was_measured(report):
    """The prose of docs/quantised.md stands on these results."""
    import quantised_report

    model = quantised_report.load(quantised_report.MODEL)
    kinds, tokens = model["kinds"], model["tokens"]
    changed = round(tokens * (1 - kinds["int8 per token"]["agreement"]))
    page = (FOLDER.parent / "docs" / "quantised.md").read_text()
    assert f"chose another next token {changed} times in {tokens:,}:" in page
    eight_bits = [own["agreement"] for own in kinds.values() if 1 <= own["bytes"] < 2]
    assert kinds["int8 per token"]["agreement"] == max(eight_bits)
    assert kinds["int8 per head"]["agreement"] > kinds["e4m3"]["agreement"]
    assert kinds["e5m2 per token"]["agreement"] < kinds["e4m3"]["agreement"]
    errors = quantised_report.load(quantised_report.ACCURACY)["error"]
    outliers, normal = errors["outlier channels in keys"], errors["normal"]
    assert outliers["e4m3 per token"] < outliers["int8 per token"] < outliers["e4m3"]
    assert 3 * normal["int8 per token"] < normal["e4m3"] < 1.1 * normal["e4m3 per head"]
    assert min(errors["keys with a large mean"].values()) > 2 * max(
        own["bfloat16"] for name, own in errors.items() if "mean" not in name
    )
