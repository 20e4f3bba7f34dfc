"""The timing of a TPU, as far as a machine without one can run it."""

import dataclasses

import jax.numpy as jnp
import pytest
import tpu
import tpu_prices
from caches import INT8, INT8_TOKEN
from workloads import uniform

import ejk

TINY = uniform("tiny", 4, 2, 8, 2, 24, 8, sliding_window=20)


def test_a_machine_without_a_tpu_says_so():
    with pytest.raises(SystemExit, match="no TPU here: JAX sees") as end:
        tpu.main([])
    assert end.value.code != 0


@pytest.mark.parametrize("cache", [None, INT8, INT8_TOKEN], ids=str)
def test_a_workload_is_checked_and_timed(cache):
    backend = ejk.PallasPageAttention(interpret=True)
    workload = dataclasses.replace(TINY, cache=cache)
    assert tpu.measure(workload, backend, calls=2, repeats=1, rounds=1) > 0


def test_what_is_wrong_is_not_timed():
    with pytest.raises(AssertionError, match="tiny is wrong: relative error 5"):
        tpu.check(TINY, jnp.ones(4), jnp.full(4, 2.0))
    with pytest.raises(AssertionError, match="nan"):
        tpu.check(TINY, jnp.full(4, jnp.nan), jnp.ones(4))


def test_measured_stands_next_to_predicted():
    workload = dataclasses.replace(TINY, name="page 16")
    predicted = tpu_prices.Prediction(
        memory=1, compute=1, issue=1, start=1, us=50.0, share=0.8, useful=0.1
    )
    rows = [
        tpu.Measured(workload, 100.0, predicted, workload.kv_bytes / 100 / 1e3 / 0.4),
        tpu.Measured(TINY, 100.0, None, workload.kv_bytes / 100 / 1e3 / 0.5),
    ]
    assert tpu.table(rows).splitlines()[2:] == [
        "| page 16 | 100.0 | 50.0 | 2.00 | 40% | 80% |",
        "| tiny | 100.0 | - | - | 50% | - |",
    ]


def test_every_profiled_generation_has_predictions():
    for chip in tpu_prices.CHIPS:
        assert tpu.predictions(chip)["page 16"].share > 0
    assert tpu.predictions("v4") == {}
