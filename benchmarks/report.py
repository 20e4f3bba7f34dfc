"""Writes the tables and plots of `docs/performance.md` and `docs/quantised.md` from `results/`.

    python benchmarks/report.py            writes them
    python benchmarks/report.py --check    fails if a page is not what the results say

Of each workload and contender the newest line counts.
"""

import argparse
import json
import sys
from pathlib import Path

import map_report
import plots
import prefix_report
import quantised_report
import ragged_report
import workloads

ROOT = Path(__file__).parent.parent
PAGE, QUANTISED = (ROOT / "docs" / f"{name}.md" for name in ("performance", "quantised"))
OTHERS = (
    "tune_",
    "compare_",
    "first_call_",
    "plan_cost_",
    "paging_",
    "reliability_",
)  # no lines of the tables
WITHOUT = "ejk without a plan"


def load() -> dict[str, dict[tuple[str, str], dict]]:
    """Read the newest line of each device, workload and contender."""
    found: dict[str, dict[tuple[str, str], dict]] = {}
    for path in sorted((ROOT / "benchmarks" / "results").glob("*.jsonl")):
        if path.name.startswith(OTHERS):
            continue
        for line in map(json.loads, path.read_text().splitlines()):
            of_device = found.setdefault(line["device"], {})
            of_device[line["workload"], line["contender"]] = line
    return found


def names(lines, suite) -> list[str]:
    return [w.name for w in workloads.SUITES[suite] if (w.name, "ejk") in lines]


def contenders_of(lines, found) -> list[str]:
    """Return who was timed on the workloads `found`; `ejk` without a plan has its own table."""
    return list(dict.fromkeys(c for (w, c) in lines if w in found and c != WITHOUT))


def page(device: str, lines: dict) -> str:
    """Write what one device has shown."""
    ours = [line for (_, contender), line in lines.items() if contender == "ejk"]
    newest = max(ours or lines.values(), key=lambda line: line["date"])
    versions = ", ".join(f"{name} {version}" for name, version in newest["versions"].items())
    first, last = (of(line["date"] for line in lines.values()) for of in (min, max))
    when = f"on {last}" if first == last else f"from {first} to {last}, the newest"
    text = f"### {device}\n\nMeasured {when} with {versions}.\n"
    for title, tables in {
        "Decode": (named_table(lines) + losses(lines)) * bool(ours)
        + own_table(lines, "shapes", "Shapes that nobody tunes for")
        + own_table(lines, "options", "Options")
        + own_table(lines, "order", "Random order of pages, and their size")
        + own_table(lines, "waves", "Few more programs than multiprocessors, and unequal lengths")
        + small_table(lines),
        "Decode over the map": map_report.section(device, lines),
        "Latent attention": latent_table(lines),
        "Prefills, chunks, mixed batches and drafts": ragged_report.section(lines),
        "Gradients": gradients_table(lines),
        "Writes": write_table(lines),
        "Copies": copy_table(lines),
        "Shared prefixes": prefix_report.section(lines),
        "Quantised caches": quantised_report.section(lines),
        "The loop over layers": loop_table(lines),
        "Several GPUs": scaling_table(lines),
    }.items():
        text += f"\n#### {title}\n{tables}" if tables else ""
    return text


def describe(workload) -> str:
    w = workload
    lens = set(w.context_lens)
    context = f"{w.num_seqs} x {min(lens):,}" + ("" if len(lens) == 1 else f" to {max(lens):,}")
    return f"{w.num_heads}/{w.num_kv_heads}/{w.head_dim}; {context}; page {w.page_size}"


def named_table(lines) -> str:
    found = names(lines, "named")
    contenders = contenders_of(lines, found)
    shapes = {w.name: describe(w) for w in workloads.NAMED}
    bold = "; the best of each row is bold" * (len(contenders) > 1)
    text = f"\nDevice time of one layer's attention in microseconds{bold}.\n\n"
    text += "| | heads/KV heads/dim; contexts | " + " | ".join(contenders) + " |\n"
    text += "|---|---|" + "---|" * len(contenders) + "\n"
    for name in found:
        times = {c: lines.get((name, c), {}).get("device_us") for c in contenders}
        given = [time for time in times.values() if time]
        best = min(given) if len(given) > 1 else None
        cells = [
            "-" if not time else f"**{time:.1f}**" if time == best else f"{time:.1f}"
            for time in times.values()
        ]
        text += f"| {name} | {shapes[name]} | " + " | ".join(cells) + " |\n"
    text += "\n`ejk` in full; the plan is made once a step, for all layers:\n\n"
    text += "| | GB/s | of the read ceiling | plan, us | wall a layer of 32, us |\n"
    text += "|---|---|---|---|---|\n"
    for name in found:
        line = lines[name, "ejk"]
        plan = line["plan_us"] or "-"
        text += f"| {name} | {line['gb_per_s']:,.0f} | {line['of_ceiling']:.1%} | {plan} |"
        text += f" {line['wall_us_per_layer']} |\n"
    return text


