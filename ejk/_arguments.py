"""The checks of what operations on pages are given, and the static facts that they leave."""

import dataclasses
from typing import Any

import jax
import numpy as np

from ejk._cache_types import CacheType
from ejk._describe import describe
from ejk._dtypes import (
    as_float32,
    check_cache_dtype,
    check_floats,
    check_rows,
    check_width,
    held_in_float32,
)
from ejk._indices import Size, as_int32, exceeds, least, rounded_bound, static_int
from ejk._pools import both_in, check_pool, check_value_cache, holds_both
from ejk._prefix_groups import num_prefix_groups, prefix_operands
from ejk._scales import GivenScales
from ejk._typing import (
    Array,
    Flag,
    PrefixGroups,
    Scalar,
    ScalarInt,
    ScaleArgument,
    StaticFloat,
    StaticInt,
)
from ejk.backends.layouts import LAYOUTS, layout_of
from ejk.backends.paged_problem import PagedFacts

# A logit that such a cap would change is so large that only the largest logit has weight anyway.
CAPS_NOTHING = 1e30
# With it or less no logit weighs more than another. Kernels divide scales by the cap: by 1.2e-38 a
# scale of 4 would be infinite, a logit of 0 NaN; and 1.2e-38 times a gradient below 1 is 0.
LEAST_CAP = 1e-30
LEAST_BOUND = 64  # tokens that a context is expected to have at least: fewer need no other program


@dataclasses.dataclass(frozen=True)
class Arguments:
    """What the caller of any attention to pages gave, types checked, values not."""

    query: Array
    key_cache: Array
    value_cache: Array | None
    context_lens: Array
    block_tables: Array
    attn_scale: Scalar | None
    max_context_len: StaticInt | None
    cache_layout: Any
    sliding_window: ScalarInt | None
    soft_cap: StaticFloat | None
    sinks: Array | None
    alibi_slopes: Array | None
    value_head_dim: StaticInt | None
    return_lse: Flag
    key_scale: ScaleArgument | None = None
    value_scale: ScaleArgument | None = None
    prefix_groups: PrefixGroups | None = None

    @property
    def latent(self) -> bool:
        """The values are read out of the keys."""
        return self.value_cache is None and not self.fused

    @property
    def fused(self) -> bool:
        """`key_cache` holds the keys and the values."""
        return holds_both(self.key_cache, self.cache_layout)

    @property
    def scales(self) -> GivenScales:
        pool = (self.key_cache, self.latent, self.fused)
        return GivenScales(self.key_scale, self.value_scale, *pool)


def facts_of(given: Arguments, num_seqs: Size) -> PagedFacts:
    """Check what every attention to pages is given; return what is known of it."""
    key_cache, cache_layout = given.key_cache, given.cache_layout
    _, num_heads, head_dim = given.query.shape
    num_pages, num_kv_heads, page_size = check_pool(
        key_cache, cache_layout, num_heads=num_heads, head_dim=head_dim
    )
    if given.fused:  # first: an axis too many of two pools is told as heads that do not group
        check_value_cache(key_cache, given.value_cache, cache_layout)
    check_rows("query", given.query, key_cache)
    cache_type = check_cache_dtype("key_cache.dtype", key_cache.dtype)
    check_floats(sinks=given.sinks, alibi_slopes=given.alibi_slopes)
    if num_heads % num_kv_heads:
        raise ValueError(
            f"num_heads={num_heads} must be a multiple of num_kv_heads={num_kv_heads} "
            f"(key_cache{list(key_cache.shape)}, cache_layout={cache_layout!r})"
            + _other_layouts(key_cache, num_heads, given.value_cache is not None)
        )
    check_width(key_cache, head_dim, "the query's")
    if exceeds(num_pages, 2**31 - 1):
        raise ValueError(
            f"num_pages={num_pages} must be below 2**31: ids of pages are 32-bit "
            f"(key_cache{list(key_cache.shape)}, cache_layout={cache_layout!r})"
        )
    _check_axes(given, num_seqs, page_size)
    return PagedFacts(
        num_seqs=num_seqs,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        value_head_dim=_value_head_dim(given, cache_type),
        num_pages=num_pages,
        page_size=page_size,
        max_blocks=given.block_tables.shape[1],
        query_dtype=given.query.dtype,
        cache_dtype=key_cache.dtype,
        cache_layout=cache_layout,
        fused=given.fused,
        latent=given.latent,
        has_window=given.sliding_window is not None,
        soft_cap=_held_soft_cap(given.soft_cap),
        has_sinks=given.sinks is not None,
        has_alibi=given.alibi_slopes is not None,
        return_lse=bool(given.return_lse),
        scales=given.scales.kind(num_kv_heads),
        num_prefix_groups=num_prefix_groups(given.prefix_groups, num_seqs),
    )


