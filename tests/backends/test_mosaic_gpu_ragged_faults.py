"""Faults put into the source of the prefill kernel one at a time: the interpreter, poison or the
oracle catch each.
"""

import dataclasses
import functools
import importlib
import inspect
import sys
import types

import gpu_interpreter
import mutants
import numpy as np
import pytest
from entries import RaggedEntry
from test_mosaic_gpu_ragged import (
    BF16,
    F16,
    INT32,
    LONG,
    build,
    build_cut,
    build_empty_piece,
    changed,
)

import ejk
from ejk.backends.mosaic_gpu.ragged_page_attention import backend, call, scaling
from ejk.testing.bounds import assert_close
from ejk.testing.configurations import E4M3, FEATURES, INT8, Configuration

pytestmark = gpu_interpreter.marks
SHAPE = changed(page_size=16, max_blocks=28, num_pages=130)
FOLDER = "ejk.backends.mosaic_gpu.ragged_page_attention"
# Each imports of those before it.
MODULES = (
    "widening", "_pages", "memory", "tiles", "mask", "softmax", "copying", "writing", "rows",
    "kernel", "call", "scaling",
)  # fmt: skip
FOLDERS = {  # those that are elsewhere
    "widening": "ejk.backends.triton.ragged_page_attention",
    "_pages": "ejk.backends.mosaic_gpu",
}

