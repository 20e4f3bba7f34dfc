"""The batch that a command is about: a model's heads, how many sequences, how long they are."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ejk._cache_types import CACHE_DTYPES, CacheType, cache_type_of
from ejk._nearest import did_you_mean
from ejk._page_attention import page_attention
from ejk._ragged_page_attention import ragged_page_attention
from ejk._write_kv_cache import write_kv_cache

OPERATIONS: dict[str, Callable[..., Any]] = {
    "decode": page_attention,
    "ragged": ragged_page_attention,
    "write": write_kv_cache,
}
FLOATS = ("bfloat16", "float16", "float32")
# As `ejk.empty_kv_cache` names them: uint8 is what int4 is held as.
CACHES = {"int4" if name == "uint8" else name: name for name in (*FLOATS, *CACHE_DTYPES)}
"""The dtype of the arrays that hold each type of cache."""


class Shape(NamedTuple):
    """The heads of a model's attention."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    value_head_dim: int | None = None  # of latent attention: values are the keys' first entries


# From the configurations that come with the weights.
MODELS = {
    "llama-3-8b": Shape(32, 8, 128),
    "llama-3-70b": Shape(64, 8, 128),
    "llama-3-405b": Shape(128, 8, 128),
    "llama-2-7b": Shape(32, 32, 128),
    "mistral-7b": Shape(32, 8, 128),
    "qwen-2.5-7b": Shape(28, 4, 128),
    "qwen-3-8b": Shape(32, 8, 128),
    "qwen-3-235b": Shape(64, 4, 128),
    "gemma-2-9b": Shape(16, 8, 256),
    "gemma-3-27b": Shape(32, 16, 128),
    "gpt-oss-120b": Shape(64, 8, 64),
    "phi-3-mini": Shape(32, 32, 96),
    "smollm2-135m": Shape(9, 3, 64),
    "deepseek-v3": Shape(128, 1, 576, 512),
}


def shape_of(text: str) -> Shape:
    """Return a model's shape, or that of `heads/kv_heads/head_dim[/value_head_dim]`.

    Raises:
        ValueError: it is neither, or no backend takes it.
    """
    if text in MODELS:
        return MODELS[text]
    parts = text.split("/")
    sizes = all(part.isdecimal() and len(part) < 10 and int(part) for part in parts)
    if len(parts) not in (3, 4) or not sizes:
        raise ValueError(
            f"{text!r} must be heads/kv_heads/head_dim, as 32/8/128, with /value_head_dim of a "
            f"latent cache, or one of {', '.join(MODELS)}{did_you_mean(text, MODELS)}"
        )
    shape = Shape(*map(int, parts))
    if shape.num_heads % shape.num_kv_heads:
        raise ValueError(
            f"{text!r}: num_heads={shape.num_heads} must be a multiple of "
            f"num_kv_heads={shape.num_kv_heads}"
        )
    if shape.value_head_dim and shape.value_head_dim > shape.head_dim:
        raise ValueError(
            f"{text!r}: value_head_dim={shape.value_head_dim} must be at most "
            f"head_dim={shape.head_dim}: values are the first entries of keys"
        )
    return shape


