"""Writes the table of `docs/paging.md` from `benchmarks/results/paging_*.jsonl`.

    python docs/paging_table.py            writes it
    python docs/paging_table.py --check    fails if the page is not what the results say

Of each processor and workload the newest line counts.
"""

import json
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "paging.md"
RESULTS = ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- paging:begin -->\n", "<!-- paging:end -->\n"


def table(lines: dict[str, dict]) -> str:
    """Write the table of one processor."""
    newest = max(lines.values(), key=lambda line: line["date"])
    versions = " and ".join(f"{name} {version}" for name, version in newest["versions"].items())
    text = (
        f"Measured on {newest['date']} with {versions}, on a core of {newest['cores']} of an "
        f"{newest['device']}, while other programs ran (load {newest['load']}).\n\n"
        "| what | median, us | of a core, us | its 99th percentile, us |\n|---|---|---|---|\n"
    )
    for workload, line in lines.items():
        times = (line["median_us"], line["cpu_us"], line["cpu_p99_us"])
        text += f"| {workload} | {' | '.join(f'{time:,.0f}' for time in times)} |\n"
    return text


def generate() -> str:
    """Return the page with the tables of all processors."""
    found: dict[str, dict[str, dict]] = {}
    for path in sorted(RESULTS.glob("paging_*.jsonl")):
        for line in map(json.loads, path.read_text().splitlines()):
            found.setdefault(line["device"], {})[line["workload"]] = line
    before, rest = PAGE.read_text(encoding="utf-8").split(BEGIN)
    after = rest.split(END)[1]
    return before + BEGIN + "\n".join(map(table, found.values())) + END + after


def main(arguments: list[str]) -> None:
    page = generate()
    if "--check" not in arguments:
        PAGE.write_text(page, encoding="utf-8")
    elif PAGE.read_text(encoding="utf-8") != page:
        raise SystemExit("docs/paging.md is stale: run `python docs/paging_table.py`")


if __name__ == "__main__":
    main(sys.argv[1:])
