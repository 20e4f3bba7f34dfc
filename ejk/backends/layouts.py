"""The layouts of pools: where the axes of a cache are."""

from typing import Any, Literal, NamedTuple

CacheLayout = Literal["HND", "NHD", "KV_HEADS_FIRST", "INTERLEAVED"]


class Layout(NamedTuple):
    """Where a pool's axes are; the head dimension is the last."""

    pages: int
    kv_heads: int
    slots: int
    halves: int | None = None  # of fused pools: a page's keys, then its values
    interleaved: bool = False  # a key and a value of each head, on the axis of the heads

    @property
    def num_axes(self) -> int:
        """Axes of a pool."""
        return 4 if self.halves is None else 5

    @property
    def heads_inside(self) -> bool:
        """A token's heads lie side by side."""
        return self.slots < self.kv_heads

    @property
    def heads_of_head(self) -> int:
        """Places on the axis of the heads that a KV head takes."""
        return 2 if self.interleaved else 1

    @property
    def fused(self) -> "Layout":
        """The same for fused pools: of interleaved ones, itself."""
        if self.interleaved:
            return self
        kv_heads, slots = (axis + (axis > self.pages) for axis in (self.kv_heads, self.slots))
        return Layout(self.pages, kv_heads, slots, halves=self.pages + 1)

    @property
    def gathered(self) -> tuple[int, int, int, int]:
        """Where sequences, KV heads, pages and slots are in what a table gathers of keys or values.

        A table's two axes take the pages' place and, in fused pools, that of the halves. Heads that
        are chosen one by one come right after them.
        """
        if self.interleaved:
            return 0, 2, 1, 3
        wide = self.fused if self.halves is None else self
        return self.pages, wide.kv_heads, self.pages + 1, wide.slots


LAYOUTS: dict[str, Layout] = {
    "HND": Layout(pages=0, kv_heads=1, slots=2),
    "NHD": Layout(pages=0, slots=1, kv_heads=2),
    "KV_HEADS_FIRST": Layout(kv_heads=0, pages=1, slots=2),
    "INTERLEAVED": Layout(pages=0, slots=1, kv_heads=2, interleaved=True),
}

POOLS = frozenset({"fused_pools", *(f'cache_layout="{layout}"' for layout in LAYOUTS)})
"""The features of how pools lie in memory."""


def layout_of(pool: Any, cache_layout: str) -> Layout:
    """Return where the axes of `key_cache` are: a pool of five is fused."""
    return LAYOUTS[cache_layout].fused if pool.ndim == 5 else LAYOUTS[cache_layout]
