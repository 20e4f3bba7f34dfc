"""Counts the examples that each backend passed and refused, for the summary at the end."""

import collections

passed: collections.Counter[str] = collections.Counter()
refused: collections.Counter[str] = collections.Counter()


NOTHING: dict[str, dict[str, int]] = {"passed": {}, "refused": {}}


def dump() -> dict[str, dict[str, int]]:
    """What a worker of pytest-xdist hands to its controller."""
    return {"passed": dict(passed), "refused": dict(refused)}


def add(counts: dict[str, dict[str, int]]) -> None:
    passed.update(counts["passed"])
    refused.update(counts["refused"])


def lines() -> list[str]:
    return [
        f"{name}: {passed[name]} examples passed"
        + (f", {refused[name]} refused by name as declared" if refused[name] else "")
        for name in sorted(passed | refused)
    ]
