"""How one `ejk.write_kv_cache` problem is cut for a GPU: pure functions of problem and target."""

from typing import Any, NamedTuple

from ejk.backends.gpu import Target
from ejk.backends.triton._sizes import power_of_two, stride_constants
from ejk.backends.write_kv_cache import WriteKVCacheProblem

# What a program holds of the keys, and of the values, in bytes: 4 times 16 in each of 128 threads.
BLOCK_BYTES = 8192
# Elements of a row and tokens that a program takes at most. Not measured.
MAX_BLOCK_ROW, MAX_TOKENS = 2048, 64
COMPARISONS = 1024  # at a time on a warp: 32 registers of a thread. Not measured.
# A program takes a second token once there are so many programs: eight to a multiprocessor.
ENOUGH_PROGRAMS = 1024
# Above it the comparisons of every token with every later one would take as long as the copy.
MAX_COMPARED = 16384


class WriteSizes(NamedTuple):
    """What one program writes."""

    tokens: int
    row: int  # elements of a token's keys, and as many of its values
    num_warps: int

    @classmethod
    def of(cls, problem: WriteKVCacheProblem, target: Target) -> "WriteSizes":
        itemsize = problem.row_dtype.itemsize
        row = min(power_of_two(_row(problem)), MAX_BLOCK_ROW)
        programs = problem.num_tokens * -(-_row(problem) // row)
        shared = power_of_two(-(-programs // ENOUGH_PROGRAMS))
        tokens = min(shared, max(1, BLOCK_BYTES // (itemsize * row)), MAX_TOKENS)
        # No more threads than copy 16 bytes each.
        warps = tokens * row * itemsize // (16 * target.warp_size)
        return cls(tokens, row, min(4, max(1, warps)))

    def others(self, problem: WriteKVCacheProblem) -> int:
        """Tokens that the program's own are compared with at a time."""
        at_once = max(32, COMPARISONS * self.num_warps // self.tokens)
        return min(at_once, max(32, power_of_two(problem.num_tokens)))

    def grid(self, problem: WriteKVCacheProblem) -> int:
        return -(-problem.num_tokens // self.tokens) * -(-_row(problem) // self.row)

    def constants(self, problem: WriteKVCacheProblem) -> dict[str, Any]:
        return {
            "NUM_TOKENS": problem.num_tokens,
            "NUM_KV_HEADS": problem.num_kv_heads,
            "HEAD_DIM": problem.head_dim,
            "VALUE_HEAD_DIM": problem.value_head_dim,
            "NUM_SLOTS": problem.num_slots,
            "PAGE_SIZE": problem.page_size,
            **stride_constants(problem),
            "HAS_DUPLICATES": problem.num_tokens > 1 and is_compared(problem),
            "BLOCK_TOKENS": self.tokens,
            "BLOCK_OTHERS": self.others(problem),
            "BLOCK_ROW": self.row,
        }


def is_compared(problem: WriteKVCacheProblem) -> bool:
    """Say whether the kernel finds the last token of each slot, by comparisons."""
    return problem.num_tokens <= MAX_COMPARED


def _row(problem: WriteKVCacheProblem) -> int:
    """Elements of a token's keys or of its values, whichever are more."""
    return problem.num_kv_heads * max(problem.head_dim, problem.value_head_dim)
