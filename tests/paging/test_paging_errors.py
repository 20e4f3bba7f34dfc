"""What a page manager refuses: each says argument, value and rule, and changes nothing."""

import pickle
import re

import numpy as np
import paging_copy
import pytest

PAGING = paging_copy.load()  # no hook says first what is wrong with types
PageManager = PAGING.PageManager
OutOfPagesError, OutOfSequencesError = PAGING.OutOfPagesError, PAGING.OutOfSequencesError
SIZES = dict(num_pages=4, page_size=4, max_seqs=2, max_blocks=3)


@pytest.mark.parametrize(
    "changes, error, message",
    [
        (dict(num_pages=0), ValueError, "num_pages=0 must be at least 1"),
        (dict(page_size=0), ValueError, "page_size=0 must be at least 1"),
        (dict(max_seqs=-1), ValueError, "max_seqs=-1 must be at least 1"),
        (dict(max_blocks=0), ValueError, "max_blocks=0 must be at least 1"),
        (dict(sliding_window=0), ValueError, "sliding_window=0 must be at least 1"),
        (dict(page_size=4.0), TypeError, "page_size=4.0 must be an int"),
        (dict(max_seqs=True), TypeError, "max_seqs=True must be an int"),
        (dict(num_pages=2**29), ValueError, "num_pages * page_size=2147483648 must be below 2**31"),
        (dict(max_blocks=2**29), ValueError, "max_blocks * page_size=2147483648 must be below"),
    ],
)
def test_sizes(changes, error, message):
    with pytest.raises(error, match=f"^{re.escape(message)}"):
        PageManager(**SIZES | changes)


class Case:
    """A manager with a computed sequence of 5 tokens, and one of 2 that is not computed."""

    def __init__(self, **changes):
        self.manager = PageManager(**SIZES | changes)
        self.done = self.manager.allocate(range(5))
        self.batch = self.manager.batch([self.done])
        self.manager.commit(self.batch)
        self.waiting = self.manager.allocate([1, 2])

    def with_a_full_pool(self):
        self.manager.append(self.done, range(5, 12))
        return self


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda m, c: m.allocate([]), ValueError, "tokens is empty, and must have one"),
        (
            lambda m, c: m.allocate([1], max_computed_tokens=-1), ValueError,
            "max_computed_tokens=-1 must be at least 0",
        ),
        (lambda m, c: m.allocate([1.5]), TypeError, "tokens=[1.5] must be integers"),
        (lambda m, c: m.allocate([[1]]), TypeError, "tokens has 2 axes, and must be an integer or"),
        (lambda m, c: m.allocate([1, -1]), ValueError, "tokens[1]=-1 must be in [0, 2147483647]"),
        (lambda m, c: m.allocate([2**31]), ValueError, "tokens[0]=2147483648 must be in [0, "),
        (
            lambda m, c: m.allocate(range(13)), ValueError,
            "the sequence would have 13 tokens, and max_blocks=3 pages of page_size=4 hold 12",
        ),
        (
            lambda m, c: m.allocate([1], num_new_tokens=0), ValueError,
            "num_new_tokens=0 must be at least 1",
        ),
        (
            lambda m, c: m.allocate([1], cache_salt=1.5), TypeError,
            "cache_salt=1.5 must be a str, bytes, an int or None",
        ),
        (
            lambda m, c: m.allocate([1]), OutOfSequencesError,
            "max_seqs=2 sequences live: free one, or make max_seqs larger",
        ),
        (lambda m, c: m.fork(c.done), OutOfSequencesError, "max_seqs=2 sequences live"),
        (
            lambda m, c: m.fork(c.waiting), ValueError,
            "seq=1 has 2 tokens that are not computed, and a fork must have none",
        ),
        (lambda m, c: m.fork([0]), TypeError, "seq=[0] must be one sequence, not a list"),
        (lambda m, c: m.free(7), ValueError, "seq=7 must be a live sequence, and was freed"),
        (lambda m, c: m.free([0, -1]), ValueError, "seqs[1]=-1 must be a live sequence"),
        (lambda m, c: m.free([0, 1, 0]), ValueError, "seqs[0]=0 must be named once"),
        (lambda m, c: m.free([0.0]), TypeError, "seqs=[0.0] must be the integers that allocate"),
        (lambda m, c: m.free([[0]]), TypeError, "seqs has 2 axes, and must be a sequence or a"),
        (
            lambda m, c: m.append([0, 1], [1, 2, 3]), ValueError,
            "tokens[3] must be one for each of 2 sequences: of any other number say in q_lens",
        ),
        (
            lambda m, c: m.append([0, 1], [1, 2, 3], [3]), ValueError,
            "q_lens[1] must be one for each of 2 sequences",
        ),
        (
            lambda m, c: m.append([0, 1], [1, 2, 3], [1, 1]), ValueError,
            "q_lens, of sum 2, must deal out all of tokens[3]",
        ),
        (
            lambda m, c: m.append([0, 1], [1] * 10, [2, 8]), OutOfPagesError,
            "2 pages are needed, but 1 are free and 0 can be evicted: free or preempt a sequence",
        ),
        (
            lambda m, c: m.append([1, 0], [1] * 9, [1, 8]), ValueError,
            "seqs[1] would have 13 tokens, and max_blocks=3 pages of page_size=4 hold 12: end it",
        ),
        (lambda m, c: m.truncate(0, 6), ValueError, "num_tokens[0]=6 must be at most 5, the token"),
        (lambda m, c: m.truncate(0, -1), ValueError, "num_tokens[0]=-1 must be in [0, 2147483647]"),
        (lambda m, c: m.batch([0]), ValueError, "seqs[0]=0 has no token to compute: append one"),
        (
            lambda m, c: m.batch([1], [3]), ValueError,
            "q_lens[0]=3 must be from 1 to 2, the tokens of seqs[0]=1 that are not computed",
        ),
        (lambda m, c: m.batch([1], [0]), ValueError, "q_lens[0]=0 must be from 1 to 2"),
        (lambda m, c: m.batch([1], [1, 1]), ValueError, "q_lens[2] must be one for each of 1 seq"),
        (lambda m, c: m.batch([1], min_seqs=-1), ValueError, "min_seqs=-1 must be at least 0"),
        (
            lambda m, c: m.batch([1], min_blocks=4), ValueError,
            "min_blocks=4 must be at most max_blocks=3",
        ),
        (
            lambda m, c: m.commit(c.batch), ValueError,
            "batch.number=1 must be the newest batch of seq=0, and not be committed yet",
        ),
        (
            lambda m, c: m.commit(Case().manager.batch([1])), ValueError,
            "batch.number=2 must be a batch of this manager, and is another's: commit it to the",
        ),
        (
            lambda m, c: m.commit(c.batch.inputs), TypeError,
            "batch=BatchInputs must be a Batch, which batch() returns",
        ),
        (lambda m, c: c.batch.prefix_groups(1.5), TypeError, "min_pages=1.5 must be an int"),
        (lambda m, c: c.batch.prefix_groups(0), ValueError, "min_pages=0 must be at least 1"),
    ],
)  # fmt: skip
def test_calls(call, error, message):
    case = Case()
    before = state(case.manager)
    with pytest.raises(error, match=f"^{re.escape(message)}"):
        call(case.manager, case)
    assert state(case.manager) == before


