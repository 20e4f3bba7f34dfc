"""What each operation promises, as functions of a backend under test and a drawn call.

A property returns at once of a call that it does not concern.
"""

import zlib
from collections.abc import Callable
from typing import Any

import numpy as np

from ejk.testing import bounds
from ejk.testing.bits import bits, bits_equal
from ejk.testing.case import ATTENTIONS, OPERATIONS, WRITERS
from ejk.testing.spoilt import beside_a_nan, spoilt
from ejk.testing.subject import Subject

Property = Callable[[Subject, Any], None]
PROPERTIES: dict[str, dict[str, Property]] = {name: {} for name in OPERATIONS}
"""By operation and name, functions `(subject, case)` that raise what does not hold."""

CAUSAL_ALONE = ("chunks_equal_one_shot", "defaults_may_be_given")
"""These concern ragged batches that have none of their own options."""


def concerns(name: str, configuration: Any) -> bool:
    """Say whether a property concerns calls of a configuration."""
    own = {"positions", "tree_mask", "causal=False"}
    return name not in CAUSAL_ALONE or not configuration.features & own


def promised_by(*operations: str) -> Callable[[Property], Property]:
    """Register a property of these operations."""

    def register(body: Property) -> Property:
        for operation in operations:
            PROPERTIES[operation][body.__name__] = body
        return body

    return register


def assert_same(subject: Subject, case: Any, first: tuple[Any, ...], second: Any) -> None:
    """Compare the bits of two ways to run one call; or hold the second to the case's bound."""
    if subject.equal_bits:
        bits_equal(first, second)
    else:
        case.check(second)


@promised_by(*OPERATIONS)
def agrees_with_the_oracle(subject: Subject, case: Any) -> None:
    """Each row within its bound; caches bit for bit."""
    case.check(subject(case))


@promised_by(*OPERATIONS)
def running_twice_gives_the_same_bits(subject: Subject, case: Any) -> None:
    bits_equal(subject(case), subject(case))


@promised_by(*ATTENTIONS)
def jit_changes_no_bit(subject: Subject, case: Any) -> None:
    """Every array traced, the scale and the window with them."""
    assert_same(subject, case, subject(case), subject(case, jit=True))


@promised_by(*WRITERS)
def jit_equals_eager_and_leaves_its_arguments_alone(subject: Subject, case: Any) -> None:
    before = [None if x is None else x.copy() for x in case.operands()]
    case.check(subject(case, jit=True))
    for x, y in zip(case.operands(), before):
        assert x is None or (bits(x) == bits(y)).all(), "an argument has changed"


@promised_by(*ATTENTIONS)
def order_of_pages_changes_no_bit(subject: Subject, case: Any) -> None:
    moved = case.permuted(seed=1)
    assert_same(subject, moved, subject(case), subject(moved))


@promised_by(*ATTENTIONS)
def unread_memory_changes_no_bit(subject: Subject, case: Any) -> None:
    """Neither what is poison nor what looks like ordinary keys, values and pages.

    Nor queries that see nothing, nor masks and positions of what is no sequence's.
    """
    result = subject(case)
    bits_equal(result, subject(case.with_other_junk(seed=1)))
    bits_equal(result, subject(case.with_other_junk(seed=2, finite=True)))


@promised_by("page_attention")
def alone_equals_in_a_batch(subject: Subject, case: Any) -> None:
    """Another row, other mates, a wider table, a larger pool: bit-equal if that is promised."""
    case = case.replace(num_splits=max(1, case.num_splits), hints={})  # a plan is of this batch
    together = subject(case)
    others = case.rows(range(len(case.context_lens))[::-1])
    alone = case.rows([0], more_blocks=2).permuted(seed=2, more_pages=3)
    alone = alone.with_other_junk(seed=3)
    for other, row in ((others, -1), (alone, 0)):
        result = subject(other)
        if subject.batch_invariant:
            bits_equal([x[0] for x in together], [x[row] for x in result])
        else:
            other.check(result)


@promised_by("page_attention")
def a_row_that_sees_nothing_is_zero(subject: Subject, case: Any) -> None:
    """Length 0 and tables without a page; the LSE is the sink."""
    sinks = case.options.get("sinks", np.full(case.shape.num_heads, -np.inf, np.float32))
    nothing = np.broadcast_to(sinks, (len(case.context_lens), case.shape.num_heads))
    no_length = case.replace(context_lens=np.zeros_like(case.context_lens))
    no_page = case.replace(block_tables=np.full_like(case.block_tables, case.shape.num_pages))
    for empty in (no_length, no_page):
        out, lse = subject(empty)
        assert not out.any(), "what sees nothing must be 0"
        np.testing.assert_array_equal(lse, nothing)


