"""A small decoder with random weights, for the examples beside it: Llama's architecture.

It leaves attention to its caller, who knows where keys and values are kept: see `forward`.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

Params: TypeAlias = dict[str, Any]
Attend: TypeAlias = Callable[[jax.Array, jax.Array, jax.Array, Any], tuple[jax.Array, Any]]


class Config(NamedTuple):
    """The sizes of the model."""

    num_layers: int = 2
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 16
    vocabulary: int = 64


def random_params(config: Config, seed: int = 0) -> Params:
    """Draw the weights of a model."""
    keys = iter(jax.random.split(jax.random.key(seed), 1 + 4 * config.num_layers))
    heads = config.num_heads + 2 * config.num_kv_heads
    width = config.num_heads * config.head_dim

    def normal(*shape: int) -> jax.Array:
        return jax.random.normal(next(keys), shape) * shape[0] ** -0.5

    def layer() -> Params:
        return {
            "qkv": normal(width, heads * config.head_dim).reshape(width, heads, config.head_dim),
            "out": normal(width, width),
            "up": normal(width, 4 * width),
            "down": normal(4 * width, width),
        }

    embedding = normal(config.vocabulary, width)
    return {"embedding": embedding, "layers": [layer() for _ in range(config.num_layers)]}


def forward(
    config: Config,
    params: Params,
    tokens: jax.Array,
    positions: jax.Array,
    attend: Attend,
    cache: Sequence[Any],
) -> tuple[jax.Array, list[Any]]:
    """Return the logits of what follows each token, and the cache of each layer.

    Args:
        config: of the model.
        params: of the model.
        tokens: of any shape, such as `[num_seqs, num_tokens]`, or packed, `[num_tokens]`.
        positions: of each token in its sequence.
        attend: `attend(query, key, value, layer_cache) -> output, layer_cache`. The arrays have the
            shape of `tokens` and then `[heads, head_dim]`; tokens meet here alone.
        cache: what `attend` takes in each layer.
    """
    x = params["embedding"][tokens]
    bounds = (config.num_heads, config.num_heads + config.num_kv_heads)
    caches = []
    for weights, layer_cache in zip(params["layers"], cache, strict=True):
        heads = jnp.einsum("...e,ehd->...hd", _norm(x), weights["qkv"])
        query, key, value = jnp.split(heads, bounds, axis=-2)
        query, key = rotated(query, positions), rotated(key, positions)
        out, layer_cache = attend(query, key, value, layer_cache)
        caches.append(layer_cache)
        x = x + out.reshape(x.shape) @ weights["out"]
        x = x + jax.nn.silu(_norm(x) @ weights["up"]) @ weights["down"]
    return _norm(x) @ params["embedding"].T, caches


def _norm(x: jax.Array) -> jax.Array:
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6)


def rotated(x: jax.Array, positions: jax.Array) -> jax.Array:
    """Turn `x [..., heads, head_dim]` by position: rotary embeddings, the halves as pairs."""
    half = x.shape[-1] // 2
    frequencies = 10_000.0 ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles = positions.astype(jnp.float32)[..., None, None] * frequencies.reshape(
        (1,) * (positions.ndim + 1) + (half,)
    )
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    a, b = x[..., :half], x[..., half:]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
