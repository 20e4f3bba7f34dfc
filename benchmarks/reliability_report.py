"""Writes the figures of `docs/reliability.md` from `results/`.

    python benchmarks/reliability_report.py            writes them
    python benchmarks/reliability_report.py --bugs     and the table of seeded bugs: a minute
    python benchmarks/reliability_report.py --check    fails if the page is not what the results say

Of each device and part of `reliability_*.jsonl` the newest line counts.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from quantised_report import replaced

ROOT = Path(__file__).parents[1]
PAGE, RESULTS = ROOT / "docs" / "reliability.md", ROOT / "benchmarks" / "results"
PARTS = {
    "kernels": "tests of the real kernels",
    "fuzz": "drawn calls and compositions",
    "hostile": "hostile integers",
    "bugs": "seeded bugs",
    "repeats": "the same call again",
    "soak": "random steps of serving",
    "replay": "command buffers",
    "memory": "memory runs out",
    "sanitizer": "compute-sanitizer",
}
ON_A_GPU = [part for part in PARTS if part != "bugs"]
ON_A_CPU = [part for part in PARTS if part not in ("kernels", "sanitizer")]
Line = dict[str, Any]


def load() -> dict[str, dict[str, Line]]:
    """Read the newest line of each part of each device."""
    found: dict[str, dict[str, Line]] = {}
    for path in sorted(RESULTS.glob("reliability_*.jsonl")):
        for line in map(json.loads, path.read_text().splitlines()):
            found.setdefault(line["device"], {})[line["part"]] = line
    return found


def more(line: Line) -> list[str]:
    """Say what a line holds beside its counts."""
    said: list[str] = []
    if line.get("gpus", 1) > 1:
        said.append(f"on {line['gpus']} GPUs")
    if "buffers" in line and line["platform"] == "cpu":
        said.append("a CPU has no such buffers: two processes, the same bits")
    for way, buffers in line.get("buffers", {}).items():
        if line["platform"] == "gpu":
            said.append(
                f"with command buffers {way}: {buffers['recorded']} in the program, "
                f"{buffers['launched']} launched in 3 steps"
            )
    if memory := line.get("memory"):
        name = "bytes_in_use" if "bytes_in_use" in memory["at the end"] else "arrays"
        first, last = (of[name] / 2**20 for of in memory.values())
        said.append(f"{first:,.1f} MiB in use after a fifth of the time, {last:,.1f} at the end")
    errors = line.get("errors", {})
    said += [f"{name} {error}" for name, error in errors.items() if name.startswith("the ")]
    kinds = {error.split(":")[0] for error in errors.values() if ":" in error}
    said += [f"raised: {' and '.join(sorted(kinds))}, with RESOURCE_EXHAUSTED"] if kinds else []
    if others := line.get("others"):
        said.append(f"told of XLA's own {', '.join(sorted(others))}")
    return said


def row(part: str, line: Line) -> str:
    """Write what a part has shown."""
    if "missing" in line:
        return f"| {PARTS[part]} | not run: {line['missing']} | | |\n"
    counts = [f"{count:,} {name}" for name, count in line["counts"].items()]
    found = line["found"]
    shown = "; ".join([", ".join(counts), *more(line)])
    said = (x.partition(" python -m ejk repro ")[0][:200] for x in found[:1])  # results have it all
    first = "".join(f": {x}".replace("|", "/").replace("\n", " ") for x in said)
    failures = f"**{len(found)}**{first}" if found else "none"
    return f"| {PARTS[part]} | {shown} | {failures} | {line['seconds']:,.0f} |\n"


def table(device: str, lines: dict[str, Line]) -> str:
    """Write what a device has shown."""
    newest = max(lines.values(), key=lambda line: line["date"])
    parts = ON_A_GPU if newest["platform"] == "gpu" else ON_A_CPU
    commands = dict.fromkeys(f"`{lines[part]['command']}`" for part in parts if part in lines)
    versions = ", ".join(f"{name} {version}" for name, version in newest["versions"].items())
    dates = sorted({line["date"] for line in lines.values()})
    when = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    text = (
        f"**{device}**, {newest['cores']} cores, {when}, with {versions}. By "
        f"{', '.join(commands)}:\n\n| what | counts | failures | seconds |\n|---|---|---|---|\n"
    )
    for part in parts:
        text += row(part, lines[part]) if part in lines else ""
    missing = [PARTS[part] for part in parts if part not in lines]
    return text + f"\nNot run yet there: {', '.join(missing)}.\n" * bool(missing)


def figures() -> str:
    """Write the tables of all devices; of a GPU, also where there was none."""
    found = load()
    tables = [table(device, lines) for device, lines in found.items()]
    gpus = [x for x in found.values() if any(line["platform"] == "gpu" for line in x.values())]
    if not gpus:
        names = ", ".join(PARTS[part] for part in ON_A_GPU)
        tables.append(f"Not run yet on a GPU: {names}.\n")
    return "\n".join(tables)


def trainer() -> str:
    """Write how far the log-probabilities of a prefill and of a decode are apart."""
    paths = sorted(RESULTS.glob("trainer_sampler*.json"), key=lambda path: len(path.name))
    return "\n".join(map(_of_machine, paths))


def _of_machine(path: Path) -> str:
    found = json.loads(path.read_text())
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    seqs, tokens = found["tokens"]
    text = (
        f"{found['machine']}, {found['date']}, with {versions}; {seqs} sequences of {tokens} "
        f"tokens. By `{found['command']}`:\n\n"
        "| numbers | cache | `ejk`, largest | mean | bound | dense, largest | trainer, largest |\n"
        "|---|---|---|---|---|---|---|\n"
    )
    for line in found["differences"]:
        own, dense, read = (line[name] for name in ("ejk", "dense", "trainer"))
        numbers = own["largest"], own["mean"], line["bound"], dense["largest"], read["largest"]
        cells = " | ".join(f"{number:.4g}" for number in numbers)
        text += f"| {line['dtype']} | {line['cache']} | {cells} |\n"
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--bugs", action="store_true", help="collect the seeded bugs, too")
    args = parser.parse_args()
    parts = {"figures": figures(), "trainer": trainer()}
    if args.bugs:
        command = [sys.executable, str(ROOT / "tests" / "faults.py")]
        parts["bugs"] = subprocess.run(
            command, check=True, capture_output=True, text=True
        ).stdout.rstrip("\n") + "\n"  # fmt: skip
    old = PAGE.read_text()
    new = replaced(old, parts)
    if args.check and new != old:
        sys.exit("docs/reliability.md is stale: python benchmarks/reliability_report.py --bugs")
    if not args.check:
        PAGE.write_text(new)


if __name__ == "__main__":
    main()
