"""`ejk.write_kv_cache` as a Triton kernel: what it refuses, how it is launched."""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ejk.backends.gpu import MAX_GRID, Target
from ejk.backends.page_attention import POOLS
from ejk.backends.triton._backend import Call, TritonBackend
from ejk.backends.write_kv_cache import (
    WriteKVCacheBackend,
    WriteKVCacheOperands,
    WriteKVCacheProblem,
    last_writes,
)

# What a program holds of the keys, and of the values, in bytes: 4 times 16 in each of 128 threads.
BLOCK_BYTES = 8192
MAX_BLOCK_ROW = 2048  # elements
MAX_TOKENS = 64
COMPARISONS = 1024  # at a time on a warp: 32 registers of a thread
# A program takes a second token once there are so many programs: eight to a multiprocessor.
ENOUGH_PROGRAMS = 1024
# Above it the comparisons of every token with every later one would take as long as the copy.
MAX_COMPARED = 16384


@dataclasses.dataclass(frozen=True)
class TritonWriteKVCache(TritonBackend, WriteKVCacheBackend):
    """Run `ejk.write_kv_cache` as a Triton kernel, through jax-triton.

    Attributes:
        compute_capability: compile for it, 90 for sm_90; the device's own if None.
        interpret: run the kernel on the CPU with Triton's interpreter.
    """

    compute_capability: int | None = None
    interpret: bool = False

    features = POOLS | {"latent_pools"}

    launches = 1

    def limits_on(self, target: Target, problem: WriteKVCacheProblem) -> tuple[str, ...]:
        if (grid := Blocks.of(problem, target).grid(problem)) > MAX_GRID:
            return (f"its grid of {grid} programs exceeds {MAX_GRID}",)
        return ()

    def run_on(
        self,
        target: Target,
        problem: WriteKVCacheProblem,
        operands: WriteKVCacheOperands,
        call: Call,
    ) -> tuple[jax.Array, ...]:
        from ejk.backends.triton.write_kv_cache_kernel import write_kv_cache_kernel

        slots, blocks = operands.slot_mapping, Blocks.of(problem, target)
        if problem.num_tokens > MAX_COMPARED:
            slots = jnp.where(last_writes(slots, problem.num_slots), slots, -1)
        pools = {"key_cache_ptr": operands.key_cache}
        if operands.value_cache is not None:
            pools["value_cache_ptr"] = operands.value_cache
        results = call(
            write_kv_cache_kernel,
            {"key_ptr": operands.key, "value_ptr": operands.value, "slot_mapping_ptr": slots},
            {} if "value_cache_ptr" in pools else {"value_cache_ptr": None},
            constants(problem, blocks),
            in_place=pools,
            grid=blocks.grid(problem),
            num_warps=blocks.num_warps,
            num_stages=1,
        )
        return tuple(x for x in results if x is not None)


class Blocks(NamedTuple):
    """What one program writes."""

    tokens: int
    row: int  # elements of a token's keys, and as many of its values
    num_warps: int

    @classmethod
    def of(cls, problem: WriteKVCacheProblem, target: Target) -> "Blocks":
        itemsize, warp_bytes = problem.row_dtype.itemsize, 16 * target.warp_size
        row = min(_power_of_two(_row(problem)), MAX_BLOCK_ROW)
        programs = problem.num_tokens * -(-_row(problem) // row)
        shared = _power_of_two(-(-programs // ENOUGH_PROGRAMS))
        tokens = min(shared, max(1, BLOCK_BYTES // (itemsize * row)), MAX_TOKENS)
        # No more threads than copy 16 bytes each.
        return cls(tokens, row, min(4, max(1, tokens * row * itemsize // warp_bytes)))

    def others(self, problem: WriteKVCacheProblem) -> int:
        """Tokens that the program's own are compared with at a time."""
        at_once = max(32, COMPARISONS * self.num_warps // self.tokens)
        return min(at_once, max(32, _power_of_two(problem.num_tokens)))

    def grid(self, problem: WriteKVCacheProblem) -> int:
        return -(-problem.num_tokens // self.tokens) * -(-_row(problem) // self.row)


def constants(problem: WriteKVCacheProblem, blocks: Blocks) -> dict[str, Any]:
    """Return the kernel's compile-time parameters."""
    k_strides = _strides(problem, problem.key_shape)
    v_strides = _strides(problem, problem.value_shape or problem.key_shape)
    return {
        "NUM_TOKENS": problem.num_tokens,
        "NUM_KV_HEADS": problem.num_kv_heads,
        "HEAD_DIM": problem.head_dim,
        "VALUE_HEAD_DIM": problem.value_head_dim,
        "NUM_SLOTS": problem.num_slots,
        "PAGE_SIZE": problem.page_size,
        **{f"stride_k_{axis}": stride for axis, stride in k_strides.items()},
        **{f"stride_v_{axis}": stride for axis, stride in v_strides.items()},
        "stride_half": k_strides["page"] // 2 if problem.fused else 0,
        "HAS_DUPLICATES": 1 < problem.num_tokens <= MAX_COMPARED,
        "BLOCK_TOKENS": blocks.tokens,
        "BLOCK_OTHERS": blocks.others(problem),
        "BLOCK_ROW": blocks.row,
    }


def _row(problem: WriteKVCacheProblem) -> int:
    """Elements of a token's keys or of its values, whichever are more."""
    return problem.num_kv_heads * max(problem.head_dim, problem.value_head_dim)


def _strides(problem: WriteKVCacheProblem, shape: tuple[int, ...]) -> dict[str, int]:
    """Elements from one page, KV head and slot of a pool to the next."""
    layout = problem.layout
    axes = {"page": layout.pages, "head": layout.kv_heads, "slot": layout.slots}
    return {name: math.prod(shape[axis + 1 :]) for name, axis in axes.items()}


def _power_of_two(at_least: int) -> int:
    return 1 << (at_least - 1).bit_length()
