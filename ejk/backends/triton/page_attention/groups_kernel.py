"""Finds whom a sequence may share first pages with: the first of three launches of `packing`.

Grid: sequences. A program reads the groups and lengths of all, and compares its table with that of
its leader, the first sequence of its group.
"""

import typing

import triton
import triton.language as tl

from ejk.backends.triton._planning import context_length


@triton.jit
@typing.no_type_check
def groups_kernel(
    # inputs
    prefix_groups_ptr,  # int32 [num_seqs]
    prefix_pages_ptr,  # int32 [num_groups]
    context_lens_ptr,  # int32 [num_seqs]
    block_tables_ptr,  # int32 [num_seqs, max_blocks]
    # outputs
    leader_ptr,  # int32 [num_seqs]: the first sequence of my group; myself outside of one
    pages_ptr,  # int32 [num_seqs]: that my group shares at most
    differs_ptr,  # int32 [num_seqs]: 1 if one of them is another than my leader's
    # sizes
    NUM_SEQS: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    CAPACITY: tl.constexpr,
    MAX_BLOCKS: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    # blocks
    BLOCK_SEQS: tl.constexpr,
    BLOCK_PAGES: tl.constexpr,
):
    # Which work is mine: a sequence.
    seq = tl.program_id(0)
    group = tl.load(prefix_groups_ptr + seq)
    is_grouped = (group >= 0) & (group < NUM_GROUPS)

    # Load once: the groups and lengths of all.
    others = tl.arange(0, BLOCK_SEQS)
    of_others = tl.load(prefix_groups_ptr + others, mask=others < NUM_SEQS, other=-1)
    is_mate = is_grouped & (of_others == group)
    lengths = context_length(context_lens_ptr, others, NUM_SEQS, CAPACITY)
    leader = tl.min(tl.where(is_mate, others, NUM_SEQS), 0)
    shortest = tl.min(tl.where(is_mate, lengths, CAPACITY), 0)
    pages = tl.load(prefix_pages_ptr + tl.where(is_grouped, group, 0))
    pages = tl.maximum(tl.minimum(pages, shortest // PAGE_SIZE), 0)
    pages = tl.where(tl.sum(is_mate.to(tl.int32), 0) > 1, pages, 0)
    leader = tl.where(is_grouped, leader, seq)

    # Loop over the pages: does my table name another than my leader's?
    table_ptr = block_tables_ptr + seq.to(tl.int64) * MAX_BLOCKS
    leader_table_ptr = block_tables_ptr + leader.to(tl.int64) * MAX_BLOCKS
    differs = tl.zeros([BLOCK_PAGES], tl.int32)
    for start in range(0, pages, BLOCK_PAGES):
        offs = start + tl.arange(0, BLOCK_PAGES)
        own = tl.load(table_ptr + offs, mask=offs < pages, other=0)
        of_leader = tl.load(leader_table_ptr + offs, mask=offs < pages, other=0)
        differs |= (own != of_leader).to(tl.int32)

    # Write.
    tl.store(leader_ptr + seq, leader)
    tl.store(pages_ptr + seq, pages)
    tl.store(differs_ptr + seq, tl.max(differs, 0))
