"""Tells of many copies how each goes, by a table: the first of two launches, see `kernel`.

Grid, one axis: program `p` owns the units whose ids are dealt to it, and of the table, an entry a
unit, theirs. Nothing is in registers but the ids of `BLOCK_IDS` copies.

    table[u] = the last valid copy i with target_i = u, plus 1; 0 if there is none
    wins_i   = table[target_i] = i + 1           told by who owns the target
    staged_i = table[source_i] > 0               told by who owns the source

Every program goes through all ids three times: to clear the entries that are asked for, so that
time does not grow with the pool; to mark targets; and to tell. Between them it waits for its own
threads alone. Of copies that are not valid nothing is told. `stage_kernel` compares all copies with
each other instead, which is less work where there are few. A source in conflict is taken to memory
of its own by its owner: the staged ones of a block are first listed one after the other.

Source: own.
"""

import typing

import triton
import triton.language as tl

from ejk.backends.triton.copy_kv_cache.staging import stage
from ejk.backends.triton.copy_kv_cache.units import is_unit


@triton.jit
@typing.no_type_check
def mark_kernel(
    # inputs
    source_ptr,  # int32 [num_copies]
    target_ptr,  # int32 [num_copies]
    value_scale_ptr,  # float32, the axes of a cache without the last; absent if there are none
    key_scale_ptr,
    key_cache_ptr,  # four axes, or five of fused pools
    value_cache_ptr,  # absent if there are no values, or in fused pools
    # outputs
    wins_ptr,  # int32 [num_copies]: 1 where a copy is the last to its target
    staged_ptr,  # int32 [num_copies]: 1 where what it writes is staged
    key_stage_ptr,  # [num_copies, OUTER, INNER, K_WIDTH], written where a copy is staged
    value_stage_ptr,
    key_scale_stage_ptr,
    value_scale_stage_ptr,
    # scratch
    table_ptr,  # int32 [NUM_PAGES * SLOTS]
    list_ptr,  # int32 [PROGRAMS, BLOCK_IDS]
    # sizes
    NUM_COPIES: tl.constexpr,
    NUM_PAGES: tl.constexpr,
    OUTER: tl.constexpr,
    INNER: tl.constexpr,
    SLOTS: tl.constexpr,
    K_WIDTH: tl.constexpr,
    V_WIDTH: tl.constexpr,  # 0: there is no pool of values
    SCALE_WIDTH: tl.constexpr,  # 0: there are no pools of scales
    PROGRAMS: tl.constexpr,
    # blocks
    BLOCK_IDS: tl.constexpr,
    BLOCK_COPIES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # Which work is mine. Where one block is all, it stays in registers.
    own_list_ptr = list_ptr + tl.program_id(0) * BLOCK_IDS
    copies, sources, targets, reads, writes = _ids(
        source_ptr, target_ptr, 0, NUM_COPIES, NUM_PAGES, SLOTS, PROGRAMS, BLOCK_IDS
    )

    # Loop over the copies: clear, mark, and tell.
    for start in range(0, NUM_COPIES, BLOCK_IDS):
        if NUM_COPIES > BLOCK_IDS:
            copies, sources, targets, reads, writes = _ids(
                source_ptr, target_ptr, start, NUM_COPIES, NUM_PAGES, SLOTS, PROGRAMS, BLOCK_IDS
            )
        tl.store(table_ptr + sources, 0, mask=reads)
        tl.store(table_ptr + targets, 0, mask=writes)
    tl.debug_barrier()
    for start in range(0, NUM_COPIES, BLOCK_IDS):
        if NUM_COPIES > BLOCK_IDS:
            copies, sources, targets, reads, writes = _ids(
                source_ptr, target_ptr, start, NUM_COPIES, NUM_PAGES, SLOTS, PROGRAMS, BLOCK_IDS
            )
        tl.atomic_max(table_ptr + targets, copies + 1, mask=writes, sem="relaxed")
    tl.debug_barrier()
    for start in range(0, NUM_COPIES, BLOCK_IDS):
        if NUM_COPIES > BLOCK_IDS:
            copies, sources, targets, reads, writes = _ids(
                source_ptr, target_ptr, start, NUM_COPIES, NUM_PAGES, SLOTS, PROGRAMS, BLOCK_IDS
            )
        # Atomics change the second-level cache: the first may hold what was there before.
        last = tl.load(table_ptr + targets, mask=writes, other=0, cache_modifier=".cg")
        over = tl.load(table_ptr + sources, mask=reads, other=0, cache_modifier=".cg")
        is_staged = over > 0
        staged = is_staged.to(tl.int32)
        tl.store(wins_ptr + copies, (last == copies + 1).to(tl.int32), mask=writes)
        tl.store(staged_ptr + copies, staged, mask=reads)

        # Write: the sources in conflict, elsewhere.
        count = tl.sum(staged, 0)
        if count > 0:
            place = tl.cumsum(staged, 0) - 1
            tl.store(own_list_ptr + place, copies, mask=is_staged)
            tl.debug_barrier()
            for first in range(0, count, BLOCK_COPIES):
                listed = first + tl.arange(0, BLOCK_COPIES)
                is_listed = listed < count
                of = tl.load(own_list_ptr + listed, mask=is_listed, other=0)
                stage(
                    key_cache_ptr, value_cache_ptr, key_scale_ptr, value_scale_ptr,
                    key_stage_ptr, value_stage_ptr, key_scale_stage_ptr, value_scale_stage_ptr,
                    tl.load(source_ptr + of), of, is_listed,
                    NUM_PAGES, OUTER, INNER, SLOTS, K_WIDTH, V_WIDTH, SCALE_WIDTH, BLOCK,
                )  # fmt: skip
            tl.debug_barrier()  # the next block has a list of its own


@triton.jit
@typing.no_type_check
def _ids(
    source_ptr, target_ptr, start,
    NUM_COPIES: tl.constexpr, NUM_PAGES: tl.constexpr, SLOTS: tl.constexpr,
    PROGRAMS: tl.constexpr, BLOCK_IDS: tl.constexpr,
):  # fmt: skip
    """Load a block of copies; say which have a source of mine, and which a target."""
    # Each thread takes single ids, as it will touch entries, if the compiler does not know that
    # they lie side by side: else it takes four, and hands all around in shared memory.
    copies = start + (tl.arange(0, BLOCK_IDS) ^ (tl.program_id(0) // PROGRAMS))
    sources = tl.load(source_ptr + copies, mask=copies < NUM_COPIES, other=-1)
    targets = tl.load(target_ptr + copies, mask=copies < NUM_COPIES, other=-1)
    is_valid = is_unit(sources, NUM_PAGES, SLOTS) & is_unit(targets, NUM_PAGES, SLOTS)
    reads = is_valid & _is_mine(sources, PROGRAMS)
    writes = is_valid & _is_mine(targets, PROGRAMS)
    return copies, sources, targets, reads, writes


@triton.jit
@typing.no_type_check
def _is_mine(ids, PROGRAMS: tl.constexpr):
    """Deal out ids, those of the first slots of pages evenly, too."""
    return ((ids * 40503) >> 16) & (PROGRAMS - 1) == tl.program_id(0)
