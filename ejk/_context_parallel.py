"""What operations on pages that are split over devices have in common."""

import dataclasses
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np

from ejk import _dispatch
from ejk._indices import as_int32, static_int
from ejk._merge_attention_states import merge_attention_states
from ejk._own_pages import OwnPages
from ejk._page_attention_problem import as_float32

AxisName = Annotated[str | tuple[str, ...], "the name of a mesh axis, or a tuple of names"]


def check_alike(axis_name, page_offset, **arrays):
    """Check the axis, the offset, and what all devices must have alike, as far as types say."""
    _axis_size(axis_name)
    axes = {axis_name} if isinstance(axis_name, str) else set(axis_name)
    for name, x in dict(arrays, page_offset=page_offset).items():
        varying = jax.typeof(x).mat.varying if hasattr(x, "dtype") else frozenset()
        if split := axes & varying:
            raise ValueError(
                f"{name} must be the same on every device along axis_name={axis_name!r}, but it "
                f"varies over {', '.join(map(repr, sorted(split)))}"
            )
    if isinstance(page_offset, int | np.integer):
        static_int("page_offset", page_offset, at_least=0)


def part_of(problem: Any) -> Any:
    """Return the problem of one device. The sinks are one part more, once."""
    return dataclasses.replace(problem, is_part=True, has_sinks=False, return_lse=True)


def own_pages(
    axis_name, part, context_lens, block_tables, page_offset, sliding_window=None
) -> OwnPages:
    """Take a device's own pages out of a table that names those of all."""
    num_pages = _axis_size(axis_name) * part.num_pages
    if num_pages >= 2**31:
        raise ValueError(
            f"devices * local_pages={num_pages} must be below 2**31: ids of pages are 32-bit"
        )
    own = OwnPages.of(
        jnp.asarray(as_int32(context_lens, part.capacity)),
        jnp.asarray(as_int32(block_tables, num_pages)),
        first_page=jax.lax.axis_index(axis_name) * part.num_pages,
        num_pages=part.num_pages,
        page_size=part.page_size,
        sliding_window=None
        if sliding_window is None
        else jnp.asarray(as_int32(sliding_window, 2**31 - 1)),
        has_distances=part.has_alibi,
    )
    offset = as_int32(page_offset, part.num_pages)
    return own._replace(tables=jnp.where(offset < 0, -1, own.tables + offset))


def nothing_found(part, given) -> tuple[jax.Array, jax.Array]:
    """Return the part of a device where static facts leave no token to see."""
    out, lse = part.results
    found = jnp.zeros(out.shape, out.dtype), jnp.full(lse.shape, -jnp.inf, lse.dtype)
    return _dispatch.vary_together((given, found))[1]


def merge_over(axis_name, out, lse, sinks) -> tuple[jax.Array, jax.Array]:
    """Merge what the devices along an axis found, and the sinks: `[num_heads]`, or of each row."""
    packed = jnp.concatenate([out, lse[..., None]], axis=-1)
    parts = jax.lax.all_gather(packed, axis_name, to="invarying")
    outs, lses = parts[..., :-1], parts[..., -1]
    if sinks is not None:
        outs = jnp.concatenate([outs, jnp.zeros_like(outs[:1])])
        lses = jnp.concatenate([lses, jnp.broadcast_to(as_float32(sinks), lse.shape)[None]])
    return merge_attention_states(outs, lses)


def _axis_size(axis_name) -> int:
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
