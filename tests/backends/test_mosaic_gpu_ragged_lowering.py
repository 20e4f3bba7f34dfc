"""The prefill kernel lowered for an H100 that is not here: when it is chosen, what is refused."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from edges import LENS, config
from entries import BF16
from test_write_programs import struct

import ejk
from ejk import _dispatch, _jax
from ejk.backends import mosaic_gpu
from ejk.backends.mosaic_gpu.ragged_page_attention.backend import FEW_ROWS
from ejk.backends.triton._launch import CUSTOM_CALL_TARGET
from ejk.testing.bounds import assert_close
from ejk.testing.ragged_page_attention import build_ragged

pytestmark = pytest.mark.usefixtures("jax_triton")

H100 = {"compute_capability": 90, "num_sms": 132}
MOSAIC, TRITON = mosaic_gpu.CUSTOM_CALL_TARGET, CUSTOM_CALL_TARGET
BACKEND = ejk.MosaicGpuRaggedPageAttention(**H100)


@pytest.fixture(autouse=True)
def _for_an_h100(restored_registry):
    ejk.register_backend(ejk.TritonRaggedPageAttention(**H100))
    ejk.register_backend(BACKEND)  # the later one is asked first


def arguments(
    total_tokens=512, heads=32, kv_heads=8, head_dim=128, page_size=16, dtype=jnp.bfloat16,
    cache=None, max_blocks=256, num_seqs=4,
):  # fmt: skip
    """Return the arguments of a call."""
    pool = struct(1024, kv_heads, page_size, head_dim, dtype=cache or dtype)
    return (
        struct(total_tokens, heads, head_dim, dtype=dtype),
        pool,
        pool,
        struct(num_seqs, dtype=jnp.int32),
        struct(num_seqs, max_blocks, dtype=jnp.int32),
        struct(num_seqs + 1, dtype=jnp.int32),
    )


def report(*args, **options):
    return ejk.backend_report(
        *args, operation=ejk.ragged_page_attention, platform="cuda", **options
    )


def lower(args, platform="cuda", **options):
    call = jax.jit(functools.partial(ejk.ragged_page_attention, **options))
    return call.trace(*args).lower(lowering_platforms=(platform,)).as_text()


def targets(text):
    """Return the custom calls of a module, in their order."""
    return re.findall(rf"@({MOSAIC}|{TRITON})\b", text)


@pytest.mark.fast
def test_one_launch_between_the_plan_and_the_combinations():
    assert targets(lower(arguments())) == [TRITON, MOSAIC, TRITON, TRITON]
    few = lower(arguments(), max_q_len=8)
    assert targets(few) == [TRITON, MOSAIC, TRITON], "no sequence fills a block of many rows"
    short = lower(arguments(), max_context_len=64)
    assert targets(short) == [TRITON, MOSAIC], "nothing is cut"


def test_pages_of_a_quantised_cache_are_copied_first():
    scales = {"key_scale": 0.1, "value_scale": 0.2, "backend": BACKEND}
    attention = [TRITON, MOSAIC, TRITON, TRITON]
    assert targets(lower(arguments(cache=jnp.int8), **scales)) == [TRITON, TRITON, *attention]
    assert targets(lower(arguments(), **scales)) == attention, "floats are read as they are"


@pytest.mark.parametrize("total_tokens, is_left", [(512, True), (513, False)])
def test_few_rows_do_not_pay_for_copies(total_tokens, is_left):
    args = arguments(total_tokens=total_tokens, cache=jnp.float8_e4m3fn)
    ((problem, _),) = _dispatch.calls(jax.make_jaxpr(ejk.ragged_page_attention)(*args).jaxpr)
    found = BACKEND.passed_over(problem, "cuda")
    assert (found is not None and found[0] == "triton" and "do not pay" in found[1]) == is_left


COPIES = {
    "float16 and scales per token": (
        arguments(dtype=jnp.float16, cache=jnp.int8), (struct(1024, 8, 16),) * 2,
        "query.dtype=float16 has no room",
    ),
    "wide tables": (
        arguments(cache=jnp.float8_e5m2, max_blocks=2**13), (),
        "4 x 8192 pages in bfloat16 take 2147483648 bytes, and may take 1073741824",
    ),
}  # fmt: skip


@pytest.mark.parametrize("args, scales, reason", COPIES.values(), ids=COPIES)
def test_copies_that_are_refused(args, scales, reason):
    scales = dict(zip(("key_scale", "value_scale"), scales))
    call = functools.partial(ejk.ragged_page_attention, backend=BACKEND)
    with pytest.raises(ejk.UnsupportedError, match=rf"\n  mosaic_gpu: .*{reason}"):
        jax.jit(call).trace(*args, **scales).lower(lowering_platforms=("cuda",))


@pytest.mark.parametrize(
    "max_q_len, max_blocks, head_dim, is_left",
    [(16, 65, 64, True), (17, 65, 64, False), (16, 64, 64, False), (16, 65, 128, False)],
)
def test_more_rows_of_narrow_heads_are(max_q_len, max_blocks, head_dim, is_left):
    """64 rows, of contexts of more than 1,024 tokens."""
    call = functools.partial(ejk.ragged_page_attention, max_q_len=max_q_len)
    args = arguments(max_blocks=max_blocks, head_dim=head_dim)
    ((problem, _),) = _dispatch.calls(jax.make_jaxpr(call)(*args).jaxpr)
    found = BACKEND.passed_over(problem, "cuda")
    assert (found is not None and "up to 64 rows" in found[1]) == is_left


@pytest.mark.parametrize("group, kv_heads", [(1, 8), (4, 8), (8, 1)])
def test_few_rows_are_left_to_triton(group, kv_heads):
    args = arguments(heads=group * kv_heads, kv_heads=kv_heads)
    few, more = FEW_ROWS // group, FEW_ROWS // group + 1
    assert report(*args, max_q_len=more).chosen == "mosaic_gpu"
    found = report(*args, max_q_len=few)
    assert found.chosen == "triton"
    assert "triton is as fast" in found.refusals["mosaic_gpu"][0]
    assert report(*args, max_q_len=few, backend="mosaic_gpu").chosen == "mosaic_gpu"
    assert MOSAIC in targets(lower(args, max_q_len=few, backend="mosaic_gpu"))


def test_few_rows_are_not_left_to_xla():
    """A Triton object without a GPU to compile for is not preferred: it cannot run the call."""
    ejk.unregister_backend(ejk.TritonRaggedPageAttention())
    if jax.default_backend() == "gpu":
        ejk.register_backend(ejk.TritonRaggedPageAttention(interpret=True))
    found = report(*arguments(), max_q_len=1)
    assert found.chosen == "mosaic_gpu" and not found.refusals["mosaic_gpu"]
    assert MOSAIC in targets(lower(arguments(), max_q_len=1))


REFUSALS = {
    "width": (arguments(head_dim=96), {}, "head_dim=96 must be 64, 128 or 256"),
    "float32": (arguments(dtype=jnp.float32), {}, "dtype=float32: it takes bfloat16 and float16"),
    "group": (arguments(heads=130, kv_heads=2), {}, "num_heads // num_kv_heads=65 must be at most"),
    "pages of 12": (arguments(page_size=12), {}, "page_size=12 must be 8, 16, 32, 64 or a mult"),
    "pages of 64 and a half": (arguments(page_size=96), {}, "or a multiple of 128"),
    "wide pages": (arguments(head_dim=256, page_size=160), {}, "8, 16, 32 or a multiple of 64"),
    "tree": (arguments(), {"tree_mask": jnp.ones((512, 4), bool)}, "does not support tree_mask"),
    "positions": (
        arguments(), {"positions": jnp.zeros(512, jnp.int32), "sliding_window": 5},
        "does not support positions",
    ),
}  # fmt: skip


@pytest.mark.parametrize("args, options, reason", REFUSALS.values(), ids=REFUSALS)
def test_what_is_refused_is_refused_by_name(args, options, reason):
    with pytest.raises(ejk.UnsupportedError, match=rf"\n  mosaic_gpu: .*{reason}"):
        lower(args, backend=BACKEND, **options)
    assert report(*args, **options).chosen == "triton"


def test_values_of_another_width_are_refused():
    query, keys, _, *integers = arguments()
    values = struct(1024, 8, 16, 64, dtype=jnp.bfloat16)
    reason = "value_head_dim=64 must be head_dim=128"
    assert report(query, keys, values, *integers).refusals["mosaic_gpu"] == (reason,)


def latent(heads=64, total_tokens=512, **options):
    """Return the arguments of a call on a latent cache."""
    query, keys, _, *integers = arguments(total_tokens, heads, 1, 576, 64, **options)
    return query, keys, None, *integers


@pytest.mark.parametrize("heads", [33, 64, 128])
def test_latent_attention_is_the_decode_kernels(heads):
    """Without a plan of ragged items: a plan of tokens, the kernel, the combination."""
    assert report(*latent(heads), value_head_dim=512).chosen == "mosaic_gpu"
    assert targets(lower(latent(heads), value_head_dim=512)) == [TRITON, MOSAIC, TRITON]
    assert report(*latent(heads, 1), value_head_dim=512).chosen == "mosaic_gpu"


@pytest.mark.one_in(2)
@pytest.mark.parametrize(
    ("heads", "tokens", "max_q_len", "max_context_len", "chosen"),
    [
        (16, 512, 1, None, "mosaic_gpu"),
        (16, 512, 1, 1024, "triton"),
        (16, 512, 4, 1024, "triton"),
        (16, 512, 5, 1024, "mosaic_gpu"),
        (16, 512, 4, 1025, "mosaic_gpu"),
        (16, 128, None, 1024, "triton"),  # of 32 sequences: 64 rows each
        (16, 129, None, 1024, "mosaic_gpu"),
        (8, 300, None, None, "mosaic_gpu"),
    ],
)
def test_tokens_of_few_heads_share_programs_where_that_is_faster(
    heads, tokens, max_q_len, max_context_len, chosen
):
    args = latent(heads, tokens, num_seqs=32)
    options = {"max_q_len": max_q_len, "max_context_len": max_context_len, "value_head_dim": 512}
    assert report(*args, **options).chosen == chosen
    assert (MOSAIC in targets(lower(args, **options))) == (chosen == "mosaic_gpu")


@pytest.mark.parametrize("tokens, chosen", [(1024, "triton"), (4096, "mosaic_gpu")])
def test_short_prompts_are_left_to_triton(tokens, chosen):
    """Of 256 and of 1,024 tokens each, as far as tables of one page let them see."""
    args = latent(16, tokens, max_blocks=1)
    found = report(*args, value_head_dim=512)
    assert found.chosen == chosen
    assert ("up to 1048576 logits" in str(found.refusals["mosaic_gpu"])) == (chosen == "triton")


LATENT_REFUSALS = {
    "few heads and a window": (
        latent(32), {"sliding_window": 70},
        "num_heads=32 must be at least 33, or one of (8, 16, 32) without a sliding_window",
    ),
    "few heads that do not divide": (
        latent(24), {},
        "num_heads=24 must be at least 33, or one of (8, 16, 32) without a sliding_window",
    ),
    "cap": (
        latent(), {"attn_logits_soft_cap": 30.0},
        "does not support attn_logits_soft_cap with value_head_dim",
    ),
    "later tokens": (
        latent(), {"causal": False}, "does not support causal=False with value_head_dim",
    ),
    "e4m3": (
        latent(cache=jnp.float8_e4m3fn), {},
        "does not support key_cache.dtype=float8_e4m3fn with value_head_dim",
    ),
    "tree": (latent(), {"tree_mask": jnp.ones((512, 4), bool)}, "does not support tree_mask"),
}  # fmt: skip


@pytest.mark.parametrize("args, options, reason", LATENT_REFUSALS.values(), ids=LATENT_REFUSALS)
def test_what_is_refused_of_latent_attention_is_refused_by_name(args, options, reason):
    found = report(*args, value_head_dim=512, **options)
    assert (found.chosen, found.refusals["mosaic_gpu"]) == ("triton", (reason,))


@pytest.mark.one_in(2)
@pytest.mark.parametrize("heads, tokens", [(64, 8192), (128, 4096), (512, 1024), (16, 40_000)])
def test_contexts_of_very_many_blocks_are_not_cut(heads, tokens):
    """Neither planned: memory for parts would exceed 1 GiB, or blocks are more than 8,192."""
    lowered = {n: lower(latent(heads, n), value_head_dim=512) for n in (tokens, tokens // 16)}
    assert [targets(text) for text in lowered.values()] == [[MOSAIC], [TRITON, MOSAIC, TRITON]]


def test_another_generation_is_refused():
    other = ejk.MosaicGpuRaggedPageAttention(compute_capability=100, num_sms=148)
    found = report(*arguments(), backend=other)
    assert found.refusals["mosaic_gpu"] == ("compute_capability=100 must be 90, Hopper's",)


@pytest.mark.parametrize("version, is_wrong", [(12080, True), (12090, True), (12091, False)])
def test_versions_of_cuda_that_compile_masks_wrongly(version, is_wrong, monkeypatch):
    monkeypatch.setattr(_jax, "cuda_version", lambda: version)
    found = report(*arguments())
    assert found.chosen == ("triton" if is_wrong else "mosaic_gpu")
    assert is_wrong == any("compiles masks wrongly" in x for x in found.refusals["mosaic_gpu"])


@pytest.mark.one_in(2)
@pytest.mark.parametrize(
    "head_dim, layout, fused", [(64, "HND", True), (128, "NHD", False), (256, "NHD", True)]
)
def test_every_option_lowers(head_dim, layout, fused):
    heads = jnp.zeros(32, jnp.float32)
    query, _, _, *integers = arguments(head_dim=head_dim)
    slots = (8, 16) if layout == "HND" else (16, 8)
    pool = struct(1024, *((2,) if fused else ()), *slots, head_dim, dtype=jnp.bfloat16)
    text = lower(
        (query, pool, None if fused else pool, *integers), backend=BACKEND, cache_layout=layout,
        sliding_window=100, attn_logits_soft_cap=30.0, sinks=heads, alibi_slopes=heads,
        return_lse=True,
    )  # fmt: skip
    assert MOSAIC in targets(text)


def test_in_64_bits():
    with jax.enable_x64(True):
        assert MOSAIC in targets(lower(arguments(), backend=BACKEND))
        for heads in (16, 64):
            assert MOSAIC in targets(lower(latent(heads), value_head_dim=512, backend=BACKEND))


def test_layers_share_what_they_have_in_common():
    """Each has its own launch; of the plan and of what the kernel asks of tables XLA makes one."""
    query, pool, _, *integers = arguments()

    def step(query, pool, lens, tables, bounds):
        for _ in range(2):
            query = ejk.ragged_page_attention(query, pool, pool, lens, tables, bounds)
        return query

    text = jax.jit(step).trace(query, pool, *integers).lower(lowering_platforms=("cuda",)).as_text()
    assert targets(text).count(MOSAIC) == 2


def test_one_export_holds_the_kernel_and_the_cpu_program():
    bounds = np.array([0, 40, 40, 44, 45, 46, 47, 48, 48, 48])
    case = build_ragged(config(dtype=BF16), LENS, bounds, total=48)
    exported = jax.export.export(
        jax.jit(functools.partial(ejk.ragged_page_attention, return_lse=True)),
        platforms=("cpu", "cuda"),
        disabled_checks=ejk.export_disabled_checks(),
    )(*case.operands())
    assert MOSAIC in targets(exported.mlir_module())
    again = jax.export.deserialize(exported.serialize())
    if jax.default_backend() == "cpu":
        assert_close(case, *map(np.asarray, again.call(*case.operands())))
