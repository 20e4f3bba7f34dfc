"""Faults put into the source of the latent kernel one at a time: the interpreter, poison or the
oracle catch each.
"""

import dataclasses
import functools
import importlib
import inspect
import types

import gpu_interpreter
import mutants
import numpy as np
import pytest
from test_mosaic_gpu import BF16, SHAPE, WINDOW

import ejk
from ejk.backends.mosaic_gpu.page_attention import call, memory, piece
from ejk.backends.triton.page_attention import combine_kernel
from ejk.testing.bounds import assert_close
from ejk.testing.configurations import Configuration
from ejk.testing.page_attention import build
from ejk.testing.ragged_page_attention import build_ragged

pytestmark = gpu_interpreter.marks
FOLDER = "ejk.backends.mosaic_gpu.page_attention"
FOLDERS = {"_pages": "ejk.backends.mosaic_gpu"}  # those that are elsewhere
MERGED = (570, 60, 500), (0, 3, 8, 11)  # the long contexts are in parts

FAULTS = {
    "no wait for the keys": (
        "kernel", "            plgpu.barrier_wait(shared.third_there.at[3 * slot + third])\n", "",
    ),
    "no wait for the weights": (
        "kernel", "        plgpu.barrier_wait(self.shared.weights_there.at[slot])\n", "",
    ),
    "no wait for the other's sum": (
        "kernel", "        plgpu.barrier_wait(shared.sums_there)\n", "",
    ),
    "no wait for room": (
        "copying", "plgpu.barrier_wait(shared.half_free.at[2 * slot + third])", "pass",
    ),
    "wrong arrivals": ("memory", "arrivals=sizes.copies", "arrivals=1"),
    "an id is not checked": (
        "_pages", "(page >= 0) & (page < num_pages)", "page == page",
    ),
    "values that are not visible stay": (
        "kernel", "jnp.where(seen, values, jnp.zeros_like(values))", "values",
    ),
    "one token too many": ("piece", "position < piece.high", "position <= piece.high"),
    "the window is one too short": (
        "piece", "position >= piece.low", "position > piece.low",
    ),
    "hidden pages are taken for whole blocks": (
        "piece", "return some | (exist != (1 << sizes.copies) - 1)", "return some",
    ),
    "the last block is taken for a whole one": ("piece", "(first + BLOCK_KV > jnp", "(first > jnp"),
    "the window's first block is taken for a whole one": ("piece", "(first < piece.low) | ", ""),
    "what came before is not scaled": (
        "kernel", "state.l * alpha + p.sum(axis=1)", "state.l + p.sum(axis=1)",
    ),
    "weighted values are not scaled": (
        "kernel", "acc = rescaled(self.sizes.interpret, state.acc, alpha)", "acc = state.acc",
    ),
    "the maximum of own blocks alone": (
        "kernel", "return State(state.acc, m, state.l * alpha), alpha",
        "return State(state.acc, state.m, state.l * alpha), alpha",
    ),
    "the halves change places": (
        "writing", "pl.ds(self.half * self.sizes.half,", "pl.ds((1 - self.half) * self.sizes.half,",
    ),
    "the LSE is in other units": ("writing", "self._share_lse(lse * LN2)", "self._share_lse(lse)"),
    "the next heads": ("piece", "lax.rem(program, groups) * ROWS", "0 * ROWS"),
    "a piece begins at its end": (
        "piece", "low, high = jnp.maximum(begin, first)", "low, high = jnp.maximum(reach, first)",
    ),
}  # fmt: skip


# Of programs with fewer heads than rows.
FAULTS_OF_FEW_HEADS = {
    "the first heads for all": ("copying", "pl.ds(first + begin, count)", "pl.ds(first, count)"),
    "both halves of a part are the first": (
        "writing", "self.shared.parts.at[self.half, pl", "self.shared.parts.at[0, pl",
    ),
}  # fmt: skip

