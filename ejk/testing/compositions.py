"""Ways to run a call that must not change what it computes.

Each takes a `Call` and yields cases, each with the results that have to be its own.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import ejk
from ejk import _registry
from ejk._load_tuning import OPERATIONS as BACKENDS
from ejk.testing import oracle, poison
from ejk.testing.case import ATTENTIONS, SCALES, given_scales
from ejk.testing.configurations import DTYPES
from ejk.testing.copy_kv_cache import UNIT_OF
from ejk.testing.runs import (
    INDICES,
    POOLS,
    Arrays,
    Call,
    Checked,
    jit,
    page_size_of,
    perform,
    plain,
)
from ejk.testing.slopes import gradient


def vmap(call: Call) -> Checked:
    """Over two batches of queries that see one pool; of writes and copies, over pools too."""
    if call.operation not in ATTENTIONS:
        return (yield from vmap_of_pools(call))
    other = call.case.replace(query=-call.case.query)
    yield from _mapped_over(call, other, POOLS)


def vmap_of_pools(call: Call) -> Checked:
    """Over two calls, each with its own pool."""
    yield from _mapped_over(call, call.twin(), ())


def _mapped_over(call: Call, other: Any, shared: tuple[str, ...]) -> Checked:
    arrays, static = call.split(call.case)
    others, _ = call.split(other)
    axes = {name: None if name in shared else 0 for name in arrays}
    both = {
        name: x if axes[name] is None else np.stack([x, others[name]]) for name, x in arrays.items()
    }
    results = call.run(_mapped, static | {"in_axes": tuple(axes.items())}, both)
    for i, case in enumerate((call.case, other)):
        yield case, tuple(x[i] for x in results)


def _mapped(operation: str, static: Arrays, backend: ejk.Backend, arrays: Arrays) -> Any:
    rest = dict(static)
    axes = dict(rest.pop("in_axes"))
    return jax.vmap(functools.partial(perform, operation, rest, backend), (axes,))(arrays)


def scan(call: Call) -> Checked:
    """Inside of `lax.scan` over two layers that lie in one pool."""
    cases = call.case, call.twin()
    splits = [call.split(case) for case in cases]
    layout = call.case.cache_layout
    axis = int(layout == "KV_HEADS_FIRST")
    pools = {
        name: np.concatenate([arrays[name] for arrays, _ in splits], axis)
        for name, x in splits[0][0].items()
        if name in POOLS and x.ndim > 2
    }
    rows = {
        name: np.stack([arrays[name] for arrays, _ in splits])
        for name in splits[0][0]
        if name not in pools
    }
    num_pages = splits[0][0]["key_cache"].shape[axis]
    sizes = {"num_pages": num_pages, "page_size": page_size_of(splits[0][0]["key_cache"], layout)}
    results = call.run(_layers, splits[0][1] | {"sizes": tuple(sizes.items())}, pools, rows)
    for i, case in enumerate(cases):
        if call.operation in ATTENTIONS:
            yield case, tuple(x[i] for x in results)
        else:
            pages = slice(i * num_pages, (i + 1) * num_pages)
            yield case, tuple(x[(slice(None),) * axis + (pages,)] for x in results)


def _layers(
    operation: str, static: Arrays, backend: ejk.Backend, pools: Arrays, rows: Arrays
) -> Any:
    rest = dict(static)
    sizes = dict(rest.pop("sizes"))
    names = [name for name in POOLS if name in pools]  # `jit` sorts them

    def step(pools: Arrays, of_layer: Any) -> Any:
        layer, rows = of_layer
        moved = dict(rows)
        for name, x in rows.items():
            if name == "block_tables":
                moved[name] = ejk.layer_block_tables(x, layer, num_pages=sizes["num_pages"])
            elif name in INDICES:
                of_unit = sizes | ({"page_size": 1} if name.endswith("pages") else {})
                moved[name] = ejk.layer_slot_mapping(x, layer, **of_unit)
        results = perform(operation, rest, backend, pools | moved)
        if operation in ATTENTIONS:
            return pools, results
        return dict(zip(names, results)), None

    pools, results = jax.lax.scan(step, pools, (jnp.arange(2, dtype=jnp.int32), rows))
    return results if operation in ATTENTIONS else tuple(pools[name] for name in names)


def donated(call: Call) -> Checked:
    """A write or a copy with the pools donated, so that it is in place."""
    arrays, static = call.split(call.case)
    pools = {name: jnp.array(arrays.pop(name)) for name in POOLS if name in arrays}
    scales = {n: pools.pop(n) for n in SCALES if n in pools and pools[n].ndim < 2}
    yield call.case, call.run(_donated, static, pools, arrays | scales, donate=True)


def _donated(
    operation: str, static: Arrays, backend: ejk.Backend, pools: Arrays, rest: Arrays
) -> Any:
    return perform(operation, static, backend, pools | rest)


def write_then_attend(call: Call) -> Checked:
    """Write the last token of each sequence, then attend to it.

    Scales of tokens are computed for quantised caches alone: with those of others, `jit`.
    """
    case, rng = call.case, np.random.default_rng(call.seed)
    if case.has_token_scales and case.keys.dtype in DTYPES:
        return (yield from jit(call))
    num_seqs, page_size = len(case.context_lens), case.shape.page_size
    slots = np.full(num_seqs, -1, np.int32)
    for s, length in enumerate(case.lengths()):
        if length:
            page, offset = case.block_tables[s, (length - 1) // page_size], (length - 1) % page_size
            if poison.is_page(page, len(case.keys)):
                slots[s] = int(page) * page_size + offset
    rows = (num_seqs, case.shape.num_kv_heads)
    key = rng.standard_normal((*rows, case.shape.head_dim)).astype(case.dtype)
    value = rng.standard_normal((*rows, case.shape.width)).astype(case.dtype)
    if case.values is None:
        value = None
    pools = oracle.write_kv_cache(
        key, value, case.keys, case.values, slots, cache_layout="NHD", **given_scales(case.scales)
    )
    arrays, static = call.split(case)
    new = {"key": key, "value": value, "slot_mapping": slots}
    results = call.run(_after, static | {"before": "write_kv_cache"}, arrays, new)
    yield _with_pools(case, pools), results


def copy_then_attend(call: Call) -> Checked:
    """Copy pages to others, as a fork of a sequence does, then attend to the copies."""
    rng = np.random.default_rng(call.seed)
    case = call.case.permuted(call.seed, more_pages=2)
    is_page = poison.is_page(case.block_tables, len(case.keys))
    named = np.unique(case.block_tables[is_page & case.needed]).astype(np.int64)
    free = np.setdiff1d(np.arange(len(case.keys)), case.block_tables[is_page])
    sources, targets = (np.full(2, -1, np.int32) for _ in range(2))
    for i, pair in enumerate(zip(rng.permutation(named)[:2], rng.permutation(free)[:2])):
        sources[i], targets[i] = pair
    tables = case.block_tables.copy()
    for source, target in zip(sources, targets):
        if source >= 0:
            tables[tables == source] = target
    case = case.replace(block_tables=tables)
    pools = oracle.copy_kv_cache(
        "page", case.keys, case.values, sources, targets, cache_layout="NHD",
        **given_scales(case.scales),
    )  # fmt: skip
    arrays, static = call.split(case)
    new = {"source_pages": sources, "target_pages": targets}
    results = call.run(_after, static | {"before": "copy_kv_pages"}, arrays, new)
    yield _with_pools(case, pools), results


def _with_pools(case: Any, pools: list[Any]) -> Any:
    """Return the call on other pools and, where tokens have scales, on theirs."""
    keys, values, *scales = pools
    return case.replace(keys=keys, values=values, **({"scales": tuple(scales)} if scales else {}))


def _after(
    operation: str, static: Arrays, backend: ejk.Backend, arrays: Arrays, rows: Arrays
) -> Any:
    """Call the operation on what another one, named `before`, makes of the pools."""
    rest = dict(static)
    before = rest.pop("before")
    pools = {name: arrays.get(name) for name in POOLS}
    changed = getattr(ejk, before)(
        **rows, **pools, cache_layout=rest["cache_layout"], backend=partner(before, backend)
    )
    made = {name: x for name, x in zip(POOLS, changed) if x is not None}
    return perform(operation, rest, backend, arrays | made)


def implemented_as(operation: str) -> str:
    """Name the operation of backends: copies of slots and of pages are one."""
    return "copy_kv_cache" if operation in UNIT_OF else operation


def partner(operation: str, backend: ejk.Backend) -> ejk.Backend | None:
    """Return the backend of another operation that goes with one; None for the best there is."""
    problem_type, own = BACKENDS[implemented_as(operation)]
    for other in _registry.choose(None, problem_type, own).backends:
        if other.name == backend.name and dataclasses.is_dataclass(other):
            interpret = getattr(backend, "interpret", False)
            return dataclasses.replace(other, interpret=interpret) if interpret else other
    return None


def plan(call: Call) -> Checked:
    """With a plan of the call's own lengths, or of an odd seed one of others."""
    arrays, static = call.split(call.case)
    lens = arrays["context_lens"]
    window = "sliding_window"
    facts = call.case.plan_facts() | ({window: static[window]} if window in static else {})
    planned = np.asarray(lens)[:: -1 if call.seed % 2 else 1]
    run = static | {"facts": tuple(facts.items())}
    yield call.case, call.run(_planned, run, arrays, planned)


