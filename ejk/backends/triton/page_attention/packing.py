"""Finds the packs of a batch, as `Packs.of` defines them, in three small launches.

XLA takes some 30 kernels of sorts and scatters for it. With these a plan with packs took 37 us on
an H200, with the three launches it takes 15, and without packs 2.
"""

from typing import Any

import jax
import jax.numpy as jnp

from ejk.backends.page_attention_packs import MARGIN, PIECE_COST, Packs
from ejk.backends.page_attention_plan import PlanOperands, PlanProblem
from ejk.backends.triton._backend import Call
from ejk.backends.triton._sizes import next_power_of_2

# Sequences that a program reads at once. In larger batches XLA finds the packs.
MOST_SEQS = 1024
# Entries of a table that are compared at a time.
BLOCK_PAGES = 1024


def find_packs(problem: PlanProblem, operands: PlanOperands, call: Call) -> Packs:
    """Return what `Packs.of` does."""
    from ejk.backends.triton.page_attention.groups_kernel import groups_kernel
    from ejk.backends.triton.page_attention.members_kernel import members_kernel
    from ejk.backends.triton.page_attention.packs_kernel import packs_kernel

    num_seqs = problem.num_seqs
    if num_seqs > MOST_SEQS:
        return Packs.of(problem, operands)
    lens, tables = operands.context_lens, operands.block_tables
    groups, num_pages = operands.prefix_groups, operands.prefix_pages
    assert problem.packs is not None
    assert tables is not None and num_pages is not None
    max_packs, of_seqs = problem.packs.num_seqs, jax.ShapeDtypeStruct((num_seqs,), jnp.int32)

    constants = packing_constants(problem, num_pages.shape[0], tables.shape[1])

    def launch(kernel: Any, inputs: dict[str, Any], outputs: dict[str, Any]) -> tuple[Any, ...]:
        return call(
            kernel,
            inputs,
            outputs,
            constants[kernel.__name__],
            grid=num_seqs,
            num_warps=packing_warps(num_seqs),
            num_stages=1,
        )

    leader, pages, differs = launch(
        groups_kernel,
        {
            "prefix_groups_ptr": groups,
            "prefix_pages_ptr": num_pages,
            "context_lens_ptr": lens,
            "block_tables_ptr": tables,
        },
        dict.fromkeys(("leader_ptr", "pages_ptr", "differs_ptr"), of_seqs),
    )
    tokens, place, size = launch(
        members_kernel,
        {"leader_ptr": leader, "pages_ptr": pages, "differs_ptr": differs},
        dict.fromkeys(("tokens_ptr", "place_ptr", "size_ptr"), of_seqs),
    )
    found = launch(
        packs_kernel,
        {
            "context_lens_ptr": lens,
            "leader_ptr": leader,
            "tokens_ptr": tokens,
            "place_ptr": place,
            "size_ptr": size,
        },
        {
            "lengths_ptr": jax.ShapeDtypeStruct((max_packs,), jnp.int32),
            "members_ptr": jax.ShapeDtypeStruct((max_packs * problem.members,), jnp.int32),
            "places_ptr": of_seqs,
            "floors_ptr": of_seqs,
        },
    )
    return Packs(*found)


def packing_warps(num_seqs: int) -> int:
    return 4 if num_seqs <= 256 else 8


def packing_constants(
    problem: PlanProblem, num_groups: int, max_blocks: int
) -> dict[str, dict[str, Any]]:
    """Return the constants of each kernel."""
    assert problem.packs is not None
    common = {"NUM_SEQS": problem.num_seqs, "BLOCK_SEQS": next_power_of_2(problem.num_seqs)}
    least_saved = -1 if problem.least_saved is None else problem.least_saved
    return {
        "groups_kernel": common
        | {
            "NUM_GROUPS": num_groups,
            "CAPACITY": problem.capacity,
            "MAX_BLOCKS": max_blocks,
            "PAGE_SIZE": problem.page_size,
            "BLOCK_PAGES": min(BLOCK_PAGES, max(16, next_power_of_2(max_blocks))),
        },
        "members_kernel": common | {"PAGE_SIZE": problem.page_size, "MEMBERS": problem.members},
        "packs_kernel": common
        | {
            "CAPACITY": problem.capacity,
            "MEMBERS": problem.members,
            "MAX_PACKS": problem.packs.num_seqs,
            "RESIDENT": problem.packs.resident,
            "PROGRAMS": problem.programs_per_piece,
            "GRANULE_COST": problem.granule_cost,
            "PACK_COST": problem.packs.granule_cost,
            "PIECE_COST": PIECE_COST,
            "MARGIN": MARGIN,
            "LEAST_SAVED": least_saved,
            "GRANULE": problem.granule,
            "BLOCK_MEMBERS": next_power_of_2(problem.members),
        },
    }
