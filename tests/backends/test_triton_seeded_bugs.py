"""Bugs put into the source of each Triton kernel one at a time: the interpreter or a comparison
with the definition catches each of them.
"""

import dataclasses
import importlib
import inspect
import re

import jax
import jax.numpy as jnp
import mutants
import numpy as np
import pytest
import test_first_tokens
import test_plan
from entries import RAGGED_TRITON, Entry, RaggedEntry
from kernels import kernel_modules, launch_on_numpy
from planned import long_case

import ejk
from ejk.backends.page_attention_packs import Packs
from ejk.backends.page_attention_plan import PlanFacts, PlanOperands
from ejk.backends.triton.copy_kv_cache import sizes as copy_sizes
from ejk.backends.triton.interpreter import call as interpreter
from ejk.backends.triton.page_attention import plan as plan_sizes
from ejk.backends.triton.page_attention.packing import find_packs
from ejk.backends.triton.page_attention.planner import TritonPlan
from ejk.backends.triton.ragged_page_attention import widen_kernel
from ejk.testing import MemoryAccessError, shuffled
from ejk.testing.bounds import assert_close
from ejk.testing.configurations import BF16, E4M3, FEATURES, INT4, INT8, Configuration
from ejk.testing.copy_kv_cache import CopyConfiguration
from ejk.testing.copy_kv_cache import build as build_copy
from ejk.testing.interpreter import interpret
from ejk.testing.memory import RaceError, memory_checked
from ejk.testing.page_attention import build
from ejk.testing.ragged_page_attention import EXTRAS, build_ragged
from ejk.testing.shapes import Shape
from ejk.testing.write_kv_cache import WriteShape, assert_written
from ejk.testing.write_kv_cache import build as build_write

F32 = np.dtype(np.float32)
SHAPE = Shape("of seeded bugs", 4, 2, 16, page_size=32, max_blocks=12, num_pages=40)
LATENT = Shape("latent", 33, 1, 20, 32, 12, 40, value_head_dim=17, latent=True)
PAGED = dataclasses.replace(LATENT, page_size=8, max_blocks=48, num_pages=160)
LENS = np.array([383, 40, 3])
COPY = WriteShape("copied", 9, 2, 16, None, page_size=8)
WRITE = WriteShape("of seeded bugs", 9, 2, 16, None, page_size=8)


@dataclasses.dataclass(frozen=True)
class Mutant(ejk.TritonPageAttention):
    """A backend of its own to JAX: no compiled program of the sound one is reused."""

    bug: str = ""


@dataclasses.dataclass(frozen=True)
class RaggedMutant(ejk.TritonRaggedPageAttention):
    bug: str = ""


@dataclasses.dataclass(frozen=True)
class CopyMutant(ejk.TritonCopyKVCache):
    bug: str = ""


@dataclasses.dataclass(frozen=True)
class WriteMutant(ejk.TritonWriteKVCache):
    bug: str = ""


def decode(bug, num_splits=1):
    entry = Entry(bug, Mutant(interpret=True, num_sms=6, bug=bug), examples=0)
    every = frozenset(FEATURES)
    for shape, features in ((SHAPE, every), (LATENT, every), (PAGED, every - {"sliding_window"})):
        fused = shape.fusible
        config = Configuration(shape, F32, "NHD", features, num_splits, fused)
        case = build(config, LENS, window=300, invalid=0.2, as_jax=True)
        assert_close(case, *entry(case))
    window = frozenset({"sliding_window"})
    for cache, scales in ((INT8, "token"), (INT4, "token"), (E4M3, "head")):
        config = Configuration(
            SHAPE, BF16, "HND", window, num_splits, cache_dtype=cache, scales=scales
        )
        case = build(config, LENS, window=300, invalid=0.2, as_jax=True)
        assert_close(case, *entry(case))
    alone = long_case().rows([0])  # in equal parts of every sixth block
    assert_close(alone, *entry(alone))