@dataclasses.dataclass(frozen=True)
class Batch:
    """`new_tokens` of each of `num_seqs` sequences, the last of a context of `context` tokens."""

    operation: str
    name: str
    shape: Shape
    num_seqs: int
    context: int
    new_tokens: int = 1
    page_size: int = 16
    dtype: str = "bfloat16"
    cache_dtype: str = "bfloat16"

    @property
    def call(self) -> Callable[..., Any]:
        return OPERATIONS[self.operation]

    @property
    def max_blocks(self) -> int:
        return -(-self.context // self.page_size)

    @property
    def num_pages(self) -> int:
        return self.num_seqs * self.max_blocks

    @property
    def num_tokens(self) -> int:
        return self.num_seqs * self.new_tokens

    @property
    def token_bytes(self) -> int:
        """Bytes that the pools hold of a token, scales included."""
        rows = self.shape.num_kv_heads * (1 if self.shape.value_head_dim else 2)
        row = self.shape.head_dim // self.cache_type.per_element
        return rows * (row * jnp.dtype(self.held_as).itemsize + 4 * self.has_scales)

    @property
    def pool_bytes(self) -> int:
        return self.num_pages * self.page_size * self.token_bytes

    @property
    def held_as(self) -> str:
        """The dtype of the pools."""
        return CACHES[self.cache_dtype]

    @property
    def cache_type(self) -> CacheType:
        return cache_type_of(self.held_as)

    @property
    def has_scales(self) -> bool:
        """Integers come with a scale a token and head."""
        return self.cache_type.is_integer

    @property
    def moved_bytes(self) -> int:
        """Bytes that the call has to move, of keys, values, queries and results."""
        shape, itemsize = self.shape, jnp.dtype(self.dtype).itemsize
        if self.operation == "write":
            pools = 1 if shape.value_head_dim else 2
            rows = self.num_tokens * pools * shape.num_kv_heads * shape.head_dim * itemsize
            return rows + self.num_tokens * self.token_bytes
        wide = shape.head_dim + (shape.value_head_dim or shape.head_dim)
        queries = self.num_tokens * shape.num_heads * wide * itemsize
        return self.num_seqs * self.context * self.token_bytes + queries

    @property
    def flops(self) -> int:
        """Both products, of each new token with the tokens up to itself. 0 for a write."""
        if self.operation == "write":
            return 0
        new, shape = self.new_tokens, self.shape
        seen = self.num_seqs * (new * (self.context - new) + new * (new + 1) // 2)
        wide = shape.head_dim + (shape.value_head_dim or shape.head_dim)
        return 2 * shape.num_heads * wide * seen

    def arguments(self, layers: int = 1) -> dict[str, Any]:
        """Draw the call's arguments; the pools hold the pages of so many layers."""
        return self._arguments(layers, _draw)

    def types(self) -> dict[str, Any]:
        """The same as types: no memory is taken."""
        return self._arguments(1, jax.ShapeDtypeStruct)

    def _arguments(self, layers: int, array: Callable[..., Any]) -> dict[str, Any]:
        shape, latent = self.shape, self.shape.value_head_dim
        static = array is jax.ShapeDtypeStruct
        heads = shape.num_kv_heads if self.operation == "write" else shape.num_heads
        rows = array((self.num_tokens, heads, shape.head_dim), jnp.dtype(self.dtype))
        width = shape.head_dim // self.cache_type.per_element
        pool = (layers * self.num_pages, shape.num_kv_heads, self.page_size, width)
        given: dict[str, Any] = {
            "key_cache": array(pool, jnp.dtype(self.held_as)),
            "value_cache": None if latent else array(pool, jnp.dtype(self.held_as)),
        }
        if self.has_scales:
            scale = jax.ShapeDtypeStruct(pool[:-1], jnp.float32)
            given["key_scale"] = scale if static else jnp.full(scale.shape, 1 / 40, jnp.float32)
            given["value_scale"] = None if latent else given["key_scale"]

        def integers(shape: tuple[int, ...], make: Callable[[], Any]) -> Any:
            return array(shape, jnp.int32) if static else jnp.asarray(make(), jnp.int32)

        order = np.random.default_rng(0).permutation
        if self.operation == "write":
            num_slots = self.num_pages * self.page_size
            slots = integers((self.num_tokens,), lambda: order(num_slots)[: self.num_tokens])
            return given | {"key": rows, "value": None if latent else rows, "slot_mapping": slots}
        table = (self.num_seqs, self.max_blocks)
        given |= {
            "query": rows,
            "context_lens": integers(table[:1], lambda: np.full(self.num_seqs, self.context)),
            "block_tables": integers(table, lambda: order(self.num_pages).reshape(table)),
        }
        if latent:
            given["value_head_dim"] = latent
        if self.operation == "ragged":
            ends = self.num_seqs + 1
            bounds = integers((ends,), lambda: np.arange(ends) * self.new_tokens)
            given |= {"cu_q_lens": bounds, "max_q_len": self.new_tokens}
        return given


@functools.partial(jax.jit, static_argnums=(0, 1))
def _draw(shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Draw normal values, of integers codes all over their range."""
    key = jax.random.key(len(shape))
    if dtype == jnp.uint8:  # two codes of int4
        return jax.random.bits(key, shape, jnp.uint8)
    values = jax.random.normal(key, shape, jnp.float32)
    if jnp.issubdtype(dtype, jnp.integer):
        values = jnp.clip(40 * values, -127, 127)
    return values.astype(dtype)
