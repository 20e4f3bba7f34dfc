"""Latent attention of ragged batches by the decode kernel for Hopper, blocks of new tokens as its
sequences.

Interpreted, or on the GPU with `--gpu`. Slots that no row sees are poisoned.
"""

import dataclasses

import gpu_interpreter
import jax
import jax.numpy as jnp
import mutants
import numpy as np
import pytest
from test_mosaic_gpu import SHAPE
from test_ragged_triton_compile import MIXED

import ejk
from ejk.backends.mosaic_gpu.page_attention import backend as decode
from ejk.backends.mosaic_gpu.ragged_page_attention import backend as module
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


def check(config, lens, bounds, backend=BACKEND, **options):
    case = build_ragged(config, np.array(lens), np.array(bounds), **options)
    out, lse = ejk.ragged_page_attention(
        *case.operands(), **case.semantics(), return_lse=True, backend=backend
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
@pytest.mark.parametrize("heads", [8, 16])
@pytest.mark.parametrize("lens, bounds", BATCHES.values(), ids=BATCHES)
def test_tokens_of_few_heads_share_a_program(lens, bounds, heads):
    shape = dataclasses.replace(SHAPE, num_heads=heads)
    check(Configuration(shape, BF16, "NHD"), lens, bounds, invalid=0.1, seed=heads)


# So long that they are cut: as planned for six multiprocessors, in equal parts for twelve.
LONG = dataclasses.replace(SHAPE, page_size=64, max_blocks=9)
CUT = ((570, 60, 500), (0, 3, 8, 11))


@pytest.fixture
def merges(monkeypatch):
    """Return a list that each merging of parts is added to, as it is traced."""
    jax.clear_caches()
    found, combine = [], decode.combine
    monkeypatch.setattr(
        decode, "combine", lambda *args, **given: found.append(args) or combine(*args, **given)
    )
    return found


@pytest.mark.parametrize("heads, num_sms", [(8, 6), (8, 12), (64, 6)])
def test_contexts_in_parts(heads, num_sms, merges):
    config = Configuration(dataclasses.replace(LONG, num_heads=heads), BF16, "HND")
    check(config, *CUT, dataclasses.replace(BACKEND, num_sms=num_sms))
    assert merges


@pytest.mark.parametrize("heads", [16, 64])
def test_contexts_that_are_not_cut(heads, monkeypatch, merges):
    """As those of very many blocks are; the program is none that another test has compiled."""
    monkeypatch.setattr(module, "MOST_PLANNED", 2)
    config = Configuration(dataclasses.replace(LONG, num_heads=heads), BF16, "HND")
    check(config, *CUT, dataclasses.replace(BACKEND, num_sms=7))
    assert not merges


def test_a_batch_of_fewer_tokens_than_share_a_program():
    shape = dataclasses.replace(SHAPE, num_heads=8)
    check(Configuration(shape, BF16, "HND"), (130, 65), (0, 1, 4), total=5)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("last", range(61, 70))
def test_tokens_that_share_a_program_see_up_to_themselves(last):
    """Wherever the end of a block of keys falls among them."""
    shape = dataclasses.replace(SHAPE, num_heads=8)
    check(Configuration(shape, BF16, "HND"), (last, last + 128), (0, 8, 16))


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
    "rows of no sequence see tokens": (
        "jnp.pad(operands.context_lens, 1)", 'jnp.pad(operands.context_lens, 1, "edge")',
    ),
    "rows of no sequence before the first one are left out": (
        "for row in (0, problem.total_tokens)", "for row in (1, problem.total_tokens)",
    ),
    "rows of no sequence after the last one are left out": (
        "for row in (0, problem.total_tokens)", "for row in (0, problem.total_tokens - 1)",
    ),
    "bounds fall": ("sane_bounds(problem, operands.cu_q_lens)", "operands.cu_q_lens"),
    "the first table for all": ("jnp.clip(blocks.seq - 1, 0", "jnp.clip(0 * blocks.seq, 0"),
    "the next table": ("jnp.clip(blocks.seq - 1, 0", "jnp.clip(blocks.seq, 0"),
    "blocks see the token after them": (
        "blocks.begin + blocks.num_tokens", "blocks.begin + blocks.num_tokens + 1",
    ),
    "all blocks are full": ("blocks.row + blocks.num_tokens", "blocks.row + self.tokens"),
    "blocks that are not full are not counted": (
        "-(-(bounds[1:] - bounds[:-1]) // tokens)", "(bounds[1:] - bounds[:-1]) // tokens",
    ),
    "blocks that are not full have no room": ("+ partial) // self.tokens", ") // self.tokens"),
    "blocks take tokens of the sequence before": ("(row >= begin) & (row < end)", "row < end"),
    "blocks take tokens of the sequence after": ("(row >= begin) & (row < end)", "row >= begin"),
    "rows of no sequence have no room": ("self.problem.num_seqs + 2", "self.problem.num_seqs + 1"),
    "blocks that do not exist have tokens": ("end = jnp.where(exists, end, 0)", "end += 0"),
    "blocks that do not exist have contexts": (
        "length = jnp.where(exists,", "length = jnp.where(True,",
    ),
    "queries are fewer than a program reads": ("> 0:  # a program", "> 9:  # a program"),
    "tokens of a block change places": ("set(lse,", "set(lse[:, ::-1],"),
    "blocks write tokens before their first": (
        "jnp.stack([blocks.row, end]", "jnp.stack([0 * blocks.row, end]",
    ),
}  # fmt: skip


