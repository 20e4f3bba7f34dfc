"""What every backend of `ejk.copy_kv_slots` and `ejk.copy_kv_pages` is given.

Both are one operation: a page is a slot of a pool whose pages have one, a wide one.
"""

import dataclasses
import math
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from ejk._backend import Backend
from ejk._batching import merge_axis
from ejk._cache_types import QUANTISED
from ejk._indices import Size, exceeds
from ejk.backends.layouts import POOLS
from ejk.backends.pools import PoolsProblem, Shape, merge_indices
from ejk.backends.write_kv_cache import last_writes

CACHES = QUANTISED | {"key_scale, value_scale per token", "latent_pools"}
"""The features of caches: what is moved beside keys and values in the queries' types."""

NOTHING, DIRECT, STAGED = -1, 0, 1
"""How a copy goes: not at all, from the pool, or by way of memory that nothing overwrites."""

STAGES = {
    "key": "key_cache",
    "value": "value_cache",
    "key_scale": "key_scale",
    "value_scale": "value_scale",
}
"""What kernels call that memory, `key_stage` first, each with the pool that it is for."""

Unit = Literal["slot", "page"]


class CopyKVCacheOperands(NamedTuple):
    """The arrays of one call. Absent ones are None.

    Slots or pages are the caller's own values: a copy from or to one outside `[0, num_units)` does
    nothing, and of several copies to one target the last that does something is found there.
    """

    key_cache: Any  # four axes, or five of fused pools: see LAYOUTS
    value_cache: Any  # the same, of its own width; None of fused and latent pools
    sources: Any  # int32 [num_copies]
    targets: Any  # int32 [num_copies]
    key_scale: Any = None  # float32, of the axes of `key_cache` but the last; or None
    value_scale: Any = None  # the same of `value_cache`


class View(NamedTuple):
    """A pool as `[outer, num_pages, inner, slots, width]`: a copy moves `[outer, inner, width]`.

    Row-major, that is where its elements lie in every layout.
    """

    outer: int
    inner: int
    slots: int
    width: int

    @property
    def elements(self) -> int:
        """Elements that a copy moves."""
        return self.outer * self.inner * self.width


@dataclasses.dataclass(frozen=True)
class CopyKVCacheProblem(PoolsProblem):
    """The static facts of one call. No axis is empty.

    `scales` is `"token"` where scales move with what they are of, else `"none"`.
    """

    operation: ClassVar[str] = "copy_kv_cache"
    feature_names: ClassVar[frozenset[str]] = POOLS | CACHES

    num_copies: Size
    unit: Unit
    """What is copied."""

    @property
    def num_units(self) -> Size:
        """Slots or pages of a pool: below 2**31."""
        return self.num_slots if self.unit == "slot" else self.num_pages

    @property
    def placed_axes(self) -> tuple[int, ...]:
        return super().placed_axes if self.unit == "slot" else (self.layout.pages,)

    def view(self, shape: Shape) -> View:
        """Return where the elements of a pool lie, or those of a pool of scales."""
        layout, heads = self.layout, self.num_kv_heads
        width = math.prod(shape[max(layout.slots, layout.kv_heads) + 1 :])
        first = layout.kv_heads < layout.pages  # heads come before pages, between, or after slots
        outer = heads if first else 1
        inner = 2 if self.fused else 1
        if layout.pages < layout.kv_heads < layout.slots:
            inner *= heads
        elif not first:
            width *= heads
        if self.unit == "page":
            return View(outer, 1, 1, inner * self.page_size * width)
        return View(outer, inner, self.page_size, width)

    @property
    def views(self) -> tuple[View, ...]:
        """The views of the pools that there are, in the order of the results."""
        return tuple(self.view(result.shape) for result in self.results)

    @property
    def features(self) -> frozenset[str]:
        return frozenset(name for name, is_used in self.pool_features.items() if is_used)

    @property
    def without_gradient(self) -> dict[str, str]:
        told = (
            "{0} has no gradient with key_cache.dtype={1}, as codes have none: "
            "pass jax.lax.stop_gradient({0})"
        )
        names = self.pool_names if self.cache_type.is_quantised else []
        return {name: told.format(name, self.cache_type.name) for name in names}

    def fold(
        self, size: int, operands: CopyKVCacheOperands, axes: CopyKVCacheOperands
    ) -> "tuple[CopyKVCacheProblem, CopyKVCacheOperands] | None":
        """Make a `vmap` axis part of the pages: in place where it comes right before them."""
        if exceeds(size * self.num_slots, 2**31 - 1):
            return None
        sources, targets = (
            merge_indices(x, axis, size, self.num_units)
            for x, axis in ((operands.sources, axes.sources), (operands.targets, axes.targets))
        )
        pools = {
            name: merge_axis(getattr(operands, name), getattr(axes, name), size, self.folded_axis)
            for name in self.pool_names
        }
        problem = dataclasses.replace(self.with_pages_of(size), num_copies=size * self.num_copies)
        return problem, operands._replace(sources=sources, targets=targets, **pools)

    def operand_axes(self, kv_heads: Any) -> CopyKVCacheOperands:
        pools = {"value_cache": None, **self.pool_axes(kv_heads)}
        return CopyKVCacheOperands(sources=(None,), targets=(None,), **pools)


def valid_targets(sources: jax.Array, targets: jax.Array, num_units: Size) -> jax.Array:
    """Return the target of each copy, -1 of one that does nothing: from or to outside the pool."""
    does = (sources >= 0) & (sources < num_units) & (targets >= 0) & (targets < num_units)
    return jnp.where(does, targets, -1)


def routes(sources: jax.Array, targets: jax.Array, num_units: Size) -> jax.Array:
    """Return how each copy goes, int32 `[num_copies]`: `NOTHING`, `DIRECT` or `STAGED`.

    A copy is staged if some copy overwrites its source: with all sources and targets in one sort,
    targets first, a source is overwritten if the last target before it is the same.
    """
    targets = valid_targets(sources, targets, num_units)
    stays = last_writes(targets, num_units) & (sources != targets)
    count = jnp.arange(2 * sources.shape[0], dtype=jnp.int32)
    is_source = (count >= sources.shape[0]).astype(jnp.int32)
    both = jnp.concatenate([targets, sources])
    both, is_source, order = lax.sort((both, is_source, count), num_keys=2)
    last_target = lax.cummax(jnp.where(is_source == 0, both, -1))
    _, is_overwritten = lax.sort((order, (last_target == both).astype(jnp.int32)), num_keys=1)
    staged = is_overwritten[sources.shape[0] :] > 0
    return jnp.where(stays, jnp.where(staged, STAGED, DIRECT), NOTHING).astype(jnp.int32)


class CopyKVCacheBackend(Backend):
    """A way to run `ejk.copy_kv_slots` and `ejk.copy_kv_pages`: subclass it to add your own.

    `run(problem, operands, platform)` is given a `CopyKVCacheProblem` and `CopyKVCacheOperands`,
    and returns the pools, those that there are, as `problem.results` has them.
    """

    problem_type = CopyKVCacheProblem