def state(manager):
    manager._seqs._seen[:] = 0
    return pickle.dumps(manager)


def test_a_batch_that_another_has_taken_the_place_of():
    case = Case()
    first = case.manager.batch([case.waiting])
    case.manager.commit(case.manager.batch([case.waiting]))
    with pytest.raises(ValueError, match=r"^batch\.number=2 must be the newest batch of seq=1"):
        case.manager.commit(first)


@pytest.mark.parametrize("seqs", [[], [1], [7]], ids=["none", "the same", "one that is not here"])
def test_another_managers_batch_publishes_nothing(seqs):
    """Its numbers and handles may be this one's, too: 2 and 1 of both."""
    case, other = Case(max_seqs=8), Case(max_seqs=8, num_pages=9).manager
    for _ in range(6):
        other.allocate([1])
    case.manager.batch([case.waiting])
    with pytest.raises(ValueError, match=r"^batch\.number=2 must be a batch of this manager"):
        case.manager.commit(other.batch(seqs))
    assert case.manager.num_computed_tokens(case.waiting) == 0


@pytest.mark.fast
def test_a_copy_of_a_manager_takes_batches_that_were_made_before():
    case = Case()
    batch = case.manager.batch([case.waiting])
    copy = pickle.loads(pickle.dumps(case.manager))
    for manager in (copy, case.manager):
        manager.commit(batch)
        assert manager.num_computed_tokens(case.waiting) == 2


def windowed():
    """A manager with sequence 0, of 9 tokens, of which the next one sees one."""
    manager = PageManager(**SIZES, sliding_window=2)
    manager.allocate(range(9))
    manager.commit(manager.batch([0]))
    return manager


def test_pages_behind_the_window_do_not_come_back():
    manager = windowed()
    with pytest.raises(
        ValueError, match=r"^num_tokens\[0\]=8 is too few: .* sliding_window=2, which"
    ):
        manager.truncate(0, 8)
    assert manager.num_tokens(0) == 9


def test_pages_run_out_with_numbers():
    case = Case(max_seqs=3).with_a_full_pool()
    with pytest.raises(OutOfPagesError) as info:
        case.manager.allocate([9])
    error = pickle.loads(pickle.dumps(info.value))
    assert (error.needed, error.free, error.evictable) == (1, 0, 0)
    case.manager.preempt(case.done)
    case.manager.allocate([9])


def test_a_fork_that_needs_a_copy_may_run_out_of_pages():
    case = Case(max_seqs=3).with_a_full_pool()
    case.manager.free(case.waiting)
    case.manager.commit(case.manager.batch([case.done]))
    case.manager.truncate(case.done, 11)
    fork = case.manager.fork(case.done)
    filler = case.manager.allocate([9])
    with pytest.raises(OutOfPagesError):
        case.manager.append(fork, [1])
    assert np.array_equal(case.manager.block_table(fork), case.manager.block_table(case.done))
    case.manager.free(filler)
    case.manager.append(fork, [1])
