"""How a launch of the decode kernel is cut for a TPU: an item is a sequence."""

import dataclasses

import jax.numpy as jnp

from ejk.backends.page_attention import PageAttentionProblem
from ejk.backends.pallas._sizes import PagedSizes
from ejk.backends.pallas._tiles import LANES, tiled


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes(PagedSizes[PageAttentionProblem]):
    """The static shape of one launch."""

    takes_again = True

    @property
    def head_rows(self) -> int:
        return self.problem.group

    def vmem(self) -> dict[str, int]:
        problem, rows, f32 = self.problem, self.rows, jnp.dtype(jnp.float32)
        keys, values = problem.head_dim, problem.value_head_dim
        width = max(keys, values)
        operand = tiled((self.block_kv, width), problem.query_dtype)
        return self.copied_vmem() | {
            "lse": tiled((2, self.step_items, 1, rows), f32) * problem.return_lse,
            "sinks and slopes": 2 * tiled((rows, 1), f32) * (problem.has_sinks + problem.has_alibi),
            "m and l": 2 * tiled((rows, LANES), f32),
            "acc": tiled((rows, values), f32),
            # What the compiler keeps of a block: `tests/backends/test_pallas_compile.py` holds, for
            # every chip, that no less is predicted than is used. 2**19 was not measured apart.
            "logits": 3 * tiled((self.round_blocks * rows, self.block_kv), f32),
            "operands of products": (1 + self.is_f32) * operand,
            "converted codes": 2 * self.converts_by_itself * tiled((self.block_kv, width), f32),
            "reordered heads": self.reordered_vmem(),
            "the compiler's own": 2**19,
        }


def seqs_per_launch(problem: PageAttentionProblem, smem_limit_bytes: int) -> int:
    """Return how many sequences' table rows and lengths fit in scalar memory; 0: not even one."""
    words = smem_limit_bytes // 4 - 5 * LANES  # each of the five prefetched arrays is padded
    return words // (problem.max_blocks + 1 + problem.own_windows)
