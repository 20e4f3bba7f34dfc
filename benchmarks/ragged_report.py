"""The tables of `docs/performance.md` about ragged batches, from the lines of `ragged.py`."""

from collections.abc import Iterable
from typing import Any

import ragged_batches
import workloads
from ragged_batches import Batch

MOSAIC, TRITON, DENSE = "ejk mosaic_gpu", "ejk triton", "cuDNN dense, contiguous"
OURS = (MOSAIC, TRITON)

Lines = dict[tuple[str, str], dict[str, Any]]


def section(lines: Lines) -> str:
    return (
        dense_table(lines)
        + behind(lines)
        + rate_table(lines)
        + against_parts_table(lines)
        + drafts_table(lines)
        + options_table(lines)
        + layers_table(lines)
    )


def timed(lines: Lines, suites: Iterable[str]) -> list[Batch]:
    """Return the batches of suites that one of our backends ran."""
    batches = {b.name: b for suite in suites for b in ragged_batches.SUITES[suite]}
    return [b for b in batches.values() if any(figure(lines, b.name, c) for c in OURS)]


def figure(lines: Lines, name: str, contender: str, what: str = "device_us") -> float | None:
    line = lines.get((name, contender))
    if line is None and contender == TRITON:
        line = lines.get((name, "ejk"))  # from before the backends had names of their own
    return (line or {}).get(what)