def combine(bug):
    decode(bug, num_splits=3)


def plan(bug):
    """In one tile, and in tiles of two sequences."""
    for most in (plan_sizes.MOST_OTHERS, 2):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(plan_sizes, "MOST_OTHERS", most)
            for lens, window in (([5000, 3, 900, 900, 0], 4000), ([1920, 900, 0, 3456], None)):
                assert test_plan.check("triton", lens, capacity=6000, window=window, resident=10)


def packing(bug):
    """A group of 7 in packs of 4, one whose tables differ, a pair, one that is not counted."""
    facts = PlanFacts(13, 32, 2, 128, 1, 1100, None)
    groups = np.array([2, 0, 2, 1, 0, 2, 2, 1, 7, 2, 7, 2, 2], np.int32)
    tables = np.repeat(np.arange(1100, dtype=np.int32)[None], 13, 0)
    tables[7, 250] = 3
    lens = np.full(13, 1100, np.int32)
    lens[[1, 8]] = 257, 3
    given = groups, np.array([512, 1080, 1080, 800, 28], np.int32), tables
    for num_sms, least in ((4, None), (1, 0), (5, None)):  # the last does not pay
        problem = TritonPlan(
            least_saved_bytes=least, compute_capability=90, num_sms=num_sms, interpret=True
        ).plan_problem(facts, 128, np.dtype(jnp.bfloat16), 5)
        operands = PlanOperands(lens, None, *given)
        found = find_packs(problem, operands, launch_on_numpy)
        expected = Packs.of(problem, jax.tree.map(jnp.asarray, operands))
        for a, b in zip(found, expected, strict=True):
            np.testing.assert_array_equal(a, b)


def ragged(bug):
    fields = {f.name: getattr(RAGGED_TRITON, f.name) for f in dataclasses.fields(RAGGED_TRITON)}
    few, many = (
        RaggedMutant(**fields, bug=bug),
        RaggedMutant(**fields | {"block_rows": 64}, bug=bug),
    )
    features = frozenset({"sinks", "sliding_window"})
    bounds = np.array([1, 2, 9, 12])
    for shape, extras, backend, invalid in (
        (SHAPE, (), few, 0.1), (SHAPE, EXTRAS, few, 0.1), (LATENT, (), many, 0.0),
    ):  # fmt: skip
        entry = RaggedEntry(bug, backend, examples=0)
        config = Configuration(shape, F32, "NHD", features, fused=shape.fusible)
        own = bounds + (shape is LATENT) * np.array([0, 2, 0, 0])  # 64 rows see blocks with no mask
        case = build_ragged(config, LENS, own, window=300, invalid=invalid, extras=extras)
        if not invalid:  # of what every row sees, the first that is no page lies past the pool
            case.block_tables[1, 0] = shape.num_pages
        assert_close(case, *entry(case))
    for backend, cache, scales in ((few, INT8, "token"), (many, E4M3, "head")):
        entry = RaggedEntry(bug, backend, examples=0)
        config = Configuration(SHAPE, F32, "NHD", cache_dtype=cache, scales=scales)
        case = build_ragged(config, LENS, bounds)
        assert_close(case, *entry(case))
    few = RaggedEntry(bug, few, examples=0)
    test_first_tokens.test_windows_count_positions_among_new_tokens_far_from_where_they_lie(few)


def write(bug):
    slots = np.array([7, 40, 7, 48, -1, 12, 40, 3, 47])
    case = build_write(WRITE, F32, "HND", slots)
    assert_written(case, Entry(bug, WriteMutant(interpret=True, bug=bug), examples=0)(case))


