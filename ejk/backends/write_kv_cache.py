"""What every backend of `ejk.write_kv_cache` is given."""

import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ejk._backend import Backend
from ejk._batching import merge_axis
from ejk._cache_types import QUANTISED, SCALES
from ejk._indices import Size, exceeds
from ejk.backends.layouts import POOLS
from ejk.backends.pools import PoolsProblem, merge_indices

OTHER_FLOAT = "key_cache.dtype other than key.dtype"
"""The feature of a cache of another float type than the new keys'."""

CACHES = QUANTISED | SCALES | {OTHER_FLOAT}
"""The features of caches that hold something else than the new keys' type."""


class WriteKVCacheOperands(NamedTuple):
    """The arrays of one call. Absent ones are None.

    Slots are the caller's own values: those outside `[0, num_slots)` write nothing, and of several
    tokens with one slot the last is found there afterwards.
    """

    key: Any  # [num_tokens, num_kv_heads, head_dim]
    value: Any  # [num_tokens, num_kv_heads, value_head_dim], or None of latent pools
    key_cache: Any  # four axes, or five of fused pools: see LAYOUTS
    value_cache: Any  # the same, its last axis value_head_dim; None of fused and latent pools
    slot_mapping: Any  # int32 [num_tokens]
    key_scale: Any = None  # float32 [num_kv_heads], or of the pool's axes but the last; or None
    value_scale: Any = None  # the same; None where `key_scale` has all: see `scales`


@dataclasses.dataclass(frozen=True)
class WriteKVCacheProblem(PoolsProblem):
    """The static facts of one `ejk.write_kv_cache` call. No axis is empty.

    Scales of heads are given, those of tokens are computed.
    """

    operation: ClassVar[str] = "write_kv_cache"
    feature_names: ClassVar[frozenset[str]] = POOLS | CACHES | {"latent_pools"}

    num_tokens: Size
    row_dtype: np.dtype
    """The type of the keys and values that are written."""

    @property
    def head_dim(self) -> int:
        """Values of a key: twice the pool's elements with int4."""
        return self.key_shape[-1] * self.cache_type.per_element

    @property
    def value_head_dim(self) -> int:
        """The width of the values that are written: 0 with latent pools."""
        if self.latent:
            return 0
        return (self.value_shape or self.key_shape)[-1] * self.cache_type.per_element

    @property
    def features(self) -> frozenset[str]:
        is_other = self.cache_dtype != self.row_dtype and not self.cache_type.is_quantised
        used = self.pool_features | {OTHER_FLOAT: is_other}
        return frozenset(feature for feature, is_used in used.items() if is_used)

    @property
    def without_gradient(self) -> dict[str, str]:
        if not self.cache_type.is_quantised:
            return {}
        told = (
            "{0} has no gradient with key_cache.dtype={1}, as rounding to codes has none: "
            "pass jax.lax.stop_gradient({0})"
        )
        names = ("key", "value", "key_cache", "value_cache", "key_scale", "value_scale")
        return {name: told.format(name, self.cache_type.name) for name in names}

    def fold(
        self, size: int, operands: WriteKVCacheOperands, axes: WriteKVCacheOperands
    ) -> "tuple[WriteKVCacheProblem, WriteKVCacheOperands] | None":
        """Make a `vmap` axis part of the pages: in place where it comes right before them."""
        of_heads = [axes.key_scale, axes.value_scale] if self.scales == "head" else []
        own_scales = any(axis is not None and axis >= 0 for axis in of_heads)
        if own_scales or exceeds(size * self.num_slots, 2**31 - 1):
            return None

        def merged(x: Any, axis: Any, to: int) -> Any:
            return None if x is None else merge_axis(x, axis, size, to)

        slots = merge_indices(operands.slot_mapping, axes.slot_mapping, size, self.num_slots)
        pages = self.folded_axis
        to = WriteKVCacheOperands(0, 0, pages, pages, 0, pages, pages)
        kept: dict[str, Any] = {"slot_mapping": slots}
        if self.scales == "head":
            kept |= {name: getattr(operands, name) for name in ("key_scale", "value_scale")}
        pools = operands._replace(**dict.fromkeys(kept))
        operands = WriteKVCacheOperands(*map(merged, pools, axes, to))
        problem = dataclasses.replace(self.with_pages_of(size), num_tokens=size * self.num_tokens)
        return problem, operands._replace(**kept)

    def operand_axes(self, kv_heads: Any) -> WriteKVCacheOperands:
        rows = (None, kv_heads, None)
        values = None if self.latent else rows
        pools = {"value_cache": None, **self.pool_axes(kv_heads)}
        operands = WriteKVCacheOperands(rows, values, slot_mapping=(None,), **pools)
        if self.scales != "head":
            return operands
        of_values = None if self.latent else (kv_heads,)
        return operands._replace(key_scale=(kv_heads,), value_scale=of_values)


def by_slot(slots: jax.Array, num_slots: Size) -> tuple[jax.Array, jax.Array]:
    """Sort tokens by slot; return slots, -1 where nothing is written, and whose they are."""
    tokens = jnp.arange(slots.shape[0], dtype=jnp.int32)
    slots, order = lax.sort((slots, tokens), num_keys=1, is_stable=True)
    is_last = jnp.concatenate([slots[1:] != slots[:-1], jnp.ones(1, bool)])
    return jnp.where(is_last & (slots >= 0) & (slots < num_slots), slots, -1), order


def last_writes(slots: jax.Array, num_slots: Size) -> jax.Array:
    """Mark the tokens that are found in the pool afterwards, bool `[num_tokens]`.

    Those with a slot of the pool that no later token has. Two sorts, there and back: on two cores
    of a CPU 256 tokens take 16 us, where comparing each with each takes 32; 2,048 take 0.14 and
    1.0 ms.
    """
    written, order = by_slot(slots, num_slots)
    _, is_last = lax.sort((order, (written >= 0).astype(jnp.int32)), num_keys=1)
    return is_last > 0


class WriteKVCacheBackend(Backend):
    """A way to run `ejk.write_kv_cache`: subclass it to add your own.

    `run(problem, operands, platform)` is given a `WriteKVCacheProblem` and
    `WriteKVCacheOperands`, and returns the caches, those that there are, as `problem.results`
    has them.
    """

    problem_type = WriteKVCacheProblem
