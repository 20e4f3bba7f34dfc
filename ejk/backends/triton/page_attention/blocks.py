"""Which blocks of a group's query heads and of tokens `page_attention_kernel` takes on a GPU."""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp

from ejk.backends.gpu import Target
from ejk.backends.paged_problem import PagedProblem
from ejk.backends.triton._sizes import (
    MATRIX_ROWS,
    QUANTISED_ROWS,
    block_group,
    product_dtype,
    rows_of_one_tile,
    same_tile,
    value_bytes,
    widths,
)
from ejk.backends.triton.page_attention.occupancy import (
    Load,
    least_rows,
    programs_per_sm,
    quantised_per_sm,
    takes_bf16x3,
)
from ejk.backends.triton.page_attention.pipelines import of_converted, of_few_rows
from ejk.backends.triton.page_attention.tuned import TUNED, Cell, Pipeline

# Tokens and pipeline stages, best first. The first is taken that leaves no room for a second
# program on a multiprocessor.
ALONE = ((128, 3), (128, 4), (256, 3), (128, 5), (64, 3), (64, 4), (32, 3), (32, 4))
# The same for programs of which two or three fit, see `programs_per_sm`.
TOGETHER = ((128, 3), (64, 3), (32, 3), (64, 2), (32, 2))
# By rows, for large batches with one tile for keys of 576 and values of 512 entries. These leave no
# room for a second program. On an H100, 270,336 tokens in 16 bits, pages of 64, by tokens, warps
# and stages; wall time, us:
#     16 heads    64, 8, 3: 128    64, 4, 3: 127    32, 4, 5: 128    32, 8, 5: 144
#     32 heads    64, 8, 3: 138    32, 8, 5: 210
#     64 heads    32, 8, 3: 157    64, 8, 2: 159; with pages of fewer tokens 164 and 192
#     128 heads   32, 8, 3: 274    64, 8, 2: 269
# Four warps of 64 tokens spill where pages are smaller. Two tiles of 16 rows took 157 for 16 heads.
ONE_TILE = {16: Pipeline(64, 8, 3), 32: Pipeline(64, 8, 3), 64: Pipeline(32, 8, 3)}
# With one query a sequence, whose ids are loaded page by page, four warps do not spill: with 16
# heads and pages of 16, 65 contexts of 8,000 tokens took 217.1 us, and 233.6 with eight.
ONE_QUERY = ONE_TILE | {16: Pipeline(64, 4, 3)}
# A single context on a cache of 8 bits with a scale per head has two programs a multiprocessor. On
# an H200, 32,768 tokens, so and with four programs of 64, 2, 3: e4m3 22.9 and 24.5 us, int8 23.5
# and 24.9.
ONE_CONTEXT = Pipeline(128, 4, 3)
# For packs of 64 rows, in 16 bits and up to 128 entries wide. On an H200, 64 sequences on 16,384
# tokens, and 16 on 32,768, by tokens, warps and stages; us:
#     128, 4, 3: 114, 61.2    64, 4, 3: two programs at a time 110, 64.2; one 163, 84.1
#     128, 4, 2: 136, 73.5
PACKED = {64: Pipeline(128, 4, 3)}


@dataclasses.dataclass(frozen=True)
class Tuning:
    """What a caller may fix; None leaves it to `Sizes.of`. See `ejk.TritonPageAttention`."""

    block_kv: int | None = None
    num_warps: int | None = None
    num_stages: int | None = None
    split_tokens: int | None = None
    least_saved_bytes: int | None = None

    def fixed(self) -> dict[str, int]:
        """Return what is fixed of `Pipeline`."""
        given = {field: getattr(self, field) for field in Pipeline._fields}
        return {field: value for field, value in given.items() if value is not None}


class DecodeBlocks(NamedTuple):
    """What a program takes at a time, and how it runs."""

    block_group: int  # query heads of a group: rows of the product, padded
    block_kv: int  # tokens
    num_warps: int
    num_stages: int
    shared_memory: int  # bytes of a program, at most
    per_sm: int = 1  # programs that a multiprocessor runs at a time


def rows_of(problem: PagedProblem, group: int, target: Target) -> int:
    """Return how many of a KV head's `group` query rows a program takes."""
    most_rows = rows_of_one_tile(same_tile(problem), target)
    is_float32 = product_dtype(problem) == jnp.float32 and value_bytes(problem) == 4
    least = least_rows(is_float32, problem.latent, problem.value_head_dim, target)
    rows = block_group(group, problem.value_head_dim, most_rows, least)
    return min(rows, QUANTISED_ROWS) if problem.cache_type.is_quantised else rows


