"""`ejk.page_attention` as a Triton kernel: its tuning, what it refuses, how it is launched."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp

from ejk.backends.page_attention import (
    ALL_FEATURES,
    PageAttentionBackend,
    PageAttentionOperands,
    PageAttentionProblem,
)
from ejk.backends.triton import _launch
from ejk.backends.triton._target import Target

COMBINE_BLOCK_SPLITS = 16
MAX_GRID = 2**31 - 1


@dataclasses.dataclass(frozen=True)
class TritonPageAttention(PageAttentionBackend):
    """Run `ejk.page_attention` as a Triton kernel, through jax-triton.

    Attributes:
        block_kv: tokens that a step of the kernel's loop takes; a power of two, at least 16.
        num_warps: warps a program runs on.
        num_stages: depth of the kernel's software pipeline: one less is the number of blocks of
            keys and values in flight.
        split_tokens: with `num_splits=0`, cut every context into pieces of so many tokens,
            rounded up to whole blocks. Then a sequence's result has the same bits in every batch.
        compute_capability: compile for it, 90 for sm_90; the device's own if None.
        num_sms: streaming multiprocessors to keep busy; the device's own if None.
        interpret: run the kernel on the CPU with Triton's interpreter.
    """

    block_kv: int | None = None
    num_warps: int | None = None
    num_stages: int | None = None
    split_tokens: int | None = None
    compute_capability: int | None = None
    num_sms: int | None = None
    interpret: bool = False

    name = "triton"
    features = ALL_FEATURES

    def __post_init__(self):
        for field, least in (("block_kv", 16), ("num_warps", 1)):
            value = getattr(self, field)
            if value is not None and (value < least or value & (value - 1)):
                raise ValueError(f"{field}={value} must be a power of two, at least {least}")
        for field in ("num_stages", "split_tokens", "num_sms"):
            value = getattr(self, field)
            if value is not None and value < 1:
                raise ValueError(f"{field}={value} must be at least 1")

    @property
    def platforms(self):
        return ("cpu",) if self.interpret else ("cuda", "rocm")

    @property
    def only_if_asked(self):
        return () if self.interpret else ("rocm",)

    def limits(self, problem: PageAttentionProblem, platform: str):
        if missing := _launch.available(interpret=self.interpret):
            return (missing,)
        target = self._target(platform)
        if target is None:
            return (
                f"no {platform} device is here to ask for its compute capability: register "
                "ejk.TritonPageAttention(compute_capability=90, num_sms=132), or the like",
            )
        reasons = []
        launch = Launch.of(problem, self, target)
        if launch.grid(problem) > MAX_GRID:
            reasons.append(f"its grid of {launch.grid(problem)} programs exceeds {MAX_GRID}")
        if launch.shared_memory(problem) > target.shared_memory:
            reasons.append(
                f"block_kv={launch.block_kv} with head_dim={problem.head_dim} takes "
                f"{launch.shared_memory(problem)} bytes of shared memory; the target has "
                f"{target.shared_memory}"
            )
        if problem.page_size * problem.num_kv_heads * problem.head_dim >= 2**31:
            reasons.append(f"a page of page_size={problem.page_size} has 2**31 elements or more")
        return reasons

    def run(self, problem, operands, platform):
        from ejk.backends.triton import page_attention_kernel as kernels

        target = self._target(platform)
        launch = Launch.of(problem, self, target)
        split = launch.num_splits > 1
        rows = (problem.num_seqs, problem.num_heads)
        parts = (*rows, launch.num_splits) if split else rows
        call = functools.partial(
            _launch.call,
            compute_capability=target.compute_capability,
            interpret=self.interpret,
        )
        out, lse = call(
            kernels.page_attention_kernel,
            _inputs(operands),
            {
                "out_ptr": jax.ShapeDtypeStruct(
                    (*parts, problem.value_head_dim), jnp.float32 if split else problem.dtype
                ),
                "lse_ptr": jax.ShapeDtypeStruct(parts, jnp.float32),
            },
            launch.constants(problem),
            grid=launch.grid(problem),
            num_warps=launch.num_warps,
            num_stages=launch.num_stages,
        )
        if split:
            out, lse = call(
                kernels.combine_splits_kernel,
                {"partial_out_ptr": out, "partial_lse_ptr": lse, "sinks_ptr": operands.sinks},
                {
                    "out_ptr": jax.ShapeDtypeStruct((*rows, problem.value_head_dim), problem.dtype),
                    "lse_ptr": jax.ShapeDtypeStruct(rows, jnp.float32),
                },
                {
                    "NUM_HEADS": problem.num_heads,
                    "NUM_SPLITS": launch.num_splits,
                    "VALUE_HEAD_DIM": problem.value_head_dim,
                    "HAS_SINKS": problem.has_sinks,
                    "BLOCK_SPLITS": COMBINE_BLOCK_SPLITS,
                    "BLOCK_DV": _power_of_two(problem.value_head_dim),
                },
                grid=math.prod(rows),
                num_warps=4,
                num_stages=2,
            )
        return (out, lse) if problem.return_lse else (out,)

    def _target(self, platform: str) -> Target | None:
        return Target.of(platform, self.compute_capability, self.num_sms)


@dataclasses.dataclass(frozen=True)
class Launch:
    """How one problem is cut and run.

    Whatever enters rounding (`block_group`, `block_kv`, the parts of the head dimensions)
    follows from head dimensions, group, dtype and the target alone.
    """

    block_group: int
    block_kv: int
    block_d: tuple[int, int]
    block_dv: tuple[int, int]
    num_warps: int
    num_stages: int
    num_splits: int
    split_blocks: int

    @classmethod
    def of(
        cls, problem: PageAttentionProblem, backend: TritonPageAttention, target: Target
    ) -> "Launch":
        block_d, block_dv = _two_parts(problem.head_dim), _two_parts(problem.value_head_dim)
        # A row of the product costs registers for its weighted values: 16 rows of 512 floats are
        # 64 registers a thread on four warps.
        most_rows = max(16, 16 * 512 // _power_of_two(sum(block_dv)))
        launch = cls(
            block_group=min(max(16, _power_of_two(problem.group)), most_rows),
            block_kv=backend.block_kv or 128,
            block_d=block_d,
            block_dv=block_dv,
            num_warps=backend.num_warps or (8 if sum(block_dv) > 256 else 4),
            num_stages=backend.num_stages or 3,
            num_splits=1,
            split_blocks=0,
        )
        while (
            backend.block_kv is None
            and launch.block_kv > 16
            and launch.shared_memory(problem) > target.shared_memory
        ):
            launch = dataclasses.replace(launch, block_kv=launch.block_kv // 2)
        return launch._split(problem, backend, target)

    def _split(self, problem, backend, target) -> "Launch":
        """Choose how many parts each context is cut in."""
        if problem.num_splits:
            return dataclasses.replace(self, num_splits=problem.num_splits)
        if backend.split_tokens:
            blocks = -(-backend.split_tokens // self.block_kv)
            splits = -(-problem.capacity // (blocks * self.block_kv))
            return dataclasses.replace(self, num_splits=splits, split_blocks=blocks)
        # As few as fill the machine: two to three programs for each multiprocessor, none of
        # them with less than two blocks to do.
        wanted = int(2.5 * target.num_sms / self.grid(problem))
        most = problem.visible_bound // (2 * self.block_kv)
        return dataclasses.replace(self, num_splits=max(1, min(wanted, most)))

    def grid(self, problem: PageAttentionProblem) -> int:
        group_blocks = -(-problem.group // self.block_group)
        return problem.num_seqs * self.num_splits * group_blocks * problem.num_kv_heads

    def shared_memory(self, problem: PageAttentionProblem) -> int:
        """Bound the shared memory of a program, in bytes."""
        itemsize = problem.dtype.itemsize
        buffers = max(self.num_stages - 1, 1)
        keys_and_values = buffers * self.block_kv * (sum(self.block_d) + sum(self.block_dv))
        queries = self.block_group * sum(self.block_d)
        weights = self.block_group * self.block_kv
        return itemsize * (keys_and_values + queries + weights) + 4 * weights

    def constants(self, problem: PageAttentionProblem) -> dict[str, int | float | bool | str]:
        k_strides = _strides(problem, problem.head_dim)
        v_strides = k_strides if problem.latent else _strides(problem, problem.value_head_dim)
        return {
            "NUM_HEADS": problem.num_heads,
            "NUM_KV_HEADS": problem.num_kv_heads,
            "HEAD_DIM": problem.head_dim,
            "VALUE_HEAD_DIM": problem.value_head_dim,
            "NUM_PAGES": problem.num_pages,
            "PAGE_SIZE": problem.page_size,
            "MAX_BLOCKS": problem.max_blocks,
            "NUM_SPLITS": self.num_splits,
            "SPLIT_BLOCKS": self.split_blocks,
            **{f"stride_k_{axis}": stride for axis, stride in k_strides.items()},
            **{f"stride_v_{axis}": stride for axis, stride in v_strides.items()},
            "SOFT_CAP": problem.soft_cap or 0.0,
            "HAS_WINDOW": problem.has_window,
            "HAS_SINKS": problem.has_sinks,
            "HAS_ALIBI": problem.has_alibi,
            "BLOCK_GROUP": self.block_group,
            "BLOCK_KV": self.block_kv,
            "BLOCK_D": self.block_d[0],
            "BLOCK_D_REST": self.block_d[1],
            "BLOCK_DV": self.block_dv[0],
            "BLOCK_DV_REST": self.block_dv[1],
        }


def _inputs(operands: PageAttentionOperands) -> dict[str, jax.Array | None]:
    inputs = {f"{name}_ptr": value for name, value in operands._asdict().items()}
    inputs["key_ptr"] = inputs.pop("key_cache_ptr")
    inputs["value_ptr"] = inputs.pop("value_cache_ptr")
    if inputs["value_ptr"] is None:
        inputs["value_ptr"] = inputs["key_ptr"]
    names = ("query", "key", "value", "context_lens", "block_tables", "attn_scale",
             "sliding_window", "sinks", "alibi_slopes")  # fmt: skip
    return {f"{name}_ptr": inputs[f"{name}_ptr"] for name in names}


def _strides(problem: PageAttentionProblem, head_dim: int) -> dict[str, int]:
    """Elements from one page, KV head and slot of a pool to the next."""
    layout = problem.layout
    sizes = {
        layout.pages: problem.num_pages,
        layout.kv_heads: problem.num_kv_heads,
        layout.slots: problem.page_size,
    }
    stride = {axis: head_dim * math.prod(sizes[a] for a in range(axis + 1, 3)) for axis in sizes}
    return {
        "page": stride[layout.pages],
        "head": stride[layout.kv_heads],
        "slot": stride[layout.slots],
    }


def _two_parts(head_dim: int) -> tuple[int, int]:
    """Cover `head_dim` with a power of two, or two where that pads less: 576 is 512 + 64."""
    whole = max(16, _power_of_two(head_dim))
    main = whole // 2
    rest = max(16, _power_of_two(head_dim - main))
    return (main, rest) if main >= 16 and main + rest < whole else (whole, 0)


def _power_of_two(at_least: int) -> int:
    return 1 << (at_least - 1).bit_length()
