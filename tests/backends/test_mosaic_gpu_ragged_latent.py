"""Latent attention of ragged batches by the decode kernel for Hopper, each new token a sequence.

Interpreted, or on the GPU with `--gpu`. Slots that no row sees are poisoned.
"""

import dataclasses

import gpu_interpreter
import jax.numpy as jnp
import mutants
import numpy as np
import pytest
from test_mosaic_gpu import SHAPE
from test_ragged_triton_compile import MIXED

import ejk
from ejk.backends.mosaic_gpu.ragged_page_attention import tokens
from ejk.backends.ragged_page_attention import RaggedPageAttentionOperands
from ejk.testing.bounds import assert_close
from ejk.testing.configurations import BF16, F16, Configuration
from ejk.testing.ragged_page_attention import build_ragged
from ejk.testing.shapes import Shape

pytestmark = gpu_interpreter.marks

BACKEND = ejk.MosaicGpuRaggedPageAttention(num_sms=5, interpret=not gpu_interpreter.ON_GPU)


@pytest.fixture(autouse=True)
def _fresh_interpreter():
    yield
    gpu_interpreter.reset()


def check(config, lens, bounds, **options):
    case = build_ragged(config, np.array(lens), np.array(bounds), **options)
    out, lse = ejk.ragged_page_attention(
        *case.operands(), **case.semantics(), return_lse=True, backend=BACKEND
    )
    assert_close(case, np.asarray(out), np.asarray(lse))


BATCHES = {
    "verification": ((224, 7, 150), (0, 4, 8, 12)),
    "unequal ones, and rows of no sequence": ((65, 0, 191), (1, 2, 2, 9)),
    "more new tokens than tokens": ((2, 64, 1), (0, 5, 6, 12)),
    "hostile": ((-(2**31), 2**31 - 1, 70), (-3, 3, 2, 2**31 - 1)),
}


@pytest.mark.parametrize("lens, bounds", BATCHES.values(), ids=BATCHES)
def test_batches(lens, bounds):
    check(Configuration(SHAPE, BF16, "HND"), lens, bounds, invalid=0.1)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("window", [1, 70])
def test_windows(window):
    config = Configuration(SHAPE, BF16, "NHD", frozenset({"sliding_window"}))
    check(config, (221, 60, 130), (0, 4, 5, 12), window=np.int32(window))


def test_heads_that_fill_no_program_in_float16():
    shape = dataclasses.replace(SHAPE, num_heads=33)
    config = Configuration(shape, F16, "HND", frozenset({"attn_scale"}))
    check(config, (220, 100, 3), (0, 4, 8, 12))


SMALL = Shape("latent", 3, 1, 24, page_size=4, max_blocks=6, value_head_dim=16, latent=True)
FAULTS = {
    "tokens see the one after them": ("bounds[seq + 1] - 1 - row", "bounds[seq + 1] - 2 - row"),
    "rows of no sequence see tokens": ("jnp.where(is_new, lens", "jnp.where(True, lens"),
    "bounds fall": ("sane_bounds(problem, operands.cu_q_lens)", "operands.cu_q_lens"),
    "tokens read the first table": ("block_tables[seq]", "block_tables[seq * 0]"),
    "lengths are not clipped": (
        "jnp.clip(operands.context_lens, 0, problem.capacity)", "operands.context_lens",
    ),
}  # fmt: skip


def check_tokens(module, lens, bounds):
    """Hold the call whose sequences are the tokens, as XLA runs it, to the definition."""
    case = build_ragged(
        Configuration(SMALL, BF16, "HND"), np.array(lens, np.int32), np.array(bounds, np.int32),
        invalid=0.1,
    )  # fmt: skip
    query, keys, _, *integers = case.operands()
    problem = dataclasses.replace(
        MIXED, num_seqs=len(lens), total_tokens=len(query), page_size=SMALL.page_size,
        max_blocks=SMALL.max_blocks,
    )  # fmt: skip
    query, keys, *integers = map(jnp.asarray, (query, keys, *integers))
    given = RaggedPageAttentionOperands(query, keys, None, *integers, *[None] * 6)
    found = module.operands_of_tokens(problem, given)
    out, lse = ejk.page_attention(
        found.query, found.key_cache, None, found.context_lens, found.block_tables,
        value_head_dim=SMALL.width, return_lse=True, backend="xla",
    )  # fmt: skip
    assert_close(case, np.asarray(out), np.asarray(lse))


SEQUENCES = {
    "verification": ((24, 7, 15), (0, 4, 8, 12)),
    "rows of no sequence": ((5, 0, 21), (1, 2, 2, 9)),
    "falling bounds": ((24, 20, 9), (2, 9, 6, 12)),
    "more new tokens than tokens": ((2, 9, 1), (0, 5, 6, 12)),
    "hostile": ((-(2**31), 2**31 - 1, 7), (-3, 3, 2, 2**31 - 1)),
}


@pytest.mark.parametrize("lens, bounds", SEQUENCES.values(), ids=SEQUENCES)
def test_tokens_are_sequences(lens, bounds):
    check_tokens(tokens, lens, bounds)


@pytest.mark.fault("ragged_page_attention", "mosaic_gpu")
@pytest.mark.parametrize("bug", FAULTS)
def test_a_fault_is_caught(bug, tmp_path):
    faulty = mutants.load(tokens, *FAULTS[bug], tmp_path)
    with pytest.raises(AssertionError):
        for lens, bounds in SEQUENCES.values():
            check_tokens(faulty, lens, bounds)
