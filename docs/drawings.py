"""Draws the pictures of `docs/concepts.md`, as plain SVG.

    python docs/drawings.py            writes them
    python docs/drawings.py --check    fails if one is stale

Each is drawn on a ground of its own, light or dark as the page around it.
"""

import argparse
import sys
from collections.abc import Callable, Iterable
from html import escape
from pathlib import Path

HERE = Path(__file__).parent
STYLE = """
svg { --ground: #ffffff; --ink: #1f2328; --dim: #59636e; --line: #b7bec6; --empty: #f1f3f5;
  --a: #cfe3ff; --b: #ffdcb8; --c: #cdeccf; --d: #e6d6fb; }
@media (prefers-color-scheme: dark) { svg { --ground: #16181c; --ink: #e8eaed; --dim: #a6adb5;
  --line: #5a626b; --empty: #24282d; --a: #1f4476; --b: #6e4417; --c: #22552a; --d: #4a3272; } }
.ground { fill: var(--ground); } text { fill: var(--ink); font: 15px sans-serif; }
.dim { fill: var(--dim); font-size: 13px; } .head { font-weight: bold; }
.mid { text-anchor: middle; } .end { text-anchor: end; }
rect { stroke: var(--line); } .ground { stroke: none; } .empty { fill: var(--empty); }
.a { fill: var(--a); } .b { fill: var(--b); } .c { fill: var(--c); } .d { fill: var(--d); }
path { fill: none; stroke: var(--dim); stroke-width: 1.5; } .tip { fill: var(--dim); stroke: none; }
"""


class Drawing:
    """Shapes, one after the other."""

    def __init__(self, width: int, height: int, title: str):
        self.head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
            f'width="{width}" height="{height}" role="img">'
            f"<title>{escape(title)}</title><style>{STYLE}</style>"
        )
        self.shapes = [f'<rect class="ground" width="{width}" height="{height}" rx="8"/>']

    def box(self, x: float, y: float, width: float, height: float, kind: str, text: str = ""):
        self.shapes.append(
            f'<rect class="{kind}" x="{x:g}" y="{y:g}" width="{width:g}" '
            f'height="{height:g}" rx="3"/>'
        )
        if text:
            self.text(x + width / 2, y + height / 2 + 5, text, "mid")

    def row(self, x: float, y: float, size: float, cells: Iterable[tuple[str, str]], height=30):
        """Draw boxes side by side: of each its kind and its text."""
        for i, (kind, text) in enumerate(cells):
            self.box(x + i * size, y, size, height, kind, text)

    def text(self, x: float, y: float, text: str, kind: str = ""):
        self.shapes.append(f'<text class="{kind}" x="{x:g}" y="{y:g}">{escape(text)}</text>')

    def arrow(self, *points: tuple[float, float]):
        """Draw a line from point to point, with a tip at the last, which it reaches from above."""
        line = " ".join(f"{x:g},{y:g}" for x, y in points)
        x, y = points[-1]
        self.shapes.append(f'<path d="M{line}"/>')
        self.shapes.append(f'<path class="tip" d="M{x:g},{y:g} l-5,-9 l10,0 z"/>')

    def svg(self) -> str:
        return "\n".join([self.head, *self.shapes, "</svg>"]) + "\n"


def pages() -> Drawing:
    """A table, the pool that it points into, and a page of it."""
    d = Drawing(760, 400, "Block table, pool and page")
    d.text(20, 32, "block_tables", "head")
    d.text(20, 52, "which page has tokens 0-15, 16-31, 32-47", "dim")
    rows = {"sequence 0": ("a", (5, 2, None)), "sequence 1": ("b", (0, 6, 3))}
    at: dict[int, float] = {}
    for i, (name, (kind, ids)) in enumerate(rows.items()):
        y = 68 + 44 * i
        d.text(20, y + 20, name)
        for j, page in enumerate(ids):
            d.box(
                120 + 60 * j,
                y,
                60,
                30,
                "empty" if page is None else kind,
                f"{page}" if page is not None else "-1",
            )
    d.text(330, 88, "20 tokens: two pages; -1 is none yet", "dim")
    d.text(330, 132, "41 tokens: three pages, in any order", "dim")

    d.text(20, 188, "the pool", "head")
    d.text(102, 188, "8 pages of 16 tokens; nothing is ever moved", "dim")
    owner = {page: kind for kind, ids in rows.values() for page in ids if page is not None}
    for page in range(8):
        at[page] = 20 + 90 * page
        d.box(at[page], 202, 84, 36, owner.get(page, "empty"), f"page {page}")

    d.text(20, 296, "page 2", "head")
    d.text(90, 296, "slot 32 + i has a key and a value for each KV head", "dim")
    d.row(20, 310, 45, [("a", str(16 + i)) if i < 4 else ("empty", "") for i in range(16)])
    d.arrow((at[2] + 42, 238), (at[2] + 42, 276))
    d.text(20, 366, "tokens 16 to 19", "dim")
    d.text(
        210, 366, "twelve slots that no token owns: never read, so they may hold anything", "dim"
    )
    return d


