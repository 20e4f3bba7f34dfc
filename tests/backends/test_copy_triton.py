"""Copies in Triton: no race, no byte moved twice without need, 64 bits, and what is compiled."""

import dataclasses
import itertools
import re

import hypothesis
import jax
import jax.numpy as jnp
import mutants
import numpy as np
import offline
import pytest
from entries import Entry
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from test_dispatch import kernels
from test_triton_large_arrays import little_memory, on_numpy, sparse
from test_triton_memory import ANY_INT32
from test_write_lowering import aliases, pool_results
from test_write_programs import struct
from test_write_triton_compile import accesses
from tiers import THOROUGH

import ejk
from ejk.backends.copy_kv_cache import CopyKVCacheOperands, CopyKVCacheProblem
from ejk.backends.gpu import Target
from ejk.backends.triton.copy_kv_cache import (
    kernel,
    mark_kernel,
    sizes,
    stage_kernel,
    staging,
)
from ejk.backends.triton.copy_kv_cache import units as units_of_pools
from ejk.backends.triton.interpreter.memory import MemoryAccessError
from ejk.testing.configurations import F16, F32, INT8
from ejk.testing.copy_kv_cache import (
    SHAPES,
    UNITS,
    CopyConfiguration,
    build,
    num_units,
)
from ejk.testing.memory import memory_checked

TRITON = Entry("", ejk.TritonCopyKVCache(interpret=True), examples=0)
WAYS = ("comparisons", "a table")
__all__ = ["little_memory", "on_numpy"]  # fixtures


@dataclasses.dataclass(frozen=True)
class Mutant(ejk.TritonCopyKVCache):
    """A backend of its own to JAX: no program of other sizes, or of a sound kernel, is reused."""

    bug: str = ""


def by_a_table(monkeypatch, bug="", block=4):
    """Return a backend that goes by a table: of few programs, a few ids at a time."""
    for name, size in {"MAX_COMPARED": 0, "MARKING_PROGRAMS": 4, "MAX_BLOCK_IDS": block}.items():
        monkeypatch.setattr(sizes, name, size)
    return Entry("", Mutant(interpret=True, bug=f"{bug}, {block}"), examples=0)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("unit", UNITS)
def test_hostile_ids_race_with_nobody(unit, way, monkeypatch):
    """No access outside, none to what another program writes."""
    entry = by_a_table(monkeypatch) if way == "a table" else TRITON
    config = CopyConfiguration(SHAPES[1], unit, F32, "HND")
    ids = st.integers(0, 5) | st.integers(0, num_units(config) - 1) | ANY_INT32

    @hypothesis.seed(0)
    @hypothesis.settings(max_examples=300 if THOROUGH else 12)
    @hypothesis.given(*(arrays(np.int32, 9, elements=ids, fill=st.nothing()) for _ in range(2)))
    def holds(sources, targets):
        case = build(config, sources, targets)
        with memory_checked():
            case.check(entry(case))

    holds()


