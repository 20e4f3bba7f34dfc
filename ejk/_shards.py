"""How a problem says what of it can be split over devices, and where it is."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from jax.sharding import PartitionSpec

POOL_NAMES = ("key_cache", "value_cache", "key_scale", "value_scale")
"""The operands that are pools; the scales, where each token has its own, which lies as it does."""


class Axes(NamedTuple):
    """The axes of a problem's arrays, each a name, or a pair of names for one that holds two.

    Axes of one name are split together or not at all; None stays whole.
    """

    operands: Any  # for each operand a tuple; None for one that shards do without
    results: tuple[tuple[Any, ...], ...]
    sizes: dict[str, int]  # of names that occur in pairs alone


class Shards(NamedTuple):
    """How a problem is split over devices."""

    problem: Any  # what each of them runs
    operands: Any  # for each operand a PartitionSpec
    results: tuple[PartitionSpec, ...]


def mesh_axes(entry: Any) -> tuple[str, ...]:
    """Return the mesh axes of one entry of a `PartitionSpec`."""
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)


def splitting_axes(entry: Any, mesh: Mapping[str, int]) -> tuple[str, ...]:
    """Return those that split anything: a mesh axis may have size 1."""
    return tuple(axis for axis in mesh_axes(entry) if mesh[axis] > 1)


def axes_of_pools(
    pools: Mapping[str, Any], kv_heads: int, num_kv_heads: int, mesh: Mapping[str, int], mend: str
) -> tuple[str, ...]:
    """Return the mesh axes over which pools are split, by KV heads: nothing else of them may be.

    Args:
        pools: the `PartitionSpec` of each, first that of `key_cache`.
        kv_heads: which axis of them is that of KV heads.
        num_kv_heads: the size of it.
        mesh: the sizes of its axes.
        mend: what to do where pages are split over devices.

    Raises:
        ValueError: another axis is split, pools are split unlike each other, or unevenly.
    """
    split = mesh_axes(pools["key_cache"][kv_heads])
    for name, spec in pools.items():
        if any(splitting_axes(x, mesh) for axis, x in enumerate(spec) if axis != kv_heads):
            raise ValueError(
                f"{name}.sharding.spec={spec} must split only its KV heads, axis {kv_heads}, or "
                f"what reads other shards gathers the pool: of pages over devices {mend}"
            )
        if splitting_axes(spec[kv_heads], mesh) != splitting_axes(split, mesh):
            raise ValueError(
                f"{name}.sharding.spec={spec} must split its KV heads as key_cache.sharding.spec="
                f"{pools['key_cache']} does: keep all pools over the same mesh axes"
            )
    parts = math.prod(mesh[axis] for axis in split)
    if num_kv_heads % parts:
        raise ValueError(
            f"num_kv_heads={num_kv_heads} must be a multiple of the {parts} devices of the mesh "
            f"axes {split} that key_cache is split over: keep the pools on fewer, or whole"
        )
    return split
