"""The ragged batches that are timed, by suite and name, and their arrays."""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import caches
import jax
import jax.numpy as jnp
import numpy as np
import workloads
from caches import Cache

FAR = 2**20  # a window that exceeds every context: it hides nothing, and the kernel has to ask
PLAIN = "prefill 8 x 4,096, page 16"


@dataclasses.dataclass(frozen=True)
class Batch:
    """`q_lens` new tokens on contexts of `context_lens`, which count them."""

    name: str
    q_lens: tuple[int, ...]
    context_lens: tuple[int, ...]
    page_size: int
    num_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 128
    value_head_dim: int | None = None  # of latent attention
    options: tuple[tuple[str, float | int | bool], ...] = ()
    base: str | None = None  # the batch of the same suite that its time is compared with
    cache: Cache | None = None  # None: bfloat16
    sharing: tuple[int, int] | None = None  # sequences of a group, and first tokens that it shares

    @property
    def total_tokens(self) -> int:
        return sum(self.q_lens)

    @property
    def window(self) -> int:
        return int(dict(self.options).get("sliding_window", FAR))

    @property
    def flops(self) -> int:
        """Of both products, each token with those that it sees."""
        seen = sum(
            int(np.minimum(np.arange(n - q, n) + 1, self.window).sum())
            for q, n in zip(self.q_lens, self.context_lens)
        )
        return 2 * self.num_heads * (self.head_dim + (self.value_head_dim or self.head_dim)) * seen

    @property
    def calls(self) -> int:
        """Chained calls of a program that is timed: it should take a millisecond or more.

        In latent attention the output is narrower than a query, and there is no chain.
        """
        return 1 if self.flops > 3e11 or self.value_head_dim is not None else 4

    @property
    def pages(self) -> workloads.Workload:
        """The contexts as a decode batch has them."""
        return workloads.Workload(
            self.name, self.num_heads, self.num_kv_heads, self.head_dim, self.context_lens,
            self.page_size, max(self.context_lens), value_head_dim=self.value_head_dim,
            cache=self.cache,
        )  # fmt: skip

    def num_blocks(self, rows: int = 128, block_kv: int = 128) -> int:
        """Count blocks of keys that tiles of so many query rows have to see."""
        tokens, found = rows * self.num_kv_heads // self.num_heads, 0
        for q, n in zip(self.q_lens, self.context_lens):
            first = np.arange(n - q, n, tokens)
            last = np.minimum(first + tokens, n) - 1
            first = np.maximum(first - self.window + 1, 0)
            found += int((last // block_kv - first // block_kv + 1).sum())
        return found


def _named(name: str, parts, page_size: int, **facts) -> Batch:
    """Make a batch of parts: how many sequences, the new tokens and the context of each."""
    lens = [(q, n) for count, q, n in parts for _ in range(count)]
    q_lens, context_lens = zip(*lens)
    return Batch(f"{name}, page {page_size}", q_lens, context_lens, page_size, **facts)


def unequal_lens(count: int, total: int) -> list[int]:
    """Draw lengths of prompts, lognormal as a chat service's are: about 1 to 40."""
    weights = np.random.default_rng(0).lognormal(0, 1, count)
    ends = np.round(np.cumsum(weights) / weights.sum() * total).astype(int)
    return [int(n) for n in np.diff(ends, prepend=0)]


def _of_page(page_size: int, scale: int = 1) -> dict[str, list[Batch]]:
    """Everything that is timed with pages of one size; a `scale` makes it that much smaller."""
    some = 8 if scale == 1 else 2

    def batch(name, *parts):
        smaller = [(count, q // scale or q, n // scale) for count, q, n in parts]
        return _named(name, smaller, page_size)

    many = 32 if scale == 1 else 3
    chunks, decodes = (4, 512, 4096), (60 if scale == 1 else 3, 1, 4096)
    prompts = [(1, n, n) for n in unequal_lens(3 * some, 32768 // scale)]
    return {
        "prefill": [
            batch("prefill 8 x 4,096", (some, 4096, 4096)),
        ],
        "long": [
            batch("prefill 1 x 32,768", (1, 32768, 32768)),
        ],
        "chunks": [
            batch("8 chunks of 512 on 16,384", (some, 512, 16384)),
            _named("24 unequal prompts", prompts, page_size, base=PLAIN),
        ],
        "mixed": [
            batch("mixed", chunks, decodes),
            batch("mixed: its chunks", chunks),
            batch("mixed: its decodes", decodes),
        ],
        "drafts": [
            batch("verification of 8 on 8,192", (many, 8, 8192)),
            batch("verification: its decode", (many, 1, 8192)),
        ],
    }


def drafts(own: workloads.Workload) -> Batch:
    """Four drafted tokens of each sequence of a decode batch."""
    shape = own.page_size, own.num_heads, own.num_kv_heads, own.head_dim, own.value_head_dim
    return Batch(f"{own.name}: verification of 4", (4,) * own.num_seqs, own.context_lens, *shape)


def _latent() -> list[Batch]:
    """Drafts of few heads, which share a program's rows, and chunks of prompts."""

    def batch(name: str, heads: int, *parts: tuple[int, int, int]) -> Batch:
        return _named(
            f"latent, {heads} heads: {name}", parts, 64, num_heads=heads, num_kv_heads=1,
            head_dim=576, value_head_dim=512,
        )  # fmt: skip

    rng = np.random.default_rng(0)
    unequal = [(1, 8, int(n)) for n in rng.integers(200, 16_000, 40)]
    short = (16, 64, 16), (32, 8, 64), (16, 64, 64)
    prompts = (16, 16, 512), (16, 8, 1024), (64, 16, 256)
    uncut = (16, 4, 10_000), (64, 2, 8192)  # more parts than are cut
    return [
        *(
            batch(f"verification of {n} on 4,096", heads, (64, n, 4096))
            for heads, n in ((16, 3), (16, 5), (16, 8), (32, 2), (32, 3), (8, 16))
        ),
        batch("verification of 8, 40 unequal contexts", 16, *unequal),
        *(
            batch(f"chunks of {n} on 4,096", heads, (8, n, 4096))
            for heads, n in ((16, 512), (16, 1024), (16, 2048), (64, 256), (64, 512))
        ),
        *(
            batch(f"{count} prompts of {n}", heads, (count, n, n))
            for heads, count, n in (*short, *prompts, *uncut)
        ),
        batch("4 chunks of 256 and 60 decodes on 4,096", 16, (4, 256, 4096), (60, 1, 4096)),
    ]


def _verifications() -> list[Batch]:
    """Drafts of other lengths and heads, on as many tokens, about which of two kernels is ahead."""
    on = "on 8,192"
    return [
        *(_named(f"verification of {n} {on}", [(32, n, 8192)], 16) for n in (2, 4, 16, 32, 64)),
        *(
            _named(
                f"verification of 8 {on}, {heads}/8/{dim}", [(32, 8, 8192)], 16, num_heads=heads,
                num_kv_heads=8, head_dim=dim,
            )
            for heads, dim in ((8, 128), (64, 128), (32, 64))
        ),
        *(
            _named(f"verification of {n} on {count} x {length:,}, 32/8/64", [(count, n, length)],
                   16, head_dim=64)
            for n, count, length in ((16, 32, 8192), (32, 32, 8192), (8, 128, 1024), (8, 4, 32768))
        ),
        _named("verification of 8 on 4 x 32,768", [(4, 8, 32768)], 16),
        _named("verification of 8 on 128 x 1,024", [(128, 8, 1024)], 16),
    ]  # fmt: skip


def _sharing(
    name: str, seqs: int, q_len: int, group: int, shared: int, own: int, scale: int = 1
) -> Batch:
    """Make a batch in groups that each share so many tokens, beside their own."""
    shared, own = shared // scale, own // scale
    return _named(name, [(seqs, q_len, shared + own)], 16, sharing=(group, shared))


def _prefixes(scale: int = 1) -> list[Batch]:
    """Prompts of one group, of several, and groups that do not pay."""
    seqs = 64 if scale == 1 else 4
    return [
        _sharing("4 new, one group on 16,384", seqs, 4, seqs, 16384, 256, scale),
        _sharing("1 new, one group on 16,384", seqs, 1, seqs, 16384, 256, scale),
        _sharing("4 new, groups of 16 on 4,096", 2 * seqs, 4, seqs // 4, 4096, 256, scale),
        _sharing("64 new, one group on 4,096", seqs // 2, 64, seqs // 2, 4096, 256, scale),
        _sharing("4 new, pairs on 0", seqs, 4, 2, 0, 4096, scale),
    ]


SHAPES = ((32, 32, 128), (32, 8, 64), (8, 4, 256))
OPTIONS = {
    "LSE": ("return_lse", True),
    "window far away": ("sliding_window", FAR),
    "sinks": ("sinks", 0.5),
    "soft cap": ("attn_logits_soft_cap", 30.0),
}


def _with(name: str, batch: Batch, option) -> Batch:
    return dataclasses.replace(
        batch, name=f"{batch.name}, {name}", options=(option,), base=batch.name
    )


def _of_caches(batch: Batch, kinds: Sequence[Cache]) -> list[Batch]:
    """Return the same batch over each kind of cache, all compared with the first."""
    names = [f"{batch.name}: {kind.name}" for kind in kinds]
    return [
        dataclasses.replace(batch, name=name, cache=kind, base=names[0] if i else None)
        for i, (name, kind) in enumerate(zip(names, kinds))
    ]


def _suites() -> dict[str, list[Batch]]:
    """Batches of a suite take turns, so that their times compare.

    Long calls are apart from short ones, which they would slow: the card slows as it heats.
    """
    found: dict[str, list[Batch]] = {}
    for name, batches in itertools.chain(_of_page(16).items(), _of_page(64).items()):
        found.setdefault(name, []).extend(batches)
    [plain, _], [long, _] = found["prefill"], found["long"]
    found["chunks"].append(plain)
    found["drafts"] += _verifications()
    found["shapes"] = [
        _named(
            "prefill 8 x 4,096, " + "/".join(map(str, shape)), [(8, 4096, 4096)], 16,
            num_heads=shape[0], num_kv_heads=shape[1], head_dim=shape[2],
        )
        for shape in SHAPES
    ]  # fmt: skip
    found["options"] = [plain, *(_with(name, plain, option) for name, option in OPTIONS.items())]
    found["window"] = [long, _with("window of 1,024", long, ("sliding_window", 1024))]
    found["small"] = [
        _named("prefill 1 x 256", [(1, 256, 256)], 16),
        _named("4 chunks of 64 on 1,024", [(4, 64, 1024)], 16),
    ]
    found["latent"] = [*(drafts(workload) for workload in workloads.LATENT), *_latent()]
    found["quantised"] = _of_caches(plain, caches.FEW_CACHES)
    found["prefix"] = _prefixes()
    found["layers"] = [plain, found["mixed"][0], *found["small"]]
    return found


def _tiny() -> dict[str, list[Batch]]:
    """As many kinds of blocks, a hundredth of the work."""
    found = {
        suite: [
            dataclasses.replace(batch, num_heads=4, num_kv_heads=2, head_dim=16)
            for batch in batches
        ]
        for suite, batches in (_of_page(16, 128) | {"prefix": _prefixes(128)[:1]}).items()
    }
    [plain], [long] = found["prefill"], found["long"]
    found["options"] = [plain, *(_with(name, plain, option) for name, option in OPTIONS.items())]
    found["window"] = [long, _with("window of 20", long, ("sliding_window", 20))]
    found["latent"] = [drafts(workloads.latent("latent", 16, 2, 20, 16))]
    found["quantised"] = _of_caches(plain, caches.TINY_CACHES)
    found["layers"] = [plain]
    found["hopper"] = [_named("Hopper", [(1, 24, 40)], 16, num_heads=2, num_kv_heads=1)]
    return found


def each(suites: dict[str, list[Batch]]) -> list[Batch]:
    """Return the batches of suites, each once."""
    return list({batch.name: batch for suite in suites.values() for batch in suite}.values())


SUITES, TINY = _suites(), _tiny()
BATCHES = each(SUITES)


class Arrays(NamedTuple):
    """The arguments of a ragged call, and the same keys and values without pages."""

    query: jax.Array  # [total_tokens, num_heads, head_dim]
    key_cache: jax.Array  # [num_pages, num_kv_heads, page_size, head_dim]
    value_cache: jax.Array | None  # None of latent attention
    context_lens: jax.Array
    block_tables: jax.Array
    cu_q_lens: jax.Array
    key_scale: jax.Array | None = None  # as `caches.Pool` has them
    value_scale: jax.Array | None = None
    prefix_groups: tuple[jax.Array, jax.Array] | None = None


def arrays(batch: Batch) -> Arrays:
    paged = workloads.arrays(batch.pages, 1)
    shape = (batch.total_tokens, batch.num_heads, batch.head_dim)
    query = 1.5 * jax.random.normal(jax.random.key(9), shape, jnp.bfloat16)
    bounds = jnp.asarray(np.cumsum((0, *batch.q_lens)), jnp.int32)
    given = Arrays(query, *paged[1:5], bounds, paged.key_scale, paged.value_scale)
    return given if batch.sharing is None else _in_groups(batch.sharing, batch.page_size, given)


def _in_groups(sharing: tuple[int, int], page_size: int, given: Arrays) -> Arrays:
    """Let the tables of each group begin with the pages of its first sequence."""
    (group, tokens), tables = sharing, given.block_tables
    row, pages = jnp.arange(tables.shape[0], dtype=jnp.int32), tokens // page_size
    is_shared = jnp.arange(tables.shape[1]) < pages
    tables = jnp.where(is_shared, tables[row // group * group], tables)
    groups = row // group, jnp.full((tables.shape[0] // group,), pages, jnp.int32)
    return given._replace(block_tables=tables, prefix_groups=groups)
