"""The log-probabilities of a prefill and of a decode differ by no more than is said."""

import itertools
import json

import jax
import pytest
import trainer_sampler
from decoder import Config

import ejk

CONFIG = Config(num_layers=1, num_heads=2, num_kv_heads=1, vocabulary=32)
RESULTS = [
    trainer_sampler.decode.RESULTS / f"{trainer_sampler.NAME}{of}.json"
    for of in ("", "_NVIDIA_H200")
]
KINDS = (("float32", "same"), ("bfloat16", "float8_e4m3fn"), ("float16", "int8"))


def measured(kinds):
    """Measure as readers' programs do, whose types JAX promotes."""
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        return trainer_sampler.measure(kinds, CONFIG, seqs=2, num_tokens=32)


def test_a_small_model_is_within_the_bounds():
    lines = measured(KINDS)
    assert all(line["ejk"]["largest"] <= line["bound"] for line in lines), lines
    assert any(line["ejk"]["largest"] for line in lines)


def test_a_decode_that_forgets_its_token_is_not(monkeypatch):
    attend = ejk.page_attention

    def forgetful(query, keys, values, lens, tables, **options):
        return attend(query, keys, values, lens - 1, tables, **options)

    jax.clear_caches()
    monkeypatch.setattr(ejk, "page_attention", forgetful)
    [line] = measured([("bfloat16", "same")])
    assert line["ejk"]["largest"] > 2 * line["bound"]


@pytest.mark.fast
@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_what_is_committed_is_within_the_bounds(path):
    committed = json.loads(path.read_text())
    kinds = [(line["dtype"], line["cache"]) for line in committed["differences"]]
    assert kinds == [*itertools.product(trainer_sampler.BOUNDS, trainer_sampler.OF_CODES)]
    for line in committed["differences"]:
        assert line["bound"] == trainer_sampler.bound(line["dtype"], line["cache"])
        assert 0 < line["ejk"]["largest"] <= line["bound"], line
