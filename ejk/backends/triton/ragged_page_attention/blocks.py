"""Which blocks of query rows and of tokens `ragged_page_attention_kernel` takes on a GPU."""

import dataclasses
import itertools

import jax.numpy as jnp

from ejk.backends.gpu import Target
from ejk.backends.ragged_page_attention import RaggedPageAttentionProblem
from ejk.backends.triton._sizes import product_dtype, same_tile, value_bytes, widths
from ejk.backends.triton.page_attention.blocks import Tuning, choose_blocks, rows_of

# Query rows that one narrow block may have: more are wide, or several narrow ones.
MOST_NARROW_ROWS = 64
# With at most this many new tokens a sequence, as when drafts are verified, latent attention on
# Hopper is one launch of wide blocks, which are dealt out to the multiprocessors. On an H200, 64
# contexts of 4,096 with 4 new tokens, before and after; us:
#     16 heads       230.0, 120.7 (decode's blocks: 160)    16, window                251.8, 159.5
#     16, page 16    252.7, 123.9                           16, of 200 to 32,000      244.6, 170.9
#     16, 8 new      245.4, 211.4                           16, half with 1 new       217.0, 118.0
#     32 heads       243.0, 210.5 (two launches: 217)       32, half with 1 new       266.7, 198.0
FEW_TOKENS = 8
# On Hopper, blocks of drafts mask only the tokens that need it where a context may exceed this many
# tokens; up to it they mask all, in one loop. On an H200, 32 sequences of 8,192 tokens, 32 heads
# and 8 KV heads of 128 entries, all masked and only those; us:
#     4 new tokens     257.7, 250.4    8, window         313.1, 259.0    8, e4m3    310.1, 279.4
#     8 new tokens     312.8, 265.3    8, soft cap       425.6, 311.3    8, int8    322.4, 289.6
#     16 new tokens    385.2, 260.9    8, heads of 64    224.5, 161.3
# 8 new tokens on 4 contexts of 32,768 took 190.0 and 163.0; on 128 of 512, 105.1 and 109.6. Caches
# of int4, queries in float32, slopes, positions, trees and other generations were not measured.
UNPEELED_TOKENS = 1024
# Wide blocks on an H100 that they fill keep 16 warps resident, of 128 registers a thread, so that
# the softmax of one overlaps the products of another: either one program of 256 rows, which reads
# keys and values once, or two of 128, whose start and end overlap. Time of two programs over that
# of one, by the tokens that a row may see, on one machine:
#     1,024   2,048   4,096          8,192          32,768   with ALiBi
#     0.92    0.98    0.98 to 0.99   1.03 to 1.06   1.10     1.04
# On an H200 8 x 4,096 tokens of an e4m3 cache took 3,961 us in two programs, 4,349 in one and 4,101
# to 4,259 with all registers; bfloat16 took 2,513. Converted numbers go through shared memory
# before each product, and all warps wait for that. With ALiBi two programs spill more. The 16 warps
# are worth 28 spilled bytes, and products that wait for one another (ptxas, C7512): 8 x 4,096
# tokens take 2,498 us; with 8 warps, which have twice the registers, they take 2,860.
HOPPER_TILE, HOPPER_REGISTERS = 8192, 128  # elements of a step's keys; a thread's
HOPPER_SHORT, HOPPER_LONG = (128, 8, 2), (256, 16, 3)  # rows, warps, stages
SHORT_TOKENS = 4096
# Elsewhere the largest rows that fit are taken, then the most tokens, then the most stages. On an
# H100, 128 x 128 and 128 x 64 with 3 stages are alike, 2 stages are up to a quarter slower and 4
# are no faster; on sm_89 four stages spill.
WIDE_ROWS, WIDE_KV, WIDE_STAGES = (128, 64, 32, 16), (128, 64, 32, 16), (3, 2)
WIDE_WARPS = 8
# 32-bit registers of a thread for accumulators, logits and weights; a thread that needs more
# spills: see `tests/backends/test_ragged_triton_compile.py`. On Hopper and on Blackwell the product
# takes its queries from shared memory, elsewhere from registers. On AMD copies pass through
# registers, too.
HELD_WGMMA, HELD_TCGEN05, HELD_MMA, HELD_AMD = 160, 120, 130, 64
# Bytes of shared memory beside blocks, for reductions and barriers. Not measured: no program of the
# same tests takes more.
SCRATCH = 1024


