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
from ejk.backends.page_attention_plan import PlanOperands
from ejk.backends.triton._sizes import GRANULE, MAX_CAPACITY
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
        "slots": problem.slots,
        "programs": problem.programs_per_piece,
        "granule_cost": problem.granule_cost,
        "memory_bound": problem.memory_bound,
    }


def check(
    planner, lens, *, capacity, window, slots, programs=1, max_cuts=None, width=256,
    memory_bound=True,
):  # fmt: skip
    """Compare a plan with the oracle's; check what holds of every plan. Return its splits."""
    own_windows = np.ndim(window) > 0
    problem = own_plan(
        num_seqs=len(lens), capacity=capacity, longest=capacity, programs=programs, width=width,
        slots=slots, memory_bound=memory_bound, has_window=window is not None,
        own_windows=own_windows,
    )  # fmt: skip
    if max_cuts is not None:
        problem = dataclasses.replace(problem, max_cuts=max_cuts)
    traced = None if window is None else np.array(window, np.int32)
    work = PLANNERS[planner](problem, PlanOperands(np.asarray(lens, np.int32), traced))
    assert (work.shape, work.dtype) == (problem.results[0].shape, np.int32)
    pieces, splits = rows(work, problem)
    expected = plan_oracle.plan_page_attention(
        lens, capacity=capacity, sliding_window=window, **machine_of(problem)
    )
    assert [tuple(row) for row in pieces] == expected[0]
    assert [tuple(row) for row in splits] == expected[1]

    places, rounded = {}, {}
    for i, (seq, begin, end, part) in enumerate(pieces):
        places.setdefault(seq, []).append((i, begin, end, part))
    assert sorted(places) == list(range(len(lens)))  # a row that sees nothing is written, too
    for seq, own in places.items():
        n = min(max(int(lens[seq]), 0), capacity)
        of_seq = window[seq] if own_windows else window
        first = 0 if window is None else max(n - max(int(of_seq), 0), 0)
        # They follow each other, from the beginning to the capacity: a call may see any of it.
        begin = 0 if window is None else -1 - first
        assert [b for _, b, _, _ in own] == [begin, *(e for _, _, e, _ in own[:-1])]
        assert own[-1][2] == capacity
        # What this batch sees is in no piece too few.
        begins = [first, *(b for _, b, _, _ in own[1:])]
        assert first == n or all(b < n for b in begins)
        rounded[seq] = -(-(min(own[0][2], n) - first) // problem.granule)
        assert [i for i, *_ in own] == list(range(own[0][0], own[0][0] + len(own)))
        assert all((p == i) if len(own) > 1 else (p == -1) for i, _, _, p in own)
    assert {(s, f, c) for s, f, c in splits} == {
        (seq, own[0][0], len(own)) for seq, own in places.items() if len(own) > 1
    }
    largest = [rounded[seq] for seq in dict.fromkeys(seq for seq, *_ in pieces)]
    assert largest == sorted(largest, reverse=True)
    return splits


NUM_SEQS = (1, 2, 3, 17, 64, 65, 300)  # 65 and more are sorted


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
        "slots": draw(st.sampled_from((132, 480, 80, 6, 1))),
        "programs": draw(st.sampled_from((1, 2, 8, 32))),
        "memory_bound": draw(st.booleans()),
        "max_cuts": draw(st.sampled_from((None, None, None, 0, 1, 10))),
        "width": draw(st.sampled_from((32, 128, 256, 1088))),
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
        cut += bool(check(planner, lens, capacity=2**16, window=windows, slots=40))
    assert cut > 1


@pytest.mark.parametrize("planner", PLANNERS)
@pytest.mark.parametrize("num_seqs", [1, 64, 200, 1024, 1025])
def test_the_longest_contexts_there_are(planner, num_seqs):
    """Their costs stay in 32 bits: the more there may be, the coarser they are counted."""
    check(
        planner, [2**31 - 1] * num_seqs, capacity=MAX_CAPACITY, window=None, slots=480, programs=32
    )


@pytest.mark.parametrize("num_seqs", [2**24, 2**27, 2**31])
def test_more_sequences_than_costs_of_32_bits_can_be_counted_of_are_left_whole(num_seqs):
    problem = own_plan(
        num_seqs=num_seqs, capacity=MAX_CAPACITY, longest=MAX_CAPACITY, programs=32, width=256,
        slots=132, has_window=False,
    )  # fmt: skip
    assert (problem.max_cuts, problem.granule) == (0, GRANULE)


@pytest.mark.slow
@pytest.mark.parametrize("planner", PLANNERS)
def test_of_more_sequences_than_fit_in_a_tile(planner):
    rng = np.random.default_rng(0)
    lens = rng.integers(0, 2**12, 1100)
    assert not check(planner, lens, capacity=2**16, window=None, slots=132)
    lens[[3, 500, 1050]] = 2**16
    for slots in (132, 480):
        assert len(check(planner, lens, capacity=2**16, window=None, slots=slots)) == 3
    assert not check(planner, lens, capacity=2**16, window=None, slots=132, programs=8)
    check(planner, lens, capacity=2**16, window=None, slots=480, max_cuts=1)


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
    plan = ejk.plan_page_attention(lens, **SIZE | {"head_dim": 128}, backend=backend)
    assert plan.problem.slots == num_sms and plan.problem.capacity == 1280
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
    plan = functools.partial(ejk.plan_page_attention, **SIZE | {"head_dim": 128}, backend=backend)
    mapped = jax.vmap(plan)(jnp.asarray(lens))
    for each, batch in zip(np.asarray(mapped.work), lens):
        pieces, splits = rows(each, mapped.problem)
        assert splits and (pieces, splits) == rows(np.asarray(plan(batch).work), mapped.problem)
