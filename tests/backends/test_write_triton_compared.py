"""Which tokens the Triton write finds to be overwritten by later ones, and bugs in that."""

import itertools
import re
import typing

import jax
import jax.numpy as jnp
import mutants
import numpy as np
import pytest
import triton
import triton.language as tl

from ejk.backends.triton import _launch
from ejk.backends.triton.write_kv_cache import later

NUM_SLOTS = 1000


@triton.jit
@typing.no_type_check
def compare_kernel(
    slot_mapping_ptr, found_ptr, NUM_TOKENS: tl.constexpr, BLOCK_TOKENS: tl.constexpr,
    BLOCK_OTHERS: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0) * BLOCK_TOKENS
    bits = later.overwritten_by_later(
        slot_mapping_ptr, first, NUM_TOKENS, BLOCK_TOKENS, BLOCK_OTHERS
    )
    tl.store(found_ptr + tl.program_id(0), bits)


def overwritten(slots, block_tokens, block_others, interpret=True):
    grid = -(-len(slots) // block_tokens)
    constants = {
        "NUM_TOKENS": len(slots), "BLOCK_TOKENS": block_tokens, "BLOCK_OTHERS": block_others
    }  # fmt: skip
    [words] = _launch.call(
        compare_kernel, {"slot_mapping_ptr": jnp.asarray(slots, jnp.int32)},
        {"found_ptr": jax.ShapeDtypeStruct((grid,), jnp.int32)}, constants,
        grid=grid, num_warps=1, num_stages=1, compute_capability=None, interpret=interpret,
    )  # fmt: skip
    bits = np.asarray(words)[:, None] >> np.arange(block_tokens) & 1
    return bits.reshape(-1)[: len(slots)].astype(bool)


def defined(slots):
    return np.array([slot in slots[i + 1 :] for i, slot in enumerate(slots)])


def pairs_of(num_tokens, block_tokens, block_others):
    """Pairs of tokens at every edge of a program and of a block of others."""
    edges = {0, 1, num_tokens - 2, num_tokens - 1}
    for size, at in ((block_tokens, 1), (block_others, 1), (block_others, 2)):
        edges |= {size * at - 1, size * at}
    edges = sorted(i for i in edges if 0 <= i < num_tokens)
    return itertools.combinations(edges, 2)


SIZES = [(1, 1, 32), (2, 2, 32), (33, 2, 32), (96, 4, 32), (97, 8, 32), (64, 16, 64)]


def holds(interpret=True):
    """One pair alike at a time, so that nothing else can hide it; then many."""
    rng = np.random.default_rng(0)
    for num_tokens, block_tokens, block_others in SIZES:
        calls = []
        for one, other in pairs_of(num_tokens, block_tokens, block_others):
            slots = rng.permutation(NUM_SLOTS)[:num_tokens]
            slots[other] = slots[one]
            calls.append(slots)
        for few in (3, 200):
            calls.append(rng.integers(0, few, num_tokens))
        # What is no slot, the largest numbers, and slots that differ in one bit.
        calls.append(rng.choice([0, -1, -(2**31), 2**31 - 1, NUM_SLOTS], num_tokens))
        calls.append(np.resize([0, *(1 << np.arange(31))], num_tokens))
        calls.append(np.arange(num_tokens)[::-1])
        for slots in calls:
            found = overwritten(slots, block_tokens, block_others, interpret)
            is_slot = slots >= 0  # of others nothing is written either way
            message = str((num_tokens, slots.tolist()))
            np.testing.assert_array_equal(found[is_slot], defined(slots)[is_slot], message)


@pytest.mark.cpu
def test_what_a_later_token_overwrites_is_found():
    holds()


@pytest.mark.gpu
def test_what_a_later_token_overwrites_is_found_on_a_gpu():
    holds(interpret=False)


BUGS = {
    "a token overwrites itself": (
        "begin + offs > first_token + i", "begin + offs >= first_token + i",
    ),
    "the next token is none of the later ones": (
        "begin + offs > first_token + i", "begin + offs > first_token + i + 1",
    ),
    "earlier tokens of the block count": (
        "is_later = begin + offs > first_token + i", "is_later = begin + offs != first_token + i",
    ),
    "those of the program's block are left out": (
        "is_later = begin + offs > first_token + i", "is_later = begin + offs > first_token + 64",
    ),
    "the next block is left out": (
        "range(begin + BLOCK_OTHERS,", "range(begin + 2 * BLOCK_OTHERS,",
    ),
    "the last block is left out": (
        "NUM_TOKENS, BLOCK_OTHERS):\n            slots",
        "NUM_TOKENS - 1, BLOCK_OTHERS):\n            slots",
    ),
    "a second block is none": (
        "if NUM_TOKENS > BLOCK_OTHERS:", "if NUM_TOKENS > 2 * BLOCK_OTHERS:",
    ),
    "only the last block counts": (
        "found | (1 << i), found)", "found | (1 << i), found & ~(1 << i))",
    ),
    "what is past the end is slot 0": ("other=-1", "other=0"),
    "differences are signed": (".to(tl.uint32, bitcast=True)", ""),
    "the bit of the next token": ("(1 << i)", "(2 << i)"),
    "slots that differ in the first bit are one": (
        "tl.min(differences, 1) == 0", "tl.min(differences, 1) <= 1",
    ),
    "slots that differ in the last bit are one": (
        "(slots ^ slot)", "((slots ^ slot) & 0x3FFFFFFF)",
    ),
    "all four slots of a thread must be the same": (
        "tl.min(differences, 1) == 0", "tl.sum(differences, 1) == 0",
    ),
}  # fmt: skip


@pytest.mark.fault("write_kv_cache", "triton")
@pytest.mark.cpu
@pytest.mark.fast
@pytest.mark.parametrize("bug", BUGS)
def test_a_bug_is_caught(bug, monkeypatch, tmp_path):
    faulty = mutants.load(later, *BUGS[bug], tmp_path)
    monkeypatch.setitem(globals(), "later", faulty)
    with pytest.raises((AssertionError, jax.errors.JaxRuntimeError)) as info:
        holds()
    if isinstance(info.value, jax.errors.JaxRuntimeError):  # and not of a kernel that cannot run
        assert re.search("(RaceError|MemoryAccessError): ", str(info.value))