def shared_operands(given: Arguments, facts: PagedFacts, num_pages: Size) -> dict[str, Any]:
    """Return what every attention to pages hands on; a scale of None is the default.

    `num_pages` bounds the ids in the table. What NumPy holds stays there: `jax.jit` is quicker to
    put it on the device.
    """
    query, attn_scale, window = given.query, given.attn_scale, given.sliding_window
    if not (attn_scale is None or isinstance(attn_scale, jax.Array)):
        attn_scale = held_in_float32("attn_scale", attn_scale)
        if abs(attn_scale) > 2.0**127:  # kernels multiply it by log2(e), which float32 must hold
            query, attn_scale = query * 2, attn_scale / 2
        attn_scale = np.float32(attn_scale)
    return {
        "query": query,
        "key_cache": given.key_cache,
        "value_cache": given.value_cache,
        "context_lens": as_int32(given.context_lens, facts.capacity),
        "block_tables": as_int32(given.block_tables, num_pages),
        "attn_scale": attn_scale,
        "sliding_window": None if window is None else as_int32(window, 2**31 - 1),
        "sinks": as_float32(given.sinks),
        "alibi_slopes": as_float32(given.alibi_slopes),
        **given.scales.operands(facts.scales, facts.num_kv_heads),
        **prefix_operands(given.prefix_groups, facts.max_blocks),
    }


def check_sizes(**sizes: tuple[Array | None, str, Size]) -> None:
    """Check the first axis of each array that is not None: its name and its size."""
    for name, (x, axis, size) in sizes.items():
        if x is not None and x.shape[0] != size:
            how = _ONE_FOR_EACH[axis]
            if x.ndim == 2 and x.shape[1] == size:
                how = f"pass {name}.T"
            elif axis == "num_seqs + 1" and x.shape[0] != size - 1:
                how = "pass one more than there are sequences"
            raise ValueError(f"{name}.shape[0]={x.shape[0]} must be {axis}={size}: {how}")


_ONE_FOR_EACH = {
    "num_seqs": "pass one for each sequence",
    "batch": "pass one for each sequence",
    "batch + 1": "pass one more than there are sequences",
    "num_heads": "pass one for each query head",
    "num_tokens": "pass one for each new token",
    "total_tokens": "pass one for each row of the query",
    "num_copies": "pass one for each source",
    "num_seqs + 1": "of lengths pass jnp.pad(jnp.cumsum(q_lens), (1, 0))",
}


def _check_axes(given: Arguments, num_seqs: Size, page_size: int) -> None:
    """Check the axes of all that is neither query nor pool."""
    num_heads, tables = given.query.shape[1], given.block_tables
    check_sizes(
        context_lens=(given.context_lens, "num_seqs", num_seqs),
        block_tables=(tables, "num_seqs", num_seqs),
        sinks=(given.sinks, "num_heads", num_heads),
        alibi_slopes=(given.alibi_slopes, "num_heads", num_heads),
    )
    if exceeds(tables.shape[1] * page_size, 2**31 - 1):
        raise ValueError(
            f"max_blocks * page_size={tables.shape[1] * page_size} must be below 2**31: positions "
            f"are 32-bit (block_tables{list(tables.shape)}, page_size={page_size})"
        )


