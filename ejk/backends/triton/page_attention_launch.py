"""How one `ejk.page_attention` problem is cut for a GPU: pure functions of problem and target."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from ejk.backends.gpu import Target
from ejk.backends.page_attention import PageAttentionProblem, PagedProblem
from ejk.backends.page_attention_plan import PlanProblem
from ejk.backends.triton.page_attention_tuned import TUNED, Blocks, Cell

LONGEST_CHAIN = 64  # float32 products of a logit that are added up one after the other
COMBINE_BLOCK = 8192  # entries of parts that a program of the combination holds
GRANULE = 128  # tokens; planned pieces are whole multiples
# Planned pieces a multiprocessor. Flat from 1 to 4 on an H100 for a batch of 256 ragged contexts:
# enough that the last pieces to start are short.
PIECES_PER_SM = 2.5
# A batch that fills the machine twice is not cut where no context exceeds so many tokens: the
# longest is done long before the rest, and there is nothing to combine, which saves 1.7 us.
WHOLE_TOKENS = 4096
# Tokens and pipeline stages, best first, of which the first is taken that leaves no room for a
# second program on a multiprocessor.
ALONE = ((128, 3), (128, 4), (256, 3), (128, 5), (64, 3), (64, 4), (32, 3), (32, 4))


@dataclasses.dataclass(frozen=True)
class Tuning:
    """What a caller may fix; None leaves it to `Launch.of`. See `ejk.TritonPageAttention`."""

    block_kv: int | None = None
    num_warps: int | None = None
    num_stages: int | None = None
    split_tokens: int | None = None

    def blocks(self) -> dict[str, int]:
        """Return what is fixed of `Blocks`."""
        given = {field: getattr(self, field) for field in Blocks._fields}
        return {field: value for field, value in given.items() if value is not None}


@dataclasses.dataclass(frozen=True)
class Launch:
    """How one problem is cut and run.

    With `problem.num_splits` of 1 or more, whatever enters rounding (`block_group`, `block_kv`,
    the two parts of the head dimensions) follows from head dimensions, group, dtype and the
    target alone.
    """

    block_group: int
    block_kv: int
    block_d: tuple[int, int]
    block_dv: tuple[int, int]
    num_warps: int
    num_stages: int
    num_splits: int  # equal parts of each context; 0: as planned
    split_blocks: int = 0
    plan: PlanProblem | None = None

    @classmethod
    def of(
        cls,
        problem: PageAttentionProblem,
        tuning: Tuning,
        target: Target,
        tuned: dict[Cell, Blocks] = TUNED,
    ) -> "Launch":
        rows = block_group(problem.group, problem.value_head_dim)
        launch = cls(
            block_group=rows,
            block_kv=0,
            block_d=two_parts(problem.head_dim),
            block_dv=two_parts(problem.value_head_dim),
            num_warps=0,
            num_stages=0,
            num_splits=1,
        )
        large = _is_large(problem, tuning, target, rows)
        cell = Cell(
            target.compute_capability, problem.cache_dtype.itemsize, problem.head_dim, rows, large
        )
        if problem.head_dim == problem.value_head_dim and cell in tuned:
            blocks = tuned[cell]
        else:
            blocks = launch._heuristic(problem, target, large)
        if not _is_invariant(problem, tuning) and _is_short(problem, target, rows, blocks):
            blocks = blocks._replace(num_stages=2)
        launch = launch._with(blocks._replace(**tuning.blocks()))
        while launch.shared_memory(problem, target) > target.shared_memory:
            if tuning.block_kv is None and launch.block_kv > 16:
                launch = dataclasses.replace(launch, block_kv=launch.block_kv // 2)
            elif tuning.num_stages is None and launch.num_stages > 1:
                launch = dataclasses.replace(launch, num_stages=launch.num_stages - 1)
            else:
                break  # what was asked for does not fit: `limits` says so
        return launch._cut(problem, tuning, target)

    def _with(self, blocks: Blocks) -> "Launch":
        return dataclasses.replace(self, **blocks._asdict())

    def _heuristic(self, problem: PageAttentionProblem, target: Target, large: bool) -> Blocks:
        """Return what was best nearly wherever we measured: shared memory may yet shrink it."""
        wide = sum(self.block_dv)
        is_float32 = (
            problem.query_dtype == jnp.float32
        )  # taken on the ordinary cores, from registers
        if not large:  # It is latency that counts, not bytes.
            num_warps = 8 if wide > (128 if is_float32 else 256) else 4
            return Blocks(64 if self.block_group == 16 else 32, num_warps, 3 if is_float32 else 2)
        num_warps = 8 if wide > 256 or is_float32 else 4
        # One program a multiprocessor: what is left of the work then goes to whoever is done.
        # With three at once, contexts of very different length took 172 us instead of 135 on an
        # H100 (head dimension 64).
        for block_kv, num_stages in ALONE:
            blocks = Blocks(block_kv, num_warps, num_stages)
            launch = self._with(blocks)
            if launch.shared_memory(problem, target) <= target.shared_memory:
                if 2 * launch._streamed(problem) > target.shared_memory:
                    return blocks
        return Blocks(128, num_warps, 3)

    def _cut(self, problem, tuning, target) -> "Launch":
        """Choose how the contexts are cut."""
        most = max(2, -(-problem.capacity // self.block_kv))  # parts of a block or more
        if problem.num_splits:
            return dataclasses.replace(self, num_splits=min(problem.num_splits, most))
        if tuning.split_tokens:
            blocks = -(-min(tuning.split_tokens, problem.capacity) // self.block_kv)
            # Two or more, whatever the table's width: one is not rounded as parts are.
            splits = max(2, -(-problem.capacity // (blocks * self.block_kv)))
            return dataclasses.replace(self, num_splits=splits, split_blocks=blocks)
        if problem.visible_bound <= GRANULE:
            return self
        programs = problem.num_kv_heads * self._group_blocks(problem)
        if problem.num_seqs > 1:
            own = PlanProblem(
                problem.num_seqs,
                problem.capacity,
                problem.has_window,
                choose_cuts(target.num_sms, problem.num_seqs, programs, problem.visible_bound),
                GRANULE,
                own_windows=problem.own_windows,
            )
            return dataclasses.replace(self, num_splits=0, plan=problem.plan or own)
        # One program a multiprocessor: of 16, 24, 33 and 49 parts of one context of 131,072 tokens
        # on an H100 (8 KV heads, 132 multiprocessors) 16 were done first, in 182.8 us; 24, a wave
        # and a half, took 194.1.
        splits = target.num_sms // programs
        blocks = -(-problem.visible_bound // self.block_kv)
        return dataclasses.replace(self, num_splits=max(1, min(splits, blocks)))

    def _group_blocks(self, problem: PageAttentionProblem) -> int:
        return -(-problem.group // self.block_group)

    def grid(self, problem: PageAttentionProblem) -> int:
        pieces = self.plan.max_pieces if self.plan else problem.num_seqs * self.num_splits
        return pieces * self._group_blocks(problem) * problem.num_kv_heads

    def combine_grid(self, problem: PageAttentionProblem) -> int:
        seqs = self.plan.max_splits if self.plan else problem.num_seqs
        return seqs * problem.num_heads * -(-problem.value_head_dim // self._combine_dv(problem))

    def _combine_dv(self, problem: PageAttentionProblem) -> int:
        """Entries of the values that one program combines."""
        # With a plan nearly every program finds nothing to do, and the fewer the better: 5,248 took
        # 4.3 us on an H100, 1,280 took 1.9. Without one there are few rows for many processors.
        return power_of_two(problem.value_head_dim) if self.plan else 32

    def num_parts(self, problem: PageAttentionProblem) -> int:
        if self.plan:
            return self.plan.max_pieces if self.plan.max_cuts else 0
        return problem.num_seqs * self.num_splits if self.num_splits > 1 else 0

    def part_types(self, problem: PageAttentionProblem) -> dict[str, jax.ShapeDtypeStruct | None]:
        """Return the memory for parts of contexts, None where every context is one piece."""
        rows = (self.num_parts(problem), problem.num_heads)
        if not rows[0]:
            return {"part_out_ptr": None, "part_lse_ptr": None}
        return {
            "part_out_ptr": jax.ShapeDtypeStruct((*rows, problem.value_head_dim), jnp.float32),
            "part_lse_ptr": jax.ShapeDtypeStruct(rows, jnp.float32),
        }

    def shared_memory(self, problem: PageAttentionProblem, target: Target) -> int:
        """Bound the shared memory of a program, in bytes."""
        # On AMD the product reads its queries from registers.
        queries = 0 if target.is_amd else self.block_group * sum(self.block_d)
        weights = self.block_group * self.block_kv
        held = problem.query_dtype.itemsize * (queries + weights) + 4 * weights
        return self._streamed(problem) + held

    def _streamed(self, problem: PageAttentionProblem) -> int:
        """Return the bytes of shared memory that keys and values stream through."""
        k_block, v_block = (self.block_kv * sum(width) for width in (self.block_d, self.block_dv))
        buffers = self.num_stages - 1
        elements = buffers * (k_block + v_block) if buffers else max(k_block, v_block)
        return problem.cache_dtype.itemsize * elements

    def constants(self, problem: PageAttentionProblem) -> dict[str, Any]:
        return {
            "NUM_SEQS": problem.num_seqs,
            "NUM_HEADS": problem.num_heads,
            "NUM_KV_HEADS": problem.num_kv_heads,
            "HEAD_DIM": problem.head_dim,
            "VALUE_HEAD_DIM": problem.value_head_dim,
            "NUM_PAGES": problem.num_pages,
            "PAGE_SIZE": problem.page_size,
            "MAX_BLOCKS": problem.max_blocks,
            "NUM_SPLITS": self.num_splits,
            "SPLIT_BLOCKS": self.split_blocks,
            "NUM_PARTS": self.num_parts(problem),
            **stride_constants(problem),
            "stride_window_seq": int(problem.own_windows),
            "SOFT_CAP": problem.soft_cap or 0.0,
            "HAS_WINDOW": problem.has_window,
            "HAS_SINKS": problem.has_sinks,
            "HAS_ALIBI": problem.has_alibi,
            "HAS_DISTANCES": problem.own_distances,
            "BLOCK_GROUP": self.block_group,
            "BLOCK_KV": self.block_kv,
            "BLOCK_D": self.block_d[0],
            "BLOCK_D_REST": self.block_d[1],
            "CHAIN": chain(problem),
            "BLOCK_DV": self.block_dv[0],
            "BLOCK_DV_REST": self.block_dv[1],
        }

    def combine_constants(self, problem: PageAttentionProblem) -> dict[str, Any]:
        return {
            "NUM_SEQS": problem.num_seqs,
            "NUM_HEADS": problem.num_heads,
            "NUM_SPLITS": self.num_splits,
            "NUM_PARTS": self.num_parts(problem),
            "FIRST_SPLIT": 1 + self.plan.max_pieces if self.plan else 0,
            "VALUE_HEAD_DIM": problem.value_head_dim,
            "HAS_SINKS": problem.has_sinks,
            "BLOCK_PARTS": min(64, COMBINE_BLOCK // self._combine_dv(problem)),
            "BLOCK_DV": self._combine_dv(problem),
        }


def block_group(group: int, value_head_dim: int) -> int:
    """Return how many of a group's query heads one program takes.

    A row of the product costs registers for its weighted values: 16 rows of 512 floats are 64
    registers a thread on four warps. More than 64 rows spill whatever the width.
    """
    most_rows = min(64, max(16, 16 * 512 // power_of_two(sum(two_parts(value_head_dim)))))
    return min(max(16, power_of_two(group)), most_rows)


def _is_large(problem: PageAttentionProblem, tuning: Tuning, target: Target, rows: int) -> bool:
    """Say whether there is a block of 128 tokens for every multiprocessor.

    Where the bits of a result must not depend on the batch, the answer does not either.
    """
    if _is_invariant(problem, tuning):
        return True
    return _programs(problem, rows) * -(-problem.visible_bound // 128) >= target.num_sms


def _is_short(problem: PageAttentionProblem, target: Target, rows: int, blocks: Blocks) -> bool:
    """Say whether programs are short and many: better several at once than each with many buffers.

    On an H100, with 3 stages and with 2: 1,024 contexts of 128 tokens 255.9 and 190.3 us, of 256
    412.6 and 367.4, of 512 743.7 and 717.0; 256 of 1,024 tokens 363.8 and 358.5; but 16 of them, a
    program a multiprocessor, 29.5 and 33.7.
    """
    programs = _programs(problem, rows)
    return problem.visible_bound <= 8 * blocks.block_kv and programs >= 4 * target.num_sms


def _is_invariant(problem: PageAttentionProblem, tuning: Tuning) -> bool:
    """Say whether the bits of a result must not depend on the batch."""
    return bool(problem.num_splits or tuning.split_tokens)


def _programs(problem: PageAttentionProblem, rows: int) -> int:
    """Return how many programs there are where no context is cut."""
    return problem.num_seqs * problem.num_kv_heads * -(-problem.group // rows)


def choose_cuts(num_sms: int, num_seqs: int, programs_per_piece: int, longest: int) -> int:
    """Return in how many pieces a planned batch is cut: as few as keep the machine busy.

    0 leaves every context whole; the plan is then only an order.
    """
    if num_seqs * programs_per_piece >= 2 * num_sms and longest <= WHOLE_TOKENS:
        return 0
    return max(1, int(PIECES_PER_SM * num_sms / programs_per_piece))


def stride_constants(problem: PagedProblem) -> dict[str, int]:
    """Return the strides of both pools, as the kernels take them."""
    keys = strides(problem, problem.head_dim)
    values = keys if problem.latent else strides(problem, problem.value_head_dim)
    return {
        **{f"stride_k_{axis}": stride for axis, stride in keys.items()},
        **{f"stride_v_{axis}": stride for axis, stride in values.items()},
        "stride_half": keys["page"] // 2 if problem.fused else 0,
    }


def strides(problem: PagedProblem, head_dim: int) -> dict[str, int]:
    """Elements from one page, KV head and slot of a pool to the next."""
    layout = problem.layout
    sizes = {
        layout.pages: problem.num_pages,
        layout.kv_heads: problem.num_kv_heads,
        layout.slots: problem.page_size,
    }
    if layout.halves is not None:
        sizes[layout.halves] = 2
    stride = {
        axis: head_dim * math.prod(sizes[a] for a in range(axis + 1, len(sizes))) for axis in sizes
    }
    return {
        "page": stride[layout.pages],
        "head": stride[layout.kv_heads],
        "slot": stride[layout.slots],
    }


def two_parts(head_dim: int) -> tuple[int, int]:
    """Cover `head_dim` with a power of two, or with two where that pads less: 576 is 512 + 64.

    Up to 128 one is better although it pads more: 80 as 128 took 150 us for ragged contexts on an
    H100, as 64 + 16 it took 187.
    """
    whole = max(16, power_of_two(head_dim))
    rest = max(16, power_of_two(head_dim - whole // 2))
    return (whole // 2, rest) if whole > 128 and rest < whole // 2 else (whole, 0)


def chain(problem: PagedProblem) -> int:
    """Return how many products of a logit are added up apart from others: in 16 bits all.

    A product of float32 adds up one after the other. Of 576 the error is 1.5 times what is allowed;
    in emulation it is 2.8 times that of 64 at a time, and 2.2 times that of 128.
    """
    block_d, _ = two_parts(problem.head_dim)
    return min(block_d, LONGEST_CHAIN) if problem.query_dtype == jnp.float32 else block_d


def power_of_two(at_least: int) -> int:
    return 1 << (at_least - 1).bit_length()