# Of programs whose rows are those of several tokens.
FAULTS_OF_TOKENS = {
    "a token sees the one after it": (
        "piece", "position < piece.common +", "position <= piece.common +",
    ),
    "the first table for all": ("piece", "inputs.tables[seq]", "0 * inputs.tables[seq]"),
    "all tokens see as far": (
        "kernel", "if self.inputs.spans is not None:\n            row",
        "if False:\n            row",
    ),
    "rows are tokens": ("piece", "jnp.full_like(row, sizes.heads)", "jnp.full_like(row, 1)"),
    "blocks that the last token sees are whole": (
        "piece", "> jnp.minimum(piece.high, piece.common)", "> piece.high",
    ),
    "rows before the first are read": (
        "piece", "jnp.maximum(end - sizes.tokens, 0)", "end - sizes.tokens",
    ),
    "a short block counts from its own end": (
        "piece", "length - (end - 1 - token)", "length - (sizes.tokens - 1)",
    ),
    "tokens before the first are written": (
        "piece", "(token >= begin) & ", "",
    ),
}  # fmt: skip

# Of the kernel that merges the parts of such programs.
FAULTS_OF_MERGED_TOKENS = {
    "tokens before the first are merged": ("(row >= begin * HEADS) & ", ""),
    "tokens after the last are merged": (" & (row < end * HEADS)", ""),
    "a sequence's tokens begin a row": ("tl.maximum(end - TOKENS, 0) * HEADS", "begin * HEADS"),
    "sequences are rows": ("tl.maximum(end - TOKENS, 0) * HEADS", "seq * HEADS"),
}


@dataclasses.dataclass(frozen=True)
class Mutant(ejk.MosaicGpuPageAttention):
    """A backend of its own to JAX: no compiled program of the sound one is reused."""

    bug: str = ""


@dataclasses.dataclass(frozen=True)
class RaggedMutant(ejk.MosaicGpuRaggedPageAttention):
    bug: str = ""

    @property
    def _decode_backend(self):
        return Mutant(self.compute_capability, self.num_sms, self.interpret, self.bug)


@pytest.fixture(autouse=True)
def _fresh_interpreter():
    yield
    gpu_interpreter.reset()


@functools.cache
def cases():
    """Two programs a piece, a window and hidden pages; then blocks that are visible altogether."""
    shape = dataclasses.replace(SHAPE, num_heads=128)
    windowed = Configuration(shape, BF16, "HND", WINDOW)
    case = build(windowed, np.array([210, 150]), window=np.int32(180), invalid=0.15, seed=2)
    ids = case.block_tables[case.needed]
    assert ((ids < 0) | (ids >= shape.num_pages)).any()
    plain = Configuration(SHAPE, BF16, "HND", WINDOW, num_splits=1)
    whole = build(plain, np.array([210, 224]), window=np.int32(200))
    tables = whole.block_tables.copy()
    tables[1, 9] = SHAPE.num_pages  # in the third of four blocks
    # Logits so large that maxima rise by more than the slack.
    query = (whole.query * 16).astype(BF16)
    whole = dataclasses.replace(whole, block_tables=tables, query=query)
    return mutants.answered(case), mutants.answered(whole)


def check(bug):
    backend = Mutant(num_sms=5, interpret=True, bug=bug)
    for each in cases():
        assert_close(each, *gpu_interpreter.run(each, backend))


@functools.cache
def few_heads():
    """The last sequence is in parts."""
    shape = dataclasses.replace(SHAPE, num_heads=24, page_size=64, max_blocks=9)
    return mutants.answered(build(Configuration(shape, BF16, "HND"), np.array([60, 570])))


def check_few_heads(bug):
    backend = Mutant(num_sms=5, interpret=True, bug=bug)
    assert_close(few_heads(), *gpu_interpreter.run(few_heads(), backend))


@functools.cache
def tokens(lens, bounds):
    """Up to eight tokens a program, among which blocks of keys end, and fewer at the beginning."""
    shape = dataclasses.replace(SHAPE, num_heads=8, page_size=64, max_blocks=9)
    config = Configuration(shape, BF16, "HND")
    return mutants.answered(build_ragged(config, np.array(lens), np.array(bounds)))