@pytest.mark.parametrize("way", WAYS)
def test_what_is_not_in_conflict_moves_once(way, monkeypatch):
    """Of four copies one is overwritten, one conflicts, and one does nothing."""
    entry = by_a_table(monkeypatch) if way == "a table" else TRITON
    config = CopyConfiguration(SHAPES[1], "page", INT8, "KV_HEADS_FIRST", "token")
    case = build(config, np.array([0, 1, 2, 3, 5]), np.array([1, 4, 6, 6, -1]))
    with memory_checked() as checker:
        case.check(entry(case))
    page = case.key_cache.size // config.shape.num_pages
    moved = {name: checker.lanes[name] // page for name in checker.lanes}
    assert moved["store", "key_cache_ptr"] == 3 and moved["load", "key_cache_ptr"] == 3
    assert moved["store", "key_stage_ptr"] == moved["load", "key_stage_ptr"] == 1
    scales = case.scales[0].size // config.shape.num_pages
    assert checker.lanes["store", "key_scale_ptr"] == 3 * scales


@pytest.mark.parametrize("has_table", [True, False])
def test_many_copies_go_by_a_table_or_are_told_by_xla(has_table, monkeypatch):
    monkeypatch.setattr(sizes, "MAX_COMPARED", 100)
    monkeypatch.setattr(sizes, "ENOUGH_PROGRAMS", 40)
    config = CopyConfiguration(SHAPES[5], "slot", F16, "NHD")
    monkeypatch.setattr(sizes, "MAX_TABLE", num_units(config) - (not has_table))
    ends = np.random.default_rng(0).integers(-3, num_units(config) + 3, (2, 150)).astype(np.int32)
    case = build(config, *ends)
    entry = Entry("", Mutant(interpret=True, bug=f"none, {has_table}"), examples=0)
    with memory_checked() as checker:
        case.check(entry(case))
    assert checker.lanes["load", "given_route_ptr"] == (0 if has_table else 150)


# The pools have 2**32 elements.
LARGE = {
    "HND": ((2**21 + 8, 2, 16, 64), "HND", "slot"),
    "NHD": ((2**21 + 8, 16, 2, 64), "NHD", "page"),
    "KV_HEADS_FIRST": ((4, 2**20 + 8, 16, 64), "KV_HEADS_FIRST", "page"),
    "fused": ((2**20 + 8, 2, 2, 16, 64), "HND", "slot"),
    "one page": ((1, 2**21, 32, 64), "NHD", "slot"),
}


def copy_large(name):
    """The last unit and a middle one change places: one is staged, and both are far out."""
    shape, layout, unit = LARGE[name]
    pool = sparse(shape)
    assert pool.size > 2**31
    problem = CopyKVCacheProblem(shape, None, F16, layout, 3, unit)
    view, units = problem.view(shape), problem.num_units
    ends = np.array([[units - 1, units // 2 + 1, 0], [units // 2 + 1, units - 1, -1]], np.int32)
    seen = pool.reshape(view.outer, -1, view.inner, view.slots, view.width)

    def unit_at(i):
        return seen[:, i // view.slots, :, i % view.slots]

    rng, expected = np.random.default_rng(0), []
    for i in ends[0, :2]:
        unit_at(i)[...] = rng.standard_normal(unit_at(i).shape).astype(F16)
        expected.append(unit_at(i).copy())
    backend = ejk.TritonCopyKVCache(interpret=True)
    assert not backend.refusals(problem, "cpu")
    [copied] = backend.run(problem, CopyKVCacheOperands(pool, None, *ends), "cpu")
    seen = copied.reshape(seen.shape)
    for i, of in zip(ends[1, :2], expected):
        np.testing.assert_array_equal(unit_at(i), of)


@pytest.mark.parametrize("name", LARGE)
def test_pools_above_2_31_elements(on_numpy, name):
    copy_large(name)


@pytest.mark.fault("copy_kv_cache", "triton")
@pytest.mark.parametrize(
    ("name", "bug"),
    [
        ("HND", "(ids // SLOTS).to(tl.int64)"),
        ("one page", "(ids % SLOTS).to(tl.int64)"),
        ("KV_HEADS_FIRST", "(row // INNER).to(tl.int64)"),
    ],
)
def test_offsets_of_32_bits_are_caught(on_numpy, monkeypatch, tmp_path, name, bug):
    narrow = mutants.load(units_of_pools, bug, bug.removesuffix(".to(tl.int64)"), tmp_path)
    for module in (kernel, staging):
        monkeypatch.setattr(module, "in_pool", narrow.in_pool)
    with pytest.raises((MemoryAccessError, AssertionError)):
        copy_large(name)


def test_pages_and_grids_of_more_than_32_bits_are_refused():
    backend = ejk.TritonCopyKVCache(interpret=True)
    problem = CopyKVCacheProblem((8, 2**14, 16, 2**13), None, F16, "HND", 1, "page")
    assert backend.refusals(problem, "cpu") == (
        "a page of 2147483648 elements has more than 2146435072",
    )
    problem = CopyKVCacheProblem((8, 2**10, 16, 128), None, F16, "HND", 2**30, "page")
    [reason] = backend.refusals(problem, "cpu")
    assert re.fullmatch(r"its grid of \d+ programs exceeds 2147483647", reason)


HND, NHD, FIRST = (16384, 8, 16, 128), (16384, 16, 8, 128), (8, 16384, 16, 128)
VARIANTS = {
    "HND": (HND, "HND", "bfloat16", "none"),
    "NHD": (NHD, "NHD", "bfloat16", "none"),
    "KV_HEADS_FIRST": (FIRST, "KV_HEADS_FIRST", "bfloat16", "none"),
    "fused": ((16384, 2, *HND[1:]), "HND", "bfloat16", "none"),
    "float32": (HND, "HND", "float32", "none"),
    "int8": (HND, "HND", "int8", "token"),
    "e4m3, NHD": (NHD, "NHD", "float8_e4m3fn", "token"),
    "latent": ((16384, 1, 64, 576), "HND", "bfloat16", "none"),
}


def compile_for(target, variant, unit, num_copies):
    """Compile the copies, and what tells them by comparisons and by a table, for `target`."""
    shape, layout, dtype, scales = VARIANTS[variant]
    value = None if variant in ("fused", "latent") else shape
    problem = CopyKVCacheProblem(
        shape, value, jnp.dtype(dtype), layout, num_copies, unit, scales=scales
    )
    is_cuda = target.startswith("sm_")
    gpu = Target(90, 132, 0) if is_cuda else Target(None, 304, 0, is_amd=True)
    cut = sizes.CopySizes.of(problem, gpu)
    ids = {"source_ptr": "int32", "target_ptr": "int32"}
    pools = {"value_scale_ptr": "float32", "key_scale_ptr": "float32"}
    pools |= {"key_cache_ptr": dtype, "value_cache_ptr": dtype}
    stages = {"key_stage_ptr": dtype, "value_stage_ptr": dtype}
    stages |= {"key_scale_stage_ptr": "float32", "value_scale_stage_ptr": "float32"}
    compile_kernel = offline.compile_cuda if is_cuda else offline.compile_amd
    options = {"num_warps": cut.num_warps, "num_stages": 1}
    told = {"wins_ptr": "int32", "staged_ptr": "int32", **stages}
    copies = compile_kernel(
        kernel.copy_kv_cache_kernel, {**ids, **told, **pools}, cut.copying(problem), target,
        **options,
    )  # fmt: skip
    compared = compile_kernel(
        stage_kernel.stage_kernel, {**ids, "given_route_ptr": "int32", **pools, **told},
        cut.staging(problem), target, **options,
    )  # fmt: skip
    marked = compile_kernel(
        mark_kernel.mark_kernel,
        {**ids, **pools, **told, "table_ptr": "int32", "list_ptr": "int32"},
        cut.marking(problem), target, num_warps=cut.marking_warps, num_stages=1,
    )  # fmt: skip
    return problem, cut, copies, compared, marked


@pytest.mark.one_in(6)
@pytest.mark.parametrize(("unit", "num_copies"), [("slot", 64), ("slot", 4096), ("page", 1024)])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_units_are_copied_16_bytes_at_a_time(target, variant, unit, num_copies):
    problem, cut, copies, *telling = compile_for(target, variant, unit, num_copies)
    for program in (copies, *telling):
        assert program.spill_store_bytes == program.spill_load_bytes == 0
    threads = 32 * cut.num_warps
    block_bytes = cut.copies * cut.block * problem.cache_dtype.itemsize
    pools = 1 if problem.value_shape is None else 2
    stored = {width: n for (kind, width), n in accesses(copies.ptx).items() if kind == "st"}
    wide = pools * block_bytes // (16 * threads)
    assert stored.get(16, 0) >= wide > 0
    if problem.scales == "none":
        assert stored == {16: wide}


@pytest.mark.one_in(6)
@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_amd_variants_do_not_spill(variant, unit):
    _, _, copies, *telling = compile_for("gfx942", variant, unit, 1024)
    for program in (copies, *telling):
        assert program.vgpr_spills == program.sgpr_spills == 0
    assert "global_store_dwordx4" in copies.assembly


@pytest.mark.parametrize("target", offline.CUDA_TARGETS)
def test_marks_are_seen_by_the_program_that_made_them(target):
    """They change the second-level cache: so do zeros come there, and so are they read."""
    *_, marked = compile_for(target, "HND", "slot", 8192)
    assert re.search(r"red\.global\.gpu\.relaxed\.max\.s32", marked.ptx)
    assert re.search(r"ld\.global\.cg\.b32", marked.ptx)
    assert marked.ptx.count("bar.sync") >= 4


@pytest.mark.parametrize("fused", [False, True])
def test_for_cuda_they_are_two_kernels_in_place(fused, restored_registry, jax_triton):
    ejk.register_backend(ejk.TritonCopyKVCache(compute_capability=90))
    pool = struct(1009, *[2] * fused, 8, 16, 128)
    other = None if fused else pool
    for operation, count in itertools.product((ejk.copy_kv_slots, ejk.copy_kv_pages), (64, 4096)):
        arguments = (pool, other, *[struct(count, dtype=jnp.int32)] * 2)
        traced = jax.jit(operation, donate_argnums=(0, 1)).trace(*arguments)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
        assert kernels(text) == {"cuda"} and text.count("stablehlo.custom_call") >= 2
        assert set(pool_results(text)) == {"custom_call", "optimization_barrier"}
        assert len(aliases(text)) == (1 if fused else 2)
        assert len(re.findall(r"tf\.aliasing_output", text)) == (1 if fused else 2)
        assert "sort" not in text
    ids = struct(64, dtype=jnp.int32)
    report = ejk.backend_report(pool, other, ids, ids, operation=ejk.copy_kv_pages, platform="cuda")
    assert report.chosen == "triton"