def _other_layouts(key_cache: Array, num_heads: int, given_values: bool) -> str:
    """Name the layouts under which the heads would group."""
    fits = {}
    for name in LAYOUTS:
        layout = layout_of(key_cache, name)
        if layout.num_axes != key_cache.ndim or (layout.interleaved and given_values):
            continue
        num_kv_heads = key_cache.shape[layout.kv_heads] // layout.heads_of_head
        if num_kv_heads and num_heads % num_kv_heads == 0:
            fits[name] = num_kv_heads
    fit = (f"{count} under cache_layout={name!r}" for name, count in fits.items())
    return f": num_kv_heads would be {' and '.join(fit)}" if fits else ""


def visible_bound(given: Arguments, facts: PagedFacts) -> Size:
    """Check the static bounds on what a token sees, and return the least, for sizing work."""
    check_window(given.sliding_window)
    bounds = [facts.capacity]
    for name in ("max_context_len", "sliding_window"):
        bound = getattr(given, name)
        if not (bound is None or isinstance(bound, jax.Array)):
            bounds.append(max(rounded_bound(name, bound, exact_up_to=0), LEAST_BOUND))
    return max(1, least(*bounds))


def check_window(sliding_window: ScalarInt | None) -> None:
    """Check a window that is known when a call is traced."""
    if isinstance(sliding_window, int | np.integer | np.ndarray) and sliding_window < 1:
        window = describe(int(sliding_window))
        raise ValueError(f"sliding_window={window} must be at least 1: None is no window")


def _held_soft_cap(soft_cap: StaticFloat | None) -> float | None:
    """Check a soft cap and return it as it is held, in float32; None for one that caps nothing."""
    if soft_cap is None:
        return None
    if isinstance(soft_cap, bool | np.bool_):
        raise TypeError(f"attn_logits_soft_cap={soft_cap} must be a number")
    if isinstance(soft_cap, np.generic):
        soft_cap = soft_cap.item()
    limits = np.finfo(np.float32)
    if not float(limits.tiny) <= soft_cap <= float(limits.max):
        raise ValueError(
            f"attn_logits_soft_cap={describe(soft_cap)} must be above 0 and a float32, from "
            f"{limits.tiny:.2g} to {limits.max:.2g}; None caps nothing"
        )
    return float(np.float32(max(soft_cap, LEAST_CAP))) if soft_cap < CAPS_NOTHING else None


def _value_head_dim(given: Arguments, cache_type: CacheType) -> int:
    """Check the values, or where else they are to be read, and return their width."""
    key_cache, value_cache, head_dim = given.key_cache, given.value_cache, given.query.shape[-1]
    value_head_dim = given.value_head_dim
    if given.fused:
        if value_head_dim is not None:
            raise ValueError(
                f"value_head_dim={value_head_dim} must be None with {both_in(key_cache)}, which "
                "holds keys and values"
            )
        return head_dim
    if value_cache is None:
        if value_head_dim is None:
            raise ValueError(
                "value_cache=None must come with value_head_dim, for latent attention: the values "
                "are then the first value_head_dim entries of the keys. Or with a key_cache of "
                'five axes, or of cache_layout="INTERLEAVED", that holds keys and values'
            )
        width = static_int("value_head_dim", value_head_dim, at_least=1)
        if width > head_dim:
            raise ValueError(f"value_head_dim={width} must be at most head_dim={head_dim}")
        if width % cache_type.per_element:
            raise ValueError(
                f"value_head_dim={width} must be even with int4, held as uint8: a byte has two "
                "values"
            )
        return width
    if value_head_dim is not None:
        raise ValueError(
            f"value_head_dim={value_head_dim} must be None where a value_cache is given"
        )
    check_value_cache(key_cache, value_cache, given.cache_layout)
    return value_cache.shape[-1] * cache_type.per_element
