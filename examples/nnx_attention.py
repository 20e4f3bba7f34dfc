"""Paged attention as a layer of Flax NNX: its pages are `nnx.Cache` variables, as NNX has them.

The same call reads prompts, whole or in chunks, and decodes: it takes the arrays that the page
manager `ejk.paging.PageManager` makes of a batch. Each layer has pools of its own, so one table and
one mapping of slots serve all of them. `step` donates the cache, and keys and values are written
in place.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from decoder import rotated
from flax import nnx

import ejk
from ejk.paging import BatchInputs, PageManager


class PagedAttention(nnx.Module):
    """Causal self-attention over pages, with grouped query heads and rotary positions.

    Args:
        features: entries of the input and of the output.
        num_heads: of the queries.
        num_kv_heads: of keys and values, a divisor of `num_heads`.
        head_dim: entries of a head.
        backend: of `ejk`: None for the best one, a name or an object.
        rngs: as of every NNX layer.
    """

    def __init__(
        self,
        features: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        backend: str | ejk.Backend | None = None,
        rngs: nnx.Rngs,
    ):
        project = functools.partial(nnx.LinearGeneral, features, use_bias=False, rngs=rngs)
        self.query = project((num_heads, head_dim))
        self.key = project((num_kv_heads, head_dim))
        self.value = project((num_kv_heads, head_dim))
        self.out = nnx.LinearGeneral(
            (num_heads, head_dim), features, axis=(-2, -1), use_bias=False, rngs=rngs
        )
        self.num_kv_heads, self.head_dim, self.backend = num_kv_heads, head_dim, backend

    def init_cache(self, num_pages: int, page_size: int, dtype: str = "float32") -> None:
        """Make room for the keys and values of `num_pages * page_size` tokens."""
        sizes = (num_pages, self.num_kv_heads, page_size, self.head_dim)
        cache = ejk.empty_kv_cache(*sizes, dtype=dtype)
        self.key_cache, self.value_cache = map(nnx.Cache, cache[:2])

    def __call__(self, x: jax.Array, inputs: BatchInputs, *, decode: bool = False) -> jax.Array:
        """Attend from the new tokens of a batch to all tokens of their sequences.

        Args:
            x: `[num_tokens, features]`, the new tokens, packed sequence after sequence.
            inputs: where they are, and what their sequences have in the pages.
            decode: every sequence has one token at most: `batch.max_q_len == 1`. It is faster.
        """
        query = rotated(self.query(x), inputs.positions)
        key, value = rotated(self.key(x), inputs.positions), self.value(x)
        pools = self.key_cache[...], self.value_cache[...]
        pools = ejk.write_kv_cache(key, value, *pools, inputs.slot_mapping)
        self.key_cache[...], self.value_cache[...] = pools
        where = (*pools, inputs.context_lens, inputs.block_tables)
        if decode:
            out = ejk.page_attention(query, *where, backend=self.backend)
        else:
            out = ejk.ragged_page_attention(query, *where, inputs.cu_q_lens, backend=self.backend)
        return self.out(out)


class Decoder(nnx.Module):
    """A language model of such layers: as small as one can be."""

    def __init__(self, vocabulary: int, num_layers: int, *, rngs: nnx.Rngs):
        self.embed = nnx.Embed(vocabulary, 64, rngs=rngs)
        self.layers = nnx.List([PagedAttention(64, 4, 2, 16, rngs=rngs) for _ in range(num_layers)])
        self.norm = nnx.RMSNorm(64, rngs=rngs)
        self.head = nnx.Linear(64, vocabulary, use_bias=False, rngs=rngs)

    def __call__(self, inputs: BatchInputs, *, decode: bool = False) -> jax.Array:
        x = self.embed(inputs.tokens)
        for layer in self.layers:
            x = x + layer(self.norm(x), inputs, decode=decode)
        return self.head(self.norm(x))


@functools.partial(jax.jit, static_argnames=("graph", "decode"), donate_argnames="cache")
def step(
    graph: nnx.GraphDef, cache: nnx.State, params: nnx.State, inputs: BatchInputs, decode: bool
) -> tuple[jax.Array, nnx.State]:
    """Choose the next token of each sequence, and return the cache with the new ones."""
    model = nnx.merge(graph, cache, params)
    logits = model(inputs, decode=decode)
    last_rows = jnp.maximum(inputs.cu_q_lens[1:] - 1, 0)
    return jnp.argmax(logits[last_rows], axis=-1), nnx.state(model, nnx.Cache)


def main() -> None:
    model = Decoder(vocabulary=128, num_layers=2, rngs=nnx.Rngs(0))
    for layer in model.layers:
        layer.init_cache(num_pages=16, page_size=16)
    graph, cache, params = nnx.split(model, nnx.Cache, ...)

    manager = PageManager(num_pages=16, page_size=16, max_seqs=2, max_blocks=4)
    seqs = [manager.allocate(prompt) for prompt in ([1, 2, 3, 4, 5], [6, 7])]
    for _ in range(12):
        batch = manager.batch(seqs)
        tokens, cache = step(graph, cache, params, batch.inputs, batch.max_q_len == 1)
        manager.commit(batch)
        manager.append(seqs, np.asarray(tokens[: len(seqs)]))
    for seq in seqs:
        print(manager.tokens(seq))


if __name__ == "__main__":
    main()
