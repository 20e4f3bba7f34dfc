"""How copies are cut for a GPU: pure functions of problem and target."""

from typing import Any, NamedTuple

from ejk.backends.copy_kv_cache import CopyKVCacheProblem
from ejk.backends.gpu import Target
from ejk.backends.triton._sizes import power_of_two

# What a program holds of the keys, and of the values, in bytes: 4 times 16 in each of 128 threads.
BLOCK_BYTES = 8192
# Programs before a program takes a second copy: eight to a multiprocessor. None of these numbers is
# measured.
ENOUGH_PROGRAMS, MAX_COPIES = 1024, 64
# Programs that compare, so that not each of them loads all slots or pages; copies of one at most.
COMPARING_PROGRAMS, MAX_COMPARING = 256, 16
# At a time on a warp: 32 registers of a thread. What AMD's wavefronts compare takes two scalar
# registers each, and with more of them some are spilled.
COMPARISONS, AMD_COMPARISONS = 1024, 256
# Above it the comparisons of every copy with every other one would take as long as the copies.
MAX_COMPARED = 8192
# Elements of a unit, so that a block past its end still has a number of 32 bits.
MAX_UNIT = 2**31 - 2**20


class CopySizes(NamedTuple):
    """What one program copies, and what one compares."""

    copies: int
    block: int  # elements of a unit
    comparing: int  # copies of a program of the first launch
    others: int  # that it compares them with at a time
    num_warps: int

    @classmethod
    def of(cls, problem: CopyKVCacheProblem, target: Target) -> "CopySizes":
        itemsize, unit = problem.cache_dtype.itemsize, unit_of(problem)
        most = BLOCK_BYTES // itemsize
        block = min(power_of_two(unit), most)
        programs = problem.num_copies * -(-unit // block)
        shared = power_of_two(-(-programs // ENOUGH_PROGRAMS))
        copies = min(shared, most // block, MAX_COPIES)
        comparing = min(power_of_two(-(-problem.num_copies // COMPARING_PROGRAMS)), MAX_COMPARING)
        # No more threads than copy 16 bytes each.
        warps = copies * block * itemsize // (16 * target.warp_size)
        num_warps = min(4, max(1, warps))
        at_once = (AMD_COMPARISONS if target.is_amd else COMPARISONS) * num_warps // comparing
        others = min(at_once, max(32, power_of_two(problem.num_copies)))
        return cls(copies, block, comparing, others, num_warps)

    def grid(self, problem: CopyKVCacheProblem) -> int:
        return -(-problem.num_copies // self.copies) * -(-unit_of(problem) // self.block)

    def staging_grid(self, problem: CopyKVCacheProblem) -> int:
        return -(-problem.num_copies // self.comparing)

    def constants(self, problem: CopyKVCacheProblem) -> dict[str, Any]:
        """Return what both kernels take."""
        view, value, scale = problem.views[0], problem.value_shape, problem.scales == "token"
        return {
            "NUM_COPIES": problem.num_copies,
            "NUM_PAGES": problem.num_pages,
            "OUTER": view.outer,
            "INNER": view.inner,
            "SLOTS": view.slots,
            "K_WIDTH": view.width,
            "V_WIDTH": 0 if value is None else problem.view(value).width,
            "SCALE_WIDTH": problem.views[-1].width if scale else 0,
        }

    def copying(self, problem: CopyKVCacheProblem) -> dict[str, Any]:
        return self.constants(problem) | {"BLOCK_COPIES": self.copies, "BLOCK": self.block}

    def staging(self, problem: CopyKVCacheProblem) -> dict[str, Any]:
        return self.constants(problem) | {
            "IS_COMPARED": is_compared(problem),
            "BLOCK_COPIES": self.comparing,
            "BLOCK_OTHERS": self.others,
            "BLOCK": max(16, self.block // self.comparing),
        }


def is_compared(problem: CopyKVCacheProblem) -> bool:
    """Say whether the kernel finds by comparisons how each copy goes."""
    return problem.num_copies <= MAX_COMPARED


def unit_of(problem: CopyKVCacheProblem) -> int:
    """Return the most elements that a copy moves in one pool."""
    return max(view.elements for view in problem.views)
