"""Calls whose integers may be anything, of every operation: 10,000 of them in a run.

    python tests/hostile.py [calls on XLA] [calls on Triton] [calls on Pallas] [seed]
    python tests/hostile.py --shard 0/4     every fourth family of calls of a backend

Lengths, tables, slots, bounds, positions, groups, windows, offsets, sources and targets are drawn
in every integer type: in range, next to it, at the ends of the type, and what narrows, wraps or
clamps to something in range. A call is held to three things: its results are the oracle's; a pool
between two guards of poison, as a layer's is between its neighbours, is read and written alone; and
what a request does not see may be replaced, other requests' pages too, without a bit of its own
results changing. Sizes are fixed, so that one compilation serves all calls of a family.
"""

import argparse
import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

import ejk
from ejk.testing import oracle, poison
from ejk.testing.bits import bits, bits_equal
from ejk.testing.bounds import assert_close
from ejk.testing.configurations import F32, INT8, INTEGERS, Configuration
from ejk.testing.memory import memory_checked
from ejk.testing.page_attention import build
from ejk.testing.ragged_page_attention import build_ragged
from ejk.testing.shapes import Shape

PAGES, SLOTS, HEADS, WIDTH, BLOCKS, SEQS, TOTAL = 6, 2, 2, 4, 4, 3, 7
SHAPE = Shape("hostile", HEADS, HEADS, WIDTH, SLOTS, BLOCKS, PAGES, SEQS)
WINDOWED = frozenset({"sliding_window"})
END = 2**31 - 1
EDGES = (-(2**63), 1 - 2**32, -(2**31), -1, 2**8, 2**16 + 1, END, 2**31, 2**32, 2**32 + 1, 2**63)


def integers(rng: np.random.Generator, shape, size: int) -> np.ndarray:
    """Draw integers of a type that is drawn too; a share of them, drawn as well, below `size`."""
    limits = np.iinfo(rng.choice(np.array(INTEGERS)))
    edges = [x for x in (*EDGES, -size, size - 1, size, size + 1, limits.min, limits.max)
             if limits.min <= x <= limits.max]  # fmt: skip
    inside = rng.integers(0, min(size, limits.max), shape, limits.dtype)
    anything = rng.integers(limits.min, limits.max, shape, limits.dtype, endpoint=True)
    outside = np.where(rng.random(shape) < 0.7, rng.choice(np.array(edges, limits.dtype), shape),
                       anything)  # fmt: skip
    return np.where(rng.random(shape) < rng.choice((0.3, 0.7, 0.95)), inside, outside)


def guarded(rng, pool):
    """Lay a pool `[num_pages, ...]` between two of poison."""
    guard = poison.numbers(rng, pool.shape, pool.dtype)
    return np.concatenate([guard, pool, guard])


def of_layer(ids, unit: str = "page"):
    """Name the same pages or slots of the guarded pool; what is none stays none."""
    if unit == "page":
        return ejk.layer_block_tables(ids.reshape(1, -1), 1, num_pages=PAGES).reshape(ids.shape)
    return ejk.layer_slot_mapping(ids, 1, num_pages=PAGES, page_size=SLOTS)


def groups(rng):
    return integers(rng, SEQS, 2), integers(rng, 2, BLOCKS)


def window(rng):
    return np.int32(rng.choice((1, 2, 3, SHAPE.capacity, END)))


@functools.cache
def _template(is_ragged: bool, cache):
    scales = "none" if cache is None else "token"
    config = Configuration(SHAPE, F32, "HND", WINDOWED, 0, False, cache, scales)
    lens = np.zeros(SEQS, np.int32)
    if not is_ragged:
        return build(config, lens)
    bounds = np.zeros(SEQS + 1, np.int32)
    return build_ragged(config, lens, bounds, total=TOTAL, extras=frozenset({"positions"}))


def _attention_case(rng, is_ragged, cache):
    """Draw a call on a pool of ordinary numbers, all of which anybody may see."""
    case = _template(is_ragged, cache)
    options = {"sliding_window": window(rng)}
    if is_ragged:
        # Positions are 32-bit: what is past them is their end.
        positions = integers(rng, TOTAL, SHAPE.capacity)
        options["positions"] = positions.clip(max(np.iinfo(positions.dtype).min, -1), END)
        case = case.replace(cu_q_lens=integers(rng, SEQS + 1, TOTAL))
    scales = case.scales
    if cache is not None:
        of_tokens = (rng.random((PAGES, SLOTS, HEADS)).astype(np.float32) for _ in range(2))
        scales = tuple(of_tokens)
    keys, values = (poison.ordinary(rng, case.keys.shape, case.keys.dtype) for _ in range(2))
    return case.replace(
        query=poison.ordinary(rng, case.query.shape, F32), keys=keys, values=values, scales=scales,
        context_lens=integers(rng, SEQS, SHAPE.capacity + 1),
        block_tables=integers(rng, (SEQS, BLOCKS), PAGES), options=options,
    )  # fmt: skip


