"""How a problem says what of it can be split over devices, and where it is."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from jax.sharding import PartitionSpec


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


def is_split(entry: Any, mesh: Mapping[str, int]) -> bool:
    """Say whether one entry of a `PartitionSpec` splits anything: a mesh axis may have size 1."""
    return any(mesh[axis] > 1 for axis in mesh_axes(entry))
