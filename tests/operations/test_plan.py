"""What `ejk.plan_page_attention` returns, against its oracle, and what it refuses."""

import dataclasses
import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import plan_oracle
import pytest
from compilations import CompilationCounter
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from kernels import launch_on_numpy
from test_triton_memory import ANY_INT32
from tiers import THOROUGH

import ejk
from ejk.backends.page_attention_plan import PlanOperands, equal_shares, even_shares
from ejk.backends.triton._sizes import GRANULE, MAX_CAPACITY
from ejk.backends.triton.page_attention import plan as plan_sizes
from ejk.backends.triton.page_attention.plan import own_plan, run_plan
from ejk.backends.xla.page_attention_plan import XlaPlan
from ejk.testing.memory import memory_checked


def triton_plan(problem, operands):
    """Interpret the kernel: it touches its own memory alone, and no two programs one place."""
    with memory_checked():
        (work,) = run_plan(problem, operands, launch_on_numpy)
    return work


def xla_plan(problem, operands):
    (work,) = XlaPlan().run(problem, jax.tree.map(jnp.asarray, operands), "cpu")
    return np.asarray(work)


pytestmark = pytest.mark.fast

PLANNERS = {"triton": triton_plan, "xla": xla_plan}


def rows(work, problem):
    """Take a plan apart: its pieces, and the sequences that have several."""
    num_pieces, num_splits = map(int, work[0, :2])
    assert problem.num_seqs <= num_pieces <= problem.max_pieces
    assert 0 <= num_splits <= problem.max_splits
    splits = work[1 + problem.max_pieces :]
    assert len(splits) == problem.max_splits
    return work[1 : 1 + num_pieces].tolist(), splits[:num_splits, :3].tolist()


def machine_of(problem):
    """What the oracle wants to know of a plan's machine."""
    return {
        "max_cuts": problem.max_cuts,
        "granule": problem.granule,
        "shares": problem.shares,
    }


