"""The page manager against a model of it and a simulated pool (see `paging_model.py`).

Hypothesis' stateful machine takes 10,000 steps in a thorough run. Walks of a fixed seed take fewer
steps in every run, but are rarely idle.
"""

import collections
import os
import random

import hypothesis
import hypothesis.stateful as stateful
import paging_operations as operations
import pytest
from paging_operations import machine

THOROUGH = bool(os.environ.get("EJK_TEST_THOROUGH"))


@pytest.mark.fast
def test_any_operations():
    stateful.run_state_machine_as_test(
        machine(operations.new_model),
        settings=hypothesis.settings(max_examples=200 if THOROUGH else 8, stateful_step_count=50),
    )


@pytest.mark.fast
def test_walks():
    total = collections.Counter()
    for seed in range(200 if THOROUGH else 12):
        model = operations.walk(random.Random(seed), 50)
        total.update(model.manager.statistics()._asdict())
        total["refused"] += model.refused
    # Everything happens often, or the walks would prove little.
    for event in ("hit_tokens", "evictions", "forks", "copies", "preemptions", "refused"):
        assert total[event] >= 10, total
