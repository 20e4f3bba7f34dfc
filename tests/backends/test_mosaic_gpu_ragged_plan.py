"""The work list of the prefill kernel: complete, and dealt out so that no program is late."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import offline
import pytest
from test_ragged_triton_compile import MIXED

from ejk.backends.gpu import H100, Target
from ejk.backends.mosaic_gpu.ragged_page_attention.memory import Inputs
from ejk.backends.mosaic_gpu.ragged_page_attention.sizes import PrefillSizes
from ejk.backends.mosaic_gpu.ragged_page_attention.tiles import my_tile, my_tiles
from ejk.backends.ragged_page_attention import RaggedPageAttentionOperands
from ejk.backends.triton import _launch
from ejk.backends.triton.ragged_page_attention.balance import NARROW_COST
from ejk.backends.triton.ragged_page_attention.combine_kernel import ragged_combine_kernel
from ejk.backends.triton.ragged_page_attention.plan_kernel import ragged_plan_kernel
from ejk.backends.triton.ragged_page_attention.steps import list_work

SLOTS = H100["num_sms"]
TARGET = Target.of("cuda", **H100)
# New tokens and lengths of each sequence, query and KV heads.
BATCHES = {
    "prefill 8 x 4,096": ([4096] * 8, [4096] * 8, 32, 8),
    "prefill 1 x 32,768": ([32768], [32768], 32, 8),
    "chunks": ([512] * 8, [16384] * 8, 32, 8),
    "mixed": ([512] * 4 + [1] * 60, [4096] * 64, 32, 8),
    "verification": ([8] * 32, [8192] * 32, 32, 8),
    "one long chunk": ([512], [131072], 8, 1),
    "a chunk and a half": ([512, 256], [16384] * 2, 32, 8),
    "a long decode": ([1] * 61, [102400] + [4096] * 60, 32, 8),
    "one decode": ([1], [131072], 8, 1),
    "a group of 7": ([300, 1, 20], [20000, 30000, 20], 28, 4),
    "nothing new": ([0, 0], [20, 0], 8, 2),
    "empty ones": ([0, 5, 0, 700], [0, 3, 9000, 60000], 16, 4),
}
WHOLE = ("prefill 8 x 4,096", "prefill 1 x 32,768", "chunks", "mixed", "verification")


@functools.cache
def dealt(name):
    """Return the sizes and the list of a batch, by Triton's interpreter."""
    q_lens, context_lens, num_heads, num_kv_heads = BATCHES[name]
    problem = dataclasses.replace(
        MIXED, num_seqs=len(q_lens), num_heads=num_heads, num_kv_heads=num_kv_heads,
        total_tokens=max(1, sum(q_lens)), q_len_bound=max(1, *q_lens),
        visible_bound=max(context_lens), max_blocks=max(context_lens) // 16,
    )  # fmt: skip
    sizes = PrefillSizes.of(problem, TARGET, interpret=False, plain=False)
    bounds = np.concatenate([[0], np.cumsum(q_lens)]).astype(np.int32)
    operands = RaggedPageAttentionOperands(
        *[None] * 3, jnp.array(context_lens, jnp.int32), None, jnp.array(bounds), *[None] * 6
    )
    call = functools.partial(_launch.call, compute_capability=90, interpret=True)
    return sizes, np.asarray(list_work(problem, operands, sizes, call))


def items(name):
    """Return the items of each kind."""
    sizes, work = dealt(name)
    for kind, first in enumerate(sizes.plan.first_rows[: len(sizes.plan.kinds)]):
        yield work[first : first + work[0, 2 * kind]]


@pytest.mark.parametrize("name", BATCHES)
def test_every_piece_of_every_block_is_listed_once(name):
    q_lens, context_lens, _, _ = BATCHES[name]
    sizes, _ = dealt(name)
    found, part_rows = set(), set()
    for kind, own in zip(sizes.plan.kinds, items(name)):
        assert len(own) <= kind.max_items
        parts = own[own[:, 6] >= 0]
        for part in parts[:, 6].tolist():  # no two share rows, of whichever kind they are
            rows = set(range(part * kind.rows, (part + 1) * kind.rows))
            assert not rows & part_rows and max(rows) < sizes.plan.part_rows
            part_rows |= rows
        for seq, _, q_len, block, piece, pieces, part, length in own.tolist():
            assert (q_len, length) == (q_lens[seq], context_lens[seq])
            assert (pieces > 1) == (part >= 0)
            rows = range(block * kind.rows, min((block + 1) * kind.rows, q_len * sizes.group))
            assert rows
            new = {(seq, row, piece, pieces) for row in rows}
            assert not new & found
            found |= new
    rows = {(seq, row) for seq, q_len in enumerate(q_lens) for row in range(q_len * sizes.group)}
    assert {x[:2] for x in found} == rows
    pieces = {x[:2]: x[3] for x in found}
    assert len(found) == sum(pieces.values())


def tiles_of(sizes, work, window=None):
    """Return the tiles of all programs, by field."""
    inputs = Inputs(*[None] * len(Inputs._fields))._replace(
        work=jnp.asarray(work),
        sliding_window=None if window is None else jnp.full(1, window, jnp.int32),
        whole=jnp.zeros(sizes.problem.num_seqs, jnp.int32),
    )
    on_programs = functools.partial(
        jax.vmap, axis_name="program", axis_size=sizes.num_programs, in_axes=None
    )
    counts = np.asarray(on_programs(lambda _: my_tiles(inputs, sizes))(0))
    turns = np.arange(counts.max())
    found = jax.jit(on_programs(jax.vmap(lambda r: my_tile(r, inputs, sizes))))(turns)
    return type(found)(*(np.asarray(x)[turns[None] < counts[:, None]] for x in found))