@promised_by("page_attention")
def results_are_finite_on_poisoned_memory(subject: Subject, case: Any) -> None:
    out, lse = subject(case)
    assert np.isfinite(out.astype(np.float32)).all(), "the output must be finite"
    assert not np.isnan(lse).any() and not np.isposinf(lse).any(), "the LSE must be finite or -inf"


@promised_by("page_attention")
def a_nan_in_a_query_is_never_lost(subject: Subject, case: Any) -> None:
    """It reaches neither other heads nor rows that see nothing."""
    query = case.query.copy()
    query[:, 0, -1] = np.nan
    case = case.replace(query=query)
    case.check(subject(case))


@promised_by(*ATTENTIONS)
def what_is_seen_and_not_finite_is_never_lost(subject: Subject, case: Any) -> None:
    """A NaN in a key, a value or a sink, an infinite sink, a logit that is infinite.

    Rows that do not see it are what they would be, but a NaN in a value may reach other rows of its
    sequence.
    """
    case = spoilt(case, zlib.crc32(case.query.tobytes()))
    bounds.assert_close(case, *subject(case), leave_out=beside_a_nan(case))


@promised_by("ragged_page_attention")
def rows_of_no_sequence_are_zero(subject: Subject, case: Any) -> None:
    out, lse = subject(case)
    assert not out[case.outside].any() and np.isneginf(lse[case.outside]).all()
    assert np.isfinite(out.astype(np.float32)).all()


@promised_by("ragged_page_attention")
def a_batch_is_its_sequences(subject: Subject, case: Any) -> None:
    """Each sequence, run alone, is what the oracle says of it in the batch."""
    out, lse = subject(case)
    for s in range(len(case.context_lens)):
        alone = case.part(s)
        if len(alone.query):
            rows = slice(case.bounds[s], case.bounds[s + 1])
            alone.check((out[rows], lse[rows]))
            alone.check(subject(alone))


@promised_by("ragged_page_attention")
def chunks_equal_one_shot(subject: Subject, case: Any) -> None:
    """A sequence's new tokens, a few at a time, are what they are all at once."""
    q_lens = np.diff(case.bounds)
    s = int(q_lens.argmax())
    if q_lens[s] == 0 or {"positions", "tree_mask", "causal"} & {*case.options}:
        return
    size = 1 + int(case.bounds[s]) % 5
    # With more new tokens than tokens the first chunks see less than nothing.
    end = int(q_lens[s])
    chunks = [case.part(s, a, min(a + size, end)) for a in range(0, end, size)]
    results = [subject(chunk) for chunk in chunks]
    case.part(s).check([np.concatenate(parts) for parts in zip(*results)])


@promised_by("ragged_page_attention")
def defaults_may_be_given(subject: Subject, case: Any) -> None:
    """The default positions, and a lower triangle as tree mask, change nothing."""
    if {"positions", "tree_mask", "causal"} & {*case.options}:
        return
    total, positions = len(case.query), np.zeros(len(case.query), np.int64)
    triangle = np.zeros((total, total), bool)
    for s, n in enumerate(case.lengths()):
        rows = slice(case.bounds[s], case.bounds[s + 1])
        q_len = rows.stop - rows.start
        positions[rows] = n - q_len + np.arange(q_len)
        triangle[rows, :q_len] = np.tri(q_len, dtype=bool)
    case.check(subject(case))
    given = {"positions": positions, "tree_mask": triangle}
    for names in (("positions",), ("tree_mask",), ("positions", "tree_mask")):
        result = subject.attempt(case, **{name: given[name] for name in names})
        if result is not None:
            case.check(result)


@promised_by(*ATTENTIONS)
def hints_change_no_more_than_last_bits(subject: Subject, case: Any) -> None:
    """More splits than there are blocks, bounds that are too small."""
    many = {"num_splits": 40} if case.operation == "page_attention" else {"max_q_len": 1}
    case.check(subject(case.replace(hints={}), max_context_len=1, **many))


@promised_by(*ATTENTIONS)
def layouts_and_fused_pools_equal_each_other(subject: Subject, case: Any) -> None:
    """Interleaved ones, too: bit-equal if bits depend on nothing but the sequence."""
    places = [(layout, False) for layout in ("HND", "NHD", "KV_HEADS_FIRST")]
    if case.shape.fusible:
        places += [("HND", True), ("NHD", True), ("KV_HEADS_FIRST", True), ("INTERLEAVED", False)]
    first = subject(case)
    for layout, fused in places:
        other = case.replace(cache_layout=layout, fused=fused)
        result = subject.attempt(other)
        if result is not None:
            other.check(result)
            if subject.batch_invariant and case.operation == "page_attention":
                bits_equal(first, result)


@promised_by(*ATTENTIONS)
def asking_for_the_lse_changes_no_bit_of_the_output(subject: Subject, case: Any) -> None:
    assert_same(subject, case, subject(case)[:1], subject(case, return_lse=False))
