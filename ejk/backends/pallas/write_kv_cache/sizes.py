"""How the write is cut for a TPU, and the memory it needs: pure functions, no Pallas."""

import dataclasses

import numpy as np

from ejk.backends.pallas._tiles import SUBLANES, tiled
from ejk.backends.write_kv_cache import WriteKVCacheProblem

MAX_BLOCK_TOKENS = 64  # not measured


@dataclasses.dataclass(frozen=True)
class WriteSizes:
    """The static shape of one launch."""

    problem: WriteKVCacheProblem
    block_tokens: int

    @classmethod
    def of(cls, problem: WriteKVCacheProblem, vmem_limit_bytes: int) -> "WriteSizes":
        """Take as many tokens a step as fit."""
        tokens = min(MAX_BLOCK_TOKENS, problem.num_tokens)
        while tokens > 1 and sum(cls(problem, tokens).vmem().values()) > vmem_limit_bytes:
            tokens = -(-tokens // 2)
        return cls(problem, tokens)

    @property
    def num_blocks(self) -> int:
        return -(-self.problem.num_tokens // self.block_tokens)

    @property
    def widths(self) -> dict[str, int]:
        """Head dimensions of what is written."""
        widths = {"key": self.problem.head_dim, "value": self.problem.value_head_dim}
        return {name: width for name, width in widths.items() if width}

    @property
    def has_windows(self) -> bool:
        """A slot shares its tiles with others: not where all its heads are tiles of their own."""
        return self.problem.cache_layout != "NHD"

    @property
    def window_slots(self) -> int:
        """Slots that are read and written for one: a tile's, or the page where that is no tile."""
        if not self.has_windows:
            return 1
        tile = SUBLANES * 4 // self.problem.cache_dtype.itemsize
        return tile if self.problem.page_size % tile == 0 else self.problem.page_size

    @property
    def row_dtype(self) -> np.dtype:
        """What rows are given to the kernel as: a byte for a window comes as an integer."""
        is_byte = self.problem.cache_dtype.itemsize == 1 and self.has_windows
        return np.dtype(np.int32) if is_byte else self.problem.cache_dtype

    @property
    def scale_row_shape(self) -> tuple[int, int]:
        """Return the shape of a token's scales in VMEM: as a page of one slot."""
        heads = self.problem.num_kv_heads
        return (1, heads) if self.problem.cache_layout == "NHD" else (heads, 1)

    @property
    def scale_window_shape(self) -> tuple[int, int]:
        heads, slots = self.problem.num_kv_heads, self.problem.page_size
        return (slots, heads) if self.problem.cache_layout == "NHD" else (heads, slots)

    def row_shape(self, head_dim: int) -> tuple[int, ...]:
        """Return the shape of a token's row in VMEM: with windows, as a window of one slot."""
        heads = self.problem.num_kv_heads
        return (heads, 1, head_dim) if self.has_windows else (heads, head_dim)

    def window_shape(self, head_dim: int) -> tuple[int, int, int]:
        return self.problem.num_kv_heads, self.window_slots, head_dim

    def vmem(self) -> dict[str, int]:
        """Return the bytes of each buffer in VMEM; those of blocked operands count twice."""
        problem, tokens = self.problem, self.block_tokens
        # `tests/backends/test_write_pallas_compile.py` holds, for every chip, that no less is
        # predicted than is used. Neither 2**20 nor the 4 windows were measured apart.
        needs = {"the compiler's own": 2**20}
        for name, width in self.widths.items():
            # On a v5p a row of one slot takes a tile's eight, where others pad it to two.
            row = self.row_shape(width)
            row = (row[0], SUBLANES, width) if self.has_windows else row
            needs[f"{name} rows"] = 2 * tiled((tokens, *row), self.row_dtype)
            if self.has_windows:
                window = self.window_shape(width)
                needs[f"{name}_buf"] = tiled((tokens, *window), problem.cache_dtype)
                needs[f"a window of {name}s"] = 4 * tiled(window, self.row_dtype)
            if problem.scales == "token":
                f32, page = np.dtype(np.float32), self.scale_window_shape
                needs[f"{name} scales"] = 2 * tiled((tokens, *self.scale_row_shape), f32)
                needs[f"pages of {name} scales"] = tiled((tokens, *page), f32)
        return needs
