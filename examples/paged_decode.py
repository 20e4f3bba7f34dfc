"""Reading and continuing many prompts as one batch over a paged cache: the loop to copy.

Prompts are read in chunks: each call of `prefill_step` takes the next tokens of all of them that
fit, packed row after row, whichever sequences they are of. Then each call of `decode_step` appends
a token to every sequence.

Keys and values live in two pools of pages. A sequence takes a page from the pool whenever its last
one is full, so its pages lie anywhere; its row of `block_tables` says where. All layers share one
pool: layer `l` owns the pages `[l * num_pages, (l + 1) * num_pages)`, so that no layer's cache is
ever sliced, and hence copied, out of a larger array. The pools are donated to every step, which
writes the new tokens in place.

The pools start as NaN, and nothing ever cleans them: what no token has been written to is never
looked at.

A quantised cache holds a value in 8 or 4 bits, and beside its pools two of scales, one for each
token and head. `ejk.write_kv_cache` computes the scales, rounds keys and values, and stores both.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import smollm2
from jax.typing import DTypeLike

import ejk

CacheLayout: TypeAlias = Literal["HND", "NHD", "KV_HEADS_FIRST"]


QUANTISED = {"int8": "int8", "fp8": "float8_e4m3fn", "int4": "int4"}  # dtypes by shorter names


@dataclasses.dataclass(frozen=True)
class CacheSpec:
    """How the pools are laid out; `num_pages` counts the pages of one layer."""

    num_pages: int
    page_size: int
    layout: CacheLayout = "HND"
    cache: str | None = None  # a name in `QUANTISED`; None: the model's own type

    def __post_init__(self) -> None:
        if self.cache is not None and self.cache not in QUANTISED:
            names = ", ".join(map(repr, QUANTISED))
            raise ValueError(f"cache={self.cache!r} must be one of {names}; None: the model's type")

    def empty_pools(self, config: smollm2.Config, dtype: DTypeLike) -> ejk.KVCache:
        """Make the pools of all layers; `dtype` is the model's."""
        return ejk.empty_kv_cache(
            self.num_pages,
            config.num_kv_heads,
            self.page_size,
            config.head_dim,
            num_layers=config.num_layers,
            dtype=QUANTISED[self.cache] if self.cache else dtype,
            cache_layout=self.layout,
            token_scales=self.cache is not None,
        )

    def poisoned_pools(self, config: smollm2.Config, dtype: DTypeLike) -> ejk.KVCache:
        """Make pools in which every slot, or its scale, holds NaN."""

        def poisoned(pool: jax.Array) -> jax.Array:
            is_codes = jnp.issubdtype(pool.dtype, jnp.integer)
            return jnp.full_like(pool, 127 if is_codes else jnp.nan)

        return jax.tree.map(poisoned, self.empty_pools(config, dtype))

    def slot_mapping(self, block_tables: jax.Array, positions: jax.Array) -> jax.Array:
        """Find the slot of one position a row of the table; -1 where it has none."""
        sizes = {"page_size": self.page_size, "num_pages": self.num_pages}
        return ejk.slot_mapping(block_tables, positions, **sizes)

    def of_layer(self, layer: jax.Array, slots: jax.Array, block_tables: jax.Array):
        """Move the slots and the table of one layer to where that layer's pages begin."""
        sizes = {"page_size": self.page_size, "num_pages": self.num_pages}
        return (
            ejk.layer_slot_mapping(slots, layer, **sizes),
            ejk.layer_block_tables(block_tables, layer, num_pages=self.num_pages),
        )


