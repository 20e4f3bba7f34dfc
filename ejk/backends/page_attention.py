"""What every backend of `ejk.page_attention` is given: the problem and the operands."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

from ejk._backend import Backend
from ejk._batching import merge_axis
from ejk._indices import Size
from ejk._shards import Shards
from ejk.backends.page_attention_plan import PlanBackend, PlanProblem
from ejk.backends.page_attention_shards import shards_of
from ejk.backends.paged_problem import NO_GROUPS, PagedProblem


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
