"""How a launch over pages is cut, and the memory that it needs: pure functions, no Pallas.

An item is what a core attends for at a time: a sequence, or a block of new tokens of one.
"""

import abc
import dataclasses
from typing import ClassVar, Literal

import jax.numpy as jnp
import numpy as np

from ejk.backends.page_attention import PageAttentionProblem
from ejk.backends.pallas._tiles import LANES, SUBLANES, round_up, tiled
from ejk.backends.ragged_page_attention import RaggedPageAttentionProblem

AttentionProblem = PageAttentionProblem | RaggedPageAttentionProblem


@dataclasses.dataclass(frozen=True, kw_only=True)
class PagedSizes[P: (PageAttentionProblem, RaggedPageAttentionProblem)](abc.ABC):
    """The static shape of one launch."""

    takes_again: ClassVar[bool] = False
    """The kernel can compute a round a second time."""

    problem: P
    num_items: int  # of this launch: a multiple of what its cores take in a step
    block_pages: int
    round_blocks: int = 1  # blocks that are computed together
    step_items: int = 1  # items of a grid step
    cores: int = 1
    shared: Literal["batch", "kv_head"] = "batch"  # what the cores share: items, or KV heads
    reordered_copies: int = 0  # of a round, to put in order heads that lie inside tokens
    fp8_weights: bool = False  # keys and values of float8 are multiplied as they are
    nan_of_e4m3: bool = False  # and their NaN is one in products

    @property
    @abc.abstractmethod
    def head_rows(self) -> int:
        """Query rows of a KV head."""

    @abc.abstractmethod
    def vmem(self) -> dict[str, int]:
        """Return the bytes of each buffer in VMEM; those of blocked operands count twice."""

    def fits(self, vmem_limit: int) -> bool:
        return sum(self.vmem().values()) <= vmem_limit

    @property
    def block_kv(self) -> int:
        return self.block_pages * self.problem.page_size

    @property
    def core_items(self) -> int:
        return self.num_items // self.cores if self.shared == "batch" else self.num_items

    @property
    def core_steps(self) -> int:
        return self.core_items // self.step_items

    @property
    def has_two_pools(self) -> bool:
        return not (self.problem.latent or self.problem.fused)

    @property
    def kv_heads(self) -> int:
        """KV heads of a core."""
        heads = self.problem.num_kv_heads
        return -(-heads // self.cores) if self.shared == "kv_head" else heads

    @property
    def rows(self) -> int:
        """Query rows of an item on a core."""
        return self.kv_heads * self.head_rows

    def page_shape(self, head_dim: int) -> tuple[int, ...]:
        """Return the shape of a page in VMEM: that of the pool, less the pages."""
        layout = self.problem.layout
        heads = self.kv_heads * layout.heads_of_head
        sizes = {layout.kv_heads: heads, layout.slots: self.problem.page_size}
        if layout.halves is not None:
            sizes[layout.halves] = 2
        return (*(sizes[axis] for axis in sorted(sizes)), head_dim)

    def blocks_shape(self, head_dim: int) -> tuple[int, ...]:
        """Return the shape of the pages of two rounds: one is computed while another is copied."""
        return 2, self.round_blocks, self.block_pages, *self.page_shape(head_dim)

    def operand_dtype(self, masked: bool) -> np.dtype:
        """Return what products take keys and values as: bfloat16 holds all codes of 8 bits.

        The matrix unit takes those of float8, too, but masking selects among 16 bits at least, and
        so does putting heads in order.
        """
        problem = self.problem
        if not problem.cache_type.is_quantised:
            return problem.cache_dtype
        in_order = not problem.layout.heads_inside and problem.page_size % (2 * SUBLANES) == 0
        native = self.fp8_weights and not problem.cache_type.is_integer and in_order and not masked
        if native and (self.takes_again or not self.misses_nan):
            return problem.cache_dtype
        return np.dtype(jnp.bfloat16)

    @property
    def weight_dtype(self) -> np.dtype:
        """What weights are rounded to before they are multiplied with values."""
        return max(self.problem.query_dtype, self.operand_dtype(True), key=lambda x: x.itemsize)

    @property
    def converts_by_itself(self) -> bool:
        """Codes become numbers in vectors of 32 bits, where a chip has no others."""
        return self.problem.cache_type.is_quantised and not self.fp8_weights

    @property
    def misses_nan(self) -> bool:
        """The matrix unit would take NaN codes for numbers."""
        return self.problem.cache_dtype == jnp.float8_e4m3fn and not self.nan_of_e4m3

    @property
    def looks_for_nan(self) -> bool:
        """Rounds with a NaN that the matrix unit misses are computed again, masked."""
        return self.misses_nan and self.operand_dtype(masked=False) == self.problem.cache_dtype

    @property
    def scale_pools(self) -> int:
        """How many pools of tokens' scales there are."""
        return (1 + self.has_two_pools) * (self.problem.scales == "token")

    @property
    def key_bytes(self) -> int:
        """Bytes of a block's keys, each head's in whole lanes."""
        problem = self.problem
        head_bytes = round_up(problem.head_dim, LANES) * problem.cache_dtype.itemsize
        return self.block_kv * self.kv_heads * head_bytes

    def copied_vmem(self) -> dict[str, int]:
        """Return the bytes of what is copied from HBM and to it."""
        problem, steps = self.problem, (2, self.step_items)
        dtype, heads = problem.cache_dtype, (self.kv_heads, self.head_rows)
        keys, values = problem.head_dim, problem.value_head_dim
        return {
            "k_buf": tiled(self.blocks_shape(keys), dtype),
            "v_buf": tiled(self.blocks_shape(values), dtype) * self.has_two_pools,
            "scales of tokens": self.scale_pools
            * tiled(self.blocks_shape(keys)[:-1], jnp.dtype(jnp.float32)),
            "q": tiled((*steps, *heads, keys), problem.query_dtype),
            "out": tiled((*steps, *heads, values), problem.out_dtype),
        }

    def reordered_vmem(self) -> int:
        """Return the bytes that putting a block in order takes.

        Heads inside a token, or pages that are no whole tiles, are put in order first, in 32 bits
        where a chip has no 16-bit vectors.
        """
        problem = self.problem
        layout, whole_tiles = problem.layout, problem.page_size % SUBLANES == 0
        widest = max(problem.head_dim, problem.value_head_dim)
        # The first axis of fused pools is left out: the halves, or the heads of "KV_HEADS_FIRST",
        # which come one by one. Found by compiling: what is used does not grow with those.
        *lead, last = self.page_shape(widest)[layout.num_axes - 4 :]
        page = tiled((*lead[:-1], round_up(lead[-1], SUBLANES), last), jnp.dtype(jnp.float32))
        copies = self.reordered_copies
        if layout.interleaved:  # found by compiling: a page has keys and values
            copies = max(1, copies) if problem.cache_type.is_quantised else copies - 1
        copies = max(1 + self.is_f32, self.round_blocks * copies)
        return self.block_pages * page * (layout.heads_inside * copies + 4 * (not whole_tiles))

    @property
    def is_f32(self) -> bool:
        """Products split float32 in parts for the highest precision."""
        return self.problem.query_dtype == jnp.float32


def seen_pages(problem: AttentionProblem) -> int:
    """Return how many pages a sequence is expected to see at most."""
    pages = -(-problem.visible_bound // problem.page_size) + problem.has_window
    return min(pages, problem.max_blocks)
