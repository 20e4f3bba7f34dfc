"""The decode batches that are timed, by name, and their arrays."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


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

    @property
    def token_bytes(self) -> int:
        """Bytes of a token's keys and values."""
        return 2 * self.num_kv_heads * self.head_dim * jnp.dtype(self.dtype).itemsize

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
        return 4 * self.num_heads * self.head_dim * seen


def uniform(name, heads, kv_heads, head_dim, seqs, context, page, **options) -> Workload:
    """Return a batch of `seqs` contexts of one length."""
    return Workload(
        name, heads, kv_heads, head_dim, (context,) * seqs, page, context, tuple(options.items())
    )


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

_W1A, _W4, _W8 = NAMED[0], NAMED[4], NAMED[8]

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

SUITES = {"named": NAMED, "shapes": SHAPES, "options": OPTIONS, "order": ORDER}


class Arrays(NamedTuple):
    """The arguments of a call; the pool holds the pages of `layers` layers, one after another."""

    query: jax.Array  # [num_seqs, num_heads, head_dim]
    key_cache: jax.Array  # [layers * num_pages, num_kv_heads, page_size, head_dim], or as asked
    value_cache: jax.Array
    context_lens: jax.Array  # [num_seqs]
    block_tables: jax.Array  # [num_seqs, max_blocks], pages of layer 0


def arrays(workload: Workload, layers: int, cache_layout: str = "HND", seed: int = 0) -> Arrays:
    """Draw the arrays of a workload: normal values, pages in random order over the pool."""
    w = workload
    shape = {
        "HND": (layers * w.num_pages, w.num_kv_heads, w.page_size, w.head_dim),
        "NHD": (layers * w.num_pages, w.page_size, w.num_kv_heads, w.head_dim),
        "KV_HEADS_FIRST": (w.num_kv_heads, layers * w.num_pages, w.page_size, w.head_dim),
    }[cache_layout]
    keys = jax.random.split(jax.random.key(seed), 3)
    normal = jax.jit(jax.random.normal, static_argnums=(1, 2))
    dtype = jnp.dtype(w.dtype)
    pages = np.arange(w.num_pages, dtype=np.int32)
    if not w.in_order:
        pages = np.random.default_rng(seed).permutation(pages)
    tables = np.full((w.num_seqs, w.max_blocks), -1, np.int32)
    for row, n in zip(tables, w.context_lens):
        used = -(-n // w.page_size)
        row[:used], pages = pages[:used], pages[used:]
    return Arrays(
        1.5 * normal(keys[0], (w.num_seqs, w.num_heads, w.head_dim), dtype),
        normal(keys[1], shape, dtype),
        normal(keys[2], shape, dtype),
        jnp.asarray(w.context_lens, jnp.int32),
        jnp.asarray(tables),
    )