@dataclasses.dataclass(frozen=True)
class RaggedTuning:
    """What a caller may fix; None leaves it to `RaggedSizes.of`."""

    block_rows: int | None = None
    block_kv: int | None = None
    num_warps: int | None = None
    num_stages: int | None = None
    few_block_kv: int | None = None
    few_num_warps: int | None = None
    few_num_stages: int | None = None

    def fixed_of_many(self) -> tuple[int | None, ...]:
        """Return what is fixed of blocks of many query rows."""
        return self.block_rows, self.block_kv, self.num_warps, self.num_stages


@dataclasses.dataclass(frozen=True)
class RaggedBlocks:
    """Blocks of `rows` query rows, and how the programs that attend to them run.

    With `peel`, blocks of tokens that need no mask have a loop of their own.
    """

    rows: int
    block_kv: int
    num_warps: int
    num_stages: int
    shared_memory: int  # bytes of a program, at most
    max_registers: int | None  # of a thread; None: the compiler's choice
    peel: bool

    @property
    def edge_kv(self) -> int:
        """Tokens of a masked step: a mask takes registers, and few tokens need one."""
        return max(self.block_kv // 2, 16) if self.peel else self.block_kv


def blocks_of_few_tokens(
    problem: RaggedPageAttentionProblem, tuning: RaggedTuning, target: Target
) -> RaggedBlocks | None:
    """Return the blocks of all rows where `FEW_TOKENS` makes one launch, else None.

    Single tokens are left to decode's blocks, which are as good, so that they have decode's bits.
    """
    rows = rows_of(problem, min(problem.q_len_bound, FEW_TOKENS) * problem.group, target)
    is_free = tuning.fixed_of_many() == (None,) * 4
    is_alike = same_tile(problem) and rows == MOST_NARROW_ROWS and target.is_like_hopper and is_free
    if not is_alike or not 1 < problem.q_len_bound <= FEW_TOKENS:
        return None
    few = (tuning.few_block_kv, tuning.few_num_warps, tuning.few_num_stages)
    return wide_blocks(problem, RaggedTuning(rows, *few), target)


def narrow_blocks(
    problem: RaggedPageAttentionProblem, tuning: RaggedTuning, target: Target, rows: int
) -> RaggedBlocks:
    """Return decode's blocks for a group of as many heads as there are rows, in any batch.

    Single tokens then have decode's bits.
    """
    own = Tuning(tuning.few_block_kv, tuning.few_num_warps, tuning.few_num_stages)
    *blocks, _ = choose_blocks(problem, rows, None, own, target)
    return RaggedBlocks(*blocks, max_registers=None, peel=_pays_to_peel(problem, target, rows))


def wide_blocks(
    problem: RaggedPageAttentionProblem, tuning: RaggedTuning, target: Target
) -> RaggedBlocks:
    """Choose the largest blocks that fit the target's shared memory and registers."""
    fixed = tuning.fixed_of_many()
    is_converted = problem.cache_dtype != product_dtype(problem)
    if _fills_hopper(problem, target):
        is_short = problem.visible_bound <= SHORT_TOKENS and not problem.has_alibi
        is_short = is_short or is_converted
        for choice in (HOPPER_SHORT, HOPPER_LONG) if is_short else (HOPPER_LONG, HOPPER_SHORT):
            rows, num_warps, num_stages = choice
            blocks = (rows, HOPPER_TILE // max(widths(problem)), num_warps, num_stages)
            if all(value in (None, own) for value, own in zip(fixed, blocks)):
                shared = _wide_shared_memory(problem, target, *blocks)
                return RaggedBlocks(*blocks, shared, HOPPER_REGISTERS, peel=True)
    most = (WIDE_ROWS, WIDE_KV, (WIDE_WARPS,), WIDE_STAGES)
    choices = [(value,) if value else own for value, own in zip(fixed, most)]
    found = None
    one_stage = (*choices[:3], choices[3] if tuning.num_stages else (1,))
    candidates = itertools.chain(itertools.product(*choices), itertools.product(*one_stage))
    for rows, block_kv, num_warps, num_stages in candidates:
        shared = _wide_shared_memory(problem, target, rows, block_kv, num_warps, num_stages)
        blocks = (rows, block_kv, num_warps, num_stages)
        found = RaggedBlocks(*blocks, shared, max_registers=None, peel=True)
        if shared <= target.shared_memory and _fits_registers(problem, target, found):
            break  # or the smallest does not fit either: `limits` says so
    assert found is not None
    return found


def _pays_to_peel(problem: RaggedPageAttentionProblem, target: Target, rows: int) -> bool:
    """Say whether blocks of so many rows are those of drafts that `UNPEELED_TOKENS` is about."""
    are_drafts = problem.q_len_bound > 1 and problem.q_len_bound * problem.group <= rows
    is_alike = problem.query_dtype.itemsize == 2 and value_bytes(problem) >= 1
    is_alike = is_alike and not problem.latent and target.is_like_hopper
    is_plain = not (problem.has_alibi or problem.has_positions or problem.tree_width)
    return are_drafts and is_alike and is_plain and problem.visible_bound > UNPEELED_TOKENS


def _fills_hopper(problem: RaggedPageAttentionProblem, target: Target) -> bool:
    """Say whether such blocks fit 128 registers a thread and are not too few.

    On an H100 128 blocks of 256 rows, 4 chunks of 256 on 4,096, took 165.6 us and of 128 rows with
    all registers 182.0; 64 of them, a chunk of 512 on 16,384, took 371.1 and the others 327.8. The
    same number of rows is asked of two programs of 128, for which it was not measured.
    With scales of tokens such blocks spill too much: 8 x 4,096 tokens of int8 took 5,858 us on an
    H200, and 5,264 with all registers.
    """
    is_16_bit = problem.query_dtype.itemsize == 2
    fits = is_16_bit and 64 <= max(widths(problem)) <= 128 and not problem.tree_width
    rows = problem.total_tokens * problem.num_heads  # of all KV heads
    are_many = 4 * rows >= 3 * HOPPER_LONG[0] * target.num_sms
    has_few_spills = problem.scales != "token"
    return target.compute_capability == 90 and fits and are_many and has_few_spills


def _is_hopper(target: Target) -> bool:
    """Say whether products take their operands from shared memory, and are waited for."""
    capability = target.compute_capability
    return capability is not None and 90 <= capability < 120


def _fits_registers(
    problem: RaggedPageAttentionProblem, target: Target, blocks: RaggedBlocks
) -> bool:
    d, dv = widths(problem)
    if product_dtype(problem) == jnp.float32:  # on the ordinary cores, operands from registers
        return blocks.rows <= 32 and blocks.block_kv <= 32
    limit = HELD_AMD if target.is_amd else HELD_MMA
    logits = blocks.block_kv * 3 // 2  # and the weights, in 16 bits
    if problem.tree_width:
        logits += 2 * blocks.block_kv  # pointers to the mask
    if _is_hopper(target):
        limit = HELD_WGMMA if target.compute_capability == 90 else HELD_TCGEN05
    else:
        logits += d // 2
    return blocks.rows * (dv + logits) <= limit * target.warp_size * blocks.num_warps


def _wide_shared_memory(
    problem: RaggedPageAttentionProblem,
    target: Target,
    rows: int,
    block_kv: int,
    num_warps: int,
    num_stages: int,
) -> int:
    """Bound the shared memory of a program, in bytes."""
    d, dv = widths(problem)
    size = product_dtype(problem).itemsize
    # A product that is waited for later keeps its block of values, and so a buffer.
    buffers = num_stages if _is_hopper(target) else num_stages - 1
    entries = (d + (0 if same_tile(problem) else dv)) * buffers if buffers else max(d, dv)
    streamed = int(value_bytes(problem) * block_kv * entries)
    if problem.cache_dtype != product_dtype(problem):  # what a product takes from shared memory
        streamed += size * block_kv * max(d, dv)
    if problem.scales == "token":
        streamed += 2 * 4 * block_kv * buffers
    queries = size * rows * d
    weights = rows * block_kv * (4 if problem.tree_width else size) + SCRATCH
    if target.compute_capability == 90 and size == 2 and not problem.tree_width:
        if rows >= 16 * num_warps:  # each warp multiplies weights of its own, from registers
            weights = SCRATCH
    if target.is_amd:  # queries pass through to registers before anything streams
        return max(queries, streamed + weights)
    # In the end the results pass through, beside where the queries did.
    return max(streamed + weights, size * rows * dv + SCRATCH) + queries
