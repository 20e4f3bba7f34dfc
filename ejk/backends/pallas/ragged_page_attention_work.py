"""How a ragged launch is cut for a TPU, and the memory it needs: pure functions, no Pallas.

An item is a block of `block_q` new tokens of one sequence; it takes the place that a sequence has
in the decode kernel, and its `block_q * group` query rows of a KV head that of the group.
"""

import dataclasses

import jax.numpy as jnp

from ejk.backends.pallas.page_attention_work import LANES, Work, round_up, tiled
from ejk.backends.ragged_page_attention import RaggedPageAttentionProblem

ROWS_AT_ONCE = 256
"""Query rows that one softmax is taken of: all KV heads where these are few, else one of them."""


@dataclasses.dataclass(frozen=True)
class RaggedWork(Work):
    """The static shape of one launch: `num_seqs` counts items."""

    problem: RaggedPageAttentionProblem  # pyright: ignore[reportIncompatibleVariableOverride]
    block_q: int = 1
    q_lens: tuple[int, int] = (1, 1)
    """Sequences of so many new tokens, both ends included, are this launch's."""

    @property
    def head_rows(self) -> int:
        return self.block_q * self.problem.group

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
        # Found by compiling: what is kept of logits and weights, and of keys and values, of which
        # masking makes copies, and float32 parts for the highest precision; most on v5p.
        is_f32 = problem.query_dtype == f32
        width = max(problem.head_dim, problem.value_head_dim)
        operand = tiled((self.block_kv, width), problem.query_dtype)
        per_head = tiled((self.kv_heads, self.head_rows, LANES), f32)
        logits = tiled((rows, self.block_kv), f32)
        needs = super().vmem()

        def new_lanes(rows, columns):
            return tiled((rows, max(columns, self.block_kv)), f32)

        return needs | {
            "lse": 2 * per_head * problem.return_lse,
            "sinks and slopes": 2 * lanes * (problem.has_sinks + problem.has_alibi),
            "m and l": 2 * lanes,
            "acc": tiled((parts, rows, problem.value_head_dim), f32),
            "logits": ((17 if is_f32 else 5) + 7 * (problem.soft_cap is not None)) * logits,
            "operands of products": (2 + is_f32) * (self.heads_at_once + 1) * operand
            + 14 * operand * problem.latent,
            "positions": problem.has_positions
            * (2 * tiled((rows, LANES), f32) + 3 * new_lanes(1, problem.total_tokens)),
            "tree": bool(problem.tree_width)
            * (3 * new_lanes(round_up(self.block_q, 8), problem.tree_width) + logits),
            "reordered heads": 2 * needs["reordered heads"],
            "the compiler's own": 2**20,
        }


def item_words(problem: RaggedPageAttentionProblem) -> int:
    """Return how many integers the kernel is given of an item."""
    new = problem.has_positions + (problem.has_positions or problem.tree_width > 0)
    return 4 + 2 * problem.has_window + new
