"""What a message about a shape says to pass is what makes the call right."""

import re

import jax.numpy as jnp
import numpy as np
import pytest
from test_wrong_calls import said_of
from wrong_calls import RIGHT, zeros

import ejk

pytestmark = pytest.mark.fast

ARRAYS = [
    (operation, name)
    for operation, right in RIGHT.items()
    for name, x in right().items()
    if isinstance(x, np.ndarray)
]
SINKS = {"sinks": zeros(4), "alibi_slopes": zeros(4)}
ROWS = {"positions": zeros(5, dtype=np.int32), "tree_mask": zeros(5, 3, dtype=bool)}
OPTIONAL = {"page_attention": SINKS, "ragged_page_attention": SINKS | ROWS}
ARRAYS += [(operation, name) for operation, given in OPTIONAL.items() for name in given]
NEVER_SAID = {  # two pools of four axes are told from fused ones by a fifth alone
    "key_cache",
    "value_cache",
}


def right_call(operation):
    return RIGHT[operation]() | OPTIONAL.get(operation, {})


def passed(text, name, x):
    """Do what a message says, if it is one thing to pass; or return None."""
    found = re.search(rf"[:;] pass ((jnp\.\w+\()?{name}\b[^;]*)$", text)
    return found and np.asarray(eval(found[1], {name: x, "jnp": jnp}))


@pytest.mark.parametrize("operation, name", ARRAYS)
def test_an_axis_of_one_too_many_is_the_one_to_leave_out(operation, name):
    given = right_call(operation)
    x = given[name]
    for axis in range(x.ndim + 1):
        wrong = np.expand_dims(x, axis)
        kind, text = said_of(operation, given | {name: wrong})
        mended = passed(text, name, wrong)
        if mended is None:
            rows = name in ("query", "key", "value") and axis < 2
            assert rows or name in NEVER_SAID, text
        else:
            assert kind is TypeError
            np.testing.assert_array_equal(mended, x)
            getattr(ejk, operation)(**given | {name: mended})


@pytest.mark.parametrize(
    "operation, name, turned",
    [
        ("page_attention", "block_tables", (1, 0)),
        ("ragged_page_attention", "block_tables", (1, 0)),
        ("ragged_page_attention", "tree_mask", (1, 0)),
        ("merge_attention_states", "lses", (0, 2, 1)),
    ],
)
def test_an_array_with_its_axes_turned_is_to_be_turned_back(operation, name, turned):
    given = right_call(operation)
    wrong = given[name].transpose(turned)
    _, text = said_of(operation, given | {name: wrong})
    np.testing.assert_array_equal(passed(text, name, wrong), given[name])


SAID = {
    "a table before the lengths": (
        "page_attention", {"context_lens": zeros(2, 3, dtype=np.int32)},
        "the lengths come before the tables",
    ),
    "a number for one sequence": (
        "page_attention", {"context_lens": np.int32(3)}, "for one sequence pass context_lens[None]",
    ),
    "rows of all heads": (
        "page_attention", {"query": zeros(2, 256)},
        "for one token pass query[None]; of [tokens, heads * dim], query.reshape(len(query), "
        "heads, -1)",
    ),
    "keys of all heads": (
        "write_kv_cache", {"key": zeros(3, 128)},
        "for one token pass key[None]; of [tokens, heads * dim], key.reshape(len(key), heads, -1)",
    ),
    "a latent pool without the axis of heads": (
        "page_attention",
        {"key_cache": zeros(8, 16, 64), "value_cache": None, "value_head_dim": 32},
        "of [num_pages, page_size, head_dim] pass key_cache[:, None], as cache_layout='HND' has it",
    ),
    "bounds of other sequences": (
        "ragged_page_attention", {"cu_q_lens": zeros(7, dtype=np.int32)},
        "pass one more than there are sequences",
    ),
    "lengths of new tokens": (
        "ragged_page_attention", {"cu_q_lens": zeros(2, dtype=np.int32)},
        "of lengths pass jnp.pad(jnp.cumsum(q_lens), (1, 0))",
    ),
    "LSEs of one part": (
        "merge_attention_states", {"lses": zeros(4, 2)},
        "of one part alone there is nothing to merge: jnp.stack the parts",
    ),
}  # fmt: skip


@pytest.mark.parametrize("mistake", SAID)
def test_a_hint_is_of_what_was_given(mistake):
    operation, changes, hint = SAID[mistake]
    _, text = said_of(operation, RIGHT[operation](**changes))
    assert re.split("[:;] ", text, maxsplit=1)[1] == hint


@pytest.mark.parametrize("operation", ["page_attention", "write_kv_cache", "copy_kv_slots"])
def test_a_fifth_axis_of_keys_beside_values_is_told_as_what_it_is(operation):
    given = RIGHT[operation]()
    wrong = np.stack([given["key_cache"]] * 3, axis=-1)
    _, text = said_of(operation, given | {"key_cache": wrong})
    assert text.startswith("value_cache=float32[8, 2, 16, 64] must be None with a key_cache of")
