"""What every backend of `ejk.write_kv_cache` is given."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec

from ejk._backend import Backend, Problem
from ejk._batching import merge_axis
from ejk._cache_types import (
    QUANTISED,
    SCALES,
    CacheType,
    Scales,
    cache_type_of,
    features_of,
)
from ejk._indices import Size, exceeds
from ejk._shards import Axes, Shards, is_split, mesh_axes
from ejk.backends.layouts import LAYOUTS, POOLS, Layout

Shape = tuple[Size, ...]

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
class WriteKVCacheProblem(Problem):
    """The static facts of one `ejk.write_kv_cache` call. No axis is empty."""

    operation: ClassVar[str] = "write_kv_cache"
    feature_names: ClassVar[frozenset[str]] = POOLS | CACHES | {"latent_pools"}

    num_tokens: Size
    key_shape: Shape
    """Of `key_cache`."""
    value_shape: Shape | None
    """Of `value_cache`; None of fused and latent pools."""
    row_dtype: np.dtype
    """Of the keys and values that are written."""
    cache_dtype: np.dtype
    cache_layout: str
    scales: Scales = "none"
    """What has a scale: a KV head, or a token and KV head. Those of heads are given; those of
    tokens are computed and lie in pools of their own, `key_scale` having all that `key_cache` has:
    of keys and values in fused pools."""

    @property
    def cache_type(self) -> CacheType:
        """What the elements of the pools hold."""
        return cache_type_of(self.cache_dtype)

    @property
    def fused(self) -> bool:
        """`key_cache` has five axes, keys and values on one of them."""
        return len(self.key_shape) == 5

    @property
    def latent(self) -> bool:
        """There are no values: they are read out of the keys."""
        return not self.fused and self.value_shape is None

    @property
    def layout(self) -> Layout:
        """Where the axes of the pools are, as they were handed over."""
        layout = LAYOUTS[self.cache_layout]
        return layout.fused if self.fused else layout

    @property
    def num_pages(self) -> Size:
        return self.key_shape[self.layout.pages]

    @property
    def num_kv_heads(self) -> int:
        return self.key_shape[self.layout.kv_heads]

    @property
    def page_size(self) -> int:
        return self.key_shape[self.layout.slots]

    @property
    def num_slots(self) -> Size:
        """Below 2**31."""
        return self.num_pages * self.page_size

    @property
    def head_dim(self) -> int:
        """Values of a key: twice the pool's elements with int4."""
        return self.key_shape[-1] * self.cache_type.per_element

    @property
    def value_head_dim(self) -> int:
        """Of the values that are written: 0 of latent pools."""
        if self.latent:
            return 0
        return (self.value_shape or self.key_shape)[-1] * self.cache_type.per_element

    @property
    def features(self) -> frozenset[str]:
        used = {
            "fused_pools": self.fused,
            "latent_pools": self.latent,
            f'cache_layout="{self.cache_layout}"': True,
            OTHER_FLOAT: self.cache_dtype != self.row_dtype and not self.cache_type.is_quantised,
            **features_of(self.cache_type, self.scales),
        }
        return frozenset(feature for feature, is_used in used.items() if is_used)

    @property
    def results(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        shapes = [shape for shape in (self.key_shape, self.value_shape) if shape is not None]
        pools = [jax.ShapeDtypeStruct(shape, self.cache_dtype) for shape in shapes]
        if self.scales == "token":
            pools += [jax.ShapeDtypeStruct(shape[:-1], jnp.float32) for shape in shapes]
        return tuple(pools)

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

    @property
    def folded_axis(self) -> int:
        return self.layout.pages

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

        def longer(shape: Shape | None) -> Shape | None:
            return shape and tuple(n * (size if a == self.folded_axis else 1)
                                   for a, n in enumerate(shape))  # fmt: skip

        # A slot outside its own call's pool must not be one of the next call's.
        slots = merge_axis(operands.slot_mapping, axes.slot_mapping, size).reshape(size, -1)
        first = self.num_slots * jnp.arange(size, dtype=jnp.int32)
        is_inside = (slots >= 0) & (slots < self.num_slots)
        slots = jnp.where(is_inside, slots + first[:, None], -1).reshape(-1)
        pages = self.folded_axis
        to = WriteKVCacheOperands(0, 0, pages, pages, 0, pages, pages)
        problem = dataclasses.replace(
            self,
            num_tokens=size * self.num_tokens,
            key_shape=longer(self.key_shape),
            value_shape=longer(self.value_shape),
        )
        kept: dict[str, Any] = {"slot_mapping": slots}
        if self.scales == "head":
            kept |= {name: getattr(operands, name) for name in ("key_scale", "value_scale")}
        pools = operands._replace(**dict.fromkeys(kept))
        operands = WriteKVCacheOperands(*map(merged, pools, axes, to))
        return problem, operands._replace(**kept)

    @property
    def axes(self) -> Axes:
        operands = self._operands("kv_heads")
        return Axes(operands, results=self._pools_of(operands), sizes={})

    def shards(self, specs: WriteKVCacheOperands, mesh: Mapping[str, int]) -> Shards:
        """Follow the pools, which stay where they are; the new tokens are small."""
        heads, pools = self.layout.kv_heads, {}
        for name in self._pool_names:
            if (spec := getattr(specs, name)) is not None:
                pools[name] = spec
        split = mesh_axes(specs.key_cache[heads])
        for name, spec in pools.items():
            if any(is_split(entry, mesh) for axis, entry in enumerate(spec) if axis != heads):
                raise ValueError(
                    f"{name} is split as {spec}, but only its KV heads, axis {heads}, can be. "
                    "Where pages are split over devices, write inside jax.shard_map, each device "
                    "with slots of its own"
                )
            if mesh_axes(spec[heads]) != split:
                raise ValueError(f"{' and '.join(pools)} must be split alike, not {pools}")
        parts = math.prod(mesh[axis] for axis in split)
        if self.num_kv_heads % parts:
            raise ValueError(
                f"num_kv_heads={self.num_kv_heads} must be a multiple of the {parts} devices of "
                f"the mesh axes {split} that key_cache is split over"
            )

        def local(shape: Shape | None) -> Shape | None:
            return shape and tuple(n // parts if a == heads else n for a, n in enumerate(shape))

        problem = dataclasses.replace(
            self, key_shape=local(self.key_shape), value_shape=local(self.value_shape)
        )
        operands = self._operands(split or None)
        specs = WriteKVCacheOperands(*(of and PartitionSpec(*of) for of in operands))
        results = tuple(PartitionSpec(*of) for of in self._pools_of(operands))
        return Shards(problem, specs, results)

    @property
    def _pool_names(self) -> list[str]:
        """The operands that are written, in the order of the results."""
        scales = ["key_scale", "value_scale"] if self.scales == "token" else []
        return ["key_cache", "value_cache", *scales]

    def _pools_of(self, operands: WriteKVCacheOperands) -> tuple[Any, ...]:
        pools = (getattr(operands, name) for name in self._pool_names)
        return tuple(pool for pool in pools if pool is not None)

    def _operands(self, kv_heads: Any) -> WriteKVCacheOperands:
        """Say what the axes of each operand are."""
        rows = (None, kv_heads, None)
        pool = tuple(
            kv_heads if axis == self.layout.kv_heads else None
            for axis in range(len(self.key_shape))
        )
        whole = self.scales != "head"  # a pool of scales lies as that of the keys or values
        scale = {"none": None, "head": (kv_heads,), "token": pool[:-1]}[self.scales]
        return WriteKVCacheOperands(
            key=rows,
            value=None if self.latent else rows,
            key_cache=pool,
            value_cache=None if self.value_shape is None else pool,
            slot_mapping=(None,),
            key_scale=scale,
            value_scale=None if self.latent or (self.value_shape is None and whole) else scale,
        )


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
