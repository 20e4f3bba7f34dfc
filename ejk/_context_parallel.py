"""Attention to pages that are split over devices: `axis_name=` of both attentions."""

import dataclasses
from collections.abc import Sequence
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from ejk import _dispatch, _jax
from ejk._arguments import Arguments
from ejk._backend import Choice
from ejk._describe import describe
from ejk._indices import Size, as_int32, exceeds, static_int
from ejk._merge_attention_states import merge_attention_states
from ejk._own_pages import OwnPages
from ejk._rounding import rounded
from ejk._shards import POOL_NAMES
from ejk._typing import Array, AxisName, ScalarInt
from ejk.backends.page_attention import PageAttentionOperands, PageAttentionProblem
from ejk.backends.paged_problem import NO_GROUPS, PagedProblem
from ejk.backends.ragged_page_attention import (
    RaggedPageAttentionOperands,
    RaggedPageAttentionProblem,
    sane_bounds,
    sequences_of_rows,
)

P = TypeVar("P", bound=PagedProblem)


def check_axis(
    axis_name: AxisName | None, page_offset: ScalarInt, given: Arguments, **more: Array | None
) -> None:
    """Check the axis, the offset, and what all devices must have alike, as far as types say."""
    if axis_name is None:
        if not isinstance(page_offset, int | np.integer) or page_offset != 0:
            raise ValueError(
                f"page_offset={describe(page_offset)} must come with axis_name: it moves the pages "
                "that a device finds to be its own"
            )
        return
    _axis_size(axis_name)
    axes = {axis_name} if isinstance(axis_name, str) else set(axis_name)
    for name, x in (vars(given) | more | {"page_offset": page_offset}).items():
        if not isinstance(x, Array) or (name in POOL_NAMES and x.ndim > 2):
            continue
        if split := axes & _jax.varying(x):
            raise ValueError(
                f"{name} must be the same on every device along axis_name={axis_name!r}, but it "
                f"varies over {', '.join(map(repr, sorted(split)))}"
            )
    if isinstance(page_offset, int | np.integer):
        static_int("page_offset", page_offset, at_least=0)


def all_pages(axis_name: AxisName | None, num_pages: Size) -> Size:
    """Return how many pages a table may name: those of all devices."""
    if axis_name is None:
        return num_pages
    num_pages *= _axis_size(axis_name)
    if exceeds(num_pages, 2**31 - 1):
        raise ValueError(
            f"devices * local_pages={num_pages} must be below 2**31: ids of pages are 32-bit"
        )
    return num_pages


def own_part(
    problem: PageAttentionProblem,
    operands: PageAttentionOperands,
    choice: Choice,
    axis_name: AxisName,
    page_offset: ScalarInt,
) -> tuple[PageAttentionProblem, PageAttentionOperands]:
    """Return a device's part of a call: its own pages, in a table of their own."""
    part, operands = _part_of(problem, choice), operands._replace(sinks=None, **NO_GROUPS)
    if part.is_empty:
        return part, operands
    own = _own_pages(part, operands, axis_name, page_offset, operands.sliding_window)
    return part, operands._replace(
        context_lens=own.lens,
        block_tables=own.tables,
        sliding_window=own.windows,
        page_distances=own.distances,
    )


def own_ragged_part(
    problem: RaggedPageAttentionProblem,
    operands: RaggedPageAttentionOperands,
    choice: Choice,
    axis_name: AxisName,
    page_offset: ScalarInt,
) -> tuple[RaggedPageAttentionProblem, RaggedPageAttentionOperands]:
    """Return a device's part of a call: all new tokens, and of the pages its own."""
    part, operands = _part_of(problem, choice), operands._replace(sinks=None, **NO_GROUPS)
    if part.is_empty:
        return part, operands
    own = _own_pages(part, operands, axis_name, page_offset)
    bounds = sane_bounds(part, jnp.asarray(operands.cu_q_lens))
    is_new, seq = sequences_of_rows(part.num_seqs, part.total_tokens, bounds)
    lens = jnp.clip(operands.context_lens, 0, part.capacity)
    left = bounds[seq + 1] - jnp.arange(part.total_tokens, dtype=jnp.int32)
    position = jnp.where(is_new, jnp.maximum(lens[seq] - left, -1), -1)
    last = position if part.causal else jnp.where(is_new, lens[seq] - 1, -1)
    row_lens, windows = own.up_to(seq, last, part.page_size), operands.sliding_window
    if windows is not None:
        behind = jnp.maximum(windows, 0)
        hidden = own.up_to(seq, position - behind, part.page_size)
        windows = jnp.where(behind > 0, row_lens - hidden, 0)
    return part, operands._replace(
        context_lens=own.lens,
        block_tables=own.tables,
        cu_q_lens=bounds,
        sliding_window=windows,
        row_lens=row_lens,
        page_distances=own.distances,
    )


def merged(
    problem: PagedProblem, found: Sequence[jax.Array], sinks: Array | None, axis_name: AxisName
) -> tuple[jax.Array, jax.Array]:
    """Merge what the devices along an axis found, and the sinks: `[num_heads]`, or of each row."""
    out, lse = found
    packed = jnp.concatenate([out, lse[..., None]], axis=-1)
    parts: jax.Array = jax.lax.all_gather(packed, axis_name, to="invarying")
    outs, lses = parts[..., :-1], parts[..., -1]
    if sinks is not None:
        outs = jnp.concatenate([outs, jnp.zeros_like(outs[:1])])
        lses = jnp.concatenate([lses, jnp.broadcast_to(sinks, lse.shape)[None]])
    out, lse = merge_attention_states(outs, lses)
    return rounded(out, problem.out_dtype), lse


def _part_of(problem: P, choice: Choice) -> P:
    """Return the problem of one device. The sinks are one part more, once."""
    part = dataclasses.replace(
        problem, is_part=True, has_sinks=False, return_lse=True, num_prefix_groups=0
    )
    _dispatch.refuse_undeclared(part, choice)  # here: an empty call asks no backend
    return part


def _own_pages(
    part: PagedProblem,
    operands: PageAttentionOperands | RaggedPageAttentionOperands,
    axis_name: AxisName,
    page_offset: ScalarInt,
    sliding_window: ScalarInt | None = None,
) -> OwnPages:
    """Take a device's own pages out of a table that names those of all."""
    own = OwnPages.of(
        jnp.asarray(operands.context_lens),
        jnp.asarray(operands.block_tables),
        first_page=jax.lax.axis_index(axis_name) * part.num_pages,
        num_pages=part.num_pages,
        page_size=part.page_size,
        sliding_window=None if sliding_window is None else jnp.asarray(sliding_window),
        has_distances=part.has_alibi,
    )
    offset = as_int32(page_offset, part.num_pages)
    return own._replace(tables=jnp.where(offset < 0, -1, own.tables + offset))


def _axis_size(axis_name: AxisName) -> int:
    """Return how many devices there are along `axis_name`, or say which axes there are."""
    names = (axis_name,) if isinstance(axis_name, str) else axis_name
    if not names or len(set(names)) < len(names):
        raise ValueError(f"axis_name={axis_name!r} must name one axis or several, each once")
    try:
        return jax.lax.axis_size(axis_name)
    except NameError:
        found = ", ".join(map(repr, jax.sharding.get_abstract_mesh().manual_axes))
        around = f"whose axes are {found}" if found else "and there is none"
    raise ValueError(
        f"axis_name={axis_name!r} must be of the jax.shard_map around the call, {around}"
    )
