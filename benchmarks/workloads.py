"""The decode batches that are timed, by name, and their arrays."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import caches
import jax
import jax.numpy as jnp
import numpy as np
from caches import BFLOAT16, CACHES, E4M3, INT8, SOME_CACHES, TINY_CACHES, Cache


@dataclasses.dataclass(frozen=True)
class Workload:
    """New tokens of sequences, one of each but where said, over contexts of `context_lens`."""

    name: str
    num_heads: int
    num_kv_heads: int
    head_dim: int
    context_lens: tuple[int, ...]
    page_size: int
    max_context_len: int
    options: tuple[tuple[str, float | int | str | bool], ...] = ()
    dtype: str = "bfloat16"
    in_order: bool = False  # pages of a sequence follow each other in the pool
    new_tokens: int = 1  # of each sequence; its context counts them
    value_head_dim: int | None = None  # of latent attention: values are the keys' first entries
    cache: Cache | None = None  # None: keys and values of `dtype`
    group: str | None = None  # what takes turns, and is compared with the first of the group

    @property
    def held(self) -> Cache:
        return self.cache or Cache(self.dtype)

    @property
    def latent(self) -> bool:
        return self.value_head_dim is not None

    @property
    def token_bytes(self) -> int:
        """Bytes of a token's keys and values, and of their scales."""
        pools = 1 if self.latent else 2
        return pools * self.num_kv_heads * self.held.row_bytes(self.head_dim)

    @property
    def num_seqs(self) -> int:
        return len(self.context_lens)

    @property
    def max_blocks(self) -> int:
        return -(-self.max_context_len // self.page_size)

    @property
    def num_pages(self) -> int:
        return sum(-(-n // self.page_size) for n in self.context_lens)

    @property
    def pool_bytes(self) -> int:
        """Bytes of the pages of one layer."""
        return self.num_pages * self.page_size * self.token_bytes

    @property
    def kv_bytes(self) -> int:
        """Bytes of keys and values that a call has to read."""
        window = dict(self.options).get("sliding_window")
        tokens = sum(min(n, window) if window else n for n in self.context_lens)
        return tokens * self.token_bytes

    @property
    def flops(self) -> int:
        """Of both products, each new token with the tokens up to itself."""
        new = self.new_tokens
        seen = sum(new * (n - new) + new * (new + 1) // 2 for n in self.context_lens)
        return 2 * self.num_heads * (self.head_dim + (self.value_head_dim or self.head_dim)) * seen


def uniform(name, heads, kv_heads, head_dim, seqs, context, page, **options) -> Workload:
    """Return a batch of `seqs` contexts of one length."""
    return Workload(
        name, heads, kv_heads, head_dim, (context,) * seqs, page, context, tuple(options.items())
    )


def latent(name, heads, seqs, context, page) -> Workload:
    """Return a batch whose keys of 576 have values in their first 512, for all heads the same."""
    lens = (context,) * seqs
    return Workload(name, heads, 1, 576, lens, page, context, value_head_dim=512)


def unequal(name, heads, kv_heads, head_dim, lens) -> Workload:
    return Workload(name, heads, kv_heads, head_dim, tuple(lens), 16, max(lens))


def _lognormal_lens() -> tuple[int, ...]:
    """256 lengths, lognormal, 128 to 8,192: like a chat service's."""
    lens = np.random.default_rng(0).lognormal(np.log(1500), 0.9, 256)
    return tuple(int(n) for n in np.clip(lens, 128, 8192))


NAMED = (
    uniform("W1a", 32, 8, 128, 64, 4096, 16),
    uniform("W1b", 32, 8, 128, 64, 4096, 64),
    uniform("W2", 32, 8, 128, 1, 131072, 64),
    Workload("W3", 32, 8, 128, _lognormal_lens(), 16, 8192),
    uniform("W4", 8, 1, 128, 128, 8192, 16),
    uniform("W5", 32, 32, 128, 32, 4096, 16),
    uniform("W6", 32, 8, 128, 1, 1024, 16),
    uniform("W7", 16, 8, 256, 32, 4096, 16),
    uniform("W8", 64, 8, 128, 16, 32768, 64),
)

_W1A, _W4, _W6, _W8 = NAMED[0], NAMED[4], NAMED[6], NAMED[8]

SHAPES = (
    *(uniform(f"group {g}", 8 * g, 8, 128, 64, 2048, 16) for g in (3, 5, 6, 7)),
    *(uniform(f"head dimension {d}", 32, 8, d, 64, 4096, 16) for d in (64, 80, 96, 112, 192)),
    *(uniform(f"page size {p}", 32, 8, 128, 32, 4608, p) for p in (1, 8, 48, 256)),
    Workload("3 unequal sequences", 32, 8, 128, (131072, 5000, 300), 16, 131072),
    uniform("1024 short sequences", 32, 8, 128, 1024, 128, 16),
    uniform("latent-like 16/1/512", 16, 1, 512, 64, 4096, 64),
)

OPTIONS = (
    _W1A,
    *(
        dataclasses.replace(_W1A, name=f"W1a, {name}", options=((name, value),))
        for name, value in (
            ("attn_logits_soft_cap", 30.0),
            ("sliding_window", 4096),
            ("sinks", 0.5),
            ("alibi_slopes", 0.01),
            ("return_lse", True),
        )
    ),
    dataclasses.replace(_W8, name="W8, window of 1024", options=(("sliding_window", 1024),)),
    uniform("W8 of 1024 tokens", 64, 8, 128, 16, 1024, 64),
)

# What the random order of pages costs, and their size.
ORDER = (
    dataclasses.replace(_W1A, name="W1a, pages in order", in_order=True),
    dataclasses.replace(_W4, name="W4, pages in order", in_order=True),
    dataclasses.replace(_W4, name="W4, page size 256", page_size=256),
)

# Few more programs than multiprocessors, and lengths that no equal cut suits.
WAVES = (
    *(uniform(f"{seqs} x 8,192", 32, 8, 128, seqs, 8192, 16) for seqs in (4, 17, 20)),
    uniform("8/1, 100 x 8,192", 8, 1, 128, 100, 8192, 16),
    uniform("32/32, 9 x 4,096", 32, 32, 128, 9, 4096, 16),
    unequal("16/8/256, 131,072 and 5,000 and 300", 16, 8, 256, (131072, 5000, 300)),
    unequal("16/8/256, 60,000 and 50,000 and 40", 16, 8, 256, (60000, 50000, 40)),
    unequal("8 x 32,768 and 56 x 500", 32, 8, 128, (32768,) * 8 + (500,) * 56),
    unequal("1 x 65,536 and 99 x 2,000", 32, 8, 128, (65536,) + (2000,) * 99),
    unequal("8/1, 2 x 131,072 and 40 x 9,000", 8, 1, 128, (131072,) * 2 + (9000,) * 40),
)

# Batches whose time is that of launches: the wall time a layer counts.
SMALL = (
    _W6,
    *(
        uniform(f"{seqs} x {context:,}", 32, 8, 128, seqs, context, 16)
        for seqs, context in ((1, 256), (4, 1024), (8, 2048), (32, 512))
    ),
)

LATENT = tuple(latent(f"latent, {heads} heads", heads, 64, 4096, 64) for heads in (16, 32, 64, 128))


def of_caches(shape: Workload, kinds: Sequence[Cache]) -> tuple[Workload, ...]:
    """Return the same batch over each kind of cache."""
    return tuple(
        dataclasses.replace(shape, name=f"{shape.name}: {kind.name}", cache=kind, group=shape.name)
        for kind in kinds
    )


QUANTISED = tuple(
    workload
    for shape, kinds in (
        *((uniform(f"64 x 4,096, page {p}", 32, 8, 128, 64, 4096, p), CACHES) for p in (16, 64)),
        (latent("latent 16 heads, 64 x 4,096", 16, 64, 4096, 64), (BFLOAT16, E4M3, INT8)),
        *((uniform(f"{n} x {context:,}", 32, 8, 128, n, context, 16), SOME_CACHES)
          for n, context in ((1, 32768), (1, 1024), (8, 2048))),
        (uniform("32/32/128, 32 x 4,096", 32, 32, 128, 32, 4096, 16), SOME_CACHES),
        (uniform("32/8/64, 64 x 4,096", 32, 8, 64, 64, 4096, 16), SOME_CACHES),
        (uniform("16/8/256, 32 x 4,096", 16, 8, 256, 32, 4096, 16), SOME_CACHES),
        (dataclasses.replace(uniform("float32 queries, 64 x 4,096", 32, 8, 128, 64, 4096, 16),
                             dtype="float32"), (Cache("float32"), BFLOAT16, INT8)),
    )
    for workload in of_caches(shape, kinds)
)  # fmt: skip
TINY_QUANTISED = of_caches(uniform("tiny", 2, 1, 16, 1, 20, 16), TINY_CACHES)

# The map: query heads of models, by head dimension and KV heads. A tensor parallel shard has fewer
# KV heads than its model, and the same group.
HEADS = {
    64: {1: 71, 2: 14, 4: 32, 8: 64, 16: 16, 32: 32},  # Falcon, Qwen 2, TinyLlama, gpt-oss, ...
    128: {1: 8, 2: 12, 4: 28, 8: 40, 16: 32, 32: 32},  # Llama 3, Qwen 2.5 (three), Gemma 3, Llama 2
    256: {1: 8, 2: 16, 4: 8, 8: 16, 16: 16, 32: 32},  # Gemma, Qwen 3 Next, Gemma 2, 3 and 1; none
}
MODELS = (
    *((heads, kv, dim) for dim, of_dim in HEADS.items() for kv, heads in of_dim.items()),
    *((heads, 1, None) for heads in (16, 32, 64, 128)),  # latent
)
BATCHES = (1, 2, 3, 5, 9, 13, 17, 20, 33, 48, 65, 100, 133, 200)
CONTEXTS = (500, 2000, 8000, 32000)


def _of_map(model, lens, page) -> Workload:
    heads, kv_heads, head_dim = model
    contexts = "to".join(f" {n:,} " for n in sorted({min(lens), max(lens)})).strip()
    size = f"{len(lens)} x {contexts}, page {page}"
    if head_dim is None:
        found = latent(f"map latent {heads}, {size}", heads, len(lens), max(lens), page)
    else:
        name = f"map {heads}/{kv_heads}/{head_dim}, {size}"
        found = uniform(name, heads, kv_heads, head_dim, len(lens), max(lens), page)
    return dataclasses.replace(found, context_lens=tuple(lens))


def equal_points(batches, contexts, most_bytes) -> Iterator[Workload]:
    """Yield a workload for every second batch of each model's shape, and both page sizes.

    Its context is the longest that keeps it below `most_bytes`.
    """
    for i, model in enumerate(MODELS):
        for j, seqs in enumerate(batches[i % 2 :: 2]):
            page = (16, 64)[(i // 2 + j) % 2]
            found = [_of_map(model, (context,) * seqs, page) for context in contexts]
            yield next((w for w in reversed(found) if w.kv_bytes <= most_bytes), found[0])


def unequal_points(num_bytes, longest: int) -> Iterator[Workload]:
    """Yield a workload of each model's shape that reads about so much, of unequal lengths.

    They are in turn lognormal; of two lengths, one 16 times the other; and one as long as the rest.
    """
    rng = np.random.default_rng(0)
    for i, model in enumerate(MODELS):
        seqs = int(rng.choice(BATCHES[3:]))
        weights = (
            rng.lognormal(0, 1, seqs),
            np.where(rng.random(seqs) < 0.25, 16.0, 1.0),
            np.where(np.arange(seqs) == seqs // 2, seqs - 1.0, 1.0),
        )[i % 3]
        tokens = num_bytes // _of_map(model, (1,), 16).token_bytes
        lens = np.clip(tokens * weights / weights.sum(), 1, longest)
        yield _of_map(model, [int(n) for n in lens], (16, 64)[i // 3 % 2])


EQUAL = tuple(equal_points(BATCHES, CONTEXTS, most_bytes=3 * 2**29))
MAP = (*EQUAL, *unequal_points(3 * 2**28, longest=131072))

SUITES = {
    "named": NAMED,
    "shapes": SHAPES,
    "options": OPTIONS,
    "order": ORDER,
    "waves": WAVES,
    "small": SMALL,
    "latent": LATENT,
    "map": MAP,
    "quantised": QUANTISED,
}
# So small that they are interpreted on a CPU: 71 query heads of a KV head, and latent attention.
TINY_MAP = tuple(equal_points((1, 3), (20, 70), most_bytes=2**16))[::21]
TINY = {"map": TINY_MAP, "quantised": TINY_QUANTISED}


HEAD_AXIS = {"HND": 1, "NHD": 2, "KV_HEADS_FIRST": 0}


class Arrays(NamedTuple):
    """The arguments of a call; the pool holds the pages of `layers` layers, one after another."""

    query: jax.Array  # [num_seqs, num_heads, head_dim]
    key_cache: jax.Array  # [layers * num_pages, num_kv_heads, page_size, head_dim], or as asked
    value_cache: jax.Array | None  # None of latent attention
    context_lens: jax.Array  # [num_seqs]
    block_tables: jax.Array  # [num_seqs, max_blocks], pages of layer 0
    key_scale: jax.Array | None = None  # as `caches.Pool` has them
    value_scale: jax.Array | None = None


def arrays(
    workload: Workload,
    layers: int,
    cache_layout: str = "HND",
    seed: int = 0,
    key: jax.Array | None = None,
) -> Arrays:
    """Draw the arrays of a workload: normal values, pages in random order over the pool."""
    w = workload
    shape = {
        "HND": (layers * w.num_pages, w.num_kv_heads, w.page_size, w.head_dim),
        "NHD": (layers * w.num_pages, w.page_size, w.num_kv_heads, w.head_dim),
        "KV_HEADS_FIRST": (w.num_kv_heads, layers * w.num_pages, w.page_size, w.head_dim),
    }[cache_layout]
    keys = jax.random.split(jax.random.key(seed) if key is None else key, 3)
    dtype = jnp.dtype(w.dtype)

    @jax.jit
    def pool_of(key):
        rows = jax.random.normal(key, shape, dtype)
        return caches.quantise(w.held, rows, HEAD_AXIS[cache_layout])

    pages = np.arange(w.num_pages, dtype=np.int32)
    if not w.in_order:
        pages = np.random.default_rng(seed).permutation(pages)
    tables = np.full((w.num_seqs, w.max_blocks), -1, np.int32)
    for row, n in zip(tables, w.context_lens):
        used = -(-n // w.page_size)
        row[:used], pages = pages[:used], pages[used:]
    key_pool = pool_of(keys[1])
    value_pool = caches.Pool(None, None) if w.latent else pool_of(keys[2])
    return Arrays(
        1.5 * jax.random.normal(keys[0], (w.num_seqs, w.num_heads, w.head_dim), dtype),
        key_pool.codes,
        value_pool.codes,
        jnp.asarray(w.context_lens, jnp.int32),
        jnp.asarray(tables),
        key_pool.scale,
        value_pool.scale,
    )