class PageTables:
    """Which sequence holds which pages: the bookkeeping of the host.

    Pages are handed out in a random order, as those of a long-running server would be.
    """

    def __init__(self, num_seqs: int, max_blocks: int, spec: CacheSpec, seed: int):
        self.block_tables = np.full((num_seqs, max_blocks), -1, np.int32)
        self._page_size = spec.page_size
        self._free = np.random.default_rng(seed).permutation(spec.num_pages).tolist()
        self.most_used = 0  # pages, at any one time

    def reserve(self, seq: int, num_tokens: int) -> None:
        """Give the sequence the pages it lacks to hold `num_tokens`."""
        for column in range(-(-num_tokens // self._page_size)):
            if self.block_tables[seq, column] < 0:
                self.block_tables[seq, column] = self._free.pop()
        self.most_used = max(self.most_used, int((self.block_tables >= 0).sum()))

    def release(self, seq: int) -> None:
        """Return all pages of the sequence to the pool."""
        row = self.block_tables[seq]
        self._free.extend(row[row >= 0].tolist())
        row[:] = -1


def write(
    spec: CacheSpec,
    pools: ejk.KVCache,
    key: jax.Array,
    value: jax.Array,
    slots: jax.Array,
    backend: str | ejk.Backend | None,
) -> ejk.KVCache:
    """Write the keys and values of new tokens to their `slots`, in place where JAX may."""
    written = ejk.write_kv_cache(
        key,
        value,
        pools.key_cache,
        pools.value_cache,
        slots,
        key_scale=pools.key_scale,
        value_scale=pools.value_scale,
        cache_layout=spec.layout,
        backend=backend,
    )
    return ejk.KVCache(*written, *pools[len(written) :])  # scales that are given stay


class Chunk(NamedTuple):
    """Prompt tokens of several sequences, packed: those of sequence `s` are the rows
    `[cu_q_lens[s], cu_q_lens[s + 1])`.
    """

    tokens: np.ndarray  # int32 [rows]
    seqs: np.ndarray  # int32 [rows]: whose they are
    positions: np.ndarray  # int32 [rows]: where in the prompt; -1 for rows of padding
    cu_q_lens: np.ndarray  # int32 [num_seqs + 1]
    context_lens: np.ndarray  # int32 [num_seqs]: tokens read of each prompt, these included


def chunks(prompts: Sequence[Sequence[int]], size: int) -> Iterator[Chunk]:
    """Deal out the prompts, one after the other, `size` tokens at a time; pad the last chunk."""
    lens = np.array([len(prompt) for prompt in prompts])
    tokens, seqs = np.concatenate(prompts), np.repeat(np.arange(len(lens)), lens)
    ends = np.cumsum(lens)
    positions = np.arange(len(tokens)) - (ends - lens)[seqs]
    rows = min(size, len(tokens))
    for begin in range(0, len(tokens), rows):
        chosen = slice(begin, begin + rows)
        pad = (0, max(begin + rows - len(tokens), 0))
        bounds = np.clip(np.append(0, ends) - begin, 0, rows)
        bounds = np.minimum(bounds, len(tokens) - begin)
        read = np.clip(begin + rows - (ends - lens), 0, lens)
        chunk = (
            np.pad(tokens[chosen], pad),
            np.pad(seqs[chosen], pad),
            np.pad(positions[chosen], pad, constant_values=-1),
            bounds,
            read,
        )
        yield Chunk(*(x.astype(np.int32) for x in chunk))


@functools.partial(
    jax.jit, static_argnames=("config", "spec", "backend", "write_backend"), donate_argnames="pools"
)
def prefill_step(
    params: smollm2.Params,
    pools: ejk.KVCache,
    chunk: Chunk,
    block_tables: jax.Array,
    *,
    config: smollm2.Config,
    spec: CacheSpec,
    backend: str | ejk.Backend | None = None,
    write_backend: str | ejk.Backend | None = None,
) -> tuple[jax.Array, ejk.KVCache]:
    """Read a chunk of the prompts into their pages; choose what follows the last row of each.

    Each token sees what its sequence has in the pages: earlier chunks, and this one up to itself.
    """
    slots = spec.slot_mapping(block_tables[chunk.seqs], chunk.positions)

    def attend(layer, query, key, value, pools):
        layer_slots, layer_tables = spec.of_layer(layer, slots, block_tables)
        pools = write(spec, pools, key, value, layer_slots, write_backend)
        out = ejk.ragged_page_attention(
            query,
            pools.key_cache,
            pools.value_cache,
            chunk.context_lens,
            layer_tables,
            chunk.cu_q_lens,
            key_scale=pools.key_scale,
            value_scale=pools.value_scale,
            cache_layout=spec.layout,
            backend=backend,
        )
        return out, pools

    hidden, pools = smollm2.hidden_states(
        config, params, chunk.tokens, chunk.positions, attend, pools
    )
    last_rows = jnp.maximum(chunk.cu_q_lens[1:] - 1, 0)
    return _choose(params, hidden[last_rows]), pools


@functools.partial(
    jax.jit, static_argnames=("config", "spec", "backend", "write_backend"), donate_argnames="pools"
)
def decode_step(
    params: smollm2.Params,
    pools: ejk.KVCache,
    tokens: jax.Array,
    context_lens: jax.Array,
    block_tables: jax.Array,
    *,
    config: smollm2.Config,
    spec: CacheSpec,
    backend: str | ejk.Backend | None = None,
    write_backend: str | ejk.Backend | None = None,
) -> tuple[jax.Array, ejk.KVCache]:
    """Append one token (`tokens [num_seqs]`) to each sequence; choose the next tokens.

    `context_lens` counts the new tokens. A sequence that has ended stays in the batch with length
    0: it writes nothing, reads nothing and costs next to nothing.
    """
    positions = context_lens - 1
    slots = spec.slot_mapping(block_tables, positions)

    def attend(layer, query, key, value, pools):
        layer_slots, layer_tables = spec.of_layer(layer, slots, block_tables)
        pools = write(spec, pools, key, value, layer_slots, write_backend)
        out = ejk.page_attention(
            query,
            pools.key_cache,
            pools.value_cache,
            context_lens,
            layer_tables,
            key_scale=pools.key_scale,
            value_scale=pools.value_scale,
            cache_layout=spec.layout,
            backend=backend,
        )
        return out, pools

    hidden, pools = smollm2.hidden_states(config, params, tokens, positions, attend, pools)
    return _choose(params, hidden), pools


def _choose(params: smollm2.Params, hidden: jax.Array) -> jax.Array:
    return jnp.argmax(smollm2.logits(params, hidden), axis=-1).astype(jnp.int32)  # greedy


class Step(NamedTuple):
    """What one step of `stream` has done."""

    new_tokens: dict[int, int]  # by sequence; one that has reached an end token is missing
    most_pages: int  # that the sequences have held at any one time until now


def stream(
    model: smollm2.SmolLM2,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int = 64,
    prefill_chunk: int = 512,
    backend: str | ejk.Backend | None = None,
    prefill_backend: str | ejk.Backend | None = None,
    write_backend: str | ejk.Backend | None = None,
    cache: str | None = None,
    cache_layout: CacheLayout = "HND",
    page_size: int = 16,
    seed: int = 0,
) -> Iterator[Step]:
    """Continue all prompts greedily, and yield what each step has done.

    The first step reads the prompts, every later one is a single call of `decode_step`. After the
    last one no sequence has a new token, or each has `max_new_tokens`.

    Args:
        prompts: tokens of each prompt, none empty.
        prefill_chunk: prompt tokens, of all sequences together, that one call reads.
        backend: passed on to `ejk.page_attention`: None, a name or an object.
        prefill_backend: passed on to `ejk.ragged_page_attention`.
        write_backend: passed on to `ejk.write_kv_cache`.
        cache: how keys and values are held, a name in `QUANTISED`; None: as the model has them.
        seed: of the order in which pages are taken from the pool.
    """
    num_seqs = len(prompts)
    context_lens = np.array([len(prompt) for prompt in prompts], np.int32)
    full_lens = context_lens + max_new_tokens
    if num_seqs == 0 or context_lens.min() == 0 or min(max_new_tokens, prefill_chunk) < 1:
        raise ValueError(
            "there must be a prompt, a token in each, max_new_tokens >= 1 and prefill_chunk >= 1"
        )
    if full_lens.max() > model.config.max_context_len:
        raise ValueError(
            f"the longest prompt and max_new_tokens={max_new_tokens} make {full_lens.max()} "
            f"tokens, and the model has room for {model.config.max_context_len}"
        )
    blocks = -(-full_lens // page_size)
    # Half of the pool stays poison.
    spec = CacheSpec(2 * int(blocks.sum()), page_size, cache_layout, cache)
    tables = PageTables(num_seqs, int(blocks.max()), spec, seed)
    for seq, prompt in enumerate(prompts):
        tables.reserve(seq, len(prompt))

    pools = spec.poisoned_pools(model.config, model.dtype)
    tokens = jnp.zeros(num_seqs, jnp.int32)
    for chunk in chunks(prompts, prefill_chunk):
        chosen, pools = prefill_step(
            model.params,
            pools,
            chunk,
            tables.block_tables,
            config=model.config,
            spec=spec,
            backend=prefill_backend,
            write_backend=write_backend,
        )
        # What was chosen in the middle of a prompt gives way to what its next chunk chooses.
        tokens = jnp.where(np.diff(chunk.cu_q_lens) > 0, chosen, tokens)
    live = set(range(num_seqs))
    for remaining in reversed(range(max_new_tokens)):
        chosen = np.asarray(tokens).tolist()  # waits until the device is done with the tables
        for seq in [seq for seq in live if chosen[seq] in model.end_tokens]:
            live.remove(seq)
            tables.release(seq)
            context_lens[seq] = 0
        yield Step({seq: chosen[seq] for seq in live}, tables.most_used)
        if not (live and remaining):
            return
        for seq in live:
            context_lens[seq] += 1
            tables.reserve(seq, int(context_lens[seq]))
        tokens, pools = decode_step(
            model.params,
            pools,
            tokens,
            context_lens,
            tables.block_tables,
            config=model.config,
            spec=spec,
            backend=backend,
            write_backend=write_backend,
        )


def generate(
    model: smollm2.SmolLM2, prompts: Sequence[Sequence[int]], **options
) -> list[list[int]]:
    """Continue all prompts greedily; return the new tokens of each. Options: those of `stream`."""
    outputs: list[list[int]] = [[] for _ in prompts]
    for step in stream(model, prompts, **options):
        for seq, token in step.new_tokens.items():
            outputs[seq].append(token)
    return outputs