def losses(lines) -> str:
    """Say where `ejk` is not first, if anything else was measured beside it."""
    text, found = "", names(lines, "named")
    if len(contenders_of(lines, found)) == 1:
        return ""
    for name in found:
        ours = lines[name, "ejk"]["device_us"]
        for (workload, contender), line in lines.items():
            if workload == name and line.get("device_us", ours) < ours:
                text += f"- {name}: {contender} takes {line['device_us']:.1f} us, "
                text += f"`ejk` {ours:.1f} ({ours / line['device_us'] - 1:.1%} more).\n"
    return "\nWhere `ejk` is not first:\n\n" + (text or "- nowhere in this table.\n")


def own_table(lines, suite, title) -> str:
    found = [n for n in names(lines, suite) if "device_us" in lines[n, "ejk"]]
    if not found:
        return ""
    text = f"\n{title}:\n\n| | device, us | GB/s | of the read ceiling |\n|---|---|---|---|\n"
    for name in found:
        line = lines[name, "ejk"]
        text += f"| {name} | {line['device_us']:.1f} | {line['gb_per_s']:,.0f} |"
        text += f" {line['of_ceiling']:.1%} |\n"
    return text


def small_table(lines) -> str:
    """Write what a layer costs where launches are most of it."""
    found = [n for n in names(lines, "small") if "wall_us_per_layer" in lines[n, "ejk"]]
    if len(found) < 2:  # one of them is a workload of the first table, too
        return ""
    ways = [way for way in ("ejk", WITHOUT) if (found[-1], way) in lines]
    text = "\nSmall batches, 32/8/128: the wall time of a layer of 32 in microseconds:\n\n"
    text += "| | " + " | ".join(found) + " |\n|---|" + "---|" * len(found) + "\n"
    for way in ways:
        cells = (lines.get((name, way), {}).get("wall_us_per_layer", "-") for name in found)
        text += f"| {way} | " + " | ".join(map(str, cells)) + " |\n"
    return text


def latent_table(lines) -> str:
    """Write what latent attention reaches of the larger of its floors."""
    found = [n for n in names(lines, "latent") if "of_floor" in lines[n, "ejk"]]
    if not found:
        return ""
    rate = lines[found[0], "ejk"]["matmul_tflops"]
    text = (
        "\nLatent attention, 64 x 4,096, page 64: keys of 576, whose first 512 entries are the "
        "values. The floor is the larger of two times: of its bytes at the read ceiling, and of "
        f"its products at the {rate:.0f} TFLOP/s of a large product:\n\n"
        "| query heads | device, us | GB/s | TFLOP/s | of the floor |\n|---|---|---|---|---|\n"
    )
    for workload in workloads.LATENT:
        if workload.name in found:
            line = lines[workload.name, "ejk"]
            text += f"| {workload.num_heads} | {line['device_us']:.1f} | {line['gb_per_s']:,.0f} |"
            text += f" {line['tflops']:.0f} | {line['of_floor']:.1%} |\n"
    return text


def loop_table(lines) -> str:
    """Write what a layer costs for each way to write the loop."""
    batches = list(dict.fromkeys(w for w, _ in lines if w.startswith("loop, ")))
    ways = list(dict.fromkeys(way for w, way in lines if w in batches))
    if not batches:
        return ""
    text = "\nWall time of a layer in microseconds, for each way to write the loop over 32:\n\n"
    text += "| | " + " | ".join(name.removeprefix("loop, ") for name in batches) + " |\n"
    text += "|---|" + "---|" * len(batches) + "\n"
    for way in ways:
        cells = (f"{lines[name, way]['wall_us_per_layer']:.1f}" for name in batches)
        text += f"| {way} | " + " | ".join(cells) + " |\n"
    return text


def gradients_table(lines) -> str:
    """Write what gradients through pages take, beside those of dense attention."""
    found = {
        key: line
        for key, line in lines.items()
        if key[0].startswith("gradients ") and "failed" not in line
    }
    if not found:
        return ""
    text = (
        "\nGradients through pages, 32/8/128, bfloat16, all tokens new, beside those of dense "
        "causal attention. Each holds a forward pass; `wall` is by the clock, with what launches "
        "take:\n\n"
        "| | | gradients, us | wall, us | forward pass alone, us | of cuDNN's speed |\n"
        "|---|---|---|---|---|---|\n"
    )
    for (name, contender), line in found.items():
        cells = [f"{line[what]:,.0f}" for what in ("device_us", "wall_us", "forward_us")]
        cells.append(f"{line['of_cudnn']:.1%}" if "of_cudnn" in line else "-")
        text += f"| {name.removeprefix('gradients ')} | {contender} | {' | '.join(cells)} |\n"
    return text


