"""What every backend of `ejk.page_attention` is given: the problem, the operands, the layouts.

`PagedProblem` is what it has in common with other operations that attend to pages.
"""

import abc
import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ejk._backend import Backend, Problem
from ejk._batching import merge_axis
from ejk._cache_types import (
    QUANTISED,
    SCALES,
    features_of,
    told_of_gradients,
)
from ejk._indices import Size
from ejk._shards import Axes, Shards
from ejk.backends.layouts import POOLS
from ejk.backends.page_attention_plan import PlanBackend, PlanProblem
from ejk.backends.page_attention_shards import axes_of, shards_of
from ejk.backends.paged_facts import PagedFacts

AXIS = frozenset({"axis_name", "axis_name with alibi_slopes"})
"""The features of pages that are split over devices: `axis_name=`."""

OTHER_FLOAT = "key_cache.dtype other than query.dtype"
"""The feature of a cache of another float type than the query's."""

CACHES = QUANTISED | SCALES | {OTHER_FLOAT}
"""The features of caches that hold something else than the query's type."""


NO_GROUPS = {"prefix_groups": None, "prefix_pages": None}
"""The operands of a call whose sequences share nothing that is known."""


class PageAttentionOperands(NamedTuple):
    """The arrays of one call. Absent ones are None.

    Lengths and table entries are the caller's own values: a backend clips lengths to
    `[0, capacity]` and takes an entry outside `[0, num_pages)` for invalid.
    """

    query: Any  # [num_seqs, num_heads, head_dim]
    key_cache: Any  # the pool of keys, or of keys and values: see LAYOUTS
    value_cache: Any  # the same, its last axis value_head_dim; None: key_cache has the values, too
    context_lens: Any  # int32 [num_seqs]
    block_tables: Any  # int32 [num_seqs, max_blocks]
    attn_scale: Any  # float32 []
    sliding_window: Any  # int32 [], or None; [num_seqs] where the problem `is_part`
    sinks: Any  # float32 [num_heads], or None
    alibi_slopes: Any  # float32 [num_heads], or None
    plan: Any  # int32 [rows, 4], see PlanProblem, or None
    key_scale: Any = None  # float32 [num_kv_heads], or of the pool's axes but the last; or None
    value_scale: Any = None  # the same; None where `key_scale` has all: see `scales`
    page_distances: Any = None  # int32 [num_seqs, max_blocks], or None: see `is_part`
    prefix_groups: Any = None  # int32 [num_seqs], or None: see `num_prefix_groups`
    prefix_pages: Any = None  # int32 [num_prefix_groups], or None


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


@dataclasses.dataclass(frozen=True)
class PageAttentionProblem(PagedProblem):
    """The static facts of one `ejk.page_attention` call. No axis is empty."""

    operation: ClassVar[str] = "page_attention"
    feature_names: ClassVar[frozenset[str]] = PagedProblem.feature_names | {"axis_name with plan"}
    splits_sequences: ClassVar[bool] = True

    num_splits: int
    plan: PlanProblem | None
    visible_bound: Size
    """No sequence is expected to see more tokens than this: for sizing work, nothing else."""

    @property
    def num_rows(self) -> Size:
        return self.num_seqs

    @property
    def features(self) -> frozenset[str]:
        planned = self.is_part and self.plan is not None
        return super().features | ({"axis_name with plan"} if planned else frozenset())

    @property
    def per_seq(self) -> list[str]:
        """The operands that have a row for each sequence."""
        names = ["query", "context_lens", "block_tables"]
        names += ["sliding_window"] * self.own_windows + ["page_distances"] * self.own_distances
        return names

    def fold(
        self, size: int, operands: PageAttentionOperands, axes: PageAttentionOperands
    ) -> "tuple[PageAttentionProblem, PageAttentionOperands] | None":
        """Make a `vmap` axis over sequences alone part of `num_seqs`."""
        own = (*self.per_seq, "plan", *NO_GROUPS)
        shared = (x for name, x in axes._asdict().items() if name not in own)
        if any(axis is not None and axis >= 0 for axis in shared):
            return None

        per_seq = {name: (getattr(operands, name), getattr(axes, name)) for name in self.per_seq}
        # A plan is for one batch, as groups are; the folded one makes its own.
        folded = dataclasses.replace(
            self, num_seqs=size * self.num_seqs, plan=None, num_prefix_groups=0
        )
        rows = {name: merge_axis(x, axis, size) for name, (x, axis) in per_seq.items()}
        return folded, operands._replace(plan=None, **NO_GROUPS, **rows)

    def shards(self, specs: PageAttentionOperands, mesh: Mapping[str, int]) -> Shards:
        # A plan is for all sequences and sized for all heads: each device makes its own.
        return shards_of(dataclasses.replace(self, plan=None), specs, mesh)

    def operand_axes(self, *, seqs: Any, kv_heads: Any, heads: Any) -> PageAttentionOperands:
        pool = self.pool_axes(kv_heads)
        return PageAttentionOperands(
            query=(seqs, heads, None),
            key_cache=pool,
            value_cache=None if self.fused or self.latent else pool,
            context_lens=(seqs,),
            block_tables=(seqs, None),
            attn_scale=(),
            sliding_window=((seqs,) if self.is_part else ()) if self.has_window else None,
            sinks=(heads,) if self.has_sinks else None,
            alibi_slopes=(heads,) if self.has_alibi else None,
            plan=None,
            **self.scale_axes(kv_heads),
            page_distances=(seqs, None) if self.own_distances else None,
            **self.group_axes(seqs),
        )


class PageAttentionBackend(Backend):
    """A way to run `ejk.page_attention`: subclass it to add your own.

    `run(problem, operands, platform)` is given a `PageAttentionProblem` and
    `PageAttentionOperands`, is traced under the lowering for `platform`, and returns arrays of
    the shapes and dtypes of `problem.results`. It computes what `docs/mathematics.md` defines for
    the `features` that it declares.
    """

    problem_type = PageAttentionProblem

    @property
    def planner(self) -> PlanBackend | None:
        """Who makes plans for this backend's calls; None if it needs none."""
        return None
