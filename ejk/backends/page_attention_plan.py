"""What every backend of `ejk.plan_page_attention` is given."""

import abc
import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ejk._backend import Backend, Problem
from ejk._indices import Size

ROUNDS = 4  # in which the programs of all shares run, at most


class PlanOperands(NamedTuple):
    """The arrays of one call."""

    context_lens: Any  # int32 [num_seqs]
    sliding_window: Any  # int32 [], or None; [num_seqs] with `own_windows`
    prefix_groups: Any = None  # as in `PageAttentionOperands`, and so is what follows
    prefix_pages: Any = None
    block_tables: Any = None  # int32 [num_seqs, max_blocks]; None without groups


@dataclasses.dataclass(frozen=True)
class PlanProblem(Problem):
    """The static facts of a plan: which work there may be, and how it is dealt out.

    The plan is one array, `[rows, 4]` of int32:

    - row 0: how many pieces there are, and how many sequences have several;
    - `num_seqs + max_cuts` rows, those of the pieces: sequence, begin and end of its positions,
      and its part, or -1 where the piece is all of its sequence;
    - `max_splits` rows, those of the sequences in several pieces: sequence, first part, parts.

    What lies beyond the counts is not initialised. The pieces are in the order of their start: the
    longest first, equal ones by sequence and position. The part of one has its number in the order
    of sequences and positions, so that the parts of a sequence follow each other.

    The pieces of a sequence share out all positions from 0 to the capacity, and a call takes of
    each what its own lengths and window show: a plan for others is slow, never wrong. With a
    window the first piece has `-1 - first` as its begin, where `first` is the first position that
    the plan's window shows: where to look first, while the call's own window is not known yet.

    With `packs`, sequences that share their first tokens may be read together: see
    `ejk/backends/page_attention_packs.py`. Then three lists follow each other:

    - the above for what each sequence reads alone, where the last rows are one for each sequence:
      its place among the members, or -1, its first part, its parts (0 for a sequence in one piece
      that is in no pack). The first piece of a member has `-1 - pack` as its begin: it begins where
      what its pack shares ends;
    - the above for the packs, in place of sequences. The last piece of a pack ends with what it
      shares, and the last rows are one for each pack: the tokens that it shares, first part,
      parts. Every piece of a pack has a number of a part, under which each member has one;
    - `members` sequences for each pack, -1 where it has fewer, in rows of four.

    How contexts are cut is said in `ejk/backends/triton/page_attention/plan_kernel.py`. It follows
    from the lengths, and from `resident` and `programs_per_piece`, which say in how many shares.
    With `max_cuts=0` no context is cut, and the plan is an order.
    """

    operation: ClassVar[str] = "plan_page_attention"
    feature_names: ClassVar[frozenset[str]] = frozenset({"sliding_window"})

    num_seqs: Size
    capacity: Size
    has_window: bool
    max_cuts: int
    granule: int
    own_windows: bool = False
    """Each sequence has a window of its own."""
    resident: int = 1
    """Programs that the machine runs at a time."""
    programs_per_piece: int = 1
    granule_cost: int = 8
    """What a granule takes, in eighths of 128 tokens of head dimension 128 in 16 bits: of packs
    alone, to find out whether they pay."""
    packs: "PlanProblem | None" = None
    """How packs are dealt out, in place of sequences; None where there are none."""
    is_packs: bool = False
    """It is a plan of packs."""
    members: int = 0
    """Sequences of a pack, at most."""
    page_size: int = 1
    """Slots of a page, which is what sequences share."""
    least_saved: int | None = None
    """Granules that a pack saves at least, in place of what the model of costs says."""

    @classmethod
    def order_of(cls, facts: "PlanFacts") -> "PlanProblem":
        """Return a plan of an order alone, longest first: no context is cut."""
        has_window = facts.sliding_window is not None
        return cls(facts.num_seqs, facts.capacity, has_window, max_cuts=0, granule=1)

    @property
    def shares(self) -> int:
        """Even shares in which the batch is cut, unless nothing is."""
        count = even_shares(self.resident, self.programs_per_piece)
        # As many packs as there may be are seldom there.
        return count if self.is_packs else equal_shares(count, self.num_seqs)

    @property
    def max_pieces(self) -> Size:
        return self.num_seqs + self.max_cuts

    @property
    def max_splits(self) -> Size:
        """Sequences that may be in several pieces: each costs a cut. With packs, all rows."""
        if self.packs or self.is_packs:
            return self.num_seqs
        return min(self.num_seqs, self.max_cuts)

    @property
    def max_parts(self) -> Size:
        """Parts of sequences, in the memory of which each has all query heads."""
        if self.packs:
            return self.max_pieces + self.members * self.packs.max_pieces
        return self.max_pieces if self.max_cuts else 0

    @property
    def features(self) -> frozenset[str]:
        return frozenset({"sliding_window"} if self.has_window else ())

    @property
    def results(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        rows = 1 + self.max_pieces + self.max_splits
        if self.packs:
            rows += self.packs.results[0].shape[0] + -(-self.packs.num_seqs * self.members // 4)
        return (jax.ShapeDtypeStruct((rows, 4), jnp.int32),)

    def fold(self, size: int, operands: Any, axes: Any) -> None:
        return None  # plans of several batches are several plans


def even_shares(resident: int, programs: int) -> int:
    """Return in how many shares of so many programs a batch is cut, of which `resident` run.

    They are as many as keep nine tenths of the machine busy, in one round or in a few. Of 8
    programs 16 are 128 of 132; of 72 only one fits, but in three rounds 5 do, 360 of 396.
    """
    counts = {rounds: rounds * resident // programs for rounds in range(1, ROUNDS + 1)}
    for rounds, count in counts.items():
        if 10 * count * programs >= 9 * rounds * resident:
            return count
    return max(1, counts[max(counts, key=lambda rounds: counts[rounds] / rounds)])


def equal_shares(count: int, num_seqs: int) -> int:
    """Return up to a twentieth fewer shares, if they cut contexts of one length equally.

    What is cut equally is cut less often: 65 contexts in 130 parts, and not in 196 for 132 shares.
    """
    fewer = count - count % max(1, num_seqs)
    return fewer if 20 * fewer >= 19 * count else count


@dataclasses.dataclass(frozen=True)
class PlanFacts:
    """What a plan and the calls that use it have in common."""

    num_seqs: Size
    num_heads: int
    num_kv_heads: int
    head_dim: int
    page_size: int
    max_blocks: Size
    sliding_window: int | str | None  # "traced" for one that only the device knows

    @property
    def capacity(self) -> Size:
        """Tokens that a row of the block tables can name."""
        return self.max_blocks * self.page_size

    @classmethod
    def of(cls, facts: Any, sliding_window: Any) -> "PlanFacts":
        """Return those of a call, of whose `PagedFacts` they are a part."""
        shared = {
            field.name: getattr(facts, field.name)
            for field in dataclasses.fields(cls)
            if field.name != "sliding_window"
        }
        return cls(**shared, sliding_window=window_fact(sliding_window))


def window_fact(sliding_window: Any) -> int | str | None:
    """Return what is known of a window when a call is traced."""
    if sliding_window is None:
        return None
    known = isinstance(sliding_window, int | np.integer | np.ndarray)
    if not known:
        return "traced"
    return sliding_window if isinstance(sliding_window, bool) else int(sliding_window)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PageAttentionPlan:
    """How a batch's work is dealt out: a pytree, made by `ejk.plan_page_attention`.

    Attributes:
        work: the pieces of every context and what is to be combined; its layout may change.
        problem: how `work` is laid out.
        facts: what the calls that use the plan must have in common with it.
    """

    work: Any  # int32 [rows, 4]
    problem: PlanProblem = dataclasses.field(metadata={"static": True})
    facts: PlanFacts = dataclasses.field(metadata={"static": True})

    def check(self, facts: PlanFacts) -> None:
        """Raise `ValueError` unless a call's facts are the plan's."""
        if self.work.shape != self.problem.results[0].shape:
            raise ValueError(
                f"plan.work.shape={self.work.shape} must be {self.problem.results[0].shape}: "
                "a plan is for one batch"
            )
        for field in dataclasses.fields(facts):
            planned, called = getattr(self.facts, field.name), getattr(facts, field.name)
            if "traced" in (planned, called) and None not in (planned, called):
                continue  # two windows, of which one is known to the device alone
            if planned != called:
                raise ValueError(f"plan was made for {field.name}={planned}; the call has {called}")


class PlanBackend(Backend):
    """A way to run `ejk.plan_page_attention`."""

    problem_type = PlanProblem

    @abc.abstractmethod
    def plan_problem(
        self,
        facts: PlanFacts,
        value_head_dim: int,
        cache_dtype: np.dtype,
        num_prefix_groups: Size = 0,
    ) -> PlanProblem:
        """Say which work there may be in the calls of these facts, and how it is dealt out."""