def write_table(lines) -> str:
    """Write what `ejk.write_kv_cache` reaches of a copy."""
    found = [w for w, _ in lines if w.startswith("write ") and ": " not in w]
    if not found:
        return ""
    text = "\nWrites of new tokens, 8 KV heads of 128, bfloat16, pages of 16:\n\n"
    text += "| | device, us | GB/s | of the copy ceiling |\n|---|---|---|---|\n"
    for name in found:
        line = lines[name, "ejk"]
        text += f"| {name} | {line['device_us']:.2f} | {line['gb_per_s']:,.0f} |"
        text += f" {line['of_ceiling']:.1%} |\n"
    return text


def copy_table(lines) -> str:
    """Write what `ejk.copy_kv_slots` and `ejk.copy_kv_pages` reach of a plain copy."""
    found = [
        w
        for (w, contender), line in lines.items()
        if w.startswith("copy ") and contender == "ejk" and "of_ceiling" in line
    ]
    if not found:
        return ""
    text = "\nCopies inside of pools, 8 KV heads of 128, bfloat16, pages of 16:\n\n"
    text += "| | device, us | GB/s | of the copy ceiling | XLA, us |\n|---|---|---|---|---|\n"
    for name in found:
        line, xla = lines[name, "ejk"], lines.get((name, "xla"), {})
        text += f"| {name} | {line['device_us']:.2f} | {line['gb_per_s']:,.0f} |"
        text += f" {line['of_ceiling']:.1%} | {xla.get('device_us', '-')} |\n"
    return text


def scaling_table(lines) -> str:
    """Write what more devices of one host make of a call, and how fast they are linked."""

    def cell(value, form):
        return "-" if value is None else format(value, form)

    rows, links = "", []
    for (workload, contender), line in lines.items():
        if not workload.startswith("scaling ") or "wall_us" not in line:
            continue
        if workload == "scaling link":
            rate, wall_us = line.get("link_gb_per_s"), line["wall_us"]
            links.append(f"{contender} " + (f"{rate:,.0f} GB/s" if rate else f"{wall_us} us"))
            continue
        rows += f"| {workload.removeprefix('scaling ')} | {contender} |"
        for name in ("device_us", "speedup", "wall_us", "wall_speedup"):
            rows += f" {cell(line.get(name), ',.1f' if name.endswith('us') else '.2f')} |"
        rows += "\n"
    if not rows:
        return ""
    text = (
        "\nOne call split over the GPUs of one host, under plain `jit` (pages in `jax.shard_map`), "
        "64/8/128 and, of one sequence, 32/8/128, bfloat16. Device time is that of the busiest:\n\n"
        "| | split | device, us | times faster | wall, us | times faster |\n"
        "|---|---|---|---|---|---|\n"
    )
    link = f"\nBytes that a device receives a second, and a small merge: {', '.join(links)}.\n"
    return text + rows + (link if links else "")


def pyplot():
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "ejk"
    import matplotlib.pyplot as plt

    return plt


def save(figure, name: str) -> None:
    figure.savefig(ROOT / "docs" / name, metadata={"Date": None})
    pyplot().close(figure)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    devices = load()
    body = "\n".join(page(device, lines) for device, lines in devices.items())
    for path, parts in ((PAGE, {"results": body}), (QUANTISED, quantised_report.sections())):
        old = path.read_text()
        new = quantised_report.replaced(old, parts)
        if args.check and new != old:
            sys.exit(f"docs/{path.name} is stale: python benchmarks/report.py")
        path.write_text(new)
    if args.check:
        return
    # Of the device on which most of what they show ran; one of each map, and one of a model.
    named = {workload.name for workload in workloads.NAMED}
    device, lines = max(devices.items(), key=lambda item: sum(w in named for w, _ in item[1]))
    save(plots.decode(pyplot(), device, lines, workloads.NAMED), "performance.svg")
    few = [w for w in workloads.NAMED if w.name in ("W1a", "W3", "W6", "W8")]
    save(plots.decode(pyplot(), device, lines, few), "decode.svg")
    device, lines = max(devices.items(), key=lambda item: len(ragged_report.dense_batches(item[1])))
    save(plots.prefills(pyplot(), device, lines), "prefills.svg")
    for device, lines in devices.items():
        if map_report.places(lines):
            save(map_report.plot(pyplot(), device, lines), map_report.file_name(device))
    model = quantised_report.load(quantised_report.MODEL)
    save(quantised_report.plot(pyplot(), model), quantised_report.PLOT)


if __name__ == "__main__":
    main()
