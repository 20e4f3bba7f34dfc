"""Writes the tables of `docs/scaling.md`: what a decoding step moves on many devices.

    python docs/scaling_table.py            writes them
    python docs/scaling_table.py --check    fails if the page is stale

Worked out on paper. `tests/documents/test_scaling_plan.py` holds the formulas to compiled programs.
"""

import argparse
import dataclasses
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

PAGE = Path(__file__).with_name("scaling.md")
BEGIN, END = "<!-- plan:begin -->\n", "<!-- plan:end -->\n"


@dataclasses.dataclass(frozen=True)
class Model:
    """The sizes of a model that count; by default those of one of 70 billion parameters."""

    layers: int = 80
    num_heads: int = 64
    num_kv_heads: int = 8
    head_dim: int = 128
    itemsize: int = 2

    @property
    def width(self) -> int:
        return self.num_heads * self.head_dim


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a decoding step is split: `heads * pages * replicas` devices.

    Attributes:
        heads: devices that share the KV heads, and the products of the model.
        pages: devices that share the pages of each context.
        replicas: groups of devices with sequences of their own.
        seqs: sequences of a group.
        context_len: tokens of each.
    """

    heads: int
    pages: int
    replicas: int
    seqs: int
    context_len: int

    @property
    def devices(self) -> int:
        return self.heads * self.pages * self.replicas

    def cache_bytes(self, model: Model) -> int:
        """Keys and values that a device holds, and reads in a step."""
        tokens = self.seqs * self.context_len // self.pages
        heads = model.num_kv_heads // self.heads
        return model.layers * tokens * 2 * heads * model.head_dim * model.itemsize

    def merge_bytes(self, model: Model) -> int:
        """The result of `ejk`'s `all_gather` of one layer: every part's output and LSE, float32."""
        if self.pages == 1:
            return 0
        return self.pages * self.seqs * model.num_heads // self.heads * (model.head_dim + 1) * 4

    def sum_bytes(self, model: Model) -> int:
        """The results of the model's own two `psum`s of one layer, after attention and the MLP."""
        return 0 if self.heads == 1 else 2 * self.seqs * model.width * model.itemsize

    def received_merges(self, model: Model) -> int:
        """What a device receives in a step of the parts of the others."""
        return model.layers * self.merge_bytes(model) * (self.pages - 1) // self.pages

    def received_sums(self, model: Model) -> int:
        """The same for the sums, in a ring."""
        return model.layers * self.sum_bytes(model) * 2 * (self.heads - 1) // self.heads


PLANS = (
    Plan(heads=8, pages=1, replicas=1, seqs=64, context_len=8192),
    Plan(heads=8, pages=1, replicas=8, seqs=64, context_len=8192),
    Plan(heads=8, pages=8, replicas=1, seqs=1, context_len=2**20),
    Plan(heads=8, pages=1, replicas=128, seqs=64, context_len=8192),
    Plan(heads=8, pages=8, replicas=16, seqs=1, context_len=2**20),
    Plan(heads=8, pages=128, replicas=1, seqs=1, context_len=2**24),
)


def table(model: Model) -> Iterator[str]:
    yield "| devices | heads x pages x replicas | sequences of a group | cache of a device |"
    yield " `ejk` receives | the model's sums receive |\n|---|---|---|---|---|---|\n"
    for plan in PLANS:
        merges = plan.received_merges(model)
        yield f"| {plan.devices:,} | {plan.heads} x {plan.pages} x {plan.replicas} |"
        yield f" {plan.seqs} x {plan.context_len:,} | {plan.cache_bytes(model) / 1e9:.1f} GB |"
        yield f" {f'{merges / 1e6:.1f} MB' if merges else '0'} |"
        yield f" {plan.received_sums(model) / 1e6:.1f} MB |\n"


def generate(old: str) -> str:
    head, rest = old.split(BEGIN)
    return head + BEGIN + "".join(table(Model())) + END + rest.split(END)[1]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="fail if the page is stale")
    args = parser.parse_args(argv)
    old = PAGE.read_text(encoding="utf-8")
    text = generate(old)
    if not args.check:
        PAGE.write_text(text, encoding="utf-8")
    elif text != old:
        sys.exit(f"{PAGE} is stale: run `python docs/scaling_table.py`")


if __name__ == "__main__":
    main()