def _planned(
    operation: str, static: Arrays, backend: ejk.Backend, arrays: Arrays, lens: Any
) -> Any:
    rest = dict(static)
    facts = dict(rest.pop("facts"))
    if "sliding_window" in arrays:
        facts["sliding_window"] = arrays["sliding_window"]
    made = ejk.plan_page_attention(lens, **facts, backend=backend)
    return perform(operation, rest, backend, arrays | {"plan": made})


def prefix_groups(call: Call) -> Checked:
    """With groups that may be right, wrong, or no groups at all."""
    rng = np.random.default_rng(call.seed)
    arrays, static = call.split(call.case)
    groups = rng.choice([-1, 0, 0, 0, 1, 7, -(2**31)], len(call.case.context_lens))
    shared = rng.choice([0, 1, 1, 2, -1, 2**31 - 1], 2)
    named = jnp.asarray(groups, jnp.int32), jnp.asarray(shared, jnp.int32)
    yield call.case, call.run(perform, static, arrays | {"prefix_groups": named})


COMPOSITIONS: Mapping[str, Callable[[Call], Checked]] = {
    "plain": plain, "jit": jit, "vmap": vmap, "vmap of pools": vmap_of_pools, "scan": scan,
    "donated": donated, "write then attend": write_then_attend,
    "copy then attend": copy_then_attend, "plan": plan, "prefix groups": prefix_groups,
    "gradient": gradient,
}  # fmt: skip
"""By name; the simplest first."""


def names_of(operation: str, backend: ejk.Backend) -> list[str]:
    """Name the compositions of an operation that JAX allows a backend."""
    names = ["plain", "jit", "vmap", "vmap of pools", "scan"]
    if operation not in ATTENTIONS:
        names += ["donated"]
        names.remove("vmap")
    else:
        names += ["write then attend", "copy then attend", "prefix groups", "gradient"]
    if operation == "page_attention":
        names += ["plan"]
    if backend.effects:  # `vmap` refuses calls back to Python that keep their order
        names = [name for name in names if "vmap" not in name]
    return names
