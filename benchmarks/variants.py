"""Small calls that together launch every kernel of a GPU, in each of its variants.

    python benchmarks/variants.py                     runs each once
    python benchmarks/variants.py --repeats 1000      each so often: the same bits every time
    python benchmarks/variants.py --only decode --shard 1/4     those so named, every fourth of them
    python benchmarks/variants.py --backend mosaic_gpu          those of one backend

`reliability.py` starts it, also under compute-sanitizer. The CPU makes what the calls are given,
pools by `ejk.write_kv_cache` in XLA: a GPU runs nothing else, and reads what was copied to it. On a
CPU the kernels of Triton are interpreted, and those of Mosaic left out.
"""

import argparse
import functools
import itertools
import json
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import ejk

platforms = jax.config.jax_platforms
if platforms and "cpu" not in platforms.split(","):  # which makes what the calls are given
    jax.config.update("jax_platforms", f"{platforms},cpu")

INTERPRETED = jax.default_backend() == "cpu"
SHARED = 2  # first pages of a group of sequences


class Variant(NamedTuple):
    """One call: `function` is compiled with `arguments`, a pytree of arrays, traced."""

    function: Callable[..., Any]
    arguments: Any


class Context(NamedTuple):
    """Sequences, and pools that hold their keys and values."""

    cache: ejk.KVCache
    lens: jax.Array
    tables: jax.Array
    keywords: dict[str, Any]  # static: the layout, and the width of latent values
    scales: dict[str, jax.Array]


def rows_of(seed: int, shape: tuple[int, ...], dtype: str) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape, jnp.dtype(dtype))