FAULTS = {
    "no wait for the queries": (
        "kernel", "plgpu.barrier_wait(shared.query_there.at[slot])", "pass", "hidden",
    ),
    "no wait for the keys": (
        "rows", "        plgpu.barrier_wait(shared.keys_there.at[slot])\n", "", "hidden",
    ),
    "no wait for the values": (
        "rows", "plgpu.barrier_wait(shared.values_there.at[before])", "pass", "hidden",
    ),
    "no wait for the last values": (
        "rows", "plgpu.barrier_wait(shared.values_there.at[slot])", "pass", "hidden",
    ),
    "no wait for room": (
        "copying", "        plgpu.barrier_wait(self._free(half).at[slot])\n        for",
        "        for", "hidden",
    ),
    "no wait for room for queries": (
        "copying", "        plgpu.barrier_wait(shared.query_free.at[slot])\n        for",
        "        for", "hidden",
    ),
    "no wait for the other's clearing": (
        "rows", "plgpu.barrier_wait(self.shared.cleared)", "pass", "hidden",
    ),
    "room is free at once": (
        "rows", "plgpu.barrier_wait(shared.keys_there.at[slot])\n        plgpu.barrier_wait(",
        "plgpu.barrier_wait(shared.keys_there.at[slot])\n        plgpu.barrier_arrive(shared."
        "keys_free.at[slot])\n        plgpu.barrier_wait(", "hidden",
    ),
    "wrong arrivals": (
        "memory", "keys_there=barriers(sizes.stages, sizes.copies + scaled)",
        "keys_there=barriers(sizes.stages, 1)", "hidden",
    ),
    "an id is not checked": (
        "_pages", "(page >= 0) & (page < num_pages)", "page == page", "hidden",
    ),
    "hidden pages are taken for whole blocks": (
        "mask", "jnp.minimum(tile.end, tile.whole)", "tile.end", "hidden",
    ),
    "values that are not visible stay": (
        "rows", "jnp.where(seen, values, jnp.zeros_like(values))", "values", "hidden",
    ),
    "values of the last block alone are cleared": (
        "rows", "self._clear(j - 1, before)", "pass", "hidden",
    ),
    "tokens see the one after them": (
        "mask", "minimum(position + 1,", "minimum(position + 2,", "hidden",
    ),
    "tokens do not see themselves": (
        "mask", "minimum(position + 1,", "minimum(position,", "hidden",
    ),
    "what the last row sees is taken for whole": (
        "mask", "minimum(nearest + 1,", "minimum(nearest + sizes.own_tokens,", "edge",
    ),
    "the window is one too long": (
        "mask", "(window_of(inputs) - 1), begins", "window_of(inputs), begins", "features",
    ),
    "the window's first values are not cleared": (
        "mask", "(tile.seen_begin, 2)", "(tile.seen_begin, 1)", "features",
    ),
    "the first block of a piece is taken for whole": (
        "mask", "(tile.begin, 1)", "(tile.begin, 0)", "cut",
    ),
    "tokens and heads change places": (
        "mask", "token = lax.div(row, jnp.full_like(row, sizes.group)) if",
        "token = lax.rem(row, jnp.full_like(row, sizes.group)) if", "hidden",
    ),
    "sinks lie by token": (
        "memory", "jnp.tile(by_group, (1, -(-ROWS // problem.group)))",
        "jnp.repeat(by_group, -(-ROWS // problem.group), axis=1)", "features",
    ),
    "sinks weigh nothing": ("softmax", "l = l + jnp.exp2(in_log2 - finite)", "pass", "features"),
    "ALiBi counts from the next token": (
        "rows", "lax.broadcast_in_dim(position, shape",
        "lax.broadcast_in_dim(position + 1, shape", "features",
    ),
    "another cap": (
        "rows", "self.scale, problem.soft_cap,", "self.scale, 0.7 * problem.soft_cap,", "features",
    ),
    "a negative scale is folded in": (
        "mask", "jnp.where(scale >= 0, stop, 0)", "stop", "negative",
    ),
    "logits are natural": ("rows", "self.scale * LOG2E", "self.scale", "hidden"),
    "what came before is not scaled": (
        "softmax", "state.l * spread(alpha, SUMS) + sums", "state.l + sums", "hidden",
    ),
    "nor are its values": (
        "rows", "acc = rescaled(sizes.plain, acc, alpha)", "pass", "hidden",
    ),
    "another KV head": (
        "memory", "if layout.interleaved else kv_head", "if layout.interleaved else 0 * kv_head",
        "hidden",
    ),
    "keys for values": ("memory", "2 * page + half if", "2 * page if", "fused"),
    "the first part of a long page": (
        "copying", "lax.rem(first, sizes.problem.page_size) if", "0 if", "fused",
    ),
    "parts of both warpgroups in one place": (
        "writing", "row = tile.part + first * group", "row = tile.part", "cut",
    ),
    "an empty piece sees what is left": (
        "tiles", "begin = jnp.minimum(begin + item.piece * size, end)",
        "begin = jnp.minimum(begin + item.piece * size, end - 1)", "empty_piece",
    ),
    "pieces begin together": ("tiles", "begin + item.piece * size, end)", "begin, end)", "cut"),
    "LSE of parts is natural": (
        "kernel", "writing.write_part(tile, slot, out, lse)",
        "writing.write_part(tile, slot, out, lse * LN2)", "cut",
    ),
    "the last tiles are nobody's": (
        "tiles", "sizes) < rest).astype", "sizes) < 0).astype", "hidden",
    ),
    "rows of nobody at the end stay": (
        "writing", "jnp.where(i < first, i, last + i - first)", "jnp.minimum(i, first)", "hidden",
    ),
    "keys have the scale of another head": (
        "kernel", "tile_in(shared, slot).kv_head if by_head", "1 if by_head", "scaled_heads",
    ),
    "values have the scale of another head": (
        "kernel", "self.inputs.value_scale[tile.kv_head]", "self.inputs.value_scale[1]",
        "scaled_heads",
    ),
    "rows that see nothing are scaled": (
        "kernel", "jnp.where(l == 0, factor, factor * self", "(factor * self", "scaled_heads",
    ),
    "scales of another sequence": (
        "copying", "tile.seq * sizes.scaled_blocks", "0 * sizes.scaled_blocks", "scaled_tokens",
    ),
    "scales of the next token": (
        "scaling", "own = jnp.pad(own, ((0, 0), (0, 0), (0, rest))",
        "own = jnp.pad(own[..., 1:], ((0, 0), (0, 0), (0, rest + 1))", "scaled_tokens",
    ),
    "scales of the first block": (
        "copying", "tile.first_block(sizes) + j\n        plgpu", "0\n        plgpu",
        "scaled_tokens",
    ),
    "scales of values are overwritten with those of keys to come": (
        "memory", "lax.rem(n, sizes.scale_slots)", "lax.rem(n, sizes.stages)", "scaled_tokens",
    ),
    "no wait for the scales": (
        "memory", "sizes.copies + scaled)", "sizes.copies)", "scaled_tokens",
    ),
    "values have the scales of keys": (
        "rows", "value_scales = self._scales(n + 1, 1)",
        "value_scales = self._scales(n + 1, 0)", "scaled_tokens",
    ),
    "values of the first block alone are scaled": (
        "rows", "_scaled(new_p, value_scales)", "new_p", "scaled_tokens",
    ),
    "scales of dead slots are met": (
        "scaling", "jnp.where(is_there[None], own, 1.0)", "own", "scaled_tokens",
    ),
    "pages that a window cuts are not copied": (
        "widening", "(first + page_size > begins)", "(first >= begins)", "scaled_heads",
    ),
    "later tokens are hidden": (
        "mask", "if sizes.problem.causal:\n        ends", "if True:\n        ends", "later",
    ),
    "later blocks are left out": (
        "tiles", "if sizes.problem.causal else length", "if True else length", "later",
    ),
    "rows before the first position are cleared": (
        "mask", "if sizes.problem.causal:\n        return", "if True:\n        return", "later",
    ),
    "a window begins before all integers": (
        "mask", "position if sizes.problem.causal else jnp.maximum(position, 0)", "position",
        "later",
    ),
    "later tokens are seen": (
        "mask", "if sizes.problem.causal:\n        reach", "if False:\n        reach", "edge",
    ),
    "rows of the next sequence are written": (
        "writing", "jnp.clip(tile.count - first, 0, self", "jnp.clip(tile.count, 0, self", "hidden",
    ),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Mutant(ejk.MosaicGpuRaggedPageAttention):
    """A backend of its own to JAX: no compiled program of the sound one is reused."""

    bug: str = ""


@pytest.fixture(autouse=True)
def _fresh_interpreter():
    yield
    gpu_interpreter.reset()


def hidden():
    """Blocks of all kinds, hidden pages, logits far apart; a wide tile and two narrow ones."""
    case = build(
        Configuration(SHAPE, BF16, "NHD"), (429, 60, 0, 7), (1, 18, 19, 19, 21), total=23,
        magnitudes=(4.0, 1.0),
    )  # fmt: skip
    tables = case.block_tables.copy()
    tables[0, 18] = case.shape.num_pages
    tables[1, 1] = -1
    return case.replace(block_tables=tables)


def edge():
    """Two warpgroups whose first tokens see less of the second block than their last ones."""
    config = Configuration(SHAPE, BF16, "HND")
    return build(config, (264, 0, 0, 0), (0, 20, 20, 20, 20), total=20)


def features():
    config = Configuration(SHAPE, BF16, "HND", frozenset(FEATURES))
    return build(config, **LONG, window=np.int32(320), junk=False)


def later():
    """Tokens that see later ones, of many new tokens and of more than there are, and a window."""
    features = {"causal=False", "attn_logits_soft_cap", "sliding_window"}
    config = Configuration(SHAPE, BF16, "HND", frozenset(features))
    lens, bounds = (140, 10, 0, 7), (0, 60, 77, 78, 79)
    return build(config, lens, bounds, total=79, window=INT32.max)


def negative():
    """Logits far apart, in blocks that every row sees."""
    case = build(
        Configuration(SHAPE, F16, "HND"), (301, 0, 0, 0), (0, 17, 17, 17, 17), total=17,
    )  # fmt: skip
    return case.replace(options={"attn_scale": -4.0})


def fused():
    shape = changed(page_size=256, max_blocks=2, num_pages=10)
    config = Configuration(shape, BF16, "KV_HEADS_FIRST", fused=True)
    return build(config, (301, 60, 0, 7), (1, 18, 19, 19, 21), total=23)


def scaled_heads():
    """Scales of heads, some of rows that see nothing; a window that begins inside a page."""
    config = Configuration(
        SHAPE, BF16, "NHD", frozenset({"sliding_window"}), cache_dtype=E4M3, scales="head"
    )
    case = build(config, (429, 3, 0, 0), (0, 17, 22, 22, 22), total=23, window=300)
    scales = (np.float32([0.5, 2.0]), np.float32([np.nan, 3.0]))
    return case.replace(scales=scales)


def scaled_tokens():
    config = Configuration(SHAPE, BF16, "NHD", cache_dtype=INT8, scales="token")
    return build(config, (301, 60, 0, 7), (1, 18, 19, 19, 21), total=23, invalid=0.05)


def cut():
    """A context that many programs share."""
    return build_cut(20, ("sliding_window",))


def empty_piece():
    return build_empty_piece()


CASES = {
    x.__name__: x
    for x in (
        hidden, edge, features, later, negative, fused, scaled_heads, scaled_tokens, cut,
        empty_piece,
    )
}  # fmt: skip


@functools.cache
def built(name):
    return mutants.answered(CASES[name]())


def check(name, bug):
    num_sms = {"cut": 12, "empty_piece": 20}.get(name, 3)
    attend = RaggedEntry("", Mutant(num_sms=num_sms, interpret=True, bug=bug), examples=0)
    case = built(name)
    assert_close(case, *attend(case))


def mutated(monkeypatch, file, old, new):
    """Execute the modules of the kernel anew, one place of them changed."""
    package = types.ModuleType("mutant")
    monkeypatch.setitem(sys.modules, "mutant", package)
    for name in MODULES:
        sound = importlib.import_module(f"{FOLDERS.get(name, FOLDER)}.{name}")
        source = inspect.getsource(sound)
        if name == file:
            assert source.count(old) == 1, f"{old!r} is there {source.count(old)} times"
            source = source.replace(old, new)
        source = source.replace(f"from {FOLDER} import", "from mutant import")
        for other in MODULES:
            place = f"{FOLDERS.get(other, FOLDER)}.{other}"
            source = source.replace(f"from {place} import", f"from mutant.{other} import")
        module = types.ModuleType(f"mutant.{name}")
        monkeypatch.setitem(sys.modules, module.__name__, module)
        exec(compile(source, sound.__file__, "exec"), vars(module))
        setattr(package, name, module)
    monkeypatch.setattr(call, "attend", package.call.attend)
    monkeypatch.setattr(backend, "widened", package.widening.widened)
    monkeypatch.setattr(scaling, "ordered_scales", package.scaling.ordered_scales)


@pytest.mark.parametrize("case", CASES)
def test_the_sound_kernel_is_not_accused(case):
    check(case, "")


@pytest.mark.fault("ragged_page_attention", "mosaic_gpu")
@pytest.mark.fast(20)
@pytest.mark.timeout(60)
@pytest.mark.parametrize("bug", FAULTS)
def test_a_fault_is_caught(bug, monkeypatch):
    *fault, case = FAULTS[bug]
    mutated(monkeypatch, *fault)
    with pytest.raises((AssertionError, IndexError, RuntimeError, ValueError)):
        check(case, bug)