def check_blocks(module, num_heads, lens, bounds, total=13):
    """Hold the call whose sequences are blocks, each token of which XLA runs, to the definition."""
    shape = dataclasses.replace(SMALL, num_heads=num_heads)
    case = build_ragged(
        Configuration(shape, BF16, "HND"), np.array(lens, np.int32), np.array(bounds, np.int32),
        total=total, invalid=0.1,
    )  # fmt: skip
    query, keys, _, *integers = case.operands()
    problem = dataclasses.replace(
        MIXED, num_seqs=len(lens), total_tokens=len(query), page_size=SMALL.page_size,
        max_blocks=SMALL.max_blocks, num_heads=num_heads, head_dim=SMALL.head_dim,
    )  # fmt: skip
    query, keys, *integers = map(jnp.asarray, (query, keys, *integers))
    given = RaggedPageAttentionOperands(query, keys, None, *integers, *[None] * 6)
    as_decode = module.AsDecode.of(problem)
    blocks, tokens = as_decode.num_blocks, as_decode.tokens

    def run(given, of):
        """Attend to each token of each block, and write its own ones among poison."""
        begins, ends = jnp.arange(blocks), jnp.arange(1, blocks + 1)
        if of.spans is not None:
            begins, ends = of.spans.T
            own = np.asarray(as_decode.own_rows(of.spans))
            np.testing.assert_array_equal(np.sort(own[own < total]), np.arange(total))
        assert len(given.query) >= tokens and ends.max() <= total
        assert (given.context_lens[ends == 0] <= 0).all()
        rows = jnp.maximum(ends - tokens, 0)[:, None] + jnp.arange(tokens)[None]
        lens = given.context_lens[:, None] - jnp.maximum(ends[:, None] - 1 - rows, 0)
        out, lse = ejk.page_attention(
            given.query[rows.reshape(-1)], given.key_cache, None, lens.reshape(-1),
            jnp.repeat(given.block_tables[of.tables], tokens, axis=0),
            value_head_dim=SMALL.width, return_lse=True, backend="xla",
        )  # fmt: skip
        is_own = (rows >= begins[:, None]) & (rows < ends[:, None])
        place = jnp.where(is_own, rows, len(given.query)).reshape(-1)
        out = (
            jnp.full((len(given.query), *out.shape[1:]), jnp.nan, out.dtype)
            .at[place]
            .set(out, mode="drop")
        )
        return out, lse.reshape(blocks, tokens * num_heads)

    out, lse = as_decode.run(given, run)
    assert_close(case, np.asarray(out), np.asarray(lse))


SEQUENCES = {
    "verification": ((24, 7, 15), (0, 4, 8, 12)),
    "rows of no sequence": ((5, 0, 21), (1, 2, 2, 9)),
    "short ones": ((20, 3), (0, 1, 3)),
    "one": ((24,), (0, 12)),
    "falling bounds": ((24, 20, 9), (2, 9, 6, 12)),
    "more new tokens than tokens": ((2, 9, 1), (0, 5, 6, 12)),
    "hostile": ((-(2**31), 2**31 - 1, 7), (-3, 3, 2, 2**31 - 1)),
    "a token between two of no sequence": ((20,), (1, 2), 3),
    "fewer than share a program": ((20, 9), (0, 1, 3), 5),
}


@pytest.mark.parametrize("num_heads", [33, 32, 8])
@pytest.mark.parametrize("batch", SEQUENCES.values(), ids=SEQUENCES)
def test_blocks_are_sequences(batch, num_heads):
    check_blocks(tokens, num_heads, *batch)


@pytest.mark.fault("ragged_page_attention", "mosaic_gpu")
@pytest.mark.parametrize("bug", FAULTS)
def test_a_fault_is_caught(bug, tmp_path):
    faulty = mutants.load(tokens, *FAULTS[bug], tmp_path)
    with pytest.raises(AssertionError):
        for batch in SEQUENCES.values():
            for num_heads in (33, 8):
                check_blocks(faulty, num_heads, *batch)