def choose_blocks(
    problem: PagedProblem,
    group: int,
    longest: int | None,
    tuning: Tuning,
    target: Target,
    tuned: dict[Cell, Pipeline] = TUNED,
    load: Load | None = None,
) -> DecodeBlocks:
    """Choose the blocks for `group` query rows a KV head, and contexts of up to `longest` tokens.

    `load` is that of a decode batch: a multiprocessor may then run several programs. None is for
    kernels that are not decode's.

    With `longest=None` and a load that shows no tokens nothing follows from the batch, so that no
    bit of a result does: the blocks are those of a batch that fills the machine.
    """
    rows = rows_of(problem, group, target)
    each = problem.num_kv_heads * -(-group // rows)
    programs = problem.num_seqs * each  # where no context is cut
    # Short work is up to two blocks of 128 tokens a multiprocessor, or up to four waves of programs
    # that take up to four of them. Two programs of smaller blocks at a time then hide each other's
    # start. On an H100, with large blocks and with small: 4 contexts of 1,024 tokens 9.6 and
    # 8.5 us, 32 of 512 29.7 and 26.4, 64 of 512 54.9 and 51.5; but 16 of 1,024 26.5 and 30.6.
    is_large = longest is None or not (
        programs * -(-longest // 128) <= 2 * target.num_sms
        or (longest <= 512 and programs < 4 * target.num_sms)
    )
    pipeline = _pipeline_of(problem, rows, target, tuned, is_large, load)
    # Where programs are short and many, several at once are better than each with many buffers. On
    # an H100, with 3 stages and with 2: 1,024 contexts of 128 tokens 255.9 and 190.3 us, of 256
    # 412.6 and 367.4, of 512 743.7 and 717.0; 256 of 1,024 tokens 363.8 and 358.5; but 16 of them,
    # a program a multiprocessor, 29.5 and 33.7.
    if longest is not None and longest <= 8 * pipeline.block_kv and programs >= 4 * target.num_sms:
        pipeline = pipeline._replace(num_stages=2)
    is_one = load is not None and longest is not None and problem.num_seqs == 1
    if is_one and is_large and _is_like_one_context(problem, rows):
        pipeline = ONE_CONTEXT
    pipeline = pipeline._replace(**tuning.fixed())
    is_bf16x3 = load is not None and takes_bf16x3(problem, target)
    memory = functools.partial(_shared_memory, is_bf16x3=is_bf16x3)
    pipeline, shared = _that_fits(problem, rows, pipeline, tuning, target, memory)
    is_quantised = problem.cache_type.is_quantised
    if is_quantised:
        is_like_one = is_one and pipeline == ONE_CONTEXT
        per_sm = 2 if is_like_one else quantised_per_sm(problem, programs, target)
    else:
        per_sm = programs_per_sm(problem, rows, target, load) if is_large else 1
    if is_quantised or is_bf16x3 or tuning.fixed():  # there may be no room for as many
        per_sm = max(1, min(per_sm, target.shared_memory // shared))
    return DecodeBlocks(rows, *pipeline, shared, per_sm)


def choose_pack_blocks(
    problem: PagedProblem, rows: int, target: Target, tuned: dict[Cell, Pipeline]
) -> DecodeBlocks:
    """Choose the blocks of packs, whose products have `rows` rows: of few those of sequences.

    The caller's tuning does not count here: it is for products of other rows.
    """
    own_rows = max(MATRIX_ROWS, rows_of(problem, problem.group, target))
    pipeline = _pipeline_of(problem, own_rows, target, tuned, is_large=True)
    memory = functools.partial(_shared_memory, is_bf16x3=takes_bf16x3(problem, target))
    if rows in PACKED:
        pipeline, memory = PACKED[rows], _packed_memory
    pipeline, shared = _that_fits(problem, rows, pipeline, Tuning(), target, memory)
    return DecodeBlocks(rows, *pipeline, shared)


def _pipeline_of(
    problem: PagedProblem,
    rows: int,
    target: Target,
    tuned: dict[Cell, Pipeline],
    is_large: bool,
    load: Load | None = None,
) -> Pipeline:
    """Return what was measured for such a problem, or else what the rules say."""
    itemsize = value_bytes(problem)
    cell = Cell(target.compute_capability, itemsize, problem.head_dim, rows, is_large)
    # Where elements are converted, it is not their size alone that counts.
    is_as_it_is = problem.query_dtype == problem.cache_dtype
    if is_as_it_is and problem.head_dim == problem.value_head_dim and cell in tuned:
        return tuned[cell]
    return _heuristic(problem, rows, target, is_large, load)


def _that_fits(
    problem: PagedProblem,
    rows: int,
    pipeline: Pipeline,
    tuning: Tuning,
    target: Target,
    memory: Callable[[PagedProblem, int, Pipeline, Target], int],
) -> tuple[Pipeline, int]:
    """Shrink what is not fixed until it fits; return the bytes of shared memory, too."""
    while (shared := memory(problem, rows, pipeline, target)) > target.shared_memory:
        if tuning.block_kv is None and pipeline.block_kv > 16:
            pipeline = pipeline._replace(block_kv=pipeline.block_kv // 2)
        elif tuning.num_stages is None and pipeline.num_stages > 1:
            pipeline = pipeline._replace(num_stages=pipeline.num_stages - 1)
        else:
            break  # what was asked for does not fit: `limits` says so
    return pipeline, shared


def _heuristic(
    problem: PagedProblem, rows: int, target: Target, is_large: bool, load: Load | None
) -> Pipeline:
    """Return what was best nearly everywhere. `_that_fits` may shrink it."""
    _, wide = widths(problem)
    if rows < MATRIX_ROWS:
        pipeline = of_few_rows(wide, rows)
        streamed = _streamed(problem, pipeline, pipeline.num_stages - 1)
        while 3 * streamed > target.shared_memory and pipeline.block_kv > 16:  # three are to fit
            pipeline, streamed = pipeline._replace(block_kv=pipeline.block_kv // 2), streamed // 2
        return pipeline
    # Taken on the ordinary cores, from registers.
    is_float32 = product_dtype(problem) == jnp.float32
    if problem.cache_type.is_quantised or (is_float32 and value_bytes(problem) < 4):
        return of_converted(problem, wide, rows, target, load)
    if is_large and programs_per_sm(problem, rows, target, load) > 1:
        for block_kv, num_stages in TOGETHER:
            pipeline = Pipeline(block_kv, 8 if is_float32 else 4, num_stages)
            if 3 * _streamed(problem, pipeline, num_stages - 1) <= target.shared_memory:
                return pipeline
    if same_tile(problem) and wide == 512 and is_large:
        return (ONE_TILE if load is None else ONE_QUERY)[rows]
    if not is_large:  # It is latency that counts, not bytes.
        num_warps = 8 if wide > (128 if is_float32 else 256) else 4
        return Pipeline(64 if rows == 16 else 32, num_warps, 3 if is_float32 else 2)
    num_warps = 8 if wide > 256 or is_float32 else 4
    # One program a multiprocessor. With three that no plan counted on, contexts of very different
    # length took 172 us instead of 135 on an H100 (head dimension 64).
    for block_kv, num_stages in ALONE:
        pipeline = Pipeline(block_kv, num_warps, num_stages)
        if _shared_memory(problem, rows, pipeline, target, False) <= target.shared_memory:
            if 2 * _streamed(problem, pipeline, num_stages - 1) > target.shared_memory:
                return pipeline
    return Pipeline(128, num_warps, 3)


def _is_like_one_context(problem: PagedProblem, rows: int) -> bool:
    """Say whether a call on one context is like those that `ONE_CONTEXT` was measured for."""
    is_8_bit = problem.cache_type.is_quantised and value_bytes(problem) == 1
    is_alike = is_8_bit and problem.scales != "token" and product_dtype(problem) == jnp.float16
    return is_alike and not problem.latent and widths(problem) == (128, 128) and rows == 16


def _shared_memory(
    problem: PagedProblem, rows: int, pipeline: Pipeline, target: Target, is_bf16x3: bool
) -> int:
    """Bound the shared memory of a program, in bytes."""
    buffers, weights = pipeline.num_stages - 1, rows * pipeline.block_kv
    itemsize = 6 if is_bf16x3 else product_dtype(problem).itemsize
    held = itemsize * weights
    if itemsize == 4 and value_bytes(problem) < 4:  # taken from shared memory once converted
        held += itemsize * pipeline.block_kv * max(widths(problem))
    if same_tile(problem) and rows == 64 and target.compute_capability == 90:
        buffers += 1  # a product that is waited for later keeps its block
    else:
        held += 4 * weights
        if rows == 64 and target.compute_capability == 90:  # the values are written
            held += 4 * rows * widths(problem)[1]
    if not target.is_amd:  # there the product reads its queries from registers
        held += itemsize * rows * widths(problem)[0]
    return _streamed(problem, pipeline, buffers) + held


def _packed_memory(problem: PagedProblem, rows: int, pipeline: Pipeline, target: Target) -> int:
    """Bound that of a pack of many rows, where products of warpgroups keep one more block."""
    queries = product_dtype(problem).itemsize * rows * widths(problem)[0]
    return _streamed(problem, pipeline, pipeline.num_stages) + queries + 2048


def _streamed(problem: PagedProblem, pipeline: Pipeline, buffers: int) -> int:
    """Return the bytes of shared memory that keys and values stream through."""
    k_block, v_block = (pipeline.block_kv * width for width in widths(problem))
    if same_tile(problem):
        v_block = 0
    elements = buffers * (k_block + v_block) if buffers else max(k_block, v_block)
    scales = 4 * buffers * pipeline.block_kv if problem.scales == "token" else 0
    return int(value_bytes(problem) * elements) + (1 if problem.latent else 2) * scales
