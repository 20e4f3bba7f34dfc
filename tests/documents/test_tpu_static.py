"""The static prices of TPU kernels: what is read of libtpu's dumps, the formula, the check."""

import dataclasses
import json
import pathlib
import re
import sys
import tomllib

import pytest
import tpu_kernels
import tpu_prices
import tpu_profile
import tpu_static
from tpu_prices import Price, compare, predict
from tpu_profile import ProfileError, Run, parse_program, parse_run

ROOT = pathlib.Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "docs"))

import tpu_table

SCHEDULE = """\
Schedule analysis:
	total scheduled bundles:    6
	empty scheduled bundles:    1
	non empty scheduled bundles: 5
"""

FINAL_BUNDLES = """\
   0x1   :  { %47802 = sst [smem:[#allocation281_spill]] %s47085_s3 }
   0x4   :  { %14 = dma.hbm_to_smem /*hbm=*/%s47089_s1, /*size_in_granules=*/128 }
   0xe LB: > { %47804 = sst [smem:[#allocation101_spill]] %s37680_s26  ;;  %s26735_s1 = sadd.s32 4 }
  0x1e   : > { %s18 = sand.u32 16, %s17  ;;  %s47812_s3 = sld [smem:[#allocation281_spill]] }
  0x4c   : > { %v9 = vld [vmem:[%s2]]  ;;  %7 = vst [vmem:[#allocation9_spill] sm:$0xff] %v9 }
  0x4d   : > { %8 = vst [vmem:[#allocation2]] %v9  ;;  %v3 = vld [vmem:[#allocation9_spill]] }
"""

PROFILE = """\
hlo_op_estimate {
  hlo_op_name: "priced_kernel.1"
  estimated_cycles: 18954
  num_equivalent_hlos: 1
}
"""

EXECUTED = """\
0x0: bundle slots:
  %s0_s21 = smov.u32 [#allocation13] /* materialized constant */
  %3 = dma.hbm_to_smem /*hbm=*/%s2_s0, /*size_in_granules=*/16, /*smem=*/%s1_s2


0x1: bundle slots:


0xd2: bundle slots:
  %293 = dma.hbm_to_vmem [thread:$0]  /*hbm=*/%s291_s7, /*size_in_granules=*/1024, /*vmem=*/%s263


0xd2: bundle slots:
  %294 = dma.hbm_to_vmem [thread:$0]  /*hbm=*/%s292_s1, /*size_in_granules=*/256, /*vmem=*/%s268


0xd3: bundle slots:
  %7 = dma.general /*src=*/%s255_s7, /*size_in_granules=*/2048, /*dst=*/%s233 /* hbm-to-vmem */


0xd4: bundle slots:
  %8 = dma.general /*src=*/%s255_s7, /*size_in_granules=*/2048, /*dst=*/%s233 /* vmem-to-hbm */
  %9 = dma.vmem_to_hbm [thread:$0]  /*vmem=*/%s292_s1, /*size_in_granules=*/256, /*hbm=*/%s2
"""


def test_a_program_is_read():
    expected = {"static_bundles": 6, "vector_spills": 1, "scalar_spills": 2}
    assert parse_program(SCHEDULE, FINAL_BUNDLES) == expected


def test_a_run_is_read():
    granules = 1024 + 256 + 2048
    assert parse_run(PROFILE, EXECUTED) == Run(6, 18954, copies=3, copied_bytes=32 * granules)


@pytest.mark.parametrize(
    ("parse", "texts"),
    [
        (parse_program, (SCHEDULE.replace("total", "all"), FINAL_BUNDLES)),
        (parse_program, (2 * SCHEDULE, FINAL_BUNDLES)),
        (parse_program, (SCHEDULE, "")),
        (parse_program, (SCHEDULE, FINAL_BUNDLES.replace("vst", "vstore"))),
        (parse_run, ("", EXECUTED)),
        (parse_run, (PROFILE, "")),
        (parse_run, (PROFILE, EXECUTED.replace("bundle slots", "bundle"))),
        (parse_run, (PROFILE, EXECUTED.replace("size_in_granules", "granules"))),
        (parse_run, (PROFILE, EXECUTED.replace("granules=*/256", "granules=*/%s7"))),
    ],
)  # fmt: skip
def test_text_that_changed_is_an_error(parse, texts):
    with pytest.raises(ProfileError):
        parse(*texts)