def check(
    planner, lens, *, capacity, window, resident, programs=1, longest=None, whole=False
):  # fmt: skip
    """Compare a plan with the oracle's; check what holds of every plan. Return its splits."""
    own_windows = np.ndim(window) > 0
    problem = own_plan(
        num_seqs=len(lens), capacity=capacity, longest=longest or capacity, programs=programs,
        width=256, resident=resident, has_window=window is not None, own_windows=own_windows,
    )  # fmt: skip
    if whole:
        problem = dataclasses.replace(problem, max_cuts=0)
    traced = None if window is None else np.array(window, np.int32)
    work = PLANNERS[planner](problem, PlanOperands(np.asarray(lens, np.int32), traced))
    assert (work.shape, work.dtype) == (problem.results[0].shape, np.int32)
    pieces, splits = rows(work, problem)
    expected = plan_oracle.plan_page_attention(
        lens, capacity=capacity, sliding_window=window, **machine_of(problem)
    )
    assert [tuple(row) for row in pieces] == expected[0]
    assert [tuple(row) for row in splits] == expected[1]

    # In the order of sequences and positions; a first piece of a window has a negative begin.
    row = sorted(pieces, key=lambda piece: (piece[0], piece[1] if piece[1] >= 0 else -1))
    sizes, number = {}, 0
    for seq in range(len(lens)):  # a row that sees nothing is written, too
        own = [(begin, end, part) for s, begin, end, part in row if s == seq]
        n = min(max(int(lens[seq]), 0), capacity)
        of_seq = window[seq] if own_windows else window
        first = 0 if window is None else max(n - max(int(of_seq), 0), 0)
        # They follow each other, from the beginning to the capacity: a call may see any of it.
        begin = 0 if window is None else -1 - first
        assert [b for b, _, _ in own] == [begin, *(e for _, e, _ in own[:-1])]
        assert own[-1][1] == capacity
        # What this batch sees is in no piece too few.
        begins = [first, *(b for b, _, _ in own[1:])]
        assert first == n or all(b < n for b in begins)
        parts = range(number, number + len(own))
        assert [p for _, _, p in own] == (list(parts) if len(own) > 1 else [-1])
        assert ([seq, number, len(own)] in splits) == (len(own) > 1)
        for part, begin, (_, end, _) in zip(parts, begins, own, strict=True):
            sizes[part] = -(-(min(end, n) - begin) // problem.granule), seq, begin
        number += len(own)
    assert splits == sorted(splits) and number == len(pieces)

    # The longest start first, and none has more than its share.
    started = [(seq, begin if begin >= 0 else -1 - begin) for seq, begin, _, _ in pieces]
    largest = sorted(sizes.values(), key=lambda x: (-x[0], *x[1:]))
    assert started == [(seq, begin) for _, seq, begin in largest]
    if problem.max_cuts:
        total = sum(size for size, *_ in largest)
        assert largest[0][0] <= max(1, -(-total // problem.shares))
        assert number - len(lens) < max(2, problem.shares)
    return splits


NUM_SEQS = (1, 2, 3, 17, 64, 65, 300)


@st.composite
def batches(draw):
    num_seqs = draw(st.sampled_from(NUM_SEQS))
    capacity = draw(st.sampled_from((5000, 2**16, 2**20, 1, 128, 129, 700, MAX_CAPACITY)))
    ordinary = st.integers(0, capacity)
    short = st.integers(0, max(1, capacity // 100))
    alike = st.just(draw(ordinary))
    one = draw(st.sampled_from((ordinary, ordinary | ANY_INT32, short, short | ANY_INT32, alike)))
    lens = draw(arrays(np.int32, num_seqs, elements=one))
    if draw(st.booleans()):  # one that outweighs all others
        lens[draw(st.integers(0, num_seqs - 1))] = capacity
    return lens, {
        "capacity": capacity,
        "window": draw(st.none() | ANY_INT32 | st.integers(1, capacity)),
        "resident": draw(st.sampled_from((132, 480, 80, 6, 1))),
        "programs": draw(st.sampled_from((1, 2, 8, 32))),
        "longest": draw(st.sampled_from((None, None, None, 129, 300))),  # contexts may be longer
        "whole": draw(st.sampled_from((False, False, False, True))),
    }


@pytest.mark.slow
@pytest.mark.parametrize("planner", PLANNERS)
def test_a_plan_is_the_oracles(planner):
    cut = 0

    @hypothesis.seed(0)
    @hypothesis.settings(max_examples=1000 if THOROUGH else 60)
    @hypothesis.given(batches())
    def holds(batch):
        nonlocal cut
        lens, keywords = batch
        cut += bool(check(planner, lens, **keywords))

    holds()
    assert cut > 6, "or the property would prove little"


@pytest.mark.parametrize("planner", PLANNERS)
def test_each_sequence_may_have_a_window_of_its_own(planner):
    rng, cut = np.random.default_rng(0), 0
    for num_seqs in (1, 3, 17, 300):
        lens = rng.integers(0, 2**16, num_seqs, np.int32)
        windows = rng.integers(1, 2**16, num_seqs, np.int32)
        windows[rng.random(num_seqs) < 0.2] = rng.choice([0, -1, -(2**31), 2**31 - 1])
        cut += bool(check(planner, lens, capacity=2**16, window=windows, resident=40))
    assert cut > 1


@pytest.mark.parametrize("planner", PLANNERS)
@pytest.mark.parametrize("num_seqs", [1, 64, 200, 1024, 1025])
def test_the_longest_contexts_there_are(planner, num_seqs):
    """Sums of them stay in 32 bits: the more there may be, the coarser they are counted."""
    check(
        planner, [2**31 - 1] * num_seqs, capacity=MAX_CAPACITY, window=None, resident=480,
        programs=32,
    )  # fmt: skip


@pytest.mark.parametrize("num_seqs", [1025, 2**14, 2**17, 2**18, 2**19, 2**24, 2**31])
def test_more_sequences_than_can_be_counted_in_32_bits_are_left_whole(num_seqs):
    problem = own_plan(
        num_seqs=num_seqs, capacity=MAX_CAPACITY, longest=MAX_CAPACITY, programs=32, width=256,
        resident=132, has_window=False,
    )  # fmt: skip
    if num_seqs < 2**19:
        assert problem.max_cuts and MAX_CAPACITY + problem.granule <= 2**31
        assert num_seqs * -(-MAX_CAPACITY // problem.granule) + problem.shares < 2**30
    else:
        assert (problem.max_cuts, problem.granule) == (0, GRANULE)


@pytest.mark.slow
@pytest.mark.parametrize("planner", PLANNERS)
def test_of_more_sequences_than_fit_in_a_tile(planner):
    """The kernel takes 1,024 at a time: the last of a tile are cut, and the first of the next."""
    rng = np.random.default_rng(0)
    for num_seqs in (1025, 2100):
        lens = rng.integers(0, 2**12, num_seqs)
        lens[[3, 500, 1020, 1022, 1023, 1024]] = 2**16
        for resident in (132, 480):
            splits = check(planner, lens, capacity=2**16, window=None, resident=resident)
            assert len(splits) > 6 and {1023, 1024} < {seq for seq, *_ in splits}
        check(planner, lens, capacity=2**16, window=None, resident=132, programs=8)
    windows = rng.integers(1, 2**12, num_seqs)
    assert check(planner, lens, capacity=2**16, window=windows, resident=132)
    assert not check(planner, np.zeros(1100, int), capacity=2**16, window=None, resident=132)
    check(planner, lens, capacity=2**16, window=None, resident=132, whole=True)


@pytest.mark.parametrize("planner", PLANNERS)
def test_a_row_of_granules_is_cut_in_even_shares(planner):
    """10 granules in 4 shares of 3, of which the last has one: by hand."""
    lens = [300, 0, 500, 128, 256]  # 3, 0, 4, 1 and 2 granules
    problem = own_plan(
        num_seqs=5, capacity=512, longest=512, programs=1, width=256, resident=4, has_window=False
    )
    assert (problem.shares, problem.max_cuts) == (4, 3)
    work = PLANNERS[planner](problem, PlanOperands(np.array(lens, np.int32), None))
    pieces, splits = rows(work, problem)
    assert pieces == [
        [0, 0, 512, -1], [2, 0, 384, 2],  # 3 granules each
        [2, 384, 512, 3], [3, 0, 512, -1], [4, 0, 128, 5], [4, 128, 512, 6],  # one
        [1, 0, 512, -1],
    ]  # fmt: skip
    assert splits == [[2, 2, 2], [4, 5, 2]]


@pytest.mark.parametrize("resident", [1, 7, 132, 480])
def test_shares_fill_the_machine(resident):
    """At least nine tenths of it, in a round or a few: else as much as any of these rounds does."""
    for programs in (1, 2, 3, 5, 8, 16, 33, 72, 200, 1000):
        filled = {
            rounds: rounds * resident // programs * programs / (rounds * resident)
            for rounds in (1, 2, 3, 4)
        }
        enough = [rounds for rounds, share in filled.items() if share >= 0.9]
        rounds = enough[0] if enough else max(filled, key=filled.get)
        assert even_shares(resident, programs) == max(1, rounds * resident // programs)
    assert even_shares(132, 8) == 16 and even_shares(132, 72) == 5 and even_shares(132, 500) == 1


def test_contexts_of_one_length_are_cut_equally_where_that_takes_few_shares():
    found = [equal_shares(132, n) for n in (1, 2, 13, 65, 66, 100, 128, 132, 133, 0)]
    assert found == [132, 132, 130, 130, 132, 132, 128, 132, 132, 132]


@pytest.mark.parametrize("window", [None, 3000])
def test_tiles_are_one_row(monkeypatch, window):
    """What lies in tiles before is carried on, whatever their size."""
    lens = np.random.default_rng(0).integers(0, 2**13, 50)
    for most in (2, 16, 32):
        monkeypatch.setattr(plan_sizes, "MOST_OTHERS", most)
        for resident in (20, 132):
            assert check("triton", lens, capacity=2**13, window=window, resident=resident)


SIZE = dict(num_heads=4, num_kv_heads=2, head_dim=16, page_size=16, max_blocks=80)


@pytest.mark.parametrize("num_sms", [1, 100], ids=["whole", "cut"])
@pytest.mark.parametrize(
    "machine", [{"interpret": True}, {"compute_capability": 90}], ids=["interpreted", "elsewhere"]
)
@pytest.mark.parametrize("dtype", [np.int8, np.uint16, np.int64, np.uint64])
def test_the_call_plans_for_the_backends_machine(machine, num_sms, dtype):
    """Four sequences are plenty for one processor, few for a hundred. Any dtype, clipped."""
    backend = ejk.TritonPageAttention(**machine, num_sms=num_sms)
    lens = np.array([100, np.iinfo(dtype).max, 0, np.iinfo(dtype).min], dtype)
    plan = ejk.plan_page_attention(lens, **SIZE | {"head_dim": 512}, backend=backend)
    assert plan.problem.resident == num_sms and plan.problem.capacity == 1280
    clipped = [int(n) for n in np.clip(lens, 0, 1280)]
    expected = plan_oracle.plan_page_attention(
        clipped, capacity=1280, sliding_window=None, **machine_of(plan.problem)
    )
    pieces, splits = rows(np.asarray(plan.work), plan.problem)
    assert ([tuple(r) for r in pieces], [tuple(r) for r in splits]) == expected
    assert bool(splits) == (num_sms == 100 and dtype != np.int8)  # of 127 tokens none is cut


def test_who_needs_no_plan_is_given_an_order():
    """Longest first, and nothing cut. Without a backend the plan is for one that may need it."""
    for backend in ("xla", "pallas", ejk.XlaPageAttention()):
        plan = ejk.plan_page_attention(np.array([3, 900, 0, 1280]), **SIZE, backend=backend)
        pieces, splits = rows(np.asarray(plan.work), plan.problem)
        assert [tuple(r) for r in pieces] == [(s, 0, 1280, -1) for s in (3, 1, 0, 2)]
        assert not splits
    plan = ejk.plan_page_attention(np.array([3, 900, 0, 1280]), **SIZE)
    assert plan.problem.max_cuts > 0


def test_contexts_too_long_to_count_in_32_bits_stay_whole():
    lens = np.array([2**31 - 16, 2**31 - 216], np.int32)
    sizes = dict(num_heads=8, num_kv_heads=8, head_dim=512, page_size=16, max_blocks=2**27 - 1)
    backend = ejk.TritonPageAttention(interpret=True, num_sms=16)
    plan = ejk.plan_page_attention(lens, **sizes, backend=backend)
    pieces, splits = rows(np.asarray(plan.work), plan.problem)
    assert (pieces, splits) == ([[0, 0, 2**31 - 16, -1], [1, 0, 2**31 - 16, -1]], [])


def test_no_sequences_and_no_blocks_are_plans_too():
    for lens, max_blocks in ((np.zeros(0, np.int32), 80), (np.array([7, 7]), 0)):
        plan = ejk.plan_page_attention(lens, **SIZE | {"max_blocks": max_blocks})
        assert not np.asarray(plan.work).any()
        pool = np.zeros((3, 2, 16, 16), np.float32)
        tables = np.zeros((len(lens), max_blocks), np.int32)
        query = np.ones((len(lens), 4, 16), np.float32)
        assert not ejk.page_attention(query, pool, pool, lens, tables, plan=plan).any()


def test_new_lengths_and_windows_do_not_recompile():
    backend = ejk.TritonPageAttention(interpret=True, num_sms=10)

    def plan(lens, window):
        lens = jnp.asarray(lens, jnp.int32)
        made = ejk.plan_page_attention(
            lens, **SIZE, sliding_window=jnp.int32(window), backend=backend
        )
        return rows(np.asarray(made.work), made.problem)

    first = plan([1280, 5, 0], 1000)
    with CompilationCounter() as compiled:
        assert plan([0, 128, 1279], 2000) != first
    assert compiled.count == 0


def test_a_map_over_batches_makes_a_plan_each():
    lens = np.array([[1280, 0, 3], [640, 641, 1]], np.int32)
    backend = ejk.TritonPageAttention(interpret=True, num_sms=100)
    plan = functools.partial(ejk.plan_page_attention, **SIZE | {"head_dim": 512}, backend=backend)
    mapped = jax.vmap(plan)(jnp.asarray(lens))
    for each, batch in zip(np.asarray(mapped.work), lens):
        pieces, splits = rows(each, mapped.problem)
        assert splits and (pieces, splits) == rows(np.asarray(plan(batch).work), mapped.problem)