@pytest.mark.parametrize("name", BATCHES)
def test_every_tile_is_some_programs(name):
    """Of each token and KV head there is one for each piece of what they see, without gaps."""
    q_lens, context_lens, _, num_kv_heads = BATCHES[name]
    tiles = tiles_of(*dealt(name))
    seen = {}
    for tile in zip(*(x.tolist() for x in tiles)):
        tile = type(tiles)(*tile)
        seen.setdefault((tile.token, tile.count, tile.kv_head), []).append(tile)
    first = np.cumsum([0, *q_lens])
    found = np.zeros((num_kv_heads, first[-1]), int)
    for (token, count, kv_head), own in seen.items():
        found[kv_head, token : token + count] += 1
        seq, before = own[0].seq, 0
        for begin, end in sorted((x.begin, x.end) for x in own if x.begin < x.end):
            assert begin == before
            before = end
        last = context_lens[seq] - q_lens[seq] + token - first[seq] + count
        assert before == max(last, 0)
        assert len({x.part for x in own}) == len(own) and (len(own) > 1) == (own[0].part >= 0)
    assert (found == 1).all()


def test_so_many_narrow_tiles_that_their_products_are_no_int32():
    num_seqs = 50_001  # one of them has a wide tile
    problem = dataclasses.replace(
        MIXED, num_seqs=num_seqs, num_heads=4, num_kv_heads=1, total_tokens=num_seqs + 31,
        q_len_bound=32, visible_bound=16, max_blocks=1,
    )  # fmt: skip
    target = dataclasses.replace(TARGET, num_sms=1)
    sizes = PrefillSizes.of(problem, target, interpret=False, plain=False)
    work = np.zeros(sizes.plan.type.shape, np.int32)
    work[0, [0, 2]] = num_seqs - 1, 1
    first, first_wide, *_ = sizes.plan.first_rows
    narrow = work[first : first + num_seqs - 1]
    narrow[:] = 0, 0, 1, 0, 0, 1, -1, 1
    narrow[:, :2] = np.arange(num_seqs - 1)[:, None]
    work[first_wide] = num_seqs - 1, num_seqs - 1, 32, 0, 0, 1, -1, 16
    assert sorted(tiles_of(sizes, work).seq) == list(range(num_seqs))


def test_a_window_may_reach_farther_than_half_of_all_integers():
    problem = dataclasses.replace(
        MIXED, num_seqs=1, total_tokens=1, q_len_bound=1, page_size=1024, max_blocks=2**20 + 2**18,
        visible_bound=1, has_window=True,
    )  # fmt: skip
    sizes = PrefillSizes.of(problem, TARGET, interpret=False, plain=False)
    work = np.zeros(sizes.plan.type.shape, np.int32)
    work[0, 0], work[1] = 1, (0, 0, 1, 0, 0, 1, -1, problem.capacity)
    for window in (2**30 + 5, 2**31 - 1):
        [begin, *_] = tiles_of(sizes, work, window).begin
        assert begin == max(problem.capacity - window, 0)


@pytest.mark.parametrize("name", WHOLE)
def test_what_fills_the_machine_stays_whole(name):
    assert all((own[:, 5] == 1).all() for own in items(name))


def ends(name):
    """Return when the last program ends and how long all are busy on average."""
    sizes, _ = dealt(name)
    busy = np.zeros(SLOTS)
    for kind, own in enumerate(items(name)):
        granules = -(-own[:, 7] // sizes.plan.granule)
        cost = NARROW_COST.value if kind == 0 else 1.0
        cost = np.repeat(cost * -(-granules // own[:, 5]), sizes.problem.num_kv_heads)
        for tile, each in enumerate(cost.tolist()):
            turn, place = divmod(tile, SLOTS)
            busy[SLOTS - 1 - place if (turn + kind) % 2 else place] += each
    return busy.max(), busy.mean()


# Programs of narrow tiles that have the card to themselves are 1.8 times as fast.
LATE = dict.fromkeys(BATCHES, 1.08) | {"a long decode": 1.2, "one decode": 1.8}


@pytest.mark.parametrize("name", BATCHES)
def test_the_last_program_ends_soon_after_the_average(name):
    last, average = ends(name)
    assert average <= last <= LATE[name] * average


@pytest.mark.parametrize("num_seqs", [4, 1024])
def test_planning_and_combining_do_not_spill(num_seqs):
    problem = dataclasses.replace(MIXED, num_seqs=num_seqs, has_window=True, num_heads=56)  # of 7
    sizes = PrefillSizes.of(problem, TARGET, interpret=False, plain=False)
    assert sizes.plan.wide and sizes.plan.wide.rows == 126
    names = ("cu_q_lens_ptr", "context_lens_ptr", "sliding_window_ptr", "work_ptr")
    plan = offline.compile_cuda(
        ragged_plan_kernel, dict.fromkeys(names, "int32"), sizes.plan_constants(problem), "sm_90",
        num_stages=1,
    )  # fmt: skip
    assert plan.spill_store_bytes == 0
    names = ("part_out_ptr", "part_lse_ptr", "sinks_ptr")
    pointers = dict.fromkeys(names, "float32") | {"work_ptr": "int32"}
    pointers |= {"out_ptr": "bfloat16", "lse_ptr": "float32"}
    for kind in range(2):
        combination = offline.compile_cuda(
            ragged_combine_kernel, pointers, sizes.combine_constants(problem, kind), "sm_90",
            num_stages=2,
        )  # fmt: skip
        assert combination.spill_store_bytes == 0
