"""How attention to pages is split over devices: by KV heads, with the query heads that read them.

Pools stay where they are; all other arrays are small and follow them. Sequences that are a row each
are split, too.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from jax.sharding import PartitionSpec

from ejk._shards import Axes, Shards, axes_of_pools, mesh_axes


def axes_of(problem: Any) -> Axes:
    """Return the axes of operands and results of a `PagedProblem`."""
    heads = ("kv_heads", "group")
    if 1 in (problem.num_kv_heads, problem.group):  # an axis holds two names only where it has to
        heads = "kv_heads" if problem.group == 1 else "group"
    seqs = "seqs" if problem.splits_sequences else None
    operands = problem.operand_axes(seqs=seqs, kv_heads="kv_heads", heads=heads)
    if problem.layout.interleaved:
        operands = operands._replace(**_interleaved(problem, operands))
    results = _results(problem, seqs, heads)
    entries = [entry for axes in (*operands, *results) for entry in axes or ()]
    pairs = {name for entry in entries if isinstance(entry, tuple) for name in entry}
    known = {"kv_heads": problem.num_kv_heads, "group": problem.group, "halves": 2}
    return Axes(operands, results, {name: known[name] for name in pairs - {*entries}})


def _interleaved(problem: Any, operands: Any) -> dict[str, Any]:
    """Return the axes of pools, and of scales that lie as they do, with both halves of a head."""
    both = ("kv_heads", "halves") if problem.num_kv_heads > 1 else None
    pools = ["key_cache"] + ["key_scale"] * (problem.scales == "token")
    at = problem.layout.kv_heads
    return {
        name: (*getattr(operands, name)[:at], both, *getattr(operands, name)[at + 1 :])
        for name in pools
    }


def shards_of(problem: Any, specs: Any, mesh: Mapping[str, int]) -> Shards:
    """Split a `PagedProblem` as its operands are by `specs`, as far as they may."""

    def parts(axes: Sequence[str]) -> int:
        return math.prod(mesh[axis] for axis in axes)

    names = ["key_cache"] + ["value_cache"] * (specs.value_cache is not None)
    if problem.scales == "token":
        names += [name for name in ("key_scale", "value_scale") if getattr(specs, name) is not None]
    kv_heads = axes_of_pools(
        {name: getattr(specs, name) for name in names},
        problem.layout.kv_heads, problem.num_kv_heads, mesh,
        "use axis_name= inside jax.shard_map",
    )  # fmt: skip
    # Where each device holds one KV head, several may share it and split its query heads.
    heads = mesh_axes(specs.query[1])
    shares = problem.num_kv_heads == parts(kv_heads) and heads[: len(kv_heads)] == kv_heads
    if not shares or problem.num_heads % parts(heads):
        heads = kv_heads
    seqs = ()
    if problem.splits_sequences:
        rows = (specs.block_tables, specs.query, specs.context_lens)
        seqs = next(filter(None, (mesh_axes(row[0]) for row in rows)), ())
        seqs = tuple(axis for axis in seqs if axis not in heads)
        if problem.num_seqs % parts(seqs):
            seqs = ()
    own = dataclasses.replace(
        problem,
        num_seqs=problem.num_seqs // parts(seqs),
        num_heads=problem.num_heads // parts(heads),
        num_kv_heads=problem.num_kv_heads // parts(kv_heads),
    )
    kv_heads, heads, seqs = (axes or None for axes in (kv_heads, heads, seqs))
    axes = problem.operand_axes(seqs=seqs, kv_heads=kv_heads, heads=heads)
    operands = type(axes)(*(None if of is None else PartitionSpec(*of) for of in axes))
    results = (PartitionSpec(*of) for of in _results(problem, seqs, heads))
    return Shards(own, operands, tuple(results))


def _results(problem: Any, seqs: Any, heads: Any) -> tuple[tuple[Any, ...], ...]:
    """Say what the axes of each result are."""
    return ((seqs, heads, None), (seqs, heads))[: len(problem.results)]
