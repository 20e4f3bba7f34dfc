"""How one problem is cut for the latent kernel: pure functions of problem and target."""

import dataclasses
import math

from ejk.backends.gpu import Target
from ejk.backends.mosaic_gpu._tensor_cores import ROWS, TILE_ROWS
from ejk.backends.page_attention import PageAttentionProblem
from ejk.backends.triton.page_attention.blocks import DecodeBlocks, Tuning
from ejk.backends.triton.page_attention.sizes import Sizes

BLOCK_KV = 64  # tokens: two blocks of 72 KB are what fits beside as many queries
HEAD_DIM, VALUE_HEAD_DIM = 576, 512
SHARED_MEMORY = 2 * (ROWS + 2 * BLOCK_KV) * HEAD_DIM + 2048  # bytes; the last of maxima and sums


@dataclasses.dataclass(frozen=True)
class LatentSizes:
    """How one problem is cut and run: the pieces and parts are those of Triton's kernels.

    A sequence's query rows may be those of several tokens: the last ones of its context, each row
    seeing up to its own.
    """

    problem: PageAttentionProblem
    cut: Sizes
    interpret: bool
    tokens: int  # of a sequence

    @classmethod
    def of(
        cls,
        problem: PageAttentionProblem,
        target: Target,
        interpret: bool,
        tokens: int = 1,
    ) -> "LatentSizes":
        multiple = ROWS if problem.num_heads > ROWS else TILE_ROWS
        padded = -(-problem.num_heads // multiple) * multiple
        problem = dataclasses.replace(problem, num_heads=padded)
        blocks = DecodeBlocks(
            ROWS, BLOCK_KV, num_warps=12, num_stages=2, shared_memory=SHARED_MEMORY
        )
        cut = Sizes.of(problem, Tuning(), target, blocks=blocks)
        return cls(problem, cut, interpret, tokens)

    @property
    def heads(self) -> int:
        """Query heads of a token; where a sequence has one, padded to what a program copies."""
        return self.problem.num_heads // self.tokens

    @property
    def rows(self) -> int:
        """Query rows of a program that are somebody's: up to `ROWS`."""
        return min(ROWS, self.problem.num_heads)

    @property
    def query_copies(self) -> list[tuple[int, int, int]]:
        """Return copies of queries: from which row, to which, and how many.

        Rows that are nobody's are copies of others: their maxima rise when those of others do.
        """
        count = math.gcd(self.rows, ROWS)
        return [(row % self.rows, row, count) for row in range(0, ROWS, count)]

    @property
    def grid(self) -> int:
        return self.cut.grid(self.problem)

    @property
    def half(self) -> int:
        """Entries of the values that one warpgroup weighs."""
        return self.problem.value_head_dim // 2

    @property
    def rest(self) -> int:
        """Entries of the keys that are not values."""
        return self.problem.head_dim - self.problem.value_head_dim

    def third(self, index: int) -> slice:
        """Return which entries are copied together: a half of the values, or the rest."""
        begin = index * self.half
        return slice(begin, begin + (self.half if index < 2 else self.rest))

    @property
    def copies(self) -> int:
        """Copies of a third of a block: one a page, or of a part of one."""
        return BLOCK_KV // self.copied_rows

    @property
    def copied_rows(self) -> int:
        return min(self.problem.page_size, BLOCK_KV)

    @property
    def num_parts(self) -> int:
        return self.cut.num_parts(self.problem)