def widen(bug):
    codes = np.arange(2 * 5 * 40).reshape(2, 5, 40).astype(np.int8)
    pages = np.array([3, -1, 0, 4], np.int32)
    constants = {"NUM_PAGES": 5, "NUM_COPIES": 4, "PAGE_WIDTH": 40, "BLOCK": 32}
    copies = interpret(
        widen_kernel.widen_pages_kernel, codes, pages, jax.ShapeDtypeStruct((2, 4, 40), F32),
        **constants, CACHE="int8", TILES=2, PTX=False, grid=2 * 4 * 2,
    )["copies_ptr"]  # fmt: skip
    named = pages >= 0
    np.testing.assert_array_equal(copies[:, named], codes[:, pages[named]].astype(F32))


def copy(bug):
    config = CopyConfiguration(COPY, "slot", INT8, "HND", "token")
    sources = np.array([1, 0, 3, 3, -1, 40, 41, 5, 48])
    targets = np.array([0, 1, 2, 39, 6, 7, 6, 39, 7])
    entry = Entry(bug, CopyMutant(interpret=True, bug=bug), examples=0)
    for unit, ends in (("slot", (sources, targets)), ("page", (sources % 7 - 1, targets % 7 - 1))):
        case = build_copy(config._replace(unit=unit), *ends)
        case.check(entry(case))


def mark(bug):
    """By a table of few programs, a few ids at a time, and in one block."""
    for block in (4, 16):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(copy_sizes, "MAX_COMPARED", 0)
            patch.setattr(copy_sizes, "MARKING_PROGRAMS", 4)
            patch.setattr(copy_sizes, "MAX_BLOCK_IDS", block)
            copy(f"{bug}, {block}")


HOLDS = {
    "page_attention_kernel": decode,
    "page_attention_groups_kernel": packing,
    "page_attention_members_kernel": packing,
    "page_attention_packs_kernel": packing,
    "page_attention_combine_kernel": combine,
    "page_attention_plan_kernel": plan,
    "ragged_page_attention_kernel": ragged,
    "ragged_page_attention_combine_kernel": ragged,
    "ragged_page_attention_plan_kernel": ragged,
    "ragged_page_attention_widen_kernel": widen,
    "write_kv_cache_kernel": write,
    "copy_kv_cache_kernel": copy,
    "copy_kv_cache_mark_kernel": mark,
    "copy_kv_cache_stage_kernel": copy,
}

OPERATIONS = ("page_attention", "ragged_page_attention", "write_kv_cache", "copy_kv_cache")

# What a kernel calls and is bent with it.
PARTS = {
    kernel: [f"ejk.backends.triton.{part}" for part in parts]
    for kernel, parts in {
        "page_attention_kernel": (
            "page_attention.attending", "page_attention.packs", "page_attention.writing",
            "_softmax", "_quantised",
        ),
        "page_attention_combine_kernel": ("page_attention.packs",),
        "ragged_page_attention_kernel": (
            "ragged_page_attention.rows", "ragged_page_attention.mask", "_softmax",
        ),
        "write_kv_cache_kernel": ("write_kv_cache.later",),
        "copy_kv_cache_kernel": ("copy_kv_cache.units",),
        "copy_kv_cache_mark_kernel": ("copy_kv_cache.units", "copy_kv_cache.staging"),
        "copy_kv_cache_stage_kernel": ("copy_kv_cache.units", "copy_kv_cache.staging"),
    }.items()
}  # fmt: skip