def cell(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def table(head: str, rows: Iterable[Iterable[str]]) -> str:
    columns = head.split(", ")
    text = "\n| | " + " | ".join(columns) + " |\n|---|" + "---|" * len(columns) + "\n"
    return text + "".join(f"| {' | '.join(row)} |\n" for row in rows)


def heads(batch: Batch) -> str:
    return f"{batch.num_heads}/{batch.num_kv_heads}/{batch.head_dim}"


def dense_table(lines: Lines) -> str:
    """Write whole prefills beside cuDNN's dense attention of the same turns."""
    found = dense_batches(lines)
    if not found:
        return ""
    rates = [figure(lines, b.name, c, "matmul_tflops") for b in found for c in OURS]
    product = max(rate for rate in rates if rate)
    rows = []
    for b in found:
        row = [b.name.removeprefix("prefill ").replace(f", {heads(b)}", ""), heads(b)]
        row.append(cell(figure(lines, b.name, MOSAIC), ",.0f"))
        for contender in OURS:
            row.append(cell(figure(lines, b.name, contender, "tflops"), ".0f"))
            row.append(cell(figure(lines, b.name, contender, "of_cudnn"), ".3f"))
        rows.append([*row, cell(figure(lines, b.name, DENSE, "tflops"), ".0f")])
    return (
        "\nPrefills, causal, bfloat16: TFLOP/s, and what they are of cuDNN's dense attention to "
        "contiguous tensors of the same shape, which took turns with them. A product of two "
        f"matrices of 8,192 x 8,192 ran at up to {product:.0f} TFLOP/s in the same run:\n"
    ) + table(
        "heads/KV heads/dim, `mosaic_gpu` us, TFLOP/s, of cuDNN, `triton` TFLOP/s, of cuDNN, "
        "cuDNN TFLOP/s",
        rows,
    )


def dense_batches(lines: Lines) -> list[Batch]:
    """Return whole prefills of equal prompts."""
    found = timed(lines, ("prefill", "long", "shapes", "small"))
    return [b for b in found if len({*b.q_lens, *b.context_lens}) == 1]


def behind(lines: Lines) -> str:
    """Say where `mosaic_gpu` is behind cuDNN."""
    found = dense_batches(lines)
    shares = {b.name: figure(lines, b.name, MOSAIC, "of_cudnn") for b in found}
    if not any(shares.values()):
        return ""
    text = "".join(
        f"- {name.removeprefix('prefill ')}: {share:.1%} of cuDNN's rate.\n"
        for name, share in shares.items()
        if share and share < 1
    )
    return "\nWhere `mosaic_gpu` is behind cuDNN:\n\n" + (text or "- nowhere in this table.\n")


def rate_table(lines: Lines) -> str:
    """Write the rate of what no dense call does."""
    rows = []
    for b in timed(lines, ("chunks", "small")):
        if len({*b.q_lens, *b.context_lens}) == 1:
            continue  # in the table above
        row = [b.name]
        for contender in OURS:
            row.append(cell(figure(lines, b.name, contender), ",.0f"))
            row.append(cell(figure(lines, b.name, contender, "tflops"), ".0f"))
        rows.append([*row, of_plain_rate(lines, b)])
    if not rows:
        return ""
    return (
        "\nChunks of long prompts, and 24 prompts of 32,768 tokens in all: the shortest has 108, "
        "the longest 4,324. The last column is `mosaic_gpu`'s rate over that of 8 x 4,096 in the "
        "same turns:\n"
    ) + table("`mosaic_gpu` us, TFLOP/s, `triton` us, TFLOP/s, of 8 x 4,096", rows)


def base_of(batch: Batch) -> Batch:
    """Return the plain call that a batch took turns with."""
    [base] = {b for b in ragged_batches.BATCHES if b.name == batch.base}
    return base


def of_plain_rate(lines: Lines, batch: Batch) -> str:
    base_us = figure(lines, batch.name, MOSAIC, "base_us")
    ours_us = figure(lines, batch.name, MOSAIC)
    if not base_us or not ours_us:
        return "-"
    base = base_of(batch)
    return f"{batch.flops / ours_us / (base.flops / base_us):.2f}"


def against_parts_table(lines: Lines) -> str:
    """Write what one call costs against its parts, or a draft against its decode, alone."""

    def best(name: str) -> float | None:
        times = [own.get("device_us") for (w, _), own in lines.items() if w == name]
        return min((time for time in times if time), default=None)

    parts = {f"mixed, page {p}": [f"mixed: its {x}, page {p}" for x in ("chunks", "decodes")]
             for p in (16, 64)}  # fmt: skip
    parts |= {
        f"verification of 8 on 8,192, page {p}": [f"verification: its decode, page {p}"]
        for p in (16, 64)
    }
    parts |= {f"{w.name}: verification of 4": [w.name] for w in workloads.LATENT}
    rows = []
    for name, own in parts.items():
        times = [figure(lines, name, contender) for contender in OURS]
        alone = [us for us in map(best, own) if us]
        if any(times) and len(alone) == len(own):
            ratio = min(us for us in times if us) / sum(alone)
            rows.append([name, *(cell(us, ",.1f") for us in times)])
            rows[-1] += [" + ".join(f"{us:,.1f}" for us in alone), f"{ratio:.2f}"]
    if not rows:
        return ""
    return (
        "\nFour chunks of 512 tokens on 4,096 and 60 decodes at 4,096 in one call, against each "
        "part in the best call for it; 8 drafted tokens of 32 sequences on 8,192 against the "
        "decode of one; and, in latent attention, 4 of 64 sequences on 4,096:\n"
    ) + table("`mosaic_gpu` us, `triton` us, alone us, best over alone", rows)


def drafts_table(lines: Lines) -> str:
    """Write how long each of our backends takes for drafts, and in latent attention for chunks."""
    rows = []
    for b in timed(lines, ("drafts", "latent")):
        times = [figure(lines, b.name, contender) for contender in OURS]
        if max(b.q_lens) == 1 or None in times:
            continue
        rows_each = max(b.q_lens) * b.num_heads // b.num_kv_heads
        ratio = f"{times[1] / times[0]:.3f}"
        name = b.name.replace(f", {heads(b)}", "")
        rows.append([name, heads(b), str(rows_each), *(cell(us, ",.1f") for us in times), ratio])
    if not rows:
        return ""
    return (
        "\nDrafts: new tokens of each sequence on its context; and in latent attention chunks of "
        "prompts, too. `rows` counts the most new tokens of a sequence times the heads of a group, "
        "`ratio` is the time of `triton` over that of `mosaic_gpu`:\n"
    ) + table("heads/KV heads/dim, rows, `mosaic_gpu` us, `triton` us, ratio", rows)


def options_table(lines: Lines) -> str:
    """Write what options cost; of a window, each block of keys that it leaves."""
    rows = []
    for b in timed(lines, ("options", "window")):
        if b.base is None:
            continue
        blocks = b.num_blocks() / base_of(b).num_blocks()
        row = [b.name.removeprefix("prefill "), f"{blocks:.3f}"]
        for contender in OURS:
            ours_us = figure(lines, b.name, contender)
            base_us = figure(lines, b.name, contender, "base_us")
            row.append(cell(ours_us, ",.0f"))
            row.append(f"{ours_us / base_us / blocks:.3f}" if ours_us and base_us else "-")
        rows.append(row)
    if not rows:
        return ""
    return (
        "\nOptions, against the plain call of the same turns. `blocks` is how many blocks of keys "
        "the call has to see over those of the plain one; `cost` is its time over the plain "
        "call's, for each of these blocks:\n"
    ) + table("blocks, `mosaic_gpu` us, cost, `triton` us, cost", rows)


def layers_table(lines: Lines) -> str:
    """Write the wall time of a layer, beside the device time of a call."""
    rows = []
    for b in ragged_batches.BATCHES:
        walls = [figure(lines, f"{b.name}: layers", c, "wall_us_per_layer") for c in OURS]
        if any(walls):
            times = [figure(lines, b.name, c) for c in OURS]
            pairs = zip(times, walls)
            rows.append([b.name, *(cell(us, ",.1f") for pair in pairs for us in pair)])
    if not rows:
        return ""
    return (
        "\nThe wall time a layer of a program of 32 chained calls over one pool, with the query "
        "donated and all inside that a step makes once, beside the device time of a call:\n"
    ) + table("`mosaic_gpu` us, wall us a layer, `triton` us, wall us a layer", rows)