def test_a_fatal_line_is_the_reason():
    stderr = (
        "I1122 x.cc:1] fine\nF1122 10:00:00.000 7 llo.cc:9] Unsupported DMA direction: 10\n@ 0x1"
    )
    assert tpu_profile.reason(stderr, -6) == "Unsupported DMA direction: 10"
    assert tpu_profile.reason("Traceback\n  here\nValueError: takes no sliding_window\n", 1) == (
        "ValueError: takes no sliding_window"
    )
    assert tpu_profile.reason("", -9) == "exit code -9"


def test_flags_that_libtpu_does_not_know_fail(monkeypatch):
    pytest.importorskip("libtpu")
    monkeypatch.setattr(tpu_profile, "FLAGS", ("--xla_jf_no_such_flag=1",))
    with pytest.raises(ProfileError, match="no_such_flag"):
        tpu_profile.profile("ejk", "v4", "page 128", num_seqs=2, copies=True, fields={})


def test_a_kernel_is_followed_to_all_it_has_to_read():
    pytest.importorskip("libtpu")
    found = {
        copies: tpu_profile.profile("ejk", "v5e", "page 128", 2, copies, {})
        for copies in (True, False)
    }
    (program, run), (_, bare) = found[True], found[False]
    workload = tpu_kernels.workload("page 128", 2)
    queries = 2 * workload.num_heads * workload.head_dim * 2
    assert run.copied_bytes == workload.kv_bytes + queries
    assert bare.copied_bytes <= queries
    assert bare.bundles < run.bundles and bare.cycles < run.cycles
    assert program.vmem_bytes > 2**20 and program.static_bundles > 500


def test_rates_leave_out_what_a_launch_costs_once():
    runs = [Run(100 + 30 * n, 700 + 50 * n, 1 + 4 * n, 64 + 10 * n) for n in (2, 4)]
    bare = [Run(90 + 20 * n, 500 + 40 * n, 0, 0) for n in (2, 4)]
    assert tpu_static.rates(2, 4, *runs, *bare) == dict(
        bundles=30, issue_bundles=10, compute_cycles=40, start_cycles=500, copies=4, copied_bytes=10
    )


def test_a_kernel_that_was_not_followed_has_no_price():
    tpu_static.check_copies(95, 100)
    with pytest.raises(ProfileError, match="saw 0 bytes copied, of 100"):
        tpu_static.check_copies(0, 100)


def test_what_fails_is_recorded(monkeypatch):
    def fail(*args, **kwargs):
        raise ProfileError("Unsupported DMA direction: 10")

    monkeypatch.setattr(tpu_profile, "profile", fail)
    price = tpu_static.price("ejk", "v6e", "1 KV head")
    assert price == Price("ejk", "v6e", "1 KV head", failure="Unsupported DMA direction: 10")
    assert "failed: Unsupported DMA direction: 10" in tpu_static.table([price])


PRICE = Price(
    "ejk", "v6e", "page 16", bundles=4300, issue_bundles=1000, compute_cycles=5000,
    start_cycles=2000, copies=256, copied_bytes=9_000_000, static_bundles=3564, vector_spills=221,
    scalar_spills=22, vmem_bytes=9_000_000, compile_s=1.0,
)  # fmt: skip


def test_the_memory_bounds_a_core_that_keeps_up():
    workload, found = tpu_kernels.WORKLOADS["page 16"], predict(PRICE)
    assert workload.kv_bytes == 16 * 2048 * 2 * 8 * 128 * 2
    cycles = 16 * 9_000_000 / (0.82 * 937) + 2000
    assert found.bound == "memory"
    assert found.us == pytest.approx(cycles / 1750)
    assert found.share == pytest.approx(workload.kv_bytes / cycles / 937)
    assert found.share < 0.82
    fewer = predict(dataclasses.replace(PRICE, copied_bytes=1))
    assert fewer.memory == pytest.approx(workload.kv_bytes / (0.82 * 937))


def test_a_core_that_does_not_keep_up_bounds():
    found = predict(dataclasses.replace(PRICE, compute_cycles=20_000))
    assert found.useful == pytest.approx(4 * 16 * 2048 * 32 * 128 / (16 * 21_000 + 2000) / 2**19)
    assert found.bound == "core"
    assert found.us == pytest.approx((16 * 21_000 + 2000) / 1750)