BUGS = {
    "page_attention_kernel": {
        "one slot on": (
            "offs_slot = positions % PAGE_SIZE", "offs_slot = (positions + 1) % PAGE_SIZE",
        ),
        "query heads are dealt out to KV heads": (
            "offs_head = kv_head * GROUP + offs_group",
            "offs_head = offs_group * NUM_KV_HEADS + kv_head",
        ),
        "values are read from the keys' half": (
            "value_pool_ptr + stride_half // TILES + kv", "value_pool_ptr + kv",
        ),
        "every part takes the first blocks": (
            "(first_block + piece % NUM_SPLITS) * BLOCK_KV",
            "(first_block + piece % NUM_SPLITS * 0) * BLOCK_KV",
        ),
        "parts take every block from their first on": (
            "range(begin, end, STEP)", "range(begin, end, BLOCK_KV)",
        ),
        "the group's first head has all slopes": (
            "alibi_slopes_ptr + offs_head", "alibi_slopes_ptr + offs_head * 0",
        ),
        "values are the keys' entries from the last on": (
            "k if SAME_TILE else v_ptrs", "(tl.flip(k[0], 1),) if SAME_TILE else v_ptrs",
        ),
        "64 rows see what lies past the end": ("[None, :], start < end", "[None, :], start > end"),
        "keys have the scale of another head": (
            "scale *= tl.load(key_scale_ptr + kv_head)",
            "scale *= tl.load(key_scale_ptr + (kv_head + 1) % 2)",
        ),
        "values have the scale of another head": (
            "value_scale_ptr) + kv_head)", "value_scale_ptr) + (kv_head + 1) % 2)",
        ),
        "keys have the scale of the next token": (
            "offs_page, offs_slot, stride_k_page, stride_k_slot, HEAD_DIM",
            "offs_page, (offs_slot + 1) % PAGE_SIZE, stride_k_page, stride_k_slot, HEAD_DIM",
        ),
        "values have the scale of the next token": (
            "offs_page, offs_slot, stride_v_page, stride_v_slot, VALUE_HEAD_DIM",
            "offs_page, (offs_slot + 1) % PAGE_SIZE, stride_v_page, stride_v_slot, VALUE_HEAD_DIM",
        ),
        "keys are scaled twice": (
            "s *= value_scale[None, :]", "s *= (value_scale * value_scale)[None, :]",
        ),
        "keys are not scaled": ("s *= value_scale[None, :]", "s *= 1.0"),
        "values are not scaled": ("l == 0, 0.0, value_scale)", "l == 0, 0.0, 1.0)"),
        "values are scaled twice": (
            "l == 0, 0.0, value_scale)", "l == 0, 0.0, value_scale * value_scale)",
        ),
        "values have the scales of keys": ("if not LATENT:", "if LATENT:"),
        "the scales of values that are not seen are read": (
            "mask=visible, other=0.0)\n        if not FOLDED",
            "mask=(page >= 0) & (page < NUM_PAGES), other=0.0)\n        if not FOLDED",
        ),
        "the window is one too long": (
            "first = tl.maximum(length - tl.maximum(window, 0), 0)",
            "first = tl.maximum(length - tl.maximum(window, 0) - 1, 0)",
        ),
        "the token past the end is seen": (
            "visible & (positions < end if", "visible & (positions <= end if",
        ),
        "entries past the pool are read": (
            "visible = (page >= 0) & (page < NUM_PAGES)", "visible = page >= 0",
        ),
        "entries below 0 are read": (
            "visible = (page >= 0) & (page < NUM_PAGES)", "visible = page < NUM_PAGES",
        ),
        "logits of what is not visible stay": (
            'return tl.where(visible, s, float("-inf"))', "return s",
        ),
        "earlier values are not rescaled": (
            "scaled_acc = acc[i] * rescale[:, None]", "scaled_acc = acc[i]",
        ),
        "earlier weights are not rescaled": (
            "if not SAME_TILE:\n        l = _summed(l, alpha, p)",
            "if not SAME_TILE:\n        l = _summed(l, alpha * 0 + 1, p)",
        ),
        "earlier sums of rounded weights are not rescaled": (
            "sums = acc[len(acc) - 1] * rescale[:, None]", "sums = acc[len(acc) - 1] * 1.0",
        ),
        "the largest of the sums of weights stands for all": (
            "l = tl.sum(l, 1)", "l = tl.max(l, 1)",
        ),
        "what all codes have in addition stays in logits": (
            "total * (-LEAST / SUBNORMALS)", "total * 0",
        ),
        "what all codes have in addition leaves logits twice": (
            "total * (-LEAST / SUBNORMALS)", "total * (-2 * LEAST / SUBNORMALS)",
        ),
        "what all codes have in addition stays in values": (
            "least = tl.max(acc[LAST], 1) * LEAST", "least = tl.max(acc[LAST], 1) * 0",
        ),
        "what all codes have in addition leaves values by half": (
            "least = tl.max(acc[LAST], 1) * LEAST", "least = tl.max(acc[LAST], 1) * (LEAST / 2)",
        ),
        "keys' upper halves of bytes count 16 times": ("q[i] * 0.0625", "q[i] * 1.0"),
        "values' upper halves of bytes count 16 times": ("(SUBNORMALS / 16)", "SUBNORMALS"),
        "slopes count from the next token": (
            "behind = positions - (length - 1)", "behind = positions - length",
        ),
        "another cap": ("return SOFT_CAP * tanh_f32", "return 0.9 * SOFT_CAP * tanh_f32"),
        "the sink weighs nothing": ("l + tl.exp2(in_log2 - m_safe), alpha", "l, alpha"),
        "the LSE is in base two": ("(m + tl.log2(l)) * LN2)", "m + tl.log2(l))"),
        "the pages of a block take turns": (
            "of_tokens(pages, PAGES, PAGE_SIZE)",
            "tl.reshape(of_tokens(pages, PAGES, PAGE_SIZE), [PAGES, BLOCK_KV // PAGES]).trans()"
            ".reshape([BLOCK_KV]) if PAGES > 1 else pages",
        ),
    },
    "page_attention_combine_kernel": {
        "the next head's parts": (
            "row = (first_part + start + i) * NUM_HEADS + head",
            "row = (first_part + start + i) * NUM_HEADS + (head + 1) % NUM_HEADS",
        ),
        "the last part is dropped": (
            "exists = start + i < num_parts", "exists = start + i < num_parts - 1",
        ),
        "earlier parts are not rescaled": ("acc * alpha)", "acc)"),
        "parts weigh the same": ("weight = tl.exp2(lse - m_safe)", "weight = tl.exp2(lse - lse)"),
    },
    "page_attention_groups_kernel": {
        "the last of a group leads it": (
            "tl.min(tl.where(is_mate, others, NUM_SEQS), 0)",
            "tl.max(tl.where(is_mate, others, -1), 0)",
        ),
        "the longest says how many pages": (
            "tl.min(tl.where(is_mate, lengths, CAPACITY), 0)",
            "tl.max(tl.where(is_mate, lengths, 0), 0)",
        ),
        "only the last pages are compared": ("differs |= (own", "differs = (own"),
        "a group outside of all is one": ("(group >= 0) & (group < NUM_GROUPS)", "group >= 0"),
    },
    "page_attention_members_kernel": {
        "only whose table differs shares nothing": (
            "mask=is_mate, other=0)", "mask=others == seq, other=0)",
        ),
        "places count from one": ("(others < seq)", "(others <= seq)"),
        "packs are all full": ("tl.minimum(left, MEMBERS)", "MEMBERS"),
    },
    "page_attention_packs_kernel": {
        "members read the prefix, too": ("lengths - tokens, lengths)", "lengths, lengths)"),
        "packs cost nothing": ("packed + tl.sum(of_packs, 0)", "packed"),
        "each member begins a pack": ("begins = is_kept & is_first", "begins = is_kept"),
        "packs of a group are one": ("(places < place // MEMBERS * MEMBERS)", "(places < 0)"),
        "who is absent is not said": ("leads & (member >= size)", "leads & (member > size)"),
        "a pack that is not there keeps its length": ("seq >= num_packs", "seq > num_packs"),
    },
    "page_attention_plan_kernel": {
        "the shortest pieces come first": (
            "(first[None, :] >= least).to(tl.int32)", "(first[None, :] <= least).to(tl.int32)",
        ),
        "a sequence comes before itself": (
            "(others[None, :] >= seqs[:, None])", "(others[None, :] > seqs[:, None])",
        ),
        "a context's last piece comes before its equals": (
            "tl.where(last == share, cuts - 1, 0)", "0",
        ),
        "a context's second piece comes before its equals": (
            "share_place = (first == share).to(tl.int32)", "share_place = seqs * 0",
        ),
        "parts begin one place on": (
            "tl.store(row_ptrs + 1, number, mask=is_split)",
            "tl.store(row_ptrs + 1, number + 1, mask=is_split)",
        ),
        "a part has the number of its place": (
            "tl.where(is_split, number + piece, -1)", "tl.where(is_split, place, -1)",
        ),
        "each context is cut by itself": ("share - before % share", "share - before % 1"),
        "each tile is a row of its own": ("carry += tl.sum(other_granules, 0)", "carry += 0"),
        "each tile is all there is": (
            "total += tl.sum(other_granules, 0)", "total = tl.sum(other_granules, 0)",
        ),
    },
    "ragged_page_attention_kernel": {
        "tokens see the one after them": (
            "key[None, :] <= place[:, None]", "key[None, :] <= place[:, None] + 1",
        ),
        "values are read from the keys' half": (
            "pool_ptr(value_ptr, CACHE, TILES) + stride_half",
            "pool_ptr(value_ptr, CACHE, TILES) + 0",
        ),
        "the keys' scale of the next token": (
            "slot_offsets(page, slot, stride_k_page",
            "slot_offsets(page, (slot + 1) % PAGE_SIZE, stride_k_page",
        ),
        "values have the keys' scales": ("if not LATENT:", "if LATENT:"),
        "the scale of the first head": (
            "tl.load((key_scale_ptr if LATENT else value_scale_ptr) + kv_head)",
            "tl.load(key_scale_ptr if LATENT else value_scale_ptr)",
        ),
        "the keys' scale applied twice": (
            "scale *= tl.load(key_scale_ptr + kv_head)",
            "scale *= tl.load(key_scale_ptr + kv_head) * tl.load(key_scale_ptr + kv_head)",
        ),
        "the values' scale is missing": (
            "l == 0, 0.0, value_scale)", "l == 0, 0.0, 1.0)",
        ),
        "the window is one too long": (
            "key_position[None, :] < window)", "key_position[None, :] <= window)",
        ),
        "entries past the pool end no block": (
            "is_bad = (pages < 0) | (pages >= NUM_PAGES)", "is_bad = pages < 0",
        ),
        "entries below 0 are read": (
            "exists = (page >= 0) & (page < NUM_PAGES)",
            "exists = page < NUM_PAGES",
        ),
        "earlier values are not rescaled": (
            "scaled_acc = acc[i] * rescale[:, None]", "scaled_acc = acc[i]",
        ),
        "rows before the first are not cleared": (
            "(tokens < first) | (tokens >= top)", "(tokens >= top)",
        ),
        "the last row is nobody's": (
            "rows % GROUP, rows < q_len * GROUP", "rows % GROUP, rows < q_len * GROUP - 1",
        ),
        "positions of new tokens are where they lie": (
            "all_end = tl.minimum(all_end, context)", "all_end = all_end + 0",
        ),
        "columns of the mask are off by one": (
            "column = (key - context)[None, :]", "column = (key - context + 1)[None, :]",
        ),
        "values are the keys' first entries negated": (
            "k if SAME_TILE else v_ptrs\n        m, l",
            "(-k[0],) if SAME_TILE else v_ptrs\n        m, l",
        ),
        "64 rows do not see the last block before that": (
            "start + BLOCK_KV <= bulk_end", "start + BLOCK_KV < bulk_end",
        ),
        "64 rows see what lies past the end": (
            "visible, block < before + after", "visible, block > before + after",
        ),
    },
    "ragged_page_attention_combine_kernel": {
        "the next KV head's parts": (
            "at = at * NUM_KV_HEADS + kv_head",
            "at = at * NUM_KV_HEADS + (kv_head + 1) % NUM_KV_HEADS",
        ),
        "the last part is dropped": (
            "(start + i < num_parts)", "(start + i < num_parts - 1)",
        ),
        "another block's rows": ("rows = block * PART_ROWS", "rows = (block + 1) * PART_ROWS"),
    },
    "ragged_page_attention_plan_kernel": {
        "every piece is the first": (
            "tl.store(ptrs + 4, item % one, mask=mask)", "tl.store(ptrs + 4, item * 0, mask=mask)",
        ),
        "sequences begin one row on": (
            "tl.store(ptrs + 1, begin[:, None], mask=mask)",
            "tl.store(ptrs + 1, begin[:, None] + 1, mask=mask)",
        ),
        "narrow and wide items share places": (
            "before = before & (wide[None, :] == is_wide[:, None])",
            "before = before & (wide[None, :] != is_wide[:, None])",
        ),
    },
    "ragged_page_attention_widen_kernel": {
        "KV heads share their pages": ("(outer * NUM_PAGES + page)", "page"),
        "every block is the first": (
            "offs = block * (BLOCK // TILES) + tl.arange(0, BLOCK // TILES)",
            "offs = tl.arange(0, BLOCK // TILES)",
        ),
    },
    "write_kv_cache_kernel": {
        "the first of several stays": (
            "begin + offs > first_token + i", "begin + offs < first_token + i",
        ),
        "one slot on": ("offset = (slots % PAGE_SIZE)", "offset = ((slots + 1) % PAGE_SIZE)"),
        "the slot past the pool is written": ("slots < NUM_SLOTS", "slots <= NUM_SLOTS"),
    },
    "copy_kv_cache_kernel": {
        "what is staged is read from the pool": (
            "where = tl.where(is_staged[:, None], staged, source)", "where = source",
        ),
        "another page of the same head": (
            "inner = (row % INNER)", "inner = ((row + 1) % INNER)",
        ),
        "scales are left behind": ("if SCALE_WIDTH > 0:", "if SCALE_WIDTH < 0:"),
        "the end of a unit is missing": (
            "units, mask=wins[:, None] & (offs < UNIT)",
            "units, mask=wins[:, None] & (offs < UNIT - 1)",
        ),
        "what goes nowhere is written": (
            "units, mask=wins[:, None]", "units, mask=(targets >= 0)[:, None]",
        ),
    },
    "copy_kv_cache_mark_kernel": {
        "a target's entry is not cleared": (
            "tl.store(table_ptr + targets, 0, mask=writes)", "pass",
        ),
        "a source's entry is not cleared": (
            "tl.store(table_ptr + sources, 0, mask=reads)", "pass",
        ),
        "the first of several stays": ("atomic_max", "atomic_min"),
        "all of several stay": ("(last == copies + 1)", "(last > 0)"),
        "the first copy is none": ("copies + 1, mask", "copies, mask"),
        "a copy from nowhere overwrites": ("is_unit(sources, NUM_PAGES, SLOTS) & ", ""),
        "the first program's units are nobody's": (
            "== tl.program_id(0)", "== 1 + tl.program_id(0)",
        ),
        "a program tells of sources that are not its own": (
            "is_valid & _is_mine(sources, PROGRAMS)", "is_valid",
        ),
        "marks do not wait for what is cleared": (
            "0, mask=writes)\n    tl.debug_barrier()", "0, mask=writes)",
        ),
        "nobody waits for the marks": (
            'sem="relaxed")\n    tl.debug_barrier()', 'sem="relaxed")',
        ),
        "nobody waits for the list": (
            "mask=is_staged)\n            tl.debug_barrier()", "mask=is_staged)",
        ),
        "the list begins too late": ("tl.cumsum(staged, 0) - 1", "tl.cumsum(staged, 0)"),
        "the list ends too early": ("listed < count", "listed < count - 1"),
    },
    "copy_kv_cache_stage_kernel": {
        "the first of several stays": (
            "others[None, :] > copies[:, None]", "others[None, :] < copies[:, None]",
        ),
        "nothing is in conflict": ("tl.max(staged, 1) * wins", "wins * 0"),
        "a copy from nowhere overwrites": (
            "tl.where(is_unit(other_sources, NUM_PAGES, SLOTS), other",
            "tl.where(others >= 0, other",
        ),
        "the unit past the end is one": ("(ids < NUM_PAGES * SLOTS)", "(ids <= NUM_PAGES * SLOTS)"),
        "the target is staged": (
            "source = in_pool(sources, offs", "source = in_pool(sources + 1, offs",
        ),
    },
}  # fmt: skip