def splits() -> Drawing:
    """A long context, cut in parts that are merged."""
    d = Drawing(760, 330, "A context is cut in parts, which are merged")
    d.text(20, 32, "one sequence of 40 pages", "head")
    kinds = "abcd"
    for part, kind in enumerate(kinds):
        x = 20 + 180 * part
        d.row(x, 48, 17, [(kind, "")] * 10, 26)
        d.arrow((x + 85, 74), (x + 85, 112))
        d.box(x, 114, 170, 56, kind)
        d.text(x + 85, 137, f"program {part}", "mid")
        d.text(x + 85, 157, f"pages {10 * part} to {10 * part + 9}", "mid dim")
        d.arrow((x + 85, 170), (x + 85, 200))
        d.text(x + 85, 218, f"out{part}, lse{part}", "mid")
        d.arrow((x + 85, 226), (x + 85, 250))
    d.box(20, 252, 710, 56, "empty")
    d.text(375, 276, "lse = log(exp(lse0) + exp(lse1) + exp(lse2) + exp(lse3))", "mid")
    d.text(375, 297, "out = the parts' outputs, each times exp(its lse - lse)", "mid")
    return d


def grid() -> Drawing:
    """Which program of a kernel does what, and what it does step by step."""
    d = Drawing(760, 400, "The grid of the decode kernel")
    d.text(20, 32, "the grid", "head")
    d.text(92, 32, "a program for each sequence, KV head and part of the context", "dim")
    for seq, kind in enumerate("abc"):
        d.text(20, 72 + 40 * seq, f"sequence {seq}")
        cells = [(kind, f"KV head {i // 2}, part {i % 2}") for i in range(4)]
        d.row(120, 52 + 40 * seq, 150, cells)
    d.text(20, 212, "one program", "head")
    d.text(
        140,
        212,
        "sequence 1, KV head 0, part 1: the queries of all heads that read KV head 0",
        "dim",
    )
    d.box(20, 226, 120, 64, "b")
    d.text(80, 253, "queries", "mid")
    d.text(80, 273, "loaded once", "mid dim")
    d.text(165, 244, "its pages, found in the table, one block after the other:", "dim")
    d.row(165, 254, 81, [("b", f"page {page}") for page in (6, 3, 9, 14, 1, 8, 20)], 34)
    steps = ("load a block's keys", "logits = q . k", "softmax so far", "add weights * values")
    for i, step in enumerate(steps):
        d.box(20 + 184 * i, 316, 168, 34, "empty", step)
        if i:
            d.text(20 + 184 * i - 8, 338, ">", "mid")
    d.text(
        20,
        378,
        "for each block; the softmax stays in registers, and no logit goes to memory",
        "dim",
    )
    return d


def choice() -> Drawing:
    """How the backend of a call is found."""
    d = Drawing(760, 400, "How a backend is chosen")
    d.box(255, 18, 250, 40, "empty", "ejk.page_attention(...)")
    d.arrow((380, 58), (380, 84))
    d.box(205, 86, 350, 44, "empty", "the platform that JAX lowers for")
    columns = (
        ("cuda", ("mosaic_gpu", "triton", "xla")),
        ("tpu", ("pallas", "xla")),
        ("cpu, rocm", ("xla",)),
    )
    for (platform, backends), x in zip(columns, (30, 285, 540)):
        d.arrow((380, 130), (x + 95, 146), (x + 95, 166))
        d.text(x + 107, 162, platform, "head")
        for i, name in enumerate(backends):
            y = 168 + 64 * i
            last = i == len(backends) - 1
            d.box(x, y, 190, 40, "c" if last else "a", name)
            if not last:
                d.arrow((x + 95, y + 40), (x + 95, y + 62))
                d.text(x + 103, y + 57, "cannot run the call", "dim")
    d.text(
        20,
        366,
        "The first that can run the call runs it. XLA runs every call, so one always does.",
        "dim",
    )
    d.text(
        20,
        386,
        'backend="triton" asks for one alone: it runs, or says every reason why it cannot.',
        "dim",
    )
    return d


DRAWINGS: dict[str, Callable[[], Drawing]] = {
    f"drawing_{draw.__name__}.svg": draw for draw in (pages, splits, grid, choice)
}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args(argv).check
    for name, draw in DRAWINGS.items():
        if not check:
            (HERE / name).write_text(draw().svg())
        elif (HERE / name).read_text() != draw().svg():
            sys.exit(f"docs/{name} is stale: run `python docs/drawings.py`")


if __name__ == "__main__":
    main()
