"""The plots of `docs/performance.md` and the README, from the lines of `decode.py` and `ragged.py`.

Their labels are for people who know neither the names of the workloads nor the code.
"""

from collections.abc import Sequence

import ragged_report
from workloads import Workload

CONTENDERS = {  # of each: its label and its colour
    "ejk": ("ejk", "#1f5fbf"),
    "cuDNN dense, contiguous cache": ("cuDNN on a contiguous cache, no pages", "#9aa3ad"),
    "cuDNN paged (private)": ("cuDNN on pages", "#5c6670"),
    "Pallas GPU paged_attention": ("JAX's own paged kernel for GPUs", "#d9822b"),
    "gather and einsum": ("plain JAX: gather the pages, then einsum", "#e3bd8c"),
    "ejk xla": ("ejk without a kernel: its XLA program", "#a9c4ec"),
}
PREFILLS = {
    ragged_report.MOSAIC: ("ejk on pages, Mosaic GPU kernel", "#1f5fbf"),
    ragged_report.TRITON: ("ejk on pages, Triton kernel", "#a9c4ec"),
    ragged_report.DENSE: ("cuDNN on contiguous tensors, no pages", "#9aa3ad"),
}


def what(seqs: int, lens: Sequence[int]) -> str:
    shortest, longest = min(lens), max(lens)
    tokens = f"{longest:,}" if shortest == longest else f"{shortest:,} to {longest:,}"
    return f"1 sequence of {tokens} tokens" if seqs == 1 else f"{seqs} sequences of {tokens} tokens"


def heads(batch) -> str:
    return f"{batch.num_heads} query, {batch.num_kv_heads} KV heads of {batch.head_dim}"


def bars(plt, groups: Sequence[str], series: dict[tuple[str, str], list[float | None]]):
    """Draw groups of horizontal bars, the first on top; of each series its label and its colour."""
    figure, axes = plt.subplots(
        figsize=(8, 0.8 + 0.17 * len(groups) * (len(series) + 1.5)), layout="constrained"
    )
    height = 1 / (len(series) + 1.5)
    for i, ((label, color), values) in enumerate(series.items()):
        places = [group + (i - (len(series) - 1) / 2) * height for group in range(len(groups))]
        found = [(place, value) for place, value in zip(places, values) if value]
        axes.barh(*zip(*found), height, label=label, color=color)
        for place, value in found:
            axes.text(value + 0.5, place, f"{value:.0f}", va="center", fontsize=7)
    axes.set_yticks(range(len(groups)), groups, fontsize=8)
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(fontsize=8, ncols=2, loc="outside lower center", frameon=False)
    return figure, axes


def decode(plt, device: str, lines, workloads: Sequence[Workload]):
    """Draw how near to the memory's limit each contender is."""
    found = [w for w in workloads if (w.name, "ejk") in lines]
    groups = [
        f"{what(w.num_seqs, w.context_lens)}\n{heads(w)}, pages of {w.page_size}" for w in found
    ]
    series = {
        contender: [lines.get((w.name, name), {}).get("of_ceiling") for w in found]
        for name, contender in CONTENDERS.items()
    }
    percent = {
        contender: [share and 100 * share for share in shares]
        for contender, shares in series.items()
        if any(shares)
    }
    figure, axes = bars(plt, groups, percent)
    axes.set_xlim(0, 105)
    axes.set_xlabel("% of the fastest possible reading of these keys and values", fontsize=9)
    figure.suptitle(f"Attention of one decoding step on one {device}", fontsize=11)
    return figure


def prefills(plt, device: str, lines):
    """Draw how many products a second prompts are read with."""
    found = ragged_report.dense_batches(lines)
    groups = []
    for b in found:
        pages = b.name.rsplit(", ", 1)[1].replace("page ", "pages of ")
        groups.append(f"{what(len(b.q_lens), b.q_lens)}\n{heads(b)}, {pages}")
    series = {
        contender: [ragged_report.figure(lines, b.name, name, "tflops") for b in found]
        for name, contender in PREFILLS.items()
    }
    figure, axes = bars(plt, groups, series)
    axes.set_xlabel("TFLOP/s; products that the causal mask hides do not count", fontsize=9)
    figure.suptitle(f"Reading whole prompts on one {device}", fontsize=11)
    return figure
