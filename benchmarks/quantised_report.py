"""The tables about quantised caches, of `docs/performance.md` and of `docs/quantised.md`."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import ragged_batches
import workloads
from ragged_report import MOSAIC, TRITON, Lines, cell, figure, table

RESULTS = Path(__file__).parent / "results"
ACCURACY, MODEL = "quantised_accuracy.json", "quantised_model.json"
PLOT = "quantised.svg"


def section(lines: Lines) -> str:
    """Write what the caches of 8 and 4 bits take of bfloat16's time."""
    return decode_table(lines) + ragged_table(lines) + write_table(lines)


def decode_table(lines: Lines) -> str:
    groups: dict[str | None, list[workloads.Workload]] = {}
    for workload in workloads.QUANTISED:
        groups.setdefault(workload.group, []).append(workload)
    kinds = list(dict.fromkeys(w.held.name for w in workloads.QUANTISED))
    rows = []
    for name, group in groups.items():
        times = {w.held.name: lines.get((w.name, "ejk"), {}) for w in group}
        ratios = [cell(times.get(kind, {}).get("of_base"), ".3f") for kind in kinds]
        if any(ratio != "-" for ratio in ratios):
            base_us = lines[group[0].name, "ejk"]["device_us"]
            rows.append([str(name), f"{group[0].held.name}: {base_us:.1f}", *ratios])
    if not rows:
        return ""
    used = [i for i in range(len(kinds)) if any(row[2 + i] != "-" for row in rows)]
    rows = [[*row[:2], *(row[2 + i] for i in used)] for row in rows]
    return (
        "\nDecode over quantised caches. The time in microseconds is that of a cache of the "
        "queries' type; the others are what each kind of cache takes of it, in turns, call by "
        "call. Where not said, 32/8/128 and pages of 16. Of the bytes of bfloat16, 8 bits read "
        "0.500, with scales per token 0.516, and int4 with its scales 0.266, in heads of 128:\n"
    ) + table(", ".join(["of the queries' type", *(kinds[i] for i in used)]), rows)


def ragged_table(lines: Lines) -> str:
    rows = []
    for name in (batch.name for batch in ragged_batches.SUITES["quantised"]):
        row = [name.removeprefix("prefill ")]
        for contender in (MOSAIC, TRITON):
            row.append(cell(figure(lines, name, contender), ",.0f"))
            row.append(cell(figure(lines, name, contender, "of_base"), ".3f"))
        if any(text != "-" for text in row[1:]):
            rows.append(row)
    if not rows:
        return ""
    return (
        "\nPrefills over quantised caches, 32/8/128, each beside what the same backend takes with "
        "bfloat16 in the same turns:\n"
    ) + table("`mosaic_gpu` us, of bfloat16, `triton` us, of bfloat16", rows)


def write_table(lines: Lines) -> str:
    rows = []
    for (name, _), line in lines.items():
        if name.startswith("write ") and ": " in name and "device_us" in line:
            figures = (line["device_us"], ".2f"), (line["gb_per_s"], ",.0f")
            figures += (line["of_ceiling"], ".1%"), (line.get("of_base"), ".3f")
            rows.append([name, *(cell(value, form) for value, form in figures)])
    if not rows:
        return ""
    return (
        "\nWrites of bfloat16 tokens to quantised caches, 8 KV heads of 128, pages of 16. Scales "
        "of a token and head are computed in the kernel that writes. Bytes are those of the rows "
        "read, of codes and scales written:\n"
    ) + table("device us, GB/s, of the copy ceiling, of bfloat16", rows)


def load(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / name).read_text())


def accuracy_table(found: dict[str, Any]) -> str:
    """Write the errors by kind of cache and distribution."""
    errors = found["error"]
    rows = [
        [
            kind,
            f"{size:.3f}".rstrip("0").rstrip("."),
            *(percent(own[kind]) for own in errors.values()),
        ]
        for kind, size in found["bytes"].items()
    ]
    return table(", ".join(["bytes a value", *errors]), rows)


def percent(share: float) -> str:
    """Round to two significant digits."""
    return f"{float(f'{100 * share:.2g}'):g} %"


def model_table(found: dict[str, Any]) -> str:
    """Write what each kind of cache changes of what a model expects."""
    rows = [
        [
            kind,
            f"{own['bytes']:.3f}".rstrip("0").rstrip("."),
            f"{own['agreement']:.1%}".replace("%", " %"),
            f"{own['change']:+.4f} ± {own['standard_error']:.4f}",
        ]
        for kind, own in found["kinds"].items()
    ]
    return table("bytes a value, same first choice, change of log-likelihood a token", rows)


def sections() -> dict[str, str]:
    """Return what `docs/quantised.md` has between the marks of each name."""
    accuracy, model = load(ACCURACY), load(MODEL)
    return {
        "accuracy": made_by(accuracy) + accuracy_table(accuracy),
        "model": made_by(model)
        + f"The float32 cache has a log-likelihood of {model['log_likelihood']:.3f} a token over "
        f"{model['tokens']:,} tokens.\n" + model_table(model),
    }


def made_by(found: dict[str, Any]) -> str:
    return f"`{found['command']}` on a CPU, {found['date']}, jax {found['versions']['jax']}.\n"


def replaced(page: str, parts: dict[str, str]) -> str:
    """Put each part between its marks."""
    for name, text in parts.items():
        begin, end = f"<!-- {name}:begin -->\n", f"<!-- {name}:end -->\n"
        head, rest = page.split(begin)
        page = head + begin + text + end + rest.split(end)[1]
    return page


def plot(plt: Any, found: dict[str, Any]) -> Any:
    """Draw how often a cache changes the model's first choice, and what its text loses."""
    kinds: dict[str, dict[str, float]] = found["kinds"]
    labels = [f"{kind} ({own['bytes']:.2f} B)" for kind, own in kinds.items()]
    changed = [100 * (1 - own["agreement"]) for own in kinds.values()]
    lost = [-own["change"] for own in kinds.values()]
    errors = [2 * own["standard_error"] for own in kinds.values()]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
    bars(left, labels, changed, None, "% of first choices that are others")
    bars(right, labels, lost, errors, "nats of log-likelihood lost a token, ± 2 standard errors")
    left.invert_yaxis()
    figure.suptitle(f"SmolLM2-135M over {found['tokens']:,} tokens, against a float32 cache")
    return figure


def bars(
    axes: Any, labels: list[str], values: Iterable[float], errors: list[float] | None, title: str
) -> None:
    axes.barh(labels, list(values), xerr=errors, height=0.6)
    axes.set_xlabel(title)
    axes.grid(axis="x", alpha=0.3)
