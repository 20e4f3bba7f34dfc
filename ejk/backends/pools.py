"""What operations have in common that change pools of pages in place: facts, `vmap`, shards."""

import abc
import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from ejk._backend import Problem
from ejk._batching import merge_axis
from ejk._cache_types import CacheType, Scales, cache_type_of, features_of
from ejk._indices import Size
from ejk._shards import Axes, Shards, axes_of_pools
from ejk.backends.layouts import LAYOUTS, Layout

Shape = tuple[Size, ...]


@dataclasses.dataclass(frozen=True)
class PoolsProblem(Problem):
    """The static facts of a call that returns its pools, changed. No axis is empty.

    Its operands call the pools `key_cache` and `value_cache`, and those of the scales of tokens
    `key_scale` and `value_scale`; `key_scale` has all that `key_cache` has: of keys and values in
    fused pools.
    """

    key_shape: Shape
    """The shape of `key_cache`."""
    value_shape: Shape | None
    """The shape of `value_cache`; None with fused and latent pools."""
    cache_dtype: np.dtype
    cache_layout: str
    scales: Scales = dataclasses.field(default="none", kw_only=True)
    """What has a scale: a KV head, or a token and KV head. Those of tokens lie in pools."""

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
        return self.num_pages * self.page_size

    @property
    def placed_axes(self) -> tuple[int, ...]:
        """The axes that a place in a pool is an index of."""
        return self.layout.pages, self.layout.slots

    @property
    def pool_features(self) -> dict[str, bool]:
        """Say which features of pools the call has."""
        return {
            "fused_pools": self.fused,
            "latent_pools": self.latent,
            f'cache_layout="{self.cache_layout}"': True,
            **features_of(self.cache_type, self.scales),
        }

    @property
    def results(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        shapes = [shape for shape in (self.key_shape, self.value_shape) if shape is not None]
        pools = [jax.ShapeDtypeStruct(shape, self.cache_dtype) for shape in shapes]
        if self.scales == "token":
            pools += [jax.ShapeDtypeStruct(shape[:-1], jnp.float32) for shape in shapes]
        return tuple(pools)

    @property
    def folded_axis(self) -> int:
        return self.layout.pages

    @property
    def pool_names(self) -> list[str]:
        """The operands that are changed, in the order of the results."""
        kinds = ["cache", "scale"] if self.scales == "token" else ["cache"]
        sides = ["key"] if self.value_shape is None else ["key", "value"]
        return [f"{side}_{kind}" for kind in kinds for side in sides]

    def pools_of(self, operands: Any) -> tuple[Any, ...]:
        """Return what `operands` has of each pool."""
        return tuple(getattr(operands, name) for name in self.pool_names)

    @property
    def axes(self) -> Axes:
        operands = self.operand_axes("kv_heads")
        return Axes(operands, results=self.pools_of(operands), sizes={})

    @abc.abstractmethod
    def operand_axes(self, kv_heads: Any) -> Any:
        """Say what the axes of each operand are."""

    def pool_axes(self, kv_heads: Any) -> dict[str, tuple[Any, ...]]:
        """Say what the axes of each pool are."""
        pool = tuple(
            kv_heads if axis == self.layout.kv_heads else None
            for axis in range(len(self.key_shape))
        )
        return {
            name: pool[: len(result.shape)] for name, result in zip(self.pool_names, self.results)
        }

    def shards(self, specs: Any, mesh: Mapping[str, int]) -> Shards:
        """Follow the pools, which stay where they are; all else is small."""
        heads, pools = self.layout.kv_heads, dict(zip(self.pool_names, self.pools_of(specs)))
        elsewhere = "call it inside jax.shard_map, each device with slots of its own"
        split = axes_of_pools(pools, heads, self.num_kv_heads, mesh, elsewhere)
        parts = math.prod(mesh[axis] for axis in split)
        problem = self._resized(heads, lambda n: n // parts)
        operands = self.operand_axes(split or None)
        specs = type(operands)(*(of and PartitionSpec(*of) for of in operands))
        results = tuple(PartitionSpec(*of) for of in self.pools_of(operands))
        return Shards(problem, specs, results)

    def with_pages_of(self, size: int) -> Any:
        """Return the problem on pools that are `size` such pools in one."""
        return self._resized(self.layout.pages, lambda n: size * n)

    def _resized(self, axis: int, change: Callable[[Size], Size]) -> Any:
        """Return the problem with another size of an axis of the pools."""

        def resized(shape: Shape | None) -> Shape | None:
            return shape and tuple(change(n) if a == axis else n for a, n in enumerate(shape))

        return dataclasses.replace(
            self, key_shape=resized(self.key_shape), value_shape=resized(self.value_shape)
        )


def merge_indices(x: jax.Array, axis: int, size: int, bound: Size) -> jax.Array:
    """Put a batched axis of slots or pages before the other, each where its pool now begins.

    An index outside its own call's pool, of `bound`, must not be one of the next call's.
    """
    x = merge_axis(x, axis, size).reshape(size, -1)
    first = bound * jnp.arange(size, dtype=jnp.int32)
    is_inside = (x >= 0) & (x < bound)
    return jnp.where(is_inside, x + first[:, None], -1).reshape(-1)
