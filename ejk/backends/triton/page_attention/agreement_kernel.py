"""Writes a plan with packs for the tables of a call, which may not be those it was made for.

Grid: packs. What a pack shares ends before the first page that a member's table names otherwise
than that of the last member, by which its pieces go. The rest of the plan is copied, so that a plan
serves every layer: one launch, where XLA would make several of gathers and minima. A pack without
members, as all are where packs do not pay, looks at no table.
"""

import typing

import triton
import triton.language as tl


@triton.jit
@typing.no_type_check
def agreement_kernel(
    # inputs
    work_ptr,  # int32 [rows, 4]: see `packs.py`
    block_tables_ptr,  # int32 [num_seqs, max_blocks]
    # outputs
    agreed_ptr,  # int32 [rows, 4]
    # sizes
    NUM_SEQS: tl.constexpr,
    MAX_BLOCKS: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    MEMBERS: tl.constexpr,
    MAX_PACKS: tl.constexpr,
    FIRST_ROW: tl.constexpr,  # of those that say what packs share
    ROWS: tl.constexpr,
    # blocks
    BLOCK_MEMBERS: tl.constexpr,
    BLOCK_PAGES: tl.constexpr,
    BLOCK: tl.constexpr,  # elements of the plan that are copied at a time
):
    # Which work is mine: a pack, and a share of the copy.
    pack = tl.program_id(0)
    for start in range(pack * BLOCK, ROWS * 4, MAX_PACKS * BLOCK):
        offs = start + tl.arange(0, BLOCK)
        row = offs // 4 - FIRST_ROW
        mask = (offs < ROWS * 4) & ~((row >= 0) & (row < MAX_PACKS) & (offs % 4 == 0))
        tl.store(agreed_ptr + offs, tl.load(work_ptr + offs, mask=mask, other=0), mask=mask)

    # Load once: what the pack shared, and its members.
    offs_shared = (FIRST_ROW + pack) * 4
    shared = tl.load(work_ptr + offs_shared)
    offs_member = tl.arange(0, BLOCK_MEMBERS)
    members_ptr = work_ptr + (FIRST_ROW + MAX_PACKS) * 4 + pack * MEMBERS
    seqs = tl.load(members_ptr + offs_member, mask=offs_member < MEMBERS, other=-1)
    exists = (seqs >= 0) & (seqs < NUM_SEQS)
    seqs = tl.where(exists, seqs, -1).to(tl.int64)
    last = tl.max(seqs, 0)

    # Loop over the pages: which is the first that tables name two of?
    num_pages = tl.minimum(tl.cdiv(tl.maximum(shared, 0), PAGE_SIZE), MAX_BLOCKS)
    num_pages = tl.where(last >= 0, num_pages, 0)
    agreed = num_pages
    for start in range(0, num_pages, BLOCK_PAGES):
        pages = start + tl.arange(0, BLOCK_PAGES)
        is_page = pages < num_pages
        of_last = tl.load(block_tables_ptr + last * MAX_BLOCKS + pages, mask=is_page, other=0)
        ptrs = block_tables_ptr + seqs[:, None] * MAX_BLOCKS + pages[None, :]
        mask = exists[:, None] & is_page[None, :]
        differs = mask & (tl.load(ptrs, mask=mask, other=0) != of_last[None, :])
        first = tl.min(tl.where(differs, pages[None, :], MAX_BLOCKS), 1)
        agreed = tl.minimum(agreed, tl.min(first, 0))

    # Write.
    tl.store(agreed_ptr + offs_shared, tl.minimum(shared, agreed * PAGE_SIZE))
