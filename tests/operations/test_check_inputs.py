"""Mistakes that only values show: every operation's check finds them, at once and under `jit`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify

import ejk

POOL = jnp.zeros((8, 2, 16, 64))
RAGGED = {
    "context_lens": [48, 17],
    "block_tables": [[0, 1, 2], [3, 7, -1]],
    "cu_q_lens": [0, 1, 5],
    "positions": [47, 13, 14, 14, 15, -1, -1],
    "tree_mask": [
        [1, 0, 0, 0], [1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 1, 0, 1],
        [0, 0, 0, 0], [0, 0, 0, 0],
    ],
    "sliding_window": 60,
}  # fmt: skip
WRITE = {"slot_mapping": [5, -1, 127, -1], "block_tables": [[0, 1], [7, -1]]}


def check_ragged(context_lens, block_tables, cu_q_lens, tree_mask, **options):
    query = jnp.zeros((7, 4, 64))
    ejk.check_ragged_page_attention_inputs(
        query, POOL, POOL, context_lens, block_tables, cu_q_lens,
        tree_mask=jnp.asarray(tree_mask, bool), **options,
    )  # fmt: skip


def check_write(slot_mapping, block_tables):
    rows = jnp.zeros((4, 2, 64))
    ejk.check_write_kv_cache_inputs(rows, rows, POOL, POOL, slot_mapping, block_tables=block_tables)


def changed(right, **places):
    """Change the entries at `argument__i_j`."""
    given = {name: np.array(x) for name, x in right.items()}
    for place, value in places.items():
        name, _, indices = place.partition("__")
        given[name][tuple(map(int, indices.split("_"))) if indices else ...] = value
    return given


MISTAKES = {
    "no mistake": (check_ragged, changed(RAGGED), None),
    "a window of nothing": (
        check_ragged, changed(RAGGED, sliding_window=0), "sliding_window=0 must be at least 1",
    ),
    "a length past the table": (
        check_ragged, changed(RAGGED, context_lens__0=49), "context_lens[0]=49 must be in [0, 48]",
    ),
    "a bound past the rows": (
        check_ragged, changed(RAGGED, cu_q_lens__2=8), "cu_q_lens[2]=8 must be in [0, 7]",
    ),
    "a bound below 0": (
        check_ragged, changed(RAGGED, cu_q_lens__0=-1), "cu_q_lens[0]=-1 must be in [0, 7]",
    ),
    "bounds that fall": (
        check_ragged, changed(RAGGED, cu_q_lens__1=6),
        "cu_q_lens[2]=5 must not be below the bound before it",
    ),
    "more new tokens than tokens": (
        check_ragged, changed(RAGGED, context_lens__1=3),
        "context_lens[1]=3 must count the new tokens",
    ),
    "a position below 0": (
        check_ragged, changed(RAGGED, positions__4=-1), "positions[4]=-1 must be at least 0",
    ),
    "a page that a token sees": (
        check_ragged, changed(RAGGED, block_tables__1_0=8),
        "block_tables[1, 0]=8 must be in [0, 8)",
    ),
    "a page behind every window": (
        check_ragged, changed(RAGGED, block_tables__0_0=-1, sliding_window=32), None,
    ),
    "a page in a window by positions": (
        check_ragged, changed(RAGGED, block_tables__0_0=-1, sliding_window=32, positions__0=46),
        "block_tables[0, 0]=-1 must be in [0, 8)",
    ),
    "a page of a sequence without new tokens": (
        check_ragged, changed(RAGGED, block_tables__0_0=-1, cu_q_lens__0=1), None,
    ),
    "a token that does not see itself": (
        check_ragged, changed(RAGGED, tree_mask__3_2=0), "tree_mask[3, 2]=False must be True",
    ),
    "a mask of too few columns": (
        check_ragged, changed(RAGGED) | {"tree_mask": np.ones((7, 3))},
        "tree_mask.shape[1]=3 must be at least the new tokens of sequence 1",
    ),
    "no mistake in slots": (check_write, changed(WRITE), None),
    "a slot outside": (
        check_write, changed(WRITE, slot_mapping__2=128),
        "slot_mapping[2]=128 must be in [0, 128), or -1 to write nothing",
    ),
    "a negative slot": (
        check_write, changed(WRITE, slot_mapping__2=-2), "slot_mapping[2]=-2 must be in [0, 128)",
    ),
    "a slot twice": (
        check_write, changed(WRITE, slot_mapping__3=127),
        "slot_mapping[2]=127 must be one token's alone",
    ),
    "a slot of nobody's page": (
        check_write, changed(WRITE, slot_mapping__2=32),
        "slot_mapping[2]=32 must be in a page that block_tables names: a page has 16 slots",
    ),
}  # fmt: skip


@pytest.mark.parametrize("check, given, message", MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_named_at_once(check, given, message):
    if message is None:
        return check(**given)
    with pytest.raises(ValueError) as info:
        check(**given)
    assert str(info.value).startswith(message)


@pytest.mark.parametrize("check, given, message", MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_named_under_jit(check, given, message):
    given = {name: jnp.asarray(x) for name, x in given.items()}
    error, _ = jax.jit(checkify.checkify(lambda given: check(**given)))(given)
    assert (error.get() or "").startswith(message or "") and bool(error.get()) == bool(message)


def test_slots_of_64_bits_are_not_narrowed_first():
    slots = np.array([5, -1, 2**32, 7])
    with pytest.raises(ValueError, match=r"^slot_mapping\[2\]=4294967296 must be in \[0, 128\)"):
        check_write(slots, None)


def test_pages_before_the_window_of_a_position_past_the_last_token_may_be_anything():
    query, pool = np.zeros((1, 1, 8), np.float32), np.zeros((4, 1, 4, 8), np.float32)
    ejk.check_ragged_page_attention_inputs(
        query, pool, pool, np.array([9]), np.array([[-1, -1, 3]]), np.array([0, 1]),
        positions=np.array([13]), sliding_window=2,
    )  # fmt: skip
