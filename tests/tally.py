"""Counts for the summary at the end: examples by backend, and cases that were left out."""

import collections

passed: collections.Counter[str] = collections.Counter()
refused: collections.Counter[str] = collections.Counter()
left_out: dict[str, int] = {}  # by the command that runs them

NOTHING: dict[str, dict[str, int]] = {"passed": {}, "refused": {}, "left_out": {}}


def dump() -> dict[str, dict[str, int]]:
    """What a worker of pytest-xdist hands to its controller."""
    return {"passed": dict(passed), "refused": dict(refused), "left_out": left_out}


def add(counts: dict[str, dict[str, int]]) -> None:
    passed.update(counts["passed"])
    refused.update(counts["refused"])
    left_out.update(counts["left_out"])  # every worker collects, and leaves out, the same


def sections() -> dict[str, list[str]]:
    """The lines of the summary under their titles."""
    sections = {
        "examples per backend": [
            f"{name}: {passed[name]} examples passed"
            + (f", {refused[name]} refused by name as declared" if refused[name] else "")
            for name in sorted(passed | refused)
        ],
        "left out": [f"{count} cases: {command} runs them" for command, count in left_out.items()],
    }
    return {title: lines for title, lines in sections.items() if lines}
