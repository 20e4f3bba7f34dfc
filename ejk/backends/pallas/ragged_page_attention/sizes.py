"""How a ragged launch is cut for a TPU: an item is a block of `block_q` new tokens of a sequence.

Its `block_q * group` query rows of a KV head take the place that the group has in decode.
"""

import dataclasses

import jax.numpy as jnp

from ejk.backends.pallas._sizes import PagedSizes
from ejk.backends.pallas._tiles import LANES, SUBLANES, round_up, tiled
from ejk.backends.ragged_page_attention import RaggedPageAttentionProblem

ROWS_AT_ONCE = 256
"""Query rows that one softmax is taken of: all KV heads where these are few, else one of them."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RaggedSizes(PagedSizes[RaggedPageAttentionProblem]):
    """The static shape of one launch."""

    block_q: int
    q_lens: tuple[int, int]
    """Sequences of so many new tokens, both ends included, are this launch's."""

    @property
    def head_rows(self) -> int:
        return self.block_q * self.problem.group

    @property
    def heads(self) -> tuple[int, int, int]:
        """KV heads, an item's tokens, and query heads of each KV head: the order of its rows."""
        return self.problem.num_kv_heads, self.block_q, self.problem.group

    @property
    def heads_at_once(self) -> int:
        return self.kv_heads if self.rows <= ROWS_AT_ONCE else 1

    @property
    def state_shape(self) -> tuple[int, int]:
        """Return how many softmaxes are taken of a block, and the rows of each."""
        return self.kv_heads // self.heads_at_once, self.heads_at_once * self.head_rows

    def vmem(self) -> dict[str, int]:
        problem, (parts, rows), f32 = self.problem, self.state_shape, jnp.dtype(jnp.float32)
        lanes = tiled((parts, rows, LANES), f32)
        width = max(problem.head_dim, problem.value_head_dim)
        operand = tiled((self.block_kv, width), problem.query_dtype)
        per_head = tiled((self.kv_heads, self.head_rows, LANES), f32)
        logits = tiled((rows, self.block_kv), f32)

        def new_lanes(rows: int, columns: int) -> int:
            return tiled((rows, max(columns, self.block_kv)), f32)

        return self.copied_vmem() | {
            "lse": 2 * per_head * problem.return_lse,
            "sinks and slopes": 2 * lanes * (problem.has_sinks + problem.has_alibi),
            "m and l": 2 * lanes,
            "acc": tiled((parts, rows, problem.value_head_dim), f32),
            # What is kept of logits and weights, and of keys and values, of which masking makes
            # copies, and float32 parts for the highest precision; most on v5p. Found by compiling:
            # `tests/backends/test_ragged_pallas_compile.py` holds, for every chip, that no less is
            # predicted than is used. No factor, nor 2**20, was measured apart.
            "logits": ((17 if self.is_f32 else 5) + 7 * (problem.soft_cap is not None)) * logits,
            "operands of products": (2 + self.is_f32) * (self.heads_at_once + 1) * operand
            + 14 * operand * problem.latent,
            "reordered heads": 2 * self.reordered_vmem(),
            "the compiler's own": 2**20,
            "positions": problem.has_positions
            * (2 * tiled((rows, LANES), f32) + 3 * new_lanes(1, problem.total_tokens)),
            "tree": bool(problem.tree_width)
            * (3 * new_lanes(round_up(self.block_q, SUBLANES), problem.tree_width) + logits),
        }


def item_words(problem: RaggedPageAttentionProblem) -> int:
    """Return how many integers the kernel is given of an item."""
    new = problem.has_positions + (problem.has_positions or problem.tree_width > 0)
    return 4 + 2 * problem.has_window + new
