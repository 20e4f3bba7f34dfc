"""How the work of a batch is dealt out: the plan of a call, and the kernel that makes it."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from ejk.backends.gpu import Target
from ejk.backends.page_attention import PageAttentionOperands, PageAttentionProblem
from ejk.backends.page_attention_packs import Packs
from ejk.backends.page_attention_plan import PlanOperands, PlanProblem
from ejk.backends.triton._backend import Call
from ejk.backends.triton._sizes import GRANULE, MAX_CAPACITY, next_power_of_2, same_tile
from ejk.backends.triton.page_attention.blocks import DecodeBlocks, Tuning, rows_of
from ejk.backends.triton.page_attention.occupancy import granule_of, packs_per_sm
from ejk.backends.triton.page_attention.packing import find_packs
from ejk.backends.triton.page_attention.sharing import Sharing

# The granules of a batch stay below it, as do the costs of a batch that may have packs, times the
# programs of a piece: so that sums of them stay in 32 bits.
VAST = 2**29
# And so does the end of a context, rounded up to granules: see `MAX_CAPACITY`.
COARSEST = 2**20
# Sequences that a program of the plan's kernel compares its own with at a time.
MOST_OTHERS = 1024


def programs_of_piece(problem: PageAttentionProblem, rows: int) -> int:
    """Return how many programs of so many query heads attend to one piece of a context."""
    return problem.num_kv_heads * -(-problem.group // rows)


def loaded_entries(problem: PageAttentionProblem) -> int:
    """Return the entries that are loaded of a token and KV head."""
    return problem.head_dim + (0 if same_tile(problem) else problem.value_head_dim)


def plan_of_call(
    problem: PageAttentionProblem, blocks: DecodeBlocks, tuning: Tuning, target: Target
) -> PlanProblem:
    """Return the plan that a call makes itself if it is given none."""
    return own_plan(
        num_seqs=problem.num_seqs,
        capacity=problem.capacity,
        longest=problem.visible_bound,
        programs=programs_of_piece(problem, blocks.block_group),
        width=loaded_entries(problem),
        resident=target.num_sms * blocks.per_sm,
        granule=granule_of(blocks.per_sm, problem.value_head_dim),
        has_window=problem.has_window,
        own_windows=problem.own_windows,
        sharing=_sharing(problem, tuning, target, blocks.per_sm),
    )


def without_unfit_plan(
    problem: PageAttentionProblem, tuning: Tuning, target: Target
) -> PageAttentionProblem:
    """Leave out a plan whose packs are larger than the call has room for, or that it may not have.

    The plan was not told the call's types, nor that its values are in its keys.
    """
    if problem.plan is None or problem.plan.packs is None:
        return problem
    sharing = _sharing(dataclasses.replace(problem, num_prefix_groups=1), tuning, target)
    fits = sharing is not None and problem.plan.members <= sharing.members
    return problem if fits else dataclasses.replace(problem, plan=None)


def _sharing(
    problem: PageAttentionProblem, tuning: Tuning, target: Target, per_sm: int = 1
) -> Sharing | None:
    return Sharing.of(
        problem,
        own_rows=rows_of(problem, problem.group, target),
        resident=target.num_sms * packs_per_sm(problem.cache_type.is_quantised, per_sm),
        target=target,
        least_saved_bytes=tuning.least_saved_bytes,
    )


def own_plan(
    *,
    num_seqs: int,
    capacity: int,
    longest: int,
    programs: int,
    width: int,
    resident: int,
    has_window: bool,
    granule: int = GRANULE,
    own_windows: bool = False,
    sharing: Sharing | None = None,
) -> PlanProblem:
    """Return the plan of a batch whose contexts show up to `longest` tokens of `width` elements.

    The machine runs `resident` programs at a time. What is not known, as the width of an element,
    costs a little speed, nothing else. So does a context that shows more tokens than it may.
    """
    if sharing is not None:  # whose costs are those of 128 tokens
        granule = GRANULE
    problem = PlanProblem(
        num_seqs=num_seqs,
        capacity=capacity,
        has_window=has_window,
        max_cuts=0,
        granule=granule,
        own_windows=own_windows,
        resident=resident,
        programs_per_piece=programs,
        # A step takes no less time with narrower heads.
        granule_cost=max(8, width * 8 // 256),
    )
    if capacity > MAX_CAPACITY:  # kernels, which alone read a plan, count in 32 bits
        return problem
    waves, in_last = divmod(num_seqs * programs, resident)
    # Many short contexts share multiprocessors, see `choose_blocks`, and one is soon done.
    is_soon_done = waves >= 4 and longest <= 8 * GRANULE
    # Where no context is long, and contexts of one length would fill whole waves, there is little
    # to gain. A combination that finds nothing to do costs more: on an H100 with one program a
    # multiprocessor 2 of 187 us for 64 contexts of 2,048.
    fills_waves = waves >= 3 and longest <= 32 * GRANULE and 3 * in_last >= 2 * resident
    if sharing is not None:
        cost = num_seqs * programs * -(-longest // granule) * problem.granule_cost
        is_soon_done = is_soon_done and sharing.least_saved is None
        fills_waves = fills_waves and not sharing.pays_to_combine(cost // sharing.resident)
    if is_soon_done or fills_waves:
        return problem
    each = problem.granule_cost * programs if sharing else 1
    while -(-capacity // granule) * num_seqs * each >= VAST:
        if granule >= min(capacity, COARSEST):
            return problem  # among so many sequences none outweighs the rest
        granule *= 2
    # None is cut where none is longer than a granule. Else as many may be as even contexts that are
    # longer than was said, by `max_context_len`, may need: each has a row.
    cuts = min(problem.shares - 1, num_seqs * (-(-capacity // granule) - 1))
    problem = dataclasses.replace(
        problem, granule=granule, max_cuts=cuts if longest > granule else 0
    )
    if sharing is None:
        return problem
    return sharing.planned(problem, longest)


def work_of(
    plan: PlanProblem | None,
    given: PlanProblem | None,
    operands: PageAttentionOperands,
    call: Call,
) -> Any:
    """Return the pieces of a call: those it was given, or dealt out now; None without a plan.

    A plan that was `given` may be one that the call leaves out.
    """
    if plan is None:
        return None  # XLA drops a plan that nobody reads
    if operands.plan is not None and plan == given:
        return operands.plan
    arrays = PlanOperands(
        operands.context_lens,
        operands.sliding_window,
        operands.prefix_groups,
        operands.prefix_pages,
        operands.block_tables,
    )
    [work] = run_plan(plan, arrays, call)
    return work


def run_plan(problem: PlanProblem, operands: PlanOperands, call: Call) -> tuple[Any, ...]:
    """Launch the kernel; with packs once for what sequences read alone, and once for packs."""
    if problem.packs is None:
        return _run_list(problem, operands, None, call)
    packs = find_packs(problem, operands, call)
    own = _run_list(problem, operands, packs, call)
    shared = _run_list(problem.packs, PlanOperands(packs.lengths, None), None, call)
    return (packs.listed(*own, *shared),)


def _run_list(
    problem: PlanProblem, operands: PlanOperands, packs: Packs | None, call: Call
) -> tuple[Any, ...]:
    from ejk.backends.triton.page_attention.plan_kernel import page_attention_plan_kernel

    block_seqs, num_warps = plan_blocks(problem.num_seqs)
    return call(
        page_attention_plan_kernel,
        {
            "context_lens_ptr": operands.context_lens,
            "sliding_window_ptr": operands.sliding_window,
            "floors_ptr": None if packs is None else packs.floors,
            "places_ptr": None if packs is None else packs.places,
        },
        {"work_ptr": list_type(problem)},
        plan_constants(problem, block_seqs),
        grid=-(-problem.num_seqs // block_seqs),
        num_warps=num_warps,
        num_stages=1,
    )


def list_type(problem: PlanProblem) -> jax.ShapeDtypeStruct:
    """Return what the kernel writes: with packs, the first of the plan's lists."""
    rows = 1 + problem.max_pieces + problem.max_splits
    return jax.ShapeDtypeStruct((rows, 4), jnp.int32)


def plan_blocks(num_seqs: int) -> tuple[int, int]:
    """Return the sequences of a program, each of which deals out the whole batch, and its warps.

    A program a multiprocessor: on an H100, 4, 8 and 16 sequences of 1,024 took 27.1, 14.9 and 16.5
    us, of 512 4 and 8 took 8.7 and 9.6; of 256, 4 and 8 warps took 6.7 and 6.9.
    """
    return min(8, max(2, next_power_of_2(num_seqs) // 128)), 4 if num_seqs <= 256 else 8


def plan_constants(problem: PlanProblem, block_seqs: int) -> dict[str, Any]:
    return {
        "NUM_SEQS": problem.num_seqs,
        "CAPACITY": problem.capacity,
        "stride_window_seq": int(problem.own_windows),
        "HAS_WINDOW": problem.has_window,
        "MAX_CUTS": problem.max_cuts,
        "SHARES": problem.shares,
        "MEMBERS": problem.members,
        "IS_PACKS": problem.is_packs,
        "GRANULE": problem.granule,
        "BLOCK_SEQS": block_seqs,
        "BLOCK_OTHERS": min(MOST_OTHERS, next_power_of_2(max(2, problem.num_seqs))),
    }