def check_tokens(bug, lens=(196, 60, 128), bounds=(0, 5, 8, 16)):
    case = tokens(lens, bounds)
    backend = RaggedMutant(num_sms=6, interpret=True, bug=bug)
    out, lse = ejk.ragged_page_attention(
        *case.operands(), **case.semantics(), return_lse=True, backend=backend
    )
    assert_close(case, np.asarray(out), np.asarray(lse))


def mutated(file, old, new):
    """Execute a module, one place of it changed; then those that use it, down to the kernel."""
    made = {}
    for name in ("_pages", "memory", "piece", "copying", "writing", "kernel"):
        module = importlib.import_module(f"{FOLDERS.get(name, FOLDER)}.{name}")
        source = inspect.getsource(module)
        if name == file:
            assert source.count(old) == 1, f"{old!r} is there {source.count(old)} times"
            source = source.replace(old, new)
        made[name] = types.ModuleType(name)
        made[name].__dict__["__name__"] = module.__name__
        exec(compile(source, module.__file__, "exec"), made[name].__dict__)
        for other in made.values():
            for key in {*vars(other)} & {*vars(made[name])}:
                if getattr(vars(other)[key], "__module__", None) == other.__name__:
                    setattr(made[name], key, vars(other)[key])
    return made


def test_the_sound_kernel_is_not_accused():
    check("")
    check_few_heads("")
    check_tokens("")
    check_tokens("", *MERGED)


@pytest.mark.fault("page_attention", "mosaic_gpu")
@pytest.mark.fast(5)
@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    "bug, fault, found_by",
    [
        pytest.param(bug, fault, found_by, id=bug)
        for faults, found_by in (
            (FAULTS, check), (FAULTS_OF_FEW_HEADS, check_few_heads),
            (FAULTS_OF_TOKENS, check_tokens),
        )
        for bug, fault in faults.items()
    ],
)  # fmt: skip
def test_a_fault_is_caught(bug, fault, found_by, monkeypatch):
    made = mutated(*fault)
    monkeypatch.setattr(call, "latent_attention_kernel", made["kernel"].latent_attention_kernel)
    monkeypatch.setattr(call, "shared_types", made["memory"].shared_types)
    with pytest.raises((AssertionError, IndexError, RuntimeError, ValueError)):
        found_by(bug)


def check_own(module):
    """Others' tokens are before and after those that are a program's own."""
    inputs = memory.Inputs(*[None] * len(memory.Inputs._fields))
    mine = piece.Piece(*[1] * len(piece.Piece._fields))
    for begin, end in ((0, 5), (5, 8), (8, 16)):
        given = inputs._replace(spans=np.array([[0, 0], [begin, end]]))
        own = [token for token in range(20) if module.is_own(token, mine, given)]
        assert own == [*range(begin, end)]


def test_a_program_writes_the_tokens_that_are_its_own():
    check_own(piece)


# In the interpreter programs run in turn: who writes the rows of others may be the first.
@pytest.mark.fault("ragged_page_attention", "mosaic_gpu")
@pytest.mark.parametrize("old", ["(token >= begin) & ", " & (token < end)"])
def test_a_fault_of_what_is_written_is_caught(old, tmp_path):
    faulty = mutants.load(piece, old, "", tmp_path)
    with pytest.raises(AssertionError):
        check_own(faulty)


@pytest.mark.fault("ragged_page_attention", "mosaic_gpu")
@pytest.mark.fast(2)
@pytest.mark.timeout(60)
@pytest.mark.parametrize("bug", FAULTS_OF_MERGED_TOKENS)
def test_a_fault_of_what_merges_tokens_is_caught(bug, monkeypatch, tmp_path):
    made = mutants.load(combine_kernel, *FAULTS_OF_MERGED_TOKENS[bug], tmp_path)
    monkeypatch.setattr(combine_kernel, "combine_parts_kernel", made.combine_parts_kernel)
    with pytest.raises((AssertionError, IndexError)):
        check_tokens(bug, *MERGED)