def context(
    lens: tuple[int, ...],
    *,
    dtype: str = "bfloat16",
    kv_heads: int = 2,
    head_dim: int = 64,
    value_head_dim: int | None = None,
    page: int = 16,
    layout: str = "HND",
    fused: bool = False,
    latent: bool = False,
    cache_dtype: str | None = None,
    scales: str = "none",
    shared: int = 0,
) -> Context:
    """Write the tokens of sequences whose first `shared` pages are the same."""
    blocks = -(-max(lens) // page)
    num_pages = len(lens) * blocks + 2
    tables = np.random.default_rng(0).permutation(num_pages)[: len(lens) * blocks]
    tables = tables.reshape(len(lens), blocks)
    tables[:, :shared] = tables[0, :shared]
    cache = ejk.empty_kv_cache(
        num_pages, kv_heads, page, head_dim, dtype=cache_dtype or dtype, cache_layout=layout,
        value_head_dim=None if latent else value_head_dim, fused=fused, latent=latent,
        token_scales=scales == "token",
    )  # fmt: skip
    given = {"key_scale": cache.key_scale, "value_scale": cache.value_scale}
    if scales == "head":
        given = dict.fromkeys(given, jnp.full(kv_heads, 0.03))
    given = {name: scale for name, scale in given.items() if scale is not None}
    slots, widths = num_pages * page, (head_dim, value_head_dim or head_dim)
    key, value = (rows_of(i, (slots, kv_heads, width), dtype) for i, width in enumerate(widths))
    key_cache, value_cache, *stored = ejk.write_kv_cache(
        key, None if latent else value, cache.key_cache, cache.value_cache, jnp.arange(slots),
        cache_layout=layout, backend="xla", **given,
    )  # fmt: skip
    if scales == "token":
        found = zip(("key_scale", "value_scale"), stored)
        given = {name: scale for name, scale in found if scale is not None}
    keywords = {"cache_layout": layout} | ({"value_head_dim": value_head_dim} if latent else {})
    arrays = (jnp.asarray(x, jnp.int32) for x in (lens, tables))
    return Context(ejk.KVCache(key_cache, value_cache), *arrays, keywords, given)


def options_of(heads: int, every: bool) -> tuple[dict[str, Any], dict[str, jax.Array]]:
    """Return the static options of attention, and those that are arrays; all of them, or none."""
    if not every:
        return {}, {}
    arrays = {"sinks": jnp.linspace(-1, 1, heads), "alibi_slopes": jnp.full(heads, 0.01)}
    return {"sliding_window": 70, "attn_logits_soft_cap": 20.0}, arrays


def one_group(num_seqs: int) -> tuple[jax.Array, jax.Array]:
    """Return `prefix_groups` that say of all sequences that they share their first pages."""
    return jnp.zeros(num_seqs, jnp.int32), jnp.full(1, SHARED, jnp.int32)


def decode(
    backend: Any,
    *,
    heads: int = 8,
    lens: tuple[int, ...] = (200, 33, 1, 300),
    every_option: bool = False,
    splits: int = 0,
    planned: bool = False,
    groups: bool = False,
    lse: bool = True,
    **given: Any,
) -> Variant:
    """A call of `ejk.page_attention`, with a plan of its own, or dealt out by one made before."""
    made = context(lens, shared=SHARED * groups, **given)
    static, arrays = options_of(heads, every_option)
    arrays |= made.scales
    if groups:
        arrays["prefix_groups"] = one_group(len(lens))
    query = rows_of(
        2, (len(lens), heads, given.get("head_dim", 64)), given.get("dtype", "bfloat16")
    )
    call = functools.partial(
        ejk.page_attention, backend=backend, num_splits=splits, return_lse=lse, **static,
        **made.keywords,
    )  # fmt: skip
    arguments = (query, *made.cache[:2], made.lens, made.tables)

    def attend(arguments: Any, arrays: Any) -> Any:
        if not planned:
            return call(*arguments, **arrays)
        plan = ejk.plan_page_attention(
            arguments[3], num_heads=heads, num_kv_heads=given.get("kv_heads", 2),
            head_dim=given.get("head_dim", 64), page_size=given.get("page", 16),
            max_blocks=arguments[4].shape[1], sliding_window=static.get("sliding_window"),
            prefix_groups=arrays.get("prefix_groups"), cache_dtype=arguments[1].dtype,
            block_tables=arguments[4] if groups else None, backend=backend,
            **{name: x for name, x in made.keywords.items() if name == "value_head_dim"},
        )  # fmt: skip
        return call(*arguments, plan=plan, **arrays)

    return Variant(attend, (arguments, arrays))


def ragged(
    backend: Any,
    *,
    heads: int = 8,
    lens: tuple[int, ...] = (200, 33, 300),
    new: tuple[int, ...] = (1, 8, 150),
    every_option: bool = False,
    tree: bool = False,
    causal: bool = True,
    groups: bool = False,
    **given: Any,
) -> Variant:
    """A call of `ejk.ragged_page_attention`: few new tokens of one sequence, many of another."""
    made = context(lens, shared=SHARED * groups, **given)
    static, arrays = options_of(heads, every_option)
    static |= {} if causal else {"causal": False}
    arrays |= made.scales
    total = sum(new) + 2  # the last two are nobody's
    if tree:
        mask = jax.random.bernoulli(jax.random.key(3), 0.6, (total, 16))
        arrays |= {"tree_mask": mask, "positions": jnp.arange(total, dtype=jnp.int32)}
    if groups:
        arrays["prefix_groups"] = one_group(len(lens))
    query = rows_of(2, (total, heads, given.get("head_dim", 64)), given.get("dtype", "bfloat16"))
    bounds = jnp.asarray(np.cumsum([0, *new]), jnp.int32)
    call = functools.partial(
        ejk.ragged_page_attention, backend=backend, return_lse=True, **static, **made.keywords
    )
    arguments = (query, *made.cache[:2], made.lens, made.tables, bounds)
    return Variant(lambda arguments, arrays: call(*arguments, **arrays), (arguments, arrays))


def write(backend: Any, *, tokens: int = 40, **given: Any) -> Variant:
    """A call of `ejk.write_kv_cache`: slots meet, and some are outside."""
    made = context((max(48, tokens),), **given)
    pool, dtype = made.cache, given.get("dtype", "bfloat16")
    widths = given.get("head_dim", 64), given.get("value_head_dim") or given.get("head_dim", 64)
    rows = [rows_of(i, (tokens, given.get("kv_heads", 2), width), dtype) for i, width in
            enumerate(widths, 5)]  # fmt: skip
    slots = np.random.default_rng(1).integers(-3, tokens, tokens).astype(np.int32)
    call = functools.partial(
        ejk.write_kv_cache, backend=backend, cache_layout=made.keywords["cache_layout"]
    )
    value = None if given.get("latent") else rows[1]
    arguments = (rows[0], value, *pool[:2], jnp.asarray(slots))
    return Variant(lambda arguments, scales: call(*arguments, **scales), (arguments, made.scales))


def copy(backend: Any, unit: str, *, copies: int = 20, **given: Any) -> Variant:
    """A copy of slots or pages: a cycle, what meets, and what is outside."""
    made = context((max(48, copies) if unit == "slots" else 16 * copies,), **given)
    operation = {"slots": ejk.copy_kv_slots, "pages": ejk.copy_kv_pages}[unit]
    rng = np.random.default_rng(2)
    sources, targets = (rng.integers(-2, copies, copies).astype(np.int32) for _ in range(2))
    sources[:3], targets[:3] = (0, 1, 2), (1, 2, 0)
    call = functools.partial(operation, backend=backend, cache_layout=made.keywords["cache_layout"])
    arguments = (*made.cache[:2], jnp.asarray(sources), jnp.asarray(targets))
    return Variant(lambda arguments, scales: call(*arguments, **scales), (arguments, made.scales))


KINDS: dict[str, dict[str, Any]] = {
    "int8 per token": {"cache_dtype": "int8", "scales": "token"},
    "int8 per head": {"cache_dtype": "int8", "scales": "head"},
    "int4 per token": {"cache_dtype": "int4", "scales": "token"},
    "e4m3": {"cache_dtype": "float8_e4m3fn"},
    "e4m3 per token": {"cache_dtype": "float8_e4m3fn", "scales": "token"},
    "e5m2 per head": {"cache_dtype": "float8_e5m2", "scales": "head"},
}
WIDTHS: dict[str, dict[str, Any]] = {
    "32 wide": {"head_dim": 32},
    "33 wide, values of 17, pages of 3": {"head_dim": 33, "value_head_dim": 17, "page": 3},
    "128 wide, pages of 1": {"head_dim": 128, "page": 1},
    "256 wide, pages of 48": {"head_dim": 256, "page": 48},
}
LAYOUTS: dict[str, dict[str, Any]] = {
    "NHD": {"layout": "NHD"},
    "KV_HEADS_FIRST": {"layout": "KV_HEADS_FIRST"},
    "INTERLEAVED": {"layout": "INTERLEAVED"},
    "fused": {"fused": True},
}
DTYPES: dict[str, dict[str, Any]] = {
    "float32": {"dtype": "float32"},
    "float16": {"dtype": "float16"},
}
LATENT: dict[str, Any] = {"latent": True, "kv_heads": 1, "head_dim": 576, "value_head_dim": 512}
OPTIONS: dict[str, dict[str, Any]] = {"every option": {"every_option": True}}
MANY = 9000  # writes that are sorted, not compared

LARGE = "sorted", "long"  # too much for an interpreter

PLANNED: dict[str, Any] = {"planned": True, "lens": (700, 3, 130, 1, 0, 90)}
DECODE = {
    "its own splits": {},
    "one piece": {"splits": 1},
    "in three parts": {"splits": 3},
    "long": {"lens": (4000, 7)},
    "planned": PLANNED,
    "planned, every option": PLANNED | {"every_option": True},
    "planned, one prefix for all": {"planned": True, "lens": (700, 99, 40, 33), "groups": True},
    "no LSE": {"lse": False},
    "latent": LATENT | {"heads": 16},
    "latent, in three parts": LATENT | {"heads": 16, "splits": 3},
} | OPTIONS | WIDTHS | LAYOUTS | DTYPES | KINDS  # fmt: skip
RAGGED = {
    "mixed": {},
    "few new tokens": {"new": (1, 4, 2)},
    "tree": {"tree": True, "new": (4, 8, 9)},
    "not causal": {"causal": False},
    "one prefix for all": {"groups": True, "new": (4, 2, 3)},
    "long": {"lens": (4000, 7), "new": (3, 2)},
    "latent": LATENT | {"heads": 16},
} | OPTIONS | WIDTHS | LAYOUTS | DTYPES | KINDS  # fmt: skip
WRITES = {"bfloat16": {}, "sorted": {"tokens": MANY, "head_dim": 8}, "latent": LATENT}
WRITES |= WIDTHS | LAYOUTS | DTYPES | KINDS
COPIES = {"bfloat16": {}, "by a table": {"copies": 2000, "head_dim": 8}, "latent": LATENT}
COPIES |= LAYOUTS | {name: KINDS[name] for name in ("int8 per token", "int4 per token", "e4m3")}
HOPPER_RAGGED = {
    "64 wide": {},
    "128 wide, every option": {"head_dim": 128, "every_option": True},
    "256 wide, float16": {"head_dim": 256, "dtype": "float16"},
    "long": {"head_dim": 128, "lens": (9000,), "new": (200,)},
    "128 wide, e4m3 per head": {
        "head_dim": 128, "cache_dtype": "float8_e4m3fn", "scales": "head"
    },
    "128 wide, int8 per token": {"head_dim": 128, **KINDS["int8 per token"]},
}  # fmt: skip
HOPPER_DECODE = {
    "latent": LATENT | {"heads": 64, "lens": (300, 65, 1)},
    "latent, window, in three parts, float16": LATENT
    | {"heads": 64, "lens": (300, 65, 1), "splits": 3, "dtype": "float16"},
    "latent, planned": LATENT | {"heads": 64, **PLANNED},
}


def variants() -> Iterator[tuple[str, str, Callable[[Any], Variant]]]:
    """Yield the name of each variant, the backend it asks for, and what makes the call."""
    for name, given in DECODE.items():
        yield f"decode: {name}", "triton", functools.partial(decode, **given)
    for name, given in RAGGED.items():
        yield f"ragged: {name}", "triton", functools.partial(ragged, **given)
    for name, given in WRITES.items():
        yield f"write: {name}", "triton", functools.partial(write, **given)
    for unit, (name, given) in zip(itertools.cycle(("slots", "pages")), COPIES.items()):
        yield f"copy {unit}: {name}", "triton", functools.partial(copy, unit=unit, **given)
    for name, given in HOPPER_DECODE.items():
        yield f"decode on Hopper: {name}", "mosaic_gpu", functools.partial(decode, **given)
    for name, given in HOPPER_RAGGED.items():
        yield f"ragged on Hopper: {name}", "mosaic_gpu", functools.partial(ragged, **given)


CLASSES: dict[str, dict[str, Any]] = {
    "triton": {
        "decode": ejk.TritonPageAttention,
        "ragged": ejk.TritonRaggedPageAttention,
        "write": ejk.TritonWriteKVCache,
        "copy": ejk.TritonCopyKVCache,
    },
    "mosaic_gpu": {
        "decode": ejk.MosaicGpuPageAttention,
        "ragged": ejk.MosaicGpuRaggedPageAttention,
    },
}


def backend_of(name: str, backend: str, **fields: Any) -> Any:
    """Return what runs a variant: plans for few programs, prefixes however little they save."""
    if "planned" in name:
        fields |= {"num_sms": 16}
    if "prefix" in name:
        fields |= {"least_saved_bytes": 0}
    return CLASSES[backend][name.split()[0].rstrip(":")](interpret=INTERPRETED, **fields)


def chosen(
    only: list[str], shard: str, xla: bool, wanted: str | None = None
) -> list[tuple[str, Callable[[], Variant]]]:
    """Return the variants that are here to be run, all or those of the backend `wanted`."""
    number, of = map(int, shard.split("/"))
    found = [
        (name, functools.partial(make, "xla" if xla else backend_of(name, backend)))
        for name, backend, make in variants()
        if any(word in name for word in only)
        and wanted in (None, backend)
        and not (backend == "mosaic_gpu" and (INTERPRETED or xla))
        and not (INTERPRETED and not xla and any(word in name for word in LARGE))
    ]
    return found[number::of]


def bits(results: Any) -> list[bytes]:
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(results)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--only", nargs="+", default=[""], metavar="WORD", help="of the names")
    parser.add_argument("--shard", default="0/1", metavar="I/N", help="every N-th, from the I-th")
    parser.add_argument("--xla", action="store_true", help="the same calls on XLA")
    parser.add_argument("--backend", choices=[*CLASSES], help="those of one backend alone")
    args = parser.parse_args()
    for word in args.only:
        if not chosen([word], "0/1", args.xla):
            parser.exit(2, f"--only {word!r} is in the name of no variant that runs here\n")
    calls, failed = 0, []
    [host] = jax.local_devices(backend="cpu")[:1]
    device = jax.local_devices()[0]
    found = chosen(args.only, args.shard, args.xla, args.backend)
    for name, make in found:
        begin = time.perf_counter()
        with jax.default_device(host):
            function, arguments = make()
        arguments = jax.device_put(arguments, device)
        run = jax.jit(function)
        first = bits(run(*arguments))
        # A batch of calls is in flight at a time: the device does not wait for the host.
        for done in range(1, args.repeats, 50):
            results = [run(*arguments) for _ in range(min(50, args.repeats - done))]
            if any(bits(result) != first for result in results):
                failed.append(f"{name}: other bits in call {done} to {done + 50}")
                break
        calls += args.repeats
        print(f"{name}: {time.perf_counter() - begin:.1f} s", flush=True)
    counts = {"variants": len(found), "calls": calls}
    print(json.dumps({"counts": counts, "found": failed}))
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
