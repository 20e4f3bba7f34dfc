"""How one `ejk.write_kv_cache` problem is cut for a GPU: pure functions of problem and target."""

from typing import Any, NamedTuple

from ejk._indices import Size
from ejk.backends.gpu import Target
from ejk.backends.triton._sizes import KERNEL_TYPES, next_power_of_2, stride_constants
from ejk.backends.write_kv_cache import WriteKVCacheProblem

# Bytes of keys, and as many of values, that a program holds: 4 times 16 in each of 128 threads.
BLOCK_BYTES = 8192
# The most elements of a row, and the most tokens, that a program takes. Not measured.
MAX_BLOCK_ROW, MAX_TOKENS = 2048, 16
# Slots that a thread compares its program's with at a time; few tokens are compared at once. With
# 8 instead of 16 a loop of this kind took 0.4 to 1.0 us longer for 8,192 tokens on an H200.
FEW, OTHERS = 4, 16
# A program takes a second token once there are so many programs: eight to a multiprocessor.
ENOUGH_PROGRAMS = 1024
# GPUs round float32 to 8-bit floats from this compute capability on; sm_89 rounds to e5m2 by way of
# float16.
ROUNDS_TO_8_BITS = 90
# With more tokens, comparing each with every later one would take as long as the copy.
MAX_COMPARED = 16384


class WriteSizes(NamedTuple):
    """What one program writes."""

    tokens: int
    row: int  # elements of a token's keys, and as many of its values
    heads: int | None  # that these are of, each padded; None where elements are copied
    num_warps: int

    @classmethod
    def of(cls, problem: WriteKVCacheProblem, target: Target) -> "WriteSizes":
        itemsize, heads = problem.row_dtype.itemsize, None
        row = min(next_power_of_2(_row(problem)), MAX_BLOCK_ROW)
        if converts(problem):
            width = next_power_of_2(max(problem.head_dim, problem.value_head_dim))
            heads = min(next_power_of_2(problem.num_kv_heads), max(1, MAX_BLOCK_ROW // width))
            row = heads * width
        programs = problem.num_tokens * _blocks(problem, row, heads)
        shared = next_power_of_2(-(-programs // ENOUGH_PROGRAMS))
        tokens = min(shared, max(1, BLOCK_BYTES // (itemsize * row)), MAX_TOKENS)
        # No more threads than copy 16 bytes each.
        warps = tokens * row * itemsize // (16 * target.warp_size)
        return cls(tokens, row, heads, min(4, max(1, warps)))

    def others(self, problem: WriteKVCacheProblem) -> int:
        """Tokens that the program's own are compared with at a time."""
        threads = 32 * self.num_warps
        return (FEW if problem.num_tokens <= FEW * threads else OTHERS) * threads

    def grid(self, problem: WriteKVCacheProblem) -> int:
        blocks = _blocks(problem, self.row, self.heads)
        return -(-problem.num_tokens // self.tokens) * blocks

    def constants(self, problem: WriteKVCacheProblem, target: Target) -> dict[str, Any]:
        cache, capability = problem.cache_type, target.compute_capability
        return {
            "NUM_TOKENS": problem.num_tokens,
            "NUM_KV_HEADS": problem.num_kv_heads,
            "HEAD_DIM": problem.head_dim,
            "VALUE_HEAD_DIM": problem.value_head_dim,
            "NUM_SLOTS": problem.num_slots,
            "PAGE_SIZE": problem.page_size,
            **stride_constants(problem),
            "HAS_DUPLICATES": problem.num_tokens > 1 and is_compared(problem),
            "CONVERTS": converts(problem),
            "SCALES": problem.scales,
            "CACHE": KERNEL_TYPES.get(problem.cache_dtype.name, ""),
            "LARGEST": cache.largest or 0.0,
            "PER_ELEMENT": cache.per_element,
            "NATIVE": capability is not None
            and capability >= ROUNDS_TO_8_BITS
            and (cache.name.startswith("float8") or self._can_pack(cache.per_element)),
            "BLOCK_TOKENS": self.tokens,
            "BLOCK_OTHERS": self.others(problem),
            "BLOCK_ROW": self.row,
            "BLOCK_HEADS": self.heads or 1,
            "BLOCK_D": next_power_of_2(problem.head_dim),
            "BLOCK_DV": next_power_of_2(problem.value_head_dim),
        }

    def _can_pack(self, per_element: int) -> bool:
        """Say whether every thread has four elements of codes at least, a register of them."""
        return self.tokens * self.row // per_element >= 4 * 32 * self.num_warps


def converts(problem: WriteKVCacheProblem) -> bool:
    """Say whether rows are written otherwise than bit for bit."""
    return problem.row_dtype != problem.cache_dtype or problem.scales != "none"


def is_compared(problem: WriteKVCacheProblem) -> bool:
    """Say whether the kernel finds the last token of each slot, by comparisons."""
    return problem.num_tokens <= MAX_COMPARED


def _row(problem: WriteKVCacheProblem) -> int:
    """Elements of a token's keys or of its values, whichever are more."""
    return problem.num_kv_heads * max(problem.head_dim, problem.value_head_dim)


def _blocks(problem: WriteKVCacheProblem, row: int, heads: int | None) -> Size:
    """In how many blocks the keys and values of a token are taken."""
    return -(-problem.num_kv_heads // heads) if heads else -(-_row(problem) // row)
