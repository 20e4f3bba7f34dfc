"""What attentions to pages have in common: the facts of a call, the problem, its features."""

import abc
import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from ejk._backend import Problem
from ejk._cache_types import (
    QUANTISED,
    SCALES,
    CacheType,
    Scales,
    cache_type_of,
    features_of,
    told_of_gradients,
)
from ejk._indices import Size
from ejk._shards import Axes, Shards
from ejk.backends.layouts import LAYOUTS, POOLS, Layout
from ejk.backends.page_attention_shards import axes_of, shards_of

AXIS = frozenset({"axis_name", "axis_name with alibi_slopes"})
"""The features of pages that are split over devices: `axis_name=`."""

OTHER_FLOAT = "key_cache.dtype other than query.dtype"
"""The feature of a cache of another float type than the query's."""

CACHES = QUANTISED | SCALES | {OTHER_FLOAT}
"""The features of caches that hold something else than the query's type."""

NO_GROUPS = {"prefix_groups": None, "prefix_pages": None}
"""The operands of a call whose sequences share nothing that is known."""


@dataclasses.dataclass(frozen=True)
class PagedFacts:
    """What is known of pools and options of any attention to pages when a call is traced."""

    num_seqs: Size
    num_heads: int
    num_kv_heads: int
    head_dim: int
    value_head_dim: int
    num_pages: Size
    page_size: int
    max_blocks: Size
    query_dtype: np.dtype
    cache_dtype: np.dtype
    cache_layout: str
    fused: bool
    """`key_cache` holds the keys and the values."""
    latent: bool
    """The values are the first `value_head_dim` entries of the keys."""
    has_window: bool
    soft_cap: float | None
    has_sinks: bool
    has_alibi: bool
    return_lse: bool
    scales: Scales = dataclasses.field(default="none", kw_only=True)
    """What has a scale: a KV head, or a token and KV head. Latent attention's are `key_scale`
    alone, and so are those of tokens in fused pools, which lie as the pool does."""

    num_prefix_groups: Size = dataclasses.field(default=0, kw_only=True)
    """Groups of sequences that may share their first pages; 0: nothing is known of any.

    A hint: `prefix_groups` says of each sequence in which group it is, if in one of these, and
    `prefix_pages` how many pages its sequences share, if their tables agree.
    """

    @property
    def cache_type(self) -> CacheType:
        """What the elements of the pools hold."""
        return cache_type_of(self.cache_dtype)

    @property
    def group(self) -> int:
        """Query heads that read one KV head."""
        return self.num_heads // self.num_kv_heads

    @property
    def capacity(self) -> Size:
        """Tokens that a row of the block table can name."""
        return self.max_blocks * self.page_size

    @property
    def layout(self) -> Layout:
        """Where the axes of the pools are, as they were handed over."""
        layout = LAYOUTS[self.cache_layout]
        return layout.fused if self.fused else layout


@dataclasses.dataclass(frozen=True)
class PagedProblem(PagedFacts, Problem):
    """The static facts of attention to pages. No axis is empty."""

    feature_names: ClassVar[frozenset[str]] = (
        POOLS
        | AXIS
        | CACHES
        | {
            "attn_logits_soft_cap",
            "sliding_window",
            "sinks",
            "alibi_slopes",
            "value_head_dim",
            "return_lse",
        }
    )
    splits_sequences: ClassVar[bool]
    """Each sequence is a row of queries and results, so that devices can share them out."""

    is_part: bool = dataclasses.field(default=False, kw_only=True)
    """The result is to be merged with others: those of a context's pages that are elsewhere.

    It is float32. Each query row has a window of its own (here a row is a sequence), and lengths
    and windows count the tokens of the pages that are here; so slopes need `page_distances`, the
    positions from the query to the first token of each page.
    """

    keeps_float32: bool = dataclasses.field(default=False, kw_only=True)
    """The output is float32: a backend's own part of a call, which it merges with another."""

    @property
    def out_dtype(self) -> np.dtype:
        return np.dtype(np.float32) if self.is_part or self.keeps_float32 else self.query_dtype

    @property
    def own_windows(self) -> bool:
        """Each query row has a window of its own."""
        return self.is_part and self.has_window

    @property
    def own_distances(self) -> bool:
        """Slopes count from `page_distances`."""
        return self.is_part and self.has_alibi

    @property
    def features(self) -> frozenset[str]:
        used = {
            "attn_logits_soft_cap": self.soft_cap is not None,
            "sliding_window": self.has_window,
            "sinks": self.has_sinks,
            "alibi_slopes": self.has_alibi,
            "value_head_dim": self.latent,
            "fused_pools": self.layout.num_axes == 5,
            "return_lse": self.return_lse,
            "axis_name": self.is_part,
            "axis_name with alibi_slopes": self.own_distances,
            f'cache_layout="{self.cache_layout}"': True,
            OTHER_FLOAT: self.cache_dtype != self.query_dtype and not self.cache_type.is_quantised,
            **features_of(self.cache_type, self.scales),
        }
        return frozenset(feature for feature, is_used in used.items() if is_used)

    @property
    def without_gradient(self) -> dict[str, str]:
        return told_of_gradients(self.cache_type, "key_cache", "value_cache")

    @property
    @abc.abstractmethod
    def num_rows(self) -> Size:
        """Query tokens: the first axis of the results."""

    @property
    def is_empty(self) -> bool:
        """Sizes alone say that there is no token to see: no backend is asked then."""
        return 0 in (self.num_rows, self.num_seqs, self.capacity, self.num_pages)

    @property
    def results(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        rows = (self.num_rows, self.num_heads)
        out = jax.ShapeDtypeStruct((*rows, self.value_head_dim), self.out_dtype)
        lse = jax.ShapeDtypeStruct(rows, jnp.float32)
        return (out, lse) if self.return_lse else (out,)

    @abc.abstractmethod
    def operand_axes(self, *, seqs: Any, kv_heads: Any, heads: Any) -> Any:
        """Say what the axes of each operand are, by these names; None for those that stay whole."""

    def pool_axes(self, kv_heads: Any) -> tuple[Any, ...]:
        """Say what the axes of a pool are."""
        axes = range(self.layout.num_axes)
        return tuple(kv_heads if axis == self.layout.kv_heads else None for axis in axes)

    def scale_axes(self, kv_heads: Any) -> dict[str, tuple[Any, ...] | None]:
        """Say what the axes of `key_scale` and `value_scale` are."""
        of = {"none": None, "head": (kv_heads,), "token": self.pool_axes(kv_heads)[:-1]}
        key_has_all = self.latent or (self.fused and self.scales == "token")
        scale = of[self.scales]
        return {"key_scale": scale, "value_scale": None if key_has_all else scale}

    def group_axes(self, seqs: Any) -> Mapping[str, tuple[Any, ...] | None]:
        """Say what the axes of `prefix_groups` and `prefix_pages` are."""
        if not self.num_prefix_groups:
            return NO_GROUPS
        return {"prefix_groups": (seqs,), "prefix_pages": (None,)}

    @property
    def axes(self) -> Axes:
        return axes_of(self)

    def shards(self, specs: Any, mesh: Mapping[str, int]) -> Shards:
        return shards_of(self, specs, mesh)
