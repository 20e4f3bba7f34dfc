"""How copies are cut for a GPU: pure functions of problem and target."""

from typing import Any, NamedTuple

from ejk.backends.copy_kv_cache import CopyKVCacheProblem
from ejk.backends.gpu import Target
from ejk.backends.triton._sizes import next_power_of_2

# A program holds BLOCK_BYTES of the keys, and as many of the values: twice 16 in each of 128
# threads. It takes a second copy where there would be more than ENOUGH_PROGRAMS, and MAX_COPIES at
# most. On an H200 1,024 pages of 16 take 34.7 us so, and 8,192 slots 18.9; with twice the bytes and
# half the programs 35.8 and 18.8; with half the bytes and twice the programs 35.7 and 18.8.
# MAX_COPIES is not measured.
BLOCK_BYTES = 4096
ENOUGH_PROGRAMS, MAX_COPIES = 2048, 64
# The most programs that compare, as each loads all slots or pages, and the most copies of one.
COMPARING_PROGRAMS, MAX_COMPARING = 256, 16
# Comparisons at a time on a warp: 32 registers of a thread. On AMD each comparison takes two scalar
# registers, and with more of them some are spilled.
COMPARISONS, AMD_COMPARISONS = 1024, 256
# With more copies, comparing each with every other one takes longer than the table: on an H200 2.2
# us and 2.5 for 512 copies, 2.9 and 3.2 for 1,024, 5.0 and 3.5 for 2,048, 39 and 8.7 for 8,192.
MAX_COMPARED = 1024
# The most units of a pool that has a table, 64 MiB large. For larger pools XLA sorts the copies.
MAX_TABLE = 2**24
# Programs that share a table, a power of two, their threads, and the ids that they read at a time:
# twice the programs, two to a multiprocessor, took 15 us instead of 8.7 for 8,192 copies, when each
# pass loaded the ids anew. 1,024 threads hold 8,192 ids in registers without spills, 512 do not: so
# 8,192 slots took 24.4 us on an H200 instead of 27.4.
MARKING_PROGRAMS, MARKING_THREADS, MAX_BLOCK_IDS = 128, 1024, 8192
# Bytes that a program stages at a time. Programs that compare took 44 us for 1,024 pages with half
# of it, and 54 with a quarter.
STAGED_BYTES = 16384
# The most elements of a unit, so that elements of a block past its end are still numbered in 32
# bits.
MAX_UNIT = 2**31 - 2**20


class CopySizes(NamedTuple):
    """What one program copies, and what one compares."""

    copies: int
    block: int  # elements of a unit
    comparing: int  # copies of a program of the first launch
    others: int  # that it compares them with at a time
    num_warps: int
    marking_programs: int  # programs that share a table
    ids: int  # that one reads at a time
    marking_warps: int

    @classmethod
    def of(cls, problem: CopyKVCacheProblem, target: Target) -> "CopySizes":
        itemsize, unit = problem.cache_dtype.itemsize, unit_of(problem)
        most = BLOCK_BYTES // itemsize
        block = min(next_power_of_2(unit), most)
        programs = problem.num_copies * -(-unit // block)
        shared = next_power_of_2(-(-programs // ENOUGH_PROGRAMS))
        copies = min(shared, most // block, MAX_COPIES)
        comparing = min(
            next_power_of_2(-(-problem.num_copies // COMPARING_PROGRAMS)), MAX_COMPARING
        )
        # No more threads than copy 16 bytes each.
        warps = copies * block * itemsize // (16 * target.warp_size)
        num_warps = min(4, max(1, warps))
        at_once = (AMD_COMPARISONS if target.is_amd else COMPARISONS) * num_warps // comparing
        all_copies = next_power_of_2(problem.num_copies)
        return cls(
            copies=copies,
            block=block,
            comparing=comparing,
            others=min(at_once, max(32, all_copies)),
            num_warps=num_warps,
            marking_programs=MARKING_PROGRAMS,
            ids=min(all_copies, MAX_BLOCK_IDS),
            marking_warps=MARKING_THREADS // target.warp_size,
        )

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
            "BLOCK": max(16, self.staged(problem) // self.comparing),
        }

    def marking(self, problem: CopyKVCacheProblem) -> dict[str, Any]:
        block = self.staged(problem)
        return self.constants(problem) | {
            "PROGRAMS": self.marking_programs,
            "BLOCK_IDS": self.ids,
            "BLOCK_COPIES": STAGED_BYTES // problem.cache_dtype.itemsize // block,
            "BLOCK": block,
        }

    def staged(self, problem: CopyKVCacheProblem) -> int:
        """Return how many elements of a unit a program takes elsewhere at a time."""
        most = STAGED_BYTES // problem.cache_dtype.itemsize
        return min(next_power_of_2(unit_of(problem)), most)


def is_compared(problem: CopyKVCacheProblem) -> bool:
    """Say whether comparisons tell how each copy goes."""
    return problem.num_copies <= MAX_COMPARED


def is_marked(problem: CopyKVCacheProblem) -> bool:
    """Say whether a table tells how each copy goes; else XLA does."""
    return not is_compared(problem) and problem.num_units <= MAX_TABLE


def unit_of(problem: CopyKVCacheProblem) -> int:
    """Return the most elements that a copy moves in one pool."""
    return max(view.elements for view in problem.views)