def replace(kernel, old, new, monkeypatch, folder):
    """Run a kernel with a line changed."""
    sound = importlib.import_module(kernel_modules("triton")[kernel])
    parts = [sound, *(importlib.import_module(name) for name in PARTS.get(kernel, ()))]
    [faulty] = [part for part in parts if old in inspect.getsource(part)]
    module = mutants.load(faulty, old, new, folder)
    changed = [name for name in functions_of(faulty) if faulty is not sound or "_kernel" in name]
    # Where they are imported: who is imported meanwhile must find the sound ones.
    for part in parts if faulty is sound else [part for part in parts if part is not faulty]:
        for name in {*vars(part)}.intersection(changed):
            monkeypatch.setattr(part, name, getattr(module, name))


def functions_of(module):
    """Name the functions that a module defines."""
    return {
        name for name, x in vars(module).items() if getattr(x, "__module__", "") == module.__name__
    }


@pytest.mark.fast
@pytest.mark.parametrize(
    ("kernel", "bug"),
    [
        pytest.param(kernel, bug, id=f"{kernel}: {bug}", marks=pytest.mark.fault(name, "triton"))
        for kernel in BUGS
        for name in OPERATIONS
        if kernel.startswith(f"{name}_")
        for bug in BUGS[kernel]
    ],
)
def test_a_bug_is_caught(kernel, bug, monkeypatch, tmp_path):
    replace(kernel, *BUGS[kernel][bug], monkeypatch, tmp_path)
    # What the interpreter raises inside `jit` comes as an error of JAX's.
    caught = (AssertionError, MemoryAccessError, RaceError, jax.errors.JaxRuntimeError)
    with pytest.raises(caught) as info, memory_checked():
        HOLDS[kernel](f"{kernel}: {bug}")
    if isinstance(info.value, jax.errors.JaxRuntimeError):  # and not of a kernel that cannot run
        assert re.search("(RaceError|MemoryAccessError): ", str(info.value))


@pytest.mark.fast
@pytest.mark.parametrize("kernel", HOLDS)
def test_the_sound_kernels_are_not_accused(kernel, monkeypatch, tmp_path):
    """Nor does the order of programs show: each launch stores the same bits in two of them."""
    old, _ = next(iter(BUGS[kernel].values()))
    replace(kernel, old, old, monkeypatch, tmp_path)  # loaded as the faulty ones are
    launched = set()

    def run_twice(function, inputs, outputs, constants, *, in_place, grid):
        given = [
            {name: None if x is None else x.copy() for name, x in arrays.items()}
            for arrays in (outputs, in_place)
        ]
        run(function, inputs, given[0], constants, in_place=given[1], grid=grid)
        with shuffled(1):
            run(function, inputs, outputs, constants, in_place=in_place, grid=grid)
        for name, stored in (outputs | in_place).items():
            if stored is not None:
                assert stored.tobytes() == (given[0] | given[1])[name].tobytes(), name
        launched.add(function.__name__)

    run = interpreter.run
    monkeypatch.setattr(interpreter, "run", run_twice)
    with memory_checked():
        HOLDS[kernel]("none")
    assert launched & vars(importlib.import_module(kernel_modules("triton")[kernel])).keys()