def _of_one(rng, case, seq: int):
    """Replace whatever the sequence does not see, other queries too; return its rows as well."""
    is_ragged = hasattr(case, "cu_q_lens")
    rows = slice(case.bounds[seq], case.bounds[seq + 1]) if is_ragged else slice(seq, seq + 1)
    seen = np.zeros((PAGES, SLOTS), bool)
    for row in range(rows.start, rows.stop):
        for j, _ in case.seen(row)[1]:
            seen[int(case.block_tables[seq, j // SLOTS]), j % SLOTS] = True

    def keep(pool):
        junk = poison.numbers(rng, pool.shape, pool.dtype)
        return np.where(seen.reshape(*seen.shape, *[1] * (pool.ndim - 2)), pool, junk)

    query = poison.numbers(rng, case.query.shape, F32)
    query[rows] = case.query[rows]
    scales = tuple(map(keep, case.scales)) if case.has_token_scales else case.scales
    other = dataclasses.replace(
        case, query=query, keys=keep(case.keys), values=keep(case.values), scales=scales
    )
    return other, rows


def _attend(rng, backend, case, *, is_guarded: bool, **hints):
    """Run a case, its pools between guards or not."""
    is_ragged = hasattr(case, "cu_q_lens")
    function = ejk.ragged_page_attention if is_ragged else ejk.page_attention
    query, keys, values, lens, tables, *bounds = case.operands()
    options = case.semantics()
    if is_guarded:
        keys, values = guarded(rng, keys), guarded(rng, values)
        scales = {n: guarded(rng, options[n]) for n in options if n.endswith("_scale")}
        tables, options = of_layer(tables), options | scales
    found = function(query, keys, values, lens, tables, *bounds, **options, **hints,
                     return_lse=True, backend=backend)  # fmt: skip
    return [np.asarray(x) for x in found]


def attention(rng, backend, *, is_ragged=False, cache=None, with_groups=False):
    """One call, and the same where all that one sequence does not see is replaced."""
    case = _attention_case(rng, is_ragged, cache)
    is_guarded = bool(rng.integers(2))
    hints = {"prefix_groups": groups(rng)} if with_groups else {}
    found = _attend(rng, backend, case, is_guarded=is_guarded, **hints)
    assert_close(case, *found)
    other, rows = _of_one(rng, case, int(rng.integers(SEQS)))
    again = _attend(rng, backend, other, is_guarded=is_guarded, **hints)
    bits_equal([x[rows] for x in found], [x[rows] for x in again])


def planned(rng, backend):
    """One call whose plan was made for other lengths, tables and groups, as hostile as its own."""
    case = _attention_case(rng, False, None)
    case.options["sliding_window"] = jnp.int32(case.options["sliding_window"])  # no static fact
    sizes = dict(num_heads=HEADS, num_kv_heads=HEADS, head_dim=WIDTH, page_size=SLOTS)
    plan = ejk.plan_page_attention(
        integers(rng, SEQS, SHAPE.capacity), **sizes, max_blocks=BLOCKS, backend=backend,
        sliding_window=jnp.int32(window(rng)), prefix_groups=groups(rng),
        block_tables=integers(rng, (SEQS, BLOCKS), PAGES),
    )  # fmt: skip
    found = _attend(rng, backend, case, is_guarded=True, plan=plan, prefix_groups=groups(rng))
    assert_close(case, *found)


@functools.cache
def _on_one_device(backend):
    """Return attention to the pages of a mesh of one device, whose pool has three layers."""
    auto = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((1,), ("pages",), auto, devices=jax.devices()[:1])
    whole = jax.sharding.PartitionSpec()

    def attend(query, keys, values, lens, tables, sliding_window, page_offset):
        return ejk.page_attention(
            query, keys, values, lens, tables, sliding_window=sliding_window, axis_name="pages",
            page_offset=page_offset, return_lse=True, backend=backend,
        )  # fmt: skip

    pool = jax.sharding.PartitionSpec("pages")
    specs = whole, pool, pool, whole, whole, whole, whole
    return jax.jit(jax.shard_map(attend, mesh=mesh, in_specs=specs, out_specs=whole))


def offset(rng, backend):
    """One call with a hostile `page_offset`: what it moves out of the pool is invisible."""
    case = _attention_case(rng, False, None)
    by = integers(rng, (), PAGES).clip(-1, END).astype(np.int32)
    int32 = [ejk.layer_block_tables(x.reshape(1, -1), 0, num_pages=END).reshape(x.shape)
             for x in (case.context_lens, case.block_tables)]  # fmt: skip
    pools = case.operands()[1:3]
    window = np.int32(case.options["sliding_window"])
    found = _on_one_device(backend)(case.query, *pools, *int32, window, by)
    moved = [[int(x) + int(by) if 0 <= x < PAGES and by >= 0 else -1 for x in row]
             for row in case.block_tables]  # fmt: skip
    tables = np.where(np.array(moved) < PAGES, np.array(moved), -1)
    lens = np.array([n if 0 <= n < END else -1 for n in case.context_lens.tolist()])
    assert_close(case.replace(block_tables=tables, context_lens=lens), *map(np.asarray, found))


def _pools(rng, cache):
    """Draw pools of any bits, and scales of their tokens where they are of codes."""
    shape = (PAGES, HEADS, SLOTS, WIDTH)
    pools = [poison.ordinary(rng, shape, cache) for _ in range(2)]
    if cache == F32:
        return pools, {}
    scales = [poison.numbers(rng, shape[:-1], F32) for _ in range(2)]
    return pools, dict(zip(("key_scale", "value_scale"), scales))


def _change(rng, function, expected, pools, scales, ids, unit):
    """Change guarded pools, or bare ones, by hostile ids; hold every bit of them to `expected`."""
    given, is_guarded = [*pools, *scales.values()], rng.integers(2)
    if is_guarded:
        given, ids = [guarded(rng, x) for x in given], [of_layer(x, unit) for x in ids]
    found = function(*given[:2], *ids, **dict(zip(scales, given[2:])))
    expected = [x for x in expected if x is not None]
    if is_guarded:
        middle = slice(PAGES, 2 * PAGES)
        for before, after in zip(given, found):
            outside = np.delete(bits(before), middle, 0), np.delete(bits(after), middle, 0)
            np.testing.assert_array_equal(*outside, "a guard has changed")
        found = [np.asarray(x)[middle] for x in found]
    bits_equal(found, expected)


def write(rng, backend, *, cache=F32):
    """One write to hostile slots."""
    pools, scales = _pools(rng, cache)
    rows = [poison.ordinary(rng, (TOTAL, HEADS, WIDTH), F32) for _ in range(2)]
    slots = integers(rng, TOTAL, PAGES * SLOTS)
    expected = oracle.write_kv_cache(*rows, *pools, slots, **scales)
    function = functools.partial(ejk.write_kv_cache, *rows, backend=backend)
    _change(rng, function, expected, pools, scales, [slots], "slot")


def copy(rng, backend, *, unit, cache=F32):
    """Copies from and to hostile slots or pages."""
    pools, scales = _pools(rng, cache)
    size = PAGES * (SLOTS if unit == "slot" else 1)
    ids = [integers(rng, TOTAL, size) for _ in range(2)]
    expected = oracle.copy_kv_cache(unit, *pools, *ids, **scales)
    function = {"slot": ejk.copy_kv_slots, "page": ejk.copy_kv_pages}[unit]
    _change(rng, functools.partial(function, backend=backend), expected, pools, scales, ids, unit)


def _slot(table, position):
    """Return a token's slot, or -1 where it has none."""
    page = int(table[position // SLOTS]) if 0 <= position < BLOCKS * SLOTS else -1
    return page * SLOTS + position % SLOTS if 0 <= page < PAGES else -1


def helpers(rng, backend):
    """The device's own helpers, against loops over Python's integers."""
    tables = integers(rng, (SEQS, BLOCKS), PAGES)
    positions, lens = (integers(rng, SEQS, SHAPE.capacity) for _ in range(2))
    bounds, accepted = integers(rng, SEQS + 1, TOTAL), integers(rng, (SEQS, 3), 3)
    slots = integers(rng, TOTAL, PAGES * SLOTS)
    sizes = {"page_size": SLOTS, "num_pages": PAGES}
    found = [ejk.slot_mapping(tables, positions, **sizes)]
    expected = [[_slot(row, int(p)) for row, p in zip(tables, positions)]]

    rows, sources, targets = [-1] * TOTAL, [], []
    sane = np.maximum.accumulate([min(max(int(b), 0), TOTAL) for b in bounds]).tolist()
    for s, (begin, end) in enumerate(itertools.pairwise(sane)):
        n = min(max(int(lens[s]), 0), END)
        rows[begin:end] = [_slot(tables[s], n - end + i) for i in range(begin, end)]
        for k, node in enumerate(map(int, accepted[s])):
            is_new = 0 <= node < end - begin and k < end - begin
            for copies, row in ((sources, begin + node), (targets, begin + k)):
                copies.append(min(max(int(slots[row]), -1), END) if is_new else -1)
    found += [ejk.ragged_slot_mapping(tables, lens, bounds, total_tokens=TOTAL, **sizes)]
    found += [*ejk.accepted_slots(slots, accepted, bounds)]
    expected += [rows, sources, targets]
    for x, y in zip(found, expected, strict=True):  # of negative ids one is as good as another
        np.testing.assert_array_equal(np.maximum(x, -1), np.maximum(y, -1))


Family = Callable[..., None]
FAMILIES: dict[str, tuple[Family, str, int]] = {
    "page_attention": (attention, "PageAttention", 2),
    "page_attention, int8": (functools.partial(attention, cache=INT8), "PageAttention", 2),
    "page_attention, groups": (functools.partial(attention, with_groups=True), "PageAttention", 2),
    "page_attention, a stale plan": (planned, "PageAttention", 2),
    "page_attention, offsets": (offset, "PageAttention", 3),
    "ragged_page_attention": (
        functools.partial(attention, is_ragged=True), "RaggedPageAttention", 2
    ),
    "ragged_page_attention, groups": (
        functools.partial(attention, is_ragged=True, with_groups=True), "RaggedPageAttention", 2
    ),
    "write_kv_cache": (write, "WriteKVCache", 30),
    "write_kv_cache, int8": (functools.partial(write, cache=INT8), "WriteKVCache", 17),
    "copy_kv_slots": (functools.partial(copy, unit="slot"), "CopyKVCache", 23),
    "copy_kv_pages, int8": (functools.partial(copy, unit="page", cache=INT8), "CopyKVCache", 12),
    "slot_mapping and its like": (helpers, "", 3),
}  # fmt: skip
"""By name: what checks one drawn call, how the backends' classes end, and the share in percent."""


def check(name: str, backend, count: int, seed: int = 0) -> None:
    """Check `count` drawn calls of a family.

    Raises:
        AssertionError: or another error, with a note that says what draws the call alone.
    """
    one = FAMILIES[name][0]
    for number in range(seed, seed + count):
        try:
            one(np.random.default_rng(number), backend)
        except Exception as error:
            error.add_note(f"hostile.check({name!r}, {backend!r}, 1, seed={number})")
            raise


def check_all(kind: str, count: int, seed: int = 0, names=FAMILIES, **fields) -> None:
    """Check `count` calls on the backends `kind`, of `Xla`, `Triton` and `Pallas`; print how many.

    Interpreted Triton kernels are checked access by access: outside of an array, or of what another
    program stores.
    """
    for name in names:
        _, ending, share = FAMILIES[name]
        if not ending and kind != "Xla":
            continue
        backend = getattr(ejk, kind + ending)(**fields) if ending else None
        calls = -(-count * share // 100)
        with memory_checked() if fields.get("interpret") else contextlib.nullcontext():
            check(name, backend, calls, seed)
        print(f"{calls} calls of {name} on {kind.lower()}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("on_xla", nargs="?", type=int, default=10_000, help="calls")
    parser.add_argument("on_triton", nargs="?", type=int, default=100, help="calls")
    parser.add_argument("on_pallas", nargs="?", type=int, default=20, help="calls, on a CPU")
    parser.add_argument("seed", nargs="?", type=int, default=0)
    parser.add_argument("--shard", default="0/1", metavar="I/N", help="every N-th, from the I-th")
    args = parser.parse_args()
    is_cpu = jax.default_backend() == "cpu"
    fields = {"interpret": True} if is_cpu else {}
    kinds = {"Xla": (args.on_xla, args.seed, {}), "Triton": (args.on_triton, args.seed, fields)}
    if is_cpu:
        kinds["Pallas"] = (args.on_pallas, args.seed, fields)
    number, of = map(int, args.shard.split("/"))
    for kind, name in [*itertools.product(kinds, FAMILIES)][number::of]:
        count, seed, given = kinds[kind]
        check_all(kind, count, seed + args.on_xla * (kind == "Triton"), [name], **given)


if __name__ == "__main__":
    main()
