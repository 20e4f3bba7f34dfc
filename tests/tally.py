"""Counts for the summary at the end: examples by backend, and cases that were left out."""

import collections

passed: collections.Counter[str] = collections.Counter()
refused: collections.Counter[str] = collections.Counter()
hostile: collections.Counter[str] = collections.Counter()  # calls by the family of their integers
left_out: dict[str, int] = {}  # by the command that runs them

NOTHING: dict[str, dict[str, int]] = {"passed": {}, "refused": {}, "hostile": {}, "left_out": {}}


def dump() -> dict[str, dict[str, int]]:
    """What a worker of pytest-xdist hands to its controller."""
    counters = {"passed": passed, "refused": refused, "hostile": hostile}
    return {name: dict(counter) for name, counter in counters.items()} | {"left_out": left_out}


def add(counts: dict[str, dict[str, int]]) -> None:
    passed.update(counts["passed"])
    refused.update(counts["refused"])
    hostile.update(counts["hostile"])
    left_out.update(counts["left_out"])  # every worker collects, and leaves out, the same


def sections() -> dict[str, list[str]]:
    """The lines of the summary under their titles."""
    sections = {
        "examples per backend": [
            f"{name}: {passed[name]} examples passed"
            + (f", {refused[name]} refused by name as declared" if refused[name] else "")
            for name in sorted(passed | refused)
        ],
        f"hostile integers: {hostile.total():,} calls": [
            f"{name}: {count:,} calls" for name, count in sorted(hostile.items())
        ],
        "left out": [f"{count} cases: {command} runs them" for command, count in left_out.items()],
    }
    return {title: lines for title, lines in sections.items() if lines}