def test_cores_share_the_sequences_of_kernels_that_are_split():
    split = predict(dataclasses.replace(PRICE, generation="v5p"))
    alone = predict(
        dataclasses.replace(PRICE, generation="v5p", kernel="jax ragged_paged_attention")
    )
    assert (split.compute, split.issue) == (8 * 5000, 8 * 1000)
    assert alone.compute == 2 * split.compute
    assert alone.memory == pytest.approx(2 * split.memory)  # one core draws half at most


@pytest.fixture
def checked(tmp_path, monkeypatch):
    """Run `--check` of a price against a baseline; returns why it fails, or 0."""

    def check(old, new, versions=None):
        path = tmp_path / "results.json"
        monkeypatch.setattr(tpu_static, "versions", lambda: versions or {"libtpu": "1"})
        tpu_static.write(path, {old.key: old} if old else {})
        before = path.read_text()
        monkeypatch.setattr(tpu_static, "versions", lambda: {"libtpu": "1"})
        monkeypatch.setattr(tpu_static, "price", lambda *case: dataclasses.replace(new))
        with pytest.raises(SystemExit) as end:
            tpu_static.main(["--check", "--only", *new.key, "--output", str(path)])
        assert path.read_text() == before
        return end.value.code

    return check


@pytest.mark.parametrize("field", tpu_prices.CHECKED)
def test_check_fails_on_what_is_worse(field, checked):
    value = getattr(PRICE, field)
    assert checked(PRICE, dataclasses.replace(PRICE, **{field: int(1.02 * value)})) == 0
    assert checked(PRICE, dataclasses.replace(PRICE, **{field: value // 2})) == 0
    worse = checked(PRICE, dataclasses.replace(PRICE, **{field: int(1.04 * value) + 1}))
    assert f"ejk, v6e, page 16: {field} was {value:,}" in worse


def test_check_fails_on_what_cannot_be_compared(checked):
    failed = Price(*PRICE.key, failure="no bundles")
    assert checked(PRICE, failed) == "worse than the results:\nejk, v6e, page 16: no bundles"
    assert "not in the results" in checked(None, PRICE)
    assert "bundles was None" in checked(dataclasses.replace(PRICE, bundles=None), PRICE)
    assert checked(failed, PRICE) == 0
    assert "the results are of" in checked(PRICE, PRICE, versions={"libtpu": "0"})


def test_words_choose_cases():
    assert tpu_static.chosen(["ejk", "v6e", "page 16"]) == [("ejk", "v6e", "page 16")]
    every = tpu_static.chosen([])
    assert {case[1] for case in every} == set(tpu_static.GENERATIONS)
    assert ("jax paged_attention", "v5p", "page 128") in every
    with pytest.raises(SystemExit, match="v6x: no kernel"):
        tpu_static.chosen(["v6x"])


def test_prices_survive_being_written(tmp_path, monkeypatch):
    monkeypatch.setattr(tpu_static, "versions", lambda: {"libtpu": "1"})
    tpu_static.write(tmp_path / "x.json", {PRICE.key: PRICE})
    facts, prices = tpu_prices.load(tmp_path / "x.json")
    assert prices == {PRICE.key: PRICE} and facts["versions"] == {"libtpu": "1"}
    assert compare(PRICE, prices[PRICE.key]) == []


def test_page_is_fresh():
    page = tpu_table.PAGE.read_text(encoding="utf-8")
    assert page == tpu_table.generate(page), "stale: run `python docs/tpu_table.py`"


def test_page_goes_stale_with_the_results(tmp_path, monkeypatch):
    page = tmp_path / "tpu.md"
    page.write_text(tpu_table.PAGE.read_text(encoding="utf-8"), encoding="utf-8")
    monkeypatch.setattr(tpu_table, "PAGE", page)
    facts, prices = tpu_prices.load()
    key = ("ejk", "v6e", "page 16")
    prices[key] = dataclasses.replace(prices[key], bundles=2 * prices[key].bundles)
    monkeypatch.setattr(tpu_prices, "load", lambda: (facts, prices))
    with pytest.raises(SystemExit, match=r"tpu\.md is stale"):
        tpu_table.main(["--check"])
    tpu_table.main([])
    tpu_table.main(["--check"])


def test_every_case_has_a_result():
    assert set(tpu_static.chosen([])) == set(tpu_prices.load()[1])


def test_the_pinned_versions_are_those_of_the_results():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    pins = dict(re.fullmatch(r"(\w+)==([^;]+).*", pin).groups() for pin in extras["static"])
    assert pins == json.loads(tpu_prices.RESULTS.read_text())["versions"]
