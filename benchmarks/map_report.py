"""The plot and the table of the map in `docs/performance.md`."""

from typing import NamedTuple

import workloads

LARGE = 2**28  # bytes; from here on the time should be that of reading
WANTED, LATENT_WANTED = 0.9, 0.75


class Place(NamedTuple):
    """A batch of the map, and its share of the rate that bounds it."""

    workload: workloads.Workload
    share: float

    @property
    def wanted(self) -> float:
        """Of batches that read much."""
        return LATENT_WANTED if by_floor(self.workload) else WANTED


def by_floor(workload) -> bool:
    """Products of so many query heads with one KV head take about as long as reading it."""
    return workload.latent and workload.num_heads > 64


def places(lines) -> list[Place]:
    """Return what was measured of the map."""
    found = [(w, lines.get((w.name, "ejk"), {})) for w in workloads.MAP]
    return [
        Place(w, line["of_floor" if by_floor(w) else "of_ceiling"])
        for w, line in found
        if "device_us" in line
    ]


def worst_table(lines, most: int | None = None) -> str:
    """Write the batches of the map that read much and fall short of what they should reach.

    Of these, at most so many: the worst.
    """
    large = [place for place in places(lines) if place.workload.kv_bytes > LARGE]
    if not large:
        return ""
    worst = sorted((p for p in large if p.share < p.wanted), key=lambda place: place.share)
    text = (
        f"\nOf {len(large)} batches of the map that read more than 256 MiB, {len(worst)} are below "
        f"{WANTED:.0%} of the read ceiling (latent attention of more than 64 heads: below "
        f"{LATENT_WANTED:.0%} of the larger of two floors, its bytes and its products)"
    )
    if not worst:
        return text + ".\n"
    text += (f". The {most} worst" if most and len(worst) > most else "") + ":\n\n"
    text += "| heads/KV heads/dim, contexts | device, us | GB/s | share |\n|---|---|---|---|\n"
    for workload, share in worst[:most]:
        line = lines[workload.name, "ejk"]
        text += f"| {workload.name.removeprefix('map ')} | {line['device_us']:.1f} |"
        text += f" {line['gb_per_s']:,.0f} | {share:.1%} |\n"
    return text


def file_name(device: str) -> str:
    return f"performance_map_{device.replace(' ', '_')}.svg"


def section(device: str, lines) -> str:
    """Write the plot's place on the page, and the worst places."""
    if not places(lines):
        return ""
    title = f"Share of the read ceiling over the map on one {device}"
    return f"\n![{title}]({file_name(device)})\n" + worst_table(lines, most=12)


def plot(plt, device: str, lines):
    """Draw each batch's share over its size: a panel a head dimension, a line a number of heads."""
    panels: dict[str, dict[str, list[Place]]] = {}
    for place in places(lines):
        w = place.workload
        if len({*w.context_lens}) > 1:
            continue
        panel = "latent, 576 and 512" if w.latent else f"head dimension {w.head_dim}"
        kv_heads = "1 KV head" if w.num_kv_heads == 1 else f"{w.num_kv_heads} KV heads"
        line = f"{w.num_heads} query heads" if w.latent else kv_heads
        panels.setdefault(panel, {}).setdefault(line, []).append(place)
    figure, grid = plt.subplots(
        2, 2, figsize=(10, 7), sharex=True, sharey=True, layout="constrained", squeeze=False
    )
    for axes, (title, of_panel) in zip(grid.flat, panels.items()):
        for i, (label, found) in enumerate(of_panel.items()):
            color = plt.get_cmap("viridis")(i / len(of_panel))
            for large in (False, True):  # hollow: too small to be bound by reading
                own = [p for p in found if (p.workload.kv_bytes > LARGE) == large]
                axes.plot(
                    [p.workload.num_seqs for p in own],
                    [100 * p.share for p in own],
                    "o",
                    color=color,
                    fillstyle="full" if large else "none",
                    markersize=4,
                )
            seqs, shares = zip(*((p.workload.num_seqs, 100 * p.share) for p in found))
            axes.plot(seqs, shares, color=color, linewidth=0.8, label=label)
        axes.axhline(100 * WANTED, color="gray", linewidth=0.5, linestyle="--")
        axes.set_title(title, fontsize=10)
        axes.set_xscale("log")
        axes.legend(fontsize=7, loc="lower right")
    for axes in grid[-1]:
        axes.set_xlabel("sequences in the batch")
        axes.set_xticks([1, 3, 10, 30, 100, 200], ["1", "3", "10", "30", "100", "200"])
    for axes in grid[:, 0]:
        axes.set_ylabel("% of the fastest possible reading")
        axes.set_ylim(0, 104)
    figure.suptitle(f"Decode attention on one {device}; hollow: at most 256 MiB of keys and values")
    return figure
