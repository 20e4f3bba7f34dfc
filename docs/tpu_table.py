"""Write the tables of `docs/tpu.md` from `benchmarks/results/tpu_static.json`.

python docs/tpu_table.py            writes them
python docs/tpu_table.py --check    fails if the page is stale
"""

import argparse
import pathlib
import sys
from collections.abc import Callable

ROOT = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import tpu_kernels
import tpu_prices
from tpu_prices import CHIPS, Price

PAGE = pathlib.Path(__file__).with_name("tpu.md")
BEGIN, END = "<!-- tables:begin -->\n", "<!-- tables:end -->\n"


def generate(text: str) -> str:
    """Return the page with fresh tables."""
    head, rest = text.split(BEGIN)
    return head + BEGIN + tables(*tpu_prices.load()) + END + rest.split(END)[1]


def tables(facts: dict, prices: dict[tuple[str, str, str], Price]) -> str:
    versions = " and ".join(f"{name} {version}" for name, version in facts["versions"].items())
    parts = [f"Predicted on {facts['date']} with {versions}, by `{facts['command']}`."]
    parts += [workloads()]
    parts += ["### Share of the memory's bandwidth\n", of_chips(prices, share)]
    parts += ["### Time of the core over that of the memory\n", of_chips(prices, load)]
    parts += ["### Time on a quantised cache over that on bfloat16's\n", ratios(prices)]
    parts += ["### Bytes of keys and values for each executed bundle\n", of_chips(prices, density)]
    parts += ["### Useful products, of those that the matrix units could take\n"]
    parts += [of_chips(prices, useful, tpu_kernels.RAGGED_WORKLOADS)]
    parts += ["### Where `ejk` is not first\n", losses(prices)]
    parts += ["### The programs of `ejk`\n", programs(prices), "### Not priced\n", failures(prices)]
    return "\n".join(parts)


def workloads() -> str:
    rows = ["| workload | heads/KV heads/dim | contexts | page | |", "|---|---|---|---|---|"]
    for w in tpu_kernels.WORKLOADS.values():
        context = f"{w.num_seqs} x {w.context_lens[0]:,}"
        heads = f"{w.num_heads}/{w.num_kv_heads}/{w.head_dim}"
        cache = f", cache {w.held.dtype}, scales per {w.held.scales}" if w.cache else ""
        rest = ", ".join([w.dtype + cache, *(f"`{name}={value}`" for name, value in w.options)])
        rest += f", {w.new_tokens} new tokens each" * (w.new_tokens > 1)
        rows.append(f"| {w.name} | {heads} | {context} | {w.page_size} | {rest} |")
    return "\n" + "\n".join(rows) + "\n"


def of_chips(prices, cell: Callable[[Price], str], workloads=tpu_kernels.WORKLOADS) -> str:
    rows = ["| workload | kernel | " + " | ".join(CHIPS) + " |", "|---|---|" + "---|" * len(CHIPS)]
    for workload in workloads:
        for kernel in tpu_kernels.KERNELS:
            found = [prices.get((kernel, chip, workload)) for chip in CHIPS]
            if any(found):
                cells = [cell(price) if price and not price.failure else "-" for price in found]
                rows.append(f"| {workload} | {kernel} | " + " | ".join(cells) + " |")
    return "\n".join(rows) + "\n"


def ratios(prices) -> str:
    chips = tpu_kernels.QUANTISED_CHIPS
    rows = ["| workload | " + " | ".join(chips) + " |", "|---|" + "---|" * len(chips)]
    for w in tpu_kernels.QUANTISED:
        plain = "page 16" if w.page_size < 128 else "page 128"
        cells = []
        for chip in chips:
            # Not priced are split pools of pages of 128, which the memory bounds as it does fused
            # ones, nor pages of 32, which it bounds as those of 16.
            other = prices.get(("ejk", chip, plain)) or prices.get(
                ("ejk, fused pools", chip, plain)
            )
            mine = prices.get(("ejk", chip, w.name))
            known = mine and other and not mine.failure and not other.failure
            times = [tpu_prices.predict(price).us for price in (mine, other)] if known else None
            cells.append(f"{times[0] / times[1]:.2f}" if times else "-")
        rows.append(f"| {w.name} | " + " | ".join(cells) + " |")
    return "\n".join(rows) + "\n"


def share(price: Price) -> str:
    return f"{tpu_prices.predict(price).share:.0%}"


def load(price: Price) -> str:
    return f"{tpu_prices.predict(price).load:.2f}"


def density(price: Price) -> str:
    return f"{tpu_prices.bytes_a_bundle(price):,.0f}"


def useful(price: Price) -> str:
    return f"{tpu_prices.predict(price).useful:.0%}"


def programs(prices) -> str:
    rows = [
        "| workload | kernel | chip | bundles | vector spills | scalar spills | VMEM, KiB | "
        "copied/needed |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for workload in tpu_kernels.WORKLOADS:
        needed = tpu_kernels.workload(workload, 1).kv_bytes
        for (kernel, chip, name), price in prices.items():
            if not kernel.startswith("ejk") or name != workload or price.failure:
                continue
            copied = "-" if price.copied_bytes is None else f"{price.copied_bytes / needed:.2f}"
            spills = f"{price.vector_spills} | {price.scalar_spills}"
            rows.append(
                f"| {workload} | {kernel} | {chip} | {price.static_bundles:,} | {spills} | "
                f"{price.vmem_bytes // 1024:,} | {copied} |"
            )
    return "\n".join(rows) + "\n"


def losses(prices) -> str:
    """Say where another kernel is predicted to take less time, by more than a hundredth."""
    times: dict[tuple[str, str], dict[str, float]] = {}
    for (kernel, chip, workload), price in prices.items():
        if price.bundles is not None:
            times.setdefault((workload, chip), {})[kernel] = tpu_prices.predict(price).us
    lines = []
    for workload, chip in sorted(times):
        of = times[workload, chip]
        ours = min((us for kernel, us in of.items() if kernel.startswith("ejk")), default=None)
        if ours is None:
            continue
        lines += [
            f"- {workload}, {chip}: {kernel} {us:,.1f} us, `ejk` {ours:,.1f} us"
            for kernel, us in of.items()
            if 1.01 * us < ours
        ]
    return "\n".join(lines or ["- nowhere in these tables."]) + "\n"


def failures(prices) -> str:
    where: dict[tuple[str, str, str], list[str]] = {}
    for (kernel, chip, workload), price in prices.items():
        if price.failure:
            where.setdefault((kernel, workload, price.failure), []).append(chip)
    lines = [
        f"- {kernel}, {workload}, {', '.join(chips)}: `{failure}`"
        for (kernel, workload, failure), chips in where.items()
    ]
    return "\n".join(lines or ["- nothing that was tried."]) + "\n"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="fail if the page is stale")
    args = parser.parse_args(argv)
    old = PAGE.read_text(encoding="utf-8")
    new = generate(old)
    if not args.check:
        PAGE.write_text(new, encoding="utf-8")
    elif new != old:
        sys.exit(f"{PAGE} is stale: run `python docs/tpu_table.py`")


if __name__ == "__main__":
    main()
